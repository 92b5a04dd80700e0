"""Which trackers a job asks for, and that they hear no secret."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from retinaray.assembly.tracking import check_tracking, make_experiment_run, make_loggers
from retinaray.config.training_schema import TrackingConfig
from retinaray.errors import ConfigError
from retinaray.reporting.experiment_loggers import Measurement, Status


class ListeningTracker:
    name = "Tracker"
    params: Mapping[str, object]
    tags: Mapping[str, str]
    end: tuple[Any, ...]

    def begin(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        self.params, self.tags = params, tags

    def write(self, measurements: Sequence[Measurement]) -> None:
        raise AssertionError(measurements)

    def finish(self, status: Status, *, model: Path | None, reports: Sequence[Path]) -> None:
        self.end = (status, model, list(reports))


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with neither mlflow nor wandb."""
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> ModuleType:
        if name.partition(".")[0] in ("mlflow", "wandb"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_make_loggers_gives_none_by_default(tmp_path: Path) -> None:
    assert make_loggers(TrackingConfig(), folder=tmp_path, run_id="r") == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"mlflow": True},
            r"--mlflow\) needs .*No module .*mlflow.*pip install 'retinaray\[mlflow\]",
        ),
        ({"wandb": True}, r"--wandb\) needs .*No module .*wandb.*pip install 'retinaray\[wandb\]"),
    ],
)
def test_begin_says_what_to_install_when_a_package_is_absent(
    without_packages: None, tmp_path: Path, setting: dict[str, bool], message: str
) -> None:
    (logger,) = make_loggers(TrackingConfig(**setting), folder=tmp_path, run_id="r")
    with pytest.raises(ConfigError, match=message):
        logger.begin({}, {})


def test_check_tracking_refuses_a_password_without_repeating_it() -> None:
    tracking = TrackingConfig(mlflow=True, mlflow_uri="http://user:hunter2@host:5000")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        check_tracking(tracking)
    assert "hunter2" not in str(caught.value)
    check_tracking(TrackingConfig(mlflow=True, mlflow_uri="http://host:5000"))


@pytest.mark.parametrize(("is_wanted", "has_model"), [(True, True), (False, False)])
def test_make_experiment_run_tells_settings_versions_and_files(
    tmp_path: Path, is_wanted: bool, has_model: bool
) -> None:
    tracker = ListeningTracker()
    model, report = tmp_path / "m.pth", tmp_path / "loss.png"
    model.touch()
    report.touch()
    record = {
        "job": {
            "output": str(model),
            "tracking": {"mlflow": True},
            "data": {"images": "s3://KEY:hunter2@bucket/x", "size": [64, 96]},
        },
        "versions": {"torch": "2.14.1", "commit": "abc"},
    }
    run = make_experiment_run(
        [tracker],
        record,
        verb="train",
        folder=tmp_path,
        model=model,
        reports=[report],
        is_model_wanted=is_wanted,
    )
    with run:
        assert tracker.params == {
            "output": str(model),
            "data.images": "s3://(hidden)@bucket/x",
            "data.size": [64, 96],
        }
    assert tracker.tags == {
        "version.torch": "2.14.1",
        "version.commit": "abc",
        "run_folder": str(tmp_path),
        "model": str(model),
        "mlflow.source.name": "retinaray train",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": "abc",
    }
    assert tracker.end == ("FINISHED", model if has_model else None, [report])
