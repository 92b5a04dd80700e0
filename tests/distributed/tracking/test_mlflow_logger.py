"""The MLflow adapter against a real server."""

from __future__ import annotations

import json
import logging
import math
import socket
from pathlib import Path
from typing import Any

import pytest

from retinaray.errors import StorageError
from retinaray.reporting.experiment_loggers import Measurement
from retinaray.reporting.mlflow_logger import MlflowLogger, clean_name

PARAMS: dict[str, object] = {"run.batch": 4, "anchors.scales": [4.0, 5.04], "long": "x" * 7000}
TAGS = {"version.torch": "2.14.1", "mlflow.source.name": "retinaray train"}


def _make(server: Any, folder: Path, experiment: str, **more: Any) -> MlflowLogger:
    return MlflowLogger(
        folder=folder,
        experiment=experiment,
        run_name="20260101T000000Z-abc",
        uri=server.uri,
        **more,
    )


def _measure(name: str, value: float, step: int) -> Measurement:
    return Measurement(name, value, step, 1_700_000_000.0 + step)


def test_mlflow_logger_leaves_settings_metrics_files_and_status(
    mlflow_server: Any, tmp_path: Path, reports: list[Path]
) -> None:
    model = tmp_path / "model.pth"
    model.write_bytes(b"weights")
    logger = _make(mlflow_server, tmp_path, "whole")
    logger.begin({**PARAMS, **{f"p{i}": i for i in range(150)}}, TAGS)
    (running,) = mlflow_server.find_runs("whole")
    assert running["info"]["status"] == "RUNNING"
    # More than one request can take.
    logger.write([_measure("progress/class_loss", 1 / step, step) for step in range(1, 1202)])
    logger.write([_measure("validation/AP/traffic light: näh", 0.25, 7)])
    logger.write([_measure("progress/box_loss", math.nan, 3)])
    logger.finish("FINISHED", model=model, reports=reports)

    (run,) = mlflow_server.find_runs("whole")
    assert run["info"]["status"] == "FINISHED"
    assert run["info"]["run_name"] == "20260101T000000Z-abc"
    assert run["params"]["run.batch"] == "4"
    assert run["params"]["anchors.scales"] == "[4.0, 5.04]"
    assert len(run["params"]["long"]) == 6000
    assert len(run["params"]) == 153
    assert run["tags"]["version.torch"] == "2.14.1"
    assert run["metrics"]["validation/AP/traffic light_ n_h"] == 0.25
    assert math.isnan(float(run["metrics"]["progress/box_loss"]))
    assert run["metrics"]["progress/class_loss"] == pytest.approx(1 / 1201)
    assert mlflow_server.list_files(logger.run_id) == {
        "loss.png": 8,
        "model/model.pth": 7,
        "run.json": 8,
    }


def test_mlflow_logger_goes_on_with_the_run_of_the_folder_when_it_is_resumed(
    mlflow_server: Any, tmp_path: Path
) -> None:
    first = _make(mlflow_server, tmp_path, "resumed")
    first.begin({"run.batch": 4, "run.workers": 1}, TAGS)
    values = [_measure("progress/class_loss", 0.5, step) for step in (1, 2)]
    first.write(values)
    first.finish("FAILED", model=None, reports=[])
    second = _make(mlflow_server, tmp_path, "resumed")
    second.begin({"run.batch": 4, "run.workers": 2, "run.log_every": 1}, TAGS)
    assert second.run_id == first.run_id
    (run,) = mlflow_server.find_runs("resumed")
    assert run["info"]["status"] == "RUNNING"
    # What was sent before comes again after a lost answer; a step after a checkpoint is new.
    second.write([*values, _measure("progress/class_loss", 0.25, 3)])
    second.finish("KILLED", model=None, reports=[])
    (run,) = mlflow_server.find_runs("resumed")
    assert run["info"]["status"] == "KILLED"
    assert run["params"] == {"run.batch": "4", "run.workers": "1", "run.log_every": "1"}
    assert run["tags"]["resumed.run.workers"] == "2"
    history = mlflow_server.history(second.run_id, "progress/class_loss")
    assert history == [(1, 0.5), (2, 0.5), (3, 0.25)]


def test_mlflow_logger_begins_a_new_run_when_the_old_one_was_deleted(
    mlflow_server: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = _make(mlflow_server, tmp_path, "deleted")
    first.begin({}, {})
    mlflow_server.post("runs/delete", run_id=first.run_id)
    second = _make(mlflow_server, tmp_path, "deleted")
    with caplog.at_level(logging.WARNING):
        second.begin({}, {})
    assert second.run_id != first.run_id
    assert f"MLflow run {first.run_id}" in caplog.text
    # And for a server that never had it.
    record = json.loads((tmp_path / "mlflow.json").read_text())
    (tmp_path / "mlflow.json").write_text(json.dumps({**record, "run_id": "0" * 32}))
    third = _make(mlflow_server, tmp_path, "deleted")
    third.begin({}, {})
    assert third.run_id not in (first.run_id, second.run_id, "0" * 32)


def test_mlflow_logger_begins_a_new_run_when_another_experiment_is_asked_for(
    mlflow_server: Any, tmp_path: Path
) -> None:
    first = _make(mlflow_server, tmp_path, "one")
    first.begin({}, {})
    _make(mlflow_server, tmp_path, "other").begin({}, {})
    assert len(mlflow_server.find_runs("one")) == len(mlflow_server.find_runs("other")) == 1


def test_mlflow_logger_names_the_sweep_of_a_trial(mlflow_server: Any, tmp_path: Path) -> None:
    sweep = _make(mlflow_server, tmp_path, "sweep")
    sweep.begin({}, {})
    _make(mlflow_server, tmp_path / "t1", "sweep", parent_id=sweep.run_id).begin({}, {})
    parents = [run["tags"].get("mlflow.parentRunId") for run in mlflow_server.find_runs("sweep")]
    assert set(parents) == {None, sweep.run_id}


def test_mlflow_logger_prints_nothing(
    mlflow_server: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = _make(mlflow_server, tmp_path, "silent")
    logger.begin({}, {})
    logger.finish("FINISHED", model=None, reports=[])
    # The command's result goes there, and nothing else.
    assert capfd.readouterr().out == ""


def test_mlflow_logger_sets_the_status_when_the_files_are_refused(
    mlflow_server: Any, tmp_path: Path
) -> None:
    logger = _make(mlflow_server, tmp_path, "refused")
    logger.begin({}, {})
    with pytest.raises(StorageError, match=r"did not keep the run's files: .*absent\.png"):
        logger.finish("FINISHED", model=None, reports=[tmp_path / "absent.png"])
    (run,) = mlflow_server.find_runs("refused")
    assert run["info"]["status"] == "FINISHED"


def test_mlflow_logger_says_what_to_check_when_nobody_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="needs the package mlflow-skinny, which is not installed")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    logger = MlflowLogger(
        folder=tmp_path,
        experiment="x",
        run_name="x",
        uri=f"http://user:secret@{address}",
        shown_uri=f"http://(hidden)@{address}",
    )
    with pytest.raises(StorageError, match=r"did not open the run: .*--mlflow-uri") as caught:
        logger.begin({}, {})
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "mlflow.json").exists()


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("validation/AP_small", "validation/AP_small"),
        ("AP/traffic light: (näh)", "AP/traffic light_ _n_h_"),
        ("x" * 300, "x" * 250),
    ],
)
def test_clean_name_gives_names_that_mlflow_accepts(name: str, clean: str) -> None:
    assert clean_name(name) == clean
