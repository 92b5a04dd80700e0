"""No credential in what is stored, logged or said: it is refused where it comes in, and hidden."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from retinaray.cli import configure_logging
from retinaray.demo.embedded_s3 import EmbeddedS3
from retinaray.errors import ConfigError, DatasetError, StorageError
from retinaray.inference.manifest import list_sources
from retinaray.storage import Storage, find_secret, hide_secret, join_uri

SECRET = "wJalr/XUtn+FEMI"
SIGNED = f"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature={SECRET}"
LOUD = ("boto3", "botocore", "urllib3", "s3transfer", "retinaray")

SECRETS = [
    (f"s3://AKIA:{SECRET}@b/k.jpg", "s3://(hidden)@b/k.jpg", "a key or password"),
    (f"s3://{SECRET.replace('/', '')}@b/k.jpg", "s3://(hidden)@b/k.jpg", "a key or password"),
    # A secret that holds @ too, and one whose URI was cut off.
    (f"s3://AKIA:{SECRET}@x@b/k.jpg", "s3://(hidden)@b/k.jpg", "a key or password"),
    (f"s3://AKIA:{SECRET}", "s3://(hidden)", "a key or password"),
    (f"s3://b/k.jpg?{SIGNED}", "s3://b/k.jpg?(hidden)", "presign"),
    (f"s3://b/k.jpg?AWSAccessKeyId={SECRET}", "s3://b/k.jpg?(hidden)", "presigned URL"),
    (f"https://b.s3.amazonaws.com/k.jpg?{SIGNED}", "https://b.s3.amazonaws.com/k.jpg?(hidden)", ""),
    (f"https://h/k.jpg?sig={SECRET}", "https://h/k.jpg?(hidden)", "presigned URL"),
    (f"https://u:{SECRET}@h:9000/k.jpg", "https://(hidden)@h:9000/k.jpg", "a key or password"),
    (f"https://u:{SECRET}@h/k.jpg?{SIGNED}", "https://(hidden)@h/k.jpg?(hidden)", "a key or"),
]
HARMLESS = [
    "s3://b/at@b:1/k.jpg",
    "s3://b/k=1?x=y&z#.jpg",
    "file:///a@b/k.jpg",
    "/data/a@b:c?Signature=1.jpg",
    "http://127.0.0.1:9000",
    "http://[::1]:9000",
    "https://s3.example.org/base",
    "",
]


@pytest.fixture
def verbose_log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What `--verbose` writes to stderr; the levels are as before afterwards."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    ours, root = logging.getLogger("retinaray"), logging.getLogger()
    monkeypatch.setattr(ours, "level", ours.level)
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    configure_logging("verbose")
    return stream


@pytest.mark.parametrize(("uri", "shown", "what"), SECRETS)
def test_hide_secret_leaves_out_what_find_secret_finds(uri: str, shown: str, what: str) -> None:
    assert what in find_secret(uri)
    assert find_secret(uri)
    assert hide_secret(uri) == shown
    assert SECRET.partition("/")[0] not in shown


@pytest.mark.parametrize("uri", HARMLESS)
def test_find_secret_takes_signs_in_names_for_names(uri: str) -> None:
    assert find_secret(uri) == ""
    assert hide_secret(uri) == uri


@pytest.mark.parametrize(("uri", "shown", "what"), SECRETS)
@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_list_sources_refuses_a_list_with_secrets_and_repeats_none(
    tmp_path: Path, kind: str, uri: str, shown: str, what: str
) -> None:
    content = {"txt": f"a.jpg\n{uri}\n", "csv": f"uri\na.jpg\n{uri}\n"}
    content["jsonl"] = f'{{"uri": "a.jpg"}}\n{{"uri": "{uri}"}}\n'
    (tmp_path / f"all.{kind}").write_text(content[kind], encoding="utf-8")
    line = 3 if kind == "csv" else 2
    with pytest.raises(DatasetError, match=f"line {line}: .*{what}.*credentials in the") as caught:
        list(list_sources(str(tmp_path / f"all.{kind}"), None, Storage()))
    assert SECRET.partition("/")[0] not in str(caught.value)
    assert shown in str(caught.value)


def test_list_sources_refuses_urls_in_a_list_instead_of_looking_for_such_folders(
    tmp_path: Path,
) -> None:
    (tmp_path / "all.txt").write_text("https://h/x.jpg\n", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"line 1: uri 'https://h/x\.jpg' is no path.*copy"):
        list(list_sources(str(tmp_path / "all.txt"), None, Storage()))


@pytest.mark.parametrize(("uri", "shown", "what"), SECRETS)
@pytest.mark.parametrize("action", ["read", "write", "list", "size", "stream"])
def test_storage_refuses_a_location_with_a_secret_and_repeats_none(
    action: str, uri: str, shown: str, what: str
) -> None:
    storage = Storage()
    actions: dict[str, Callable[[], object]] = {
        "read": lambda: storage.read_bytes(uri),
        "write": lambda: storage.write_bytes(uri, b""),
        "list": lambda: list(storage.list_files(uri)),
        "size": lambda: storage.size(uri),
        "stream": lambda: storage.open_writer(uri).__enter__(),
    }
    with pytest.raises(StorageError, match=r"expected .*s3://bucket/key") as caught:
        actions[action]()
    assert SECRET.partition("/")[0] not in str(caught.value)
    assert shown in str(caught.value)


@pytest.mark.parametrize("endpoint", [f"https://u:{SECRET}@h:9000", f"https://h/?token={SECRET}"])
@pytest.mark.parametrize("name", ["endpoint_url", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_storage_refuses_an_endpoint_with_a_secret_and_repeats_none(
    name: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use() -> bytes:
        if name == "endpoint_url":
            return bytes(Storage(endpoint_url=endpoint).max_attempts)
        monkeypatch.setenv(name, endpoint)
        return Storage().read_bytes("s3://b/k")

    with pytest.raises(
        ConfigError, match=rf"{name}=https://.*\(hidden\).* holds .*AWS_SEC"
    ) as caught:
        use()
    assert SECRET.partition("/")[0] not in str(caught.value)


def test_storage_says_nothing_of_a_proxys_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", f"http://user:{SECRET.replace('/', '')}@127.0.0.1:1")
    monkeypatch.setenv("http_proxy", f"http://user:{SECRET.replace('/', '')}@127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    storage = Storage(endpoint_url="http://192.0.2.1:9000", max_attempts=1, connect_timeout_s=1)
    with pytest.raises(StorageError, match="proxy") as caught:
        storage.read_bytes("s3://b/k")
    assert SECRET.replace("/", "") not in str(caught.value)


def test_verbose_logging_shows_no_credential_of_s3_requests(
    s3_server: EmbeddedS3,
    s3_bucket: str,
    verbose_log: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage, uri = Storage(max_attempts=2), join_uri(s3_bucket, "x")
    storage.write_bytes(uri, b"x")
    storage.read_bytes(uri)
    assert not storage.exists(f"{uri}-absent")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with pytest.raises(StorageError, match="wrong secret"):
        storage.read_bytes(uri)
    log = verbose_log.getvalue()
    # The refusal's traceback is there: nothing else would show that the log is read at all.
    assert f"S3 refused to read {uri}" in log
    for secret in (
        s3_server.secret_key,
        s3_server.access_key,
        SECRET,
        "Authorization",
        "Signature=",
    ):
        assert secret not in log
    # What these loggers say at debug level holds the signed headers.
    assert [name for name in LOUD if logging.getLogger(name).isEnabledFor(logging.DEBUG)] == [
        "retinaray"
    ]
