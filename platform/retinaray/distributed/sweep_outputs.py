"""The files of a finished sweep: the tuned model, its settings, tables and pictures."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retinaray.artifact import dump_weights, read_weights
from retinaray.assembly.reading import read_json
from retinaray.assembly.threshold_choice import ThresholdChoice, choose_thresholds
from retinaray.assembly.training import TrainingInputs
from retinaray.config.loading import load_from_dict, to_dict, to_yaml
from retinaray.config.schema import TrainJob
from retinaray.distributed.sweep_results import TrialRecord, choose_best
from retinaray.distributed.trial import TrialTask
from retinaray.errors import ClusterError
from retinaray.evaluation.candidates import CandidateSet
from retinaray.evaluation.threshold_sweep import SweepGrid, sweep_thresholds
from retinaray.reporting.sweep_plots import draw_parallel_coordinates, draw_pareto
from retinaray.reporting.threshold_plots import draw_operating_points, draw_threshold_sweep
from retinaray.reporting.trial_table import render_trials, write_rows, write_trials
from retinaray.storage import Storage
from retinaray.training.state import CANDIDATES_FILE, WEIGHTS_FILE

logger = logging.getLogger(__name__)

_MAX_AP_DIFFERENCE = 1e-9
_TABLE_METRICS = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR_100",
    "latency_ms",
)


def write_outputs(
    trials: Sequence[TrialRecord],
    task: TrialTask,
    inputs: TrainingInputs,
    rule: str,
    folder: Path,
) -> dict[str, Any]:
    """Choose the best trial and its thresholds, and write everything that a sweep leaves.

    Args:
        trials: All of them, in the order of their start.
        task: What they share.
        inputs: Data of the training that was varied.
        rule: For the operating points.
        folder: Of the sweep.

    Returns:
        `best`, `model`, `config`, `trials`, `thresholds` and `table` of the sweep's outcome.

    Raises:
        ClusterError: If no trial left weights, or cached detections disagree with a trial's AP.
    """
    rows = [_make_row(trial) for trial in trials]
    write_trials(rows, folder)
    _draw(trials, folder)
    best = choose_best(trials)
    base = load_from_dict(TrainJob, task.tree)
    truth = read_json(str(base.data.val_annotations), base.reading)
    for trial in trials:
        if trial.checkpoint is not None:
            _check_cache(trial, truth, inputs)
    job = task.make_job(best.point, best.trial_id)
    config = folder / "best.yaml"
    retrained = load_from_dict(TrainJob, to_dict(job), {"output": str(folder / "retrained.pth")})
    Storage().write_bytes(str(config), to_yaml(retrained).encode())
    thresholds = _tune_thresholds(best, truth, rule, folder)
    return {
        "best": {
            "trial": best.trial_id,
            "point": dict(best.point),
            "score": best.score,
            **{name: best.metrics.get(name) for name in (*_TABLE_METRICS, "epoch")},
        },
        "model": str(folder / "best.pth"),
        "config": str(config),
        "trials": dict(Counter(trial.status for trial in trials)),
        "thresholds": thresholds,
        "table": render_trials(rows),
    }


def _make_row(trial: TrialRecord) -> dict[str, Any]:
    return {
        "trial": trial.trial_id,
        "status": trial.status,
        "score": trial.score,
        "epoch": trial.metrics.get("epoch"),
        **{f"point.{key}": value for key, value in trial.point.items()},
        **{name: trial.metrics.get(name) for name in _TABLE_METRICS},
        "coverage": trial.coverage,
        "anchors_sha256": trial.metrics.get("anchors_sha256"),
        "settings_sha256": trial.metrics.get("settings_sha256"),
        "steps": trial.steps,
        "seconds": trial.seconds,
        "checkpoint": None if trial.checkpoint is None else str(trial.checkpoint),
        "error": trial.error,
    }


def _draw(trials: Sequence[TrialRecord], folder: Path) -> None:
    plain = [
        {
            "trial": str(number),
            "status": trial.status,
            "score": trial.score,
            "metrics": trial.metrics,
            "point": trial.point,
        }
        for number, trial in enumerate(trials, start=1)
    ]
    draw_parallel_coordinates(plain, folder / "parallel_coordinates.png")
    draw_pareto(plain, folder / "ap_latency.png")


def _check_cache(trial: TrialRecord, truth: Any, inputs: TrainingInputs) -> None:
    """Hold a trial's cached raw detections to the AP that its training reported.

    Raises:
        ClusterError: If they give another AP: thresholds chosen on them would mean nothing.
    """
    if trial.checkpoint is None or trial.metrics.get("AP") is None:
        return
    card, _ = read_weights(
        (trial.checkpoint / WEIGHTS_FILE).read_bytes(), source=str(trial.checkpoint)
    )
    grid = SweepGrid(
        nms=((card.nms_kind, card.nms_iou),),
        max_detections=(card.max_detections,),
        score_thresholds=(card.score_thresholds[0],),
    )
    candidates = _load_candidates(trial)
    cached = sweep_thresholds(candidates, truth, inputs.train.categories, grid).best_row.AP
    reported = float(trial.metrics["AP"])
    if cached is None or not math.isclose(cached, reported, abs_tol=_MAX_AP_DIFFERENCE):
        raise ClusterError(
            f"trial {trial.trial_id}: its cached detections give AP {cached}, its training "
            f"reported {reported}; the files in {trial.checkpoint} were changed"
        )


def _load_candidates(trial: TrialRecord) -> CandidateSet:
    path = Path(str(trial.checkpoint)) / CANDIDATES_FILE
    return CandidateSet.load(path.read_bytes(), source=str(path))


def _tune_thresholds(best: TrialRecord, truth: Any, rule: str, folder: Path) -> dict[str, Any]:
    """Sweep the best trial's suppression offline; write best.pth with the outcome inside."""
    path = Path(str(best.checkpoint)) / WEIGHTS_FILE
    card, model = read_weights(path.read_bytes(), source=str(path))
    choice: ThresholdChoice = choose_thresholds(
        _load_candidates(best), truth, card.categories, rule=rule
    )
    logger.info(
        "%d settings of suppression swept in %.1f s", len(choice.table.rows), choice.sweep_s
    )
    tuned = choice.apply_to(card)
    Storage().write_bytes(str(folder / "best.pth"), dump_weights(tuned, model.state_dict()))
    write_rows(choice.table.to_dicts(), folder / "thresholds.csv")
    title = f"trial {best.trial_id}, validation, rule {rule}"
    pictures = {
        "threshold_sweep.png": draw_threshold_sweep(choice.table),
        "operating_points.png": draw_operating_points(choice.curves, choice.points, title=title),
    }
    for name, picture in pictures.items():
        Storage().write_bytes(str(folder / name), picture)
    return {**choice.to_dict(), "seconds": round(choice.sweep_s, 2)}
