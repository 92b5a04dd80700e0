"""Certificates are verified unless a bundle is named; a real TLS server with one of its own."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from retinaray.errors import StorageError
from retinaray.storage import Storage

SECRET = "hush/of+this=machine"


class _OneObject(BaseHTTPRequestHandler):
    """Gives five bytes to whoever gets through."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.send_header("ETag", '"x"')
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("needs the program openssl, which is not installed")
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *(program, "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-out", files[0], "-keyout", files[1]),
        ],
        check=True,
        capture_output=True,
    )
    return files


@pytest.fixture
def serve(certificate: tuple[Path, Path]) -> Iterator[Callable[[bool], str]]:
    """Start a server with or without TLS; gives host and port."""
    servers = []

    def start(has_tls: bool) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _OneObject)
        # A client that refuses the certificate is no fault of the server.
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        if has_tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def read(endpoint_url: str) -> bytes:
    return Storage(endpoint_url=endpoint_url, max_attempts=1).read_bytes("s3://b/k")


def test_read_bytes_refuses_a_certificate_of_unknown_origin_in_one_line(
    serve: Callable[[bool], str],
) -> None:
    address = serve(True)
    with pytest.raises(
        StorageError, match=r"self-signed certificate.*set AWS_CA_BUNDLE to"
    ) as caught:
        read(f"https://{address}")
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_read_bytes_accepts_the_certificate_when_a_bundle_names_it_meanwhile(
    serve: Callable[[bool], str],
    certificate: tuple[Path, Path],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoint_url = f"https://{serve(True)}"
    with pytest.raises(StorageError, match="certificate verify failed"):
        read(endpoint_url)
    # The same process, which has made a client for this server already.
    monkeypatch.setenv(name, str(certificate[0]))
    assert read(endpoint_url) == b"hello"
    monkeypatch.delenv(name)
    with pytest.raises(StorageError, match="certificate verify failed"):
        read(endpoint_url)


def test_read_bytes_refuses_a_certificate_of_another_host(
    serve: Callable[[bool], str], certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate[0]))
    monkeypatch.setenv("NO_PROXY", "localhost")
    port = serve(True).rpartition(":")[2]
    with pytest.raises(StorageError, match=r"hostname 'localhost' doesn't match.*AWS_CA_BUNDLE"):
        read(f"https://localhost:{port}")


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "No such file"), (b"no certificate", "(?i)no certificate or crl found")],
    ids=["absent", "no PEM"],
)
def test_read_bytes_says_so_when_the_bundle_is_none(
    serve: Callable[[bool], str],
    tmp_path: Path,
    content: bytes | None,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if content is not None:
        (tmp_path / "bundle.pem").write_bytes(content)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "bundle.pem"))
    with pytest.raises(StorageError, match=f"{text}.*set AWS_CA_BUNDLE"):
        read(f"https://{serve(True)}")


def test_read_bytes_advises_http_when_the_server_speaks_no_tls(
    serve: Callable[[bool], str],
) -> None:
    address = serve(False)
    with pytest.raises(StorageError, match="speaks no TLS, write http://"):
        read(f"https://{address}")
    assert read(f"http://{address}") == b"hello"
