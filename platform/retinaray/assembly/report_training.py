"""What a report reads of the folders that train and tune leave."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from retinaray.anchoring.coverage import LearnableBoxes, measure_coverage, select_boxes
from retinaray.artifact import ModelCard, read_weights
from retinaray.assembly.evaluation import run_evaluation
from retinaray.assembly.reading import read_json
from retinaray.assembly.report_analysis import NEEDS_DETECTIONS, DetectionSource, OpenedRun
from retinaray.assembly.report_command import add_settings
from retinaray.assembly.training import choose_job_canvas, make_anchor_spec
from retinaray.config.loading import load_from_dict
from retinaray.config.report_schema import ReportJob
from retinaray.config.schema import EvaluateJob, TrainJob, TuneJob
from retinaray.data.coco import load_coco
from retinaray.detector.anchors import AnchorSpec
from retinaray.errors import DatasetError, StorageError
from retinaray.evaluation.candidates import CandidateSet, DetectionSetting, apply_setting
from retinaray.evaluation.operating_points import DEFAULT_THRESHOLD
from retinaray.reporting.coverage_map import CoveragePanel, draw_coverage_map
from retinaray.reporting.report.contents import (
    AnchorCoverage,
    Picture,
    ReportedRun,
    SweepContent,
)
from retinaray.reporting.training_log import read_events
from retinaray.storage import Storage, local_path
from retinaray.training.state import CANDIDATES_FILE

_SWEEP_PICTURES = {
    "parallel_coordinates.png": "Every trial: what was tried and what it scored",
    "ap_latency.png": "AP against time per image",
    "threshold_sweep.png": "Best trial: AP against score threshold and NMS",
}


def open_training(
    uri: str, record: Mapping[str, Any], job: ReportJob, storage: Storage
) -> OpenedRun:
    """Read a training.

    Args:
        uri: Its run folder, local.
        record: Its run.json; empty when there is none.
        job: What to do where there are no detections.
        storage: Where its data are.

    Raises:
        CheckpointError, InferenceError: If its weights shall detect and cannot be run.
        DatasetError: If the images that they shall detect in cannot be used.
        StorageError: If a file cannot be read.
    """
    folder = local_path(uri)
    has_events = (folder / "metrics.jsonl").is_file()
    run = ReportedRun(
        name=folder.name,
        kind="train",
        source=str(folder),
        facts={"run": str(record.get("run_id", "unknown"))},
        events=tuple(read_events(folder)) if has_events else (),
        gaps=() if has_events else ("curves of the training: there is no metrics.jsonl yet",),
    )
    if not record:
        gap = f"settings, anchors and detections: {folder} has no run.json"
        return OpenedRun(run.with_gap(gap))
    run, trained = add_settings(run, TrainJob, record["job"], record.get("versions", {}))
    if trained is None:
        return OpenedRun(run)
    run = replace(run, facts={**run.facts, **_describe_training(trained, run)})
    run = _add_coverage(run, trained, storage)
    if job.detect:
        return _detect(run, trained, job, storage)
    gap = f"{NEEDS_DETECTIONS}, and a training leaves none; --detect runs its weights"
    return OpenedRun(run.with_gap(gap))


def _describe_training(trained: TrainJob, run: ReportedRun) -> dict[str, str]:
    facts = {"network": trained.model.backbone, "training data": trained.data.annotations}
    if trained.data.val_annotations:
        facts["validation data"] = trained.data.val_annotations
    progress = [event for event in run.events if event["kind"] == "progress"]
    if progress:
        last = progress[-1]
        facts["steps"] = f"{last['step']:,} of {last['total_steps']:,}"
    return facts


def _add_coverage(
    run: ReportedRun,
    trained: TrainJob,
    storage: Storage,
    *,
    best: ModelCard | None = None,
) -> ReportedRun:
    """The run with the coverage of its anchors, or with the reason why not.

    Args:
        run: So far.
        trained: Names the training set.
        storage: Where that is.
        best: Has the anchors of a sweep's best trial; none = those of the training.
    """
    try:
        source = trained.data.annotations
        dataset = load_coco(storage.read_bytes(source), source=source)
    except (DatasetError, StorageError) as error:
        return run.with_gap(f"anchors: {error}")
    spec = best.anchors if best else make_anchor_spec(trained.anchors)
    canvas = best.canvas if best else choose_job_canvas(trained, dataset)
    coverage = _measure_anchors(spec, canvas, select_boxes(dataset, canvas))
    return replace(run, coverage=coverage)


def _measure_anchors(
    spec: AnchorSpec, canvas: tuple[int, int], boxes: LearnableBoxes
) -> AnchorCoverage:
    stream = io.BytesIO()
    draw_coverage_map([CoveragePanel("anchors of the run", spec, boxes)], stream)
    caption = (
        f"Best IoU that a box of each size and aspect has with the anchors on {canvas[0]} x "
        f"{canvas[1]} pixels (height x width); points are training boxes"
    )
    return AnchorCoverage(
        measure_coverage(boxes, spec), Picture(caption, _to_webp(stream.getvalue()), "image/webp")
    )


def _to_webp(content: bytes) -> bytes:
    """A drawing, a tenth as long as its PNG."""
    stream = io.BytesIO()
    with Image.open(io.BytesIO(content)) as image:
        image.convert("RGB").save(stream, "WEBP", quality=85, method=4)
    return stream.getvalue()


def _detect(run: ReportedRun, trained: TrainJob, job: ReportJob, storage: Storage) -> OpenedRun:
    """Run the kept weights over the validation set, or over the images that the job names."""
    annotations = job.annotations or trained.data.val_annotations
    if annotations is None:
        gap = f"{NEEDS_DETECTIONS}, and there was no validation set; give --annotations"
        return OpenedRun(run.with_gap(gap))
    images = job.images or trained.data.val_images or trained.data.images
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "detections.json")
        settings = {
            "model": trained.output,
            "images": images,
            "annotations": annotations,
            "output": output,
            "backend": job.backend,
            "batch": job.batch,
            "reading": job.reading.model_dump(),
        }
        outcome = run_evaluation(load_from_dict(EvaluateJob, settings))
        results = json.loads(Path(output).read_bytes())
    card = read_weights(storage.read_bytes(trained.output), source=trained.output)[0]
    speed = {"images_per_s": outcome.images_per_s}
    return OpenedRun(
        replace(run, scores={**outcome.scores.summary, **speed}),
        DetectionSource(
            results=results,
            truth=read_json(annotations, job.reading),
            truth_name=annotations,
            images_root=images,
            thresholds=thresholds_of_card(card),
        ),
    )


def thresholds_of_card(card: ModelCard) -> dict[int | str, float]:
    """Score thresholds by category id."""
    return dict(zip(card.categories.ids, card.score_thresholds, strict=True))


def open_sweep(uri: str, job: ReportJob, storage: Storage) -> OpenedRun:
    """Read a sweep, and the detections of its best trial on the validation set.

    Args:
        uri: Its folder, local.
        job: Where the images are, if they are no longer where they were.
        storage: Where its data are.

    Raises:
        CheckpointError: If its best weights or their candidates cannot be read.
        DatasetError: If its annotations cannot be used.
        StorageError: If a file cannot be read.
    """
    folder = local_path(uri)
    record = read_json(str(folder / "sweep.json"), job.reading)
    settings = {**record["settings"], "output": str(folder)}
    run = ReportedRun(name=folder.name, kind="tune", source=str(folder))
    run, swept = add_settings(run, TuneJob, settings, record.get("versions", {}))
    table = folder / "trials.parquet"
    if not table.is_file() or not (folder / "best.pth").is_file():
        gap = "trials, anchors and detections: the sweep has not ended; the same command resumes it"
        return OpenedRun(run.with_gap(gap))
    import pyarrow.parquet

    rows = tuple(pyarrow.parquet.read_table(table).to_pylist())
    pictures = tuple(
        Picture(caption, _to_webp((folder / name).read_bytes()), "image/webp")
        for name, caption in _SWEEP_PICTURES.items()
        if (folder / name).is_file()
    )
    run = replace(run, sweep=SweepContent(rows, pictures), facts={"trials": str(len(rows))})
    if swept is None:
        return OpenedRun(run)
    card = read_weights((folder / "best.pth").read_bytes(), source=str(folder / "best.pth"))[0]
    run = _add_coverage(run, swept, storage, best=card)
    return _replay_best(run, swept, card, rows, folder, job)


def _replay_best(
    run: ReportedRun,
    swept: TuneJob,
    card: ModelCard,
    rows: tuple[Mapping[str, Any], ...],
    folder: Path,
    job: ReportJob,
) -> OpenedRun:
    """Detections of the best trial on the validation set, from what its network proposed."""
    usable = [row for row in rows if row["score"] is not None and row["checkpoint"]]
    best = max(usable, key=lambda row: float(row["score"]))
    checkpoint = Path(best["checkpoint"])
    # The folder may have been moved since.
    moved = folder / "trials" / str(best["trial"]) / "ray_train" / checkpoint.name
    path = next((p / CANDIDATES_FILE for p in (checkpoint, moved) if p.is_dir()), None)
    if path is None or not path.is_file():
        gap = f"{NEEDS_DETECTIONS}, and {moved / CANDIDATES_FILE} is not there any more"
        return OpenedRun(run.with_gap(gap))
    candidates = CandidateSet.load(path.read_bytes(), source=str(path))
    lowest = max(candidates.floor, DEFAULT_THRESHOLD)
    setting = DetectionSetting(
        score_thresholds=tuple(min(lowest, value) for value in card.score_thresholds),
        nms_iou=card.nms_iou,
        nms_kind=card.nms_kind,
        max_detections=card.max_detections,
    )
    annotations = str(swept.data.val_annotations)
    facts = {**run.facts, "best trial": str(best["trial"])}
    return OpenedRun(
        replace(run, facts=facts),
        DetectionSource(
            results=apply_setting(candidates, setting, card.categories),
            truth=read_json(annotations, job.reading),
            truth_name=annotations,
            images_root=job.images or swept.data.val_images or swept.data.images,
            thresholds=thresholds_of_card(card),
        ),
    )
