"""The Weights & Biases adapter against the real package, which keeps everything in files."""

from __future__ import annotations

import importlib.util
import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from retinaray.errors import StorageError
from retinaray.reporting.experiment_loggers import Measurement, Status
from retinaray.reporting.wandb_logger import WandbLogger

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None,
    reason="needs the package wandb, which is not installed",
)


@pytest.fixture(autouse=True)
def _stay_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    import wandb

    # It keeps what it has read of the environment.
    wandb.teardown()


def _read_records(folder: Path) -> list[Any]:
    """Records of the transaction log of each run in a folder, in the order of the runs."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    # Its process may still write; now it ends.
    wandb.teardown()
    records = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in _split_log(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            records.append(record)
    return records


def _split_log(content: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format: checksum, length and kind before each piece."""
    assert content.startswith(b":W&B")
    position, pieces = 7, b""
    while position + 7 <= len(content):
        left = 32_768 - position % 32_768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        if kind == 0:
            return
        pieces += content[position + 7 : position + 7 + length]
        position += 7 + length
        # Whole, or the last piece of several.
        if kind in (1, 4):
            yield pieces
            pieces = b""


def _read_history(records: list[Any]) -> list[dict[str, Any]]:
    """What was logged, without W&B's own entries."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {(i.key or "/".join(i.nested_key)): i.value_json for i in record.history.item}
            rows.append({k: json.loads(v) for k, v in items.items() if not k.startswith("_")})
    return rows


def test_wandb_logger_leaves_settings_metrics_files_and_status(
    tmp_path: Path, reports: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model.pth"
    model.write_bytes(b"weights")
    folder = tmp_path / "run"
    logger = WandbLogger(folder=folder, project="cars", run_id="20260101T000000Z-a#b", group="s1")
    logger.begin({"run.batch": 4}, {"version.torch": "2.14.1"})
    logger.write(
        [
            Measurement("progress/class_loss", 0.5, 5, 1000.0),
            Measurement("progress/box_loss", 0.25, 5, 1000.0),
            # A step that is repeated after a failure.
            Measurement("progress/class_loss", 0.125, 4, 1001.0),
        ]
    )
    logger.finish("FINISHED", model=model, reports=reports)
    records = _read_records(folder)
    run = next(r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (run.run_id, run.project, run.run_group) == ("20260101T000000Z-a-b", "cars", "s1")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["run.batch"] == 4
    assert config["run"] == {"version.torch": "2.14.1"}
    assert _read_history(records) == [
        {"step": 5, "progress/class_loss": 0.5, "progress/box_loss": 0.25},
        {"step": 4, "progress/class_loss": 0.125},
    ]
    (exit_code,) = [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"]
    assert exit_code == 0
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("status", ["KILLED", "FAILED"])
def test_wandb_logger_tells_a_failure_and_keeps_the_id(tmp_path: Path, status: Status) -> None:
    logger = WandbLogger(folder=tmp_path, project="cars", run_id="r1")
    logger.begin({"run.batch": 4}, {})
    logger.finish(status, model=None, reports=[])
    records = _read_records(tmp_path)
    (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    (code,) = [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"]
    assert (run.run_id, code) == ("r1", 1)


def test_wandb_logger_says_what_to_set_when_nobody_is_logged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    # A terminal would be asked for a key.
    monkeypatch.setattr("sys.stdin", io.StringIO())
    logger = WandbLogger(folder=tmp_path, project="cars", run_id="r1")
    with pytest.raises(StorageError, match=r"did not open the run: .*WANDB_MODE=offline"):
        logger.begin({}, {})
