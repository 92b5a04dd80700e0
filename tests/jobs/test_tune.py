"""A sweep as a user runs it: started, killed in the middle, started again."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from retinaray.artifact import read_weights
from retinaray.config.loading import load_from_argv
from retinaray.config.schema import TrainJob

pytestmark = [pytest.mark.local_ray, pytest.mark.slow]

SWEEP = """
output: sweep
model: {backbone: ResNet10FPN, fpn_channels: 16, head_depth: 0}
data: {images: data/images, annotations: data/train.json, val_annotations: data/val.json,
       size: [64, 96]}
run: {batch: 4, epochs: 3, val_every: 3, precision: fp32, max_failures: 0,
      checkpoint_minutes: 1.0e-9}
space:
  anchors.base_scale: [4.0, 2.0]
  model.backbone_weights: [null, absent.pth]
sweep: {search: grid, grace_epochs: 2, reduction: 4, retries: 0, concurrent: 2}
"""


@dataclass(frozen=True)
class Sweep:
    """What two starts of one sweep left, the first of which was killed."""

    folder: Path
    first_log: str
    second_log: str
    result: dict[str, Any]


@pytest.fixture(scope="module")
def sweep(
    workplace: Path,
    start_command: Callable[..., subprocess.Popen[str]],
    wait_until: Callable[[Callable[[], object], str], None],
) -> Sweep:
    """Two trials train to the end, two fail; the driver is killed when a trial has ended."""
    (workplace / "sweep.yaml").write_text(SWEEP, encoding="utf-8")
    notes = workplace / "sweep" / "ray_tune"
    process = start_command("-m", "retinaray", "tune", "--config", "sweep.yaml")
    try:
        wait_until(
            lambda: (
                process.poll() is not None
                or any("TERMINATED" in p.read_text() for p in notes.glob("experiment_state-*.json"))
            ),
            "a trial's end",
        )
    finally:
        process.kill()
        _, first_log = process.communicate()
    assert not (workplace / "sweep" / "best.pth").exists(), first_log
    again = start_command("-m", "retinaray", "tune", "--config", "sweep.yaml")
    out, second_log = again.communicate()
    assert again.returncode == 0, second_log
    result = json.loads(out.splitlines()[-1])
    return Sweep(workplace / "sweep", first_log, second_log, result)


def _read_trials(sweep: Sweep) -> list[dict[str, str]]:
    with (sweep.folder / "trials.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_tune_resumes_without_repeating_what_had_ended(sweep: Sweep) -> None:
    assert "resuming the sweep" in sweep.second_log
    ended = {line.split()[4] for line in sweep.first_log.splitlines() if " ended (" in line}
    restarted = {
        line.split()[5].strip("():")
        for line in sweep.second_log.splitlines()
        if " starts: " in line
    }
    assert ended
    assert not ended & restarted


def test_tune_shows_trials_that_failed(sweep: Sweep) -> None:
    rows = _read_trials(sweep)
    failed = [row for row in rows if row["status"] == "failed"]
    assert len(rows) == 4
    assert len(failed) == 2
    assert all("absent.pth" in row["error"] for row in failed)
    assert sweep.result["trials"] == {"done": 2, "failed": 2}
    assert "absent.pth" in sweep.second_log


def test_tune_proves_that_each_trial_had_its_own_anchors(sweep: Sweep) -> None:
    rows = [row for row in _read_trials(sweep) if row["status"] == "done"]
    assert {row["point.anchors.base_scale"] for row in rows} == {"4", "2"}
    assert len({row["anchors_sha256"] for row in rows}) == 2
    for row in rows:
        weights = Path(row["checkpoint"]) / "weights.pth"
        card, _ = read_weights(weights.read_bytes(), source=str(weights))
        base = float(row["point.anchors.base_scale"])
        assert card.anchors.scales == tuple(base * 2 ** (index / 3) for index in range(3))


def test_tune_compares_trials_by_validated_checkpoints_only(sweep: Sweep) -> None:
    (shown,) = {row["epoch"] for row in _read_trials(sweep) if row["status"] == "done"}
    assert float(shown) == 3
    for row in _read_trials(sweep):
        if row["status"] != "done":
            continue
        # Kept by the clock at the first vote of the workers, two steps before the validation.
        kept = sweep.folder / "trials" / row["trial"] / "ray_train" / "step_00000004"
        assert (kept / "checkpoint.json").exists()
        told = (sweep.folder / "ray_tune" / row["trial"] / "result.json").read_text()
        assert {json.loads(line)["step"] for line in told.splitlines()} == {6}


def test_tune_leaves_a_model_with_thresholds_and_settings_to_train_it_again(sweep: Sweep) -> None:
    best = sweep.result["best"]
    content = Path(sweep.result["model"]).read_bytes()
    card, _ = read_weights(content, source="best.pth")
    chosen = {
        name: entry["threshold"] for name, entry in sweep.result["thresholds"]["classes"].items()
    }
    assert dict(zip(card.categories.names, card.score_thresholds, strict=True)) == chosen
    assert card.nms_iou == sweep.result["thresholds"]["best"]["nms_iou"]
    again = load_from_argv(TrainJob, ["--config", sweep.result["config"]])
    assert again.anchors.scales == card.anchors.scales
    assert again.anchors.scales[0] == best["point"]["anchors.base_scale"]


def test_tune_leaves_tables_and_pictures(sweep: Sweep) -> None:
    table = pq.read_table(sweep.folder / "trials.parquet")
    assert table.num_rows == 4
    for name in ("parallel_coordinates", "ap_latency", "threshold_sweep", "operating_points"):
        assert (sweep.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with (sweep.folder / "thresholds.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == sweep.result["thresholds"]["num_settings"]


def test_tune_refuses_another_space_in_the_same_folder(
    sweep: Sweep, workplace: Path, start_command: Callable[..., subprocess.Popen[str]]
) -> None:
    assert sweep.result
    other = SWEEP.replace("[4.0, 2.0]", "[4.0, 3.0]")
    (workplace / "other.yaml").write_text(other, encoding="utf-8")
    process = start_command("-m", "retinaray", "tune", "--config", "other.yaml")
    _, err = process.communicate()
    assert process.returncode == 2
    assert "space.anchors.base_scale: [4.0, 2.0] -> [4.0, 3.0]" in err
    assert "--override" in err
