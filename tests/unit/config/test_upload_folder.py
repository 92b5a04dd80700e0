"""A job's output may not lie where Ray removes it."""

from pathlib import Path

import pytest

from retinaray.config.inference_schema import EvaluateJob
from retinaray.config.loading import load_from_dict
from retinaray.config.nodes import Job
from retinaray.config.schema import TrainJob
from retinaray.config.upload_folder import check_output_stays
from retinaray.errors import ConfigError

COPY = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0123456789abcdef")


def _train(output: str) -> Job:
    return load_from_dict(TrainJob, {"output": output, "data": {"annotations": "a.json"}})


@pytest.mark.parametrize("output", ["model.pth", "sub/../model.pth", f"{COPY}/model.pth"])
def test_check_output_stays_refuses_when_the_copy_holds_it(output: str) -> None:
    with pytest.raises(ConfigError, match="removes after it; give an absolute path"):
        check_output_stays(_train(output), COPY)


@pytest.mark.parametrize("output", ["/mnt/shared/model.pth", "s3://bucket/model.pth"])
def test_check_output_stays_passes_when_it_lies_elsewhere(output: str) -> None:
    check_output_stays(_train(output), COPY)


def test_check_output_stays_passes_when_this_is_no_submitted_job(tmp_path: Path) -> None:
    check_output_stays(_train("model.pth"), tmp_path)


def test_check_output_stays_passes_when_nothing_is_written() -> None:
    job = load_from_dict(EvaluateJob, {"model": "m.pth", "annotations": "a.json"})
    check_output_stays(job, COPY)
