"""What may change when a run is resumed: nothing that its result depends on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retinaray.config.loading import to_dict
from retinaray.config.schema import InferJob
from retinaray.distributed.run_opening import settle_backend
from retinaray.errors import ConfigError
from retinaray.inference.run_files import RunFiles
from retinaray.storage import Storage

MakeJob = Callable[..., InferJob]


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(str(tmp_path / "run"), Storage())


def _begin(files: RunFiles, job: InferJob, backend: str) -> dict[str, Any]:
    record = settle_backend(files, {"run_id": "r", "job": to_dict(job)}, backend, job)
    assert files.read_record() == record
    return record


def test_settle_backend_keeps_the_first_runtime(files: RunFiles, make_infer_job: MakeJob) -> None:
    job = make_infer_job(files.root)
    record = _begin(files, job, "openvino")
    assert settle_backend(files, record, "openvino", job) == record
    with pytest.raises(ConfigError, match="openvino -> tensorrt; give --backend openvino"):
        settle_backend(files, record, "tensorrt", job)


@pytest.mark.parametrize(("backend", "is_refused"), [("openvino", False), ("tensorrt", True)])
def test_settle_backend_keeps_the_batch_when_kernels_depend_on_it(
    files: RunFiles, make_infer_job: MakeJob, backend: str, is_refused: bool
) -> None:
    record = _begin(files, make_infer_job(files.root, batch=2), backend)
    job = make_infer_job(files.root, batch=5)
    if is_refused:
        with pytest.raises(ConfigError, match="batch: 2 -> 5; give --batch 2 to go on"):
            settle_backend(files, record, backend, job)
    else:
        assert settle_backend(files, record, backend, job) == record


def test_settle_backend_refuses_to_decode_on_a_gpu_that_is_not_there(
    files: RunFiles, make_infer_job: MakeJob
) -> None:
    job = make_infer_job(files.root, decoding__device="gpu")
    with pytest.raises(ConfigError, match="backend 'openvino' has none"):
        settle_backend(files, {"job": to_dict(job)}, "openvino", job)
    assert files.read_record() is None
