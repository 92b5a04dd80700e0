"""Versions of a cluster and of its driver, without a cluster; `test_submit` has a real one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
from ray._private.utils import check_version_info

from retinaray.distributed import cluster_versions
from retinaray.distributed.cluster_versions import (
    Versions,
    explain_mismatch,
    own_versions,
    read_cluster_versions,
    refuse_other_versions,
)
from retinaray.errors import ClusterError

HERE = Versions("2.60.0", "3.11.7")

Tell = Callable[[bytes | Exception | None], None]


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch) -> Tell:
    """Make the cluster answer with these bytes, or raise."""

    def answer_with(content: bytes | Exception | None) -> None:
        class Client:
            def __init__(self, *, address: str) -> None:
                assert address == "10.0.0.1:6379"

            def internal_kv_get(self, key: bytes, *, namespace: bytes, timeout: float) -> object:
                assert (key, namespace) == (b"CLUSTER_METADATA", b"cluster")
                assert 0 < timeout <= 10
                if isinstance(content, Exception):
                    raise content
                return content

        monkeypatch.setattr("ray._raylet.GcsClient", Client)

    monkeypatch.setattr(cluster_versions, "own_versions", lambda: HERE)
    monkeypatch.delenv("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", raising=False)
    return answer_with


def _metadata(ray: str, python: str) -> bytes:
    return json.dumps({"ray_version": ray, "python_version": python, "os": "linux"}).encode()


def test_own_versions_are_those_of_this_process() -> None:
    import ray

    assert own_versions().ray == ray.__version__
    assert own_versions().python == f"{sys.version_info[0]}.{sys.version_info[1]}." + str(
        sys.version_info[2]
    )


@pytest.mark.parametrize(
    ("ray", "python"), [("2.59.1", "3.11.7"), ("2.60.0", "3.12.7"), ("2.60.0", "3.11.9")]
)
def test_refuse_other_versions_names_both_in_one_line(tell: Tell, ray: str, python: str) -> None:
    tell(_metadata(ray, python))
    with pytest.raises(ClusterError) as caught:
        refuse_other_versions("10.0.0.1:6379")
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert f"10.0.0.1:6379 (RAY_ADDRESS) runs Ray {ray} on Python {python}" in text
    assert "this process Ray 2.60.0 on Python 3.11.7" in text
    assert f"under Python {python} with ray=={ray}" in text


def test_refuse_other_versions_is_as_lenient_as_ray_is_told_to_be(
    tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "minor")
    tell(_metadata("2.60.0", "3.11.9"))
    refuse_other_versions("10.0.0.1:6379")
    tell(_metadata("2.60.0", "3.12.7"))
    with pytest.raises(ClusterError, match=r"Python 3\.12\.7"):
        refuse_other_versions("10.0.0.1:6379")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(None, id="nothing stored"),
        pytest.param(b"{}", id="no versions"),
        pytest.param(b"\xff", id="no text"),
        pytest.param(b"[1]", id="no object"),
        pytest.param(RuntimeError("Failed to connect to GCS"), id="no answer"),
    ],
)
def test_read_cluster_versions_leaves_to_ray_what_it_cannot_read(
    tell: Tell, content: bytes | Exception | None
) -> None:
    tell(content)
    assert read_cluster_versions("10.0.0.1:6379") is None
    refuse_other_versions("10.0.0.1:6379")


def test_explain_mismatch_reads_what_ray_says() -> None:
    with pytest.raises(RuntimeError) as caught:
        check_version_info({"ray_version": "1.0.1", "python_version": "3.9.0"}, "node 10.0.0.2")
    text = explain_mismatch(str(caught.value), "auto")
    assert text is not None
    assert "the cluster at auto (RAY_ADDRESS) runs Ray 1.0.1 on Python 3.9.0" in text
    assert f"this process {own_versions()}" in text
    assert len(text.splitlines()) == 1


def test_explain_mismatch_leaves_other_errors_alone() -> None:
    assert explain_mismatch("Version of the protocol: 3\nRay: no", "auto") is None
