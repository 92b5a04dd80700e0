"""What a report reads of a run, by what lies at its place: a folder's record, or a JSON file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retinaray.assembly.reading import read_json, read_model_card, read_model_file
from retinaray.assembly.report_analysis import NEEDS_DETECTIONS, DetectionSource, OpenedRun
from retinaray.assembly.report_command import JobT, add_settings
from retinaray.assembly.report_training import open_sweep, open_training, thresholds_of_card
from retinaray.assembly.run_plan import list_truth, make_output
from retinaray.config.report_schema import ReportJob
from retinaray.config.schema import DetectionConfig, EvaluateJob, InferJob, ParityJob
from retinaray.data.coco_results import check_coco_results
from retinaray.errors import CheckpointError, ConfigError, DatasetError, StorageError
from retinaray.inference.run_files import RunFiles
from retinaray.path_hints import hint_at_missing, show_paths
from retinaray.reporting.report.contents import ReportedRun
from retinaray.storage import Storage, is_s3, join_uri, local_path

_RECORDS = ("run.json", "sweep.json", "metrics.jsonl")

logger = logging.getLogger(__name__)

MAX_ANALYSED_IMAGES = 50_000
"""Of a larger batch inference only the numbers in its record are shown: a report is made by one
process, and a person looks at it."""


def open_run(uri: str, job: ReportJob, storage: Storage) -> OpenedRun:
    """Read one run.

    Args:
        uri: A folder, or a JSON file.
        job: Annotations, images and what to do where there are no detections.
        storage: Where the run is.

    Raises:
        DatasetError: If it is no run.
        ConfigError: If detections come without annotations.
        StorageError: If it cannot be read.
    """
    if uri.lower().endswith(".json"):
        return _open_file(uri, job, storage)
    if uri.lower().endswith(".pth"):
        uri = f"{uri[:-4]}_run"
    if storage.exists(join_uri(uri, "run.json")):
        record = read_json(join_uri(uri, "run.json"), job.reading)
        if isinstance(record, dict) and "num_parts" in record:
            return _open_inference(uri, record, job, storage)
        if isinstance(record, dict) and isinstance(record.get("job"), dict) and not is_s3(uri):
            return open_training(uri, record, job, storage)
    elif not is_s3(uri) and (local_path(uri) / "sweep.json").is_file():
        return open_sweep(uri, job, storage)
    elif not is_s3(uri) and (local_path(uri) / "metrics.jsonl").is_file():
        return open_training(uri, {}, job, storage)
    hint = "" if is_s3(uri) else _hint_at_runs(local_path(uri))
    raise DatasetError(
        f"{uri}: expected what train, tune or infer left, a folder with run.json or sweep.json, or "
        "a .json file of detections, evaluate or parity; found none of these: name the run's folder"
        + (f"; {hint}" if hint else "")
    )


def _hint_at_runs(path: Path) -> str:
    """Runs that lie in a folder which is none; or what the path may have meant."""
    inner = sorted({str(r.parent) for name in _RECORDS for r in path.glob(f"*/{name}")})
    return f"it holds {show_paths(inner)}" if inner else hint_at_missing(path)


def _open_inference(
    uri: str, record: Mapping[str, Any], job: ReportJob, storage: Storage
) -> OpenedRun:
    totals = record.get("totals")
    facts = {"run": str(record["run_id"]), "runtime": str(record.get("backend", "not chosen yet"))}
    if totals:
        facts |= {
            "images": f"{totals['num_images']:,}",
            "unreadable": f"{totals['num_errors']:,}",
            "detections": f"{totals['num_detections']:,}",
        }
    run = ReportedRun(
        name=uri.rstrip("/").rsplit("/", 1)[-1],
        kind="infer",
        source=uri,
        facts=facts,
        scores=record.get("scores") or {},
        speed=record.get("summary") or {},
    )
    run, inferred = add_settings(run, InferJob, record["job"], record.get("versions", {}))
    if inferred is None:
        return OpenedRun(run)
    annotations = job.annotations or inferred.annotations
    if not totals:
        gap = f"{NEEDS_DETECTIONS}, and the run has not ended; the same command resumes it"
    elif totals["num_images"] > MAX_ANALYSED_IMAGES:
        gap = f"{NEEDS_DETECTIONS} of at most {MAX_ANALYSED_IMAGES:,} images"
    elif annotations is None:
        gap = f"{NEEDS_DETECTIONS} and ground truth; give --annotations"
    else:
        files = RunFiles(uri, storage, make_output(inferred, record))
        return _read_inference(run, inferred, record, files, annotations, job)
    return OpenedRun(run.with_gap(gap))


def _read_inference(
    run: ReportedRun,
    inferred: InferJob,
    record: Mapping[str, Any],
    files: RunFiles,
    annotations: str,
    job: ReportJob,
) -> OpenedRun:
    truth = read_json(annotations, job.reading)
    results, uris = [], {}
    for row in files.read_rows(record["num_parts"]):
        results += [{"image_id": row["image_id"], **found} for found in row["detections"]]
        if "member" not in row and job.images is None:
            uris[row["image_id"]] = row["uri"]
    return OpenedRun(
        run,
        DetectionSource(
            results=results,
            truth=list_truth(inferred, files, record["num_parts"], truth),
            truth_name=annotations,
            images_root=job.images or inferred.images,
            uris=uris,
            thresholds=_read_thresholds(inferred.model, inferred.detection, files.storage),
        ),
    )


def _read_thresholds(
    model: str, detection: DetectionConfig, storage: Storage
) -> dict[int | str, float]:
    """What the run dropped detections by; empty when the model is gone and nothing was asked."""
    try:
        content, sidecar = read_model_file(model, storage.read_bytes)
        card = read_model_card(content, sidecar, model)
    except (CheckpointError, StorageError) as error:
        logger.warning("%s: thresholds are chosen anew: %s", model, error)
        return {}
    asked = detection.score_threshold
    own = thresholds_of_card(card)
    return own if asked is None else dict.fromkeys(own, asked)


def _open_file(uri: str, job: ReportJob, storage: Storage) -> OpenedRun:
    content = read_json(uri, job.reading)
    name = uri.rsplit("/", 1)[-1]
    if isinstance(content, list):
        return _open_detections(uri, name, check_coco_results(content, source=uri), job)
    if isinstance(content, dict) and {"rows", "references", "tolerance"} <= content.keys():
        facts = {"model": str(content["model"]), "images": str(content["num_images"])}
        facts["machine"] = str(content["machine"])
        run = ReportedRun(name=name, kind="parity", source=uri, facts=facts, parity=content)
        return OpenedRun(_add_making(run, ParityJob, content)[0])
    if isinstance(content, dict) and {"AP", "classes", "model"} <= content.keys():
        return _open_evaluation(uri, name, content, job, storage)
    raise DatasetError(
        f"{uri}: expected detections (a list of COCO results), what evaluate printed, or what "
        "parity wrote to --output; found other JSON"
    )


def _add_making(
    run: ReportedRun, job_class: type[JobT], content: Mapping[str, Any]
) -> tuple[ReportedRun, JobT | None]:
    if "job" in content:
        return add_settings(run, job_class, content["job"], content.get("versions", {}))
    gap = "settings and command line: the file does not hold them; an older version wrote it"
    return run.with_gap(gap), None


def _open_evaluation(
    uri: str, name: str, content: Mapping[str, Any], job: ReportJob, storage: Storage
) -> OpenedRun:
    """What `evaluate` printed, and the detections that it was told to keep."""
    names = {"model": "model", "backend": "runtime", "images_per_s": "images per second"}
    facts = {text: str(content[key]) for key, text in names.items() if content.get(key)}
    run = ReportedRun(name=name, kind="evaluate", source=uri, facts=facts, scores=content)
    run, evaluated = _add_making(run, EvaluateJob, content)
    source = None if evaluated is None else _find_detections(evaluated, job, storage)
    if source is None:
        gap = f"{NEEDS_DETECTIONS}; give the file of `evaluate --output` with --annotations"
        return OpenedRun(run.with_gap(gap))
    return OpenedRun(run, source)


def _find_detections(
    evaluated: EvaluateJob, job: ReportJob, storage: Storage
) -> DetectionSource | None:
    """What an evaluation was told to keep, or was given; none where it is gone, or its truth."""
    model, is_list = evaluated.model, (evaluated.model or "").endswith(".json")
    found = evaluated.output or (model if is_list else None)
    truth = job.annotations or evaluated.annotations
    if found is None or not storage.exists(found) or not storage.exists(truth):
        return None
    thresholds: Mapping[int | str, float] = {}
    if model is not None and not is_list:
        thresholds = _read_thresholds(model, evaluated.detection, storage)
    return DetectionSource(
        results=check_coco_results(read_json(found, job.reading), source=found),
        truth=read_json(truth, job.reading),
        truth_name=truth,
        images_root=job.images or evaluated.images,
        thresholds=thresholds,
    )


def _open_detections(
    uri: str, name: str, content: list[dict[str, Any]], job: ReportJob
) -> OpenedRun:
    if job.annotations is None:
        raise ConfigError(
            f"{uri} holds detections, which mean nothing without ground truth: give --annotations"
        )
    facts = {"annotations": job.annotations}
    run = ReportedRun(name=name, kind="evaluate", source=uri, facts=facts)
    return OpenedRun(
        run,
        DetectionSource(
            results=content,
            truth=read_json(job.annotations, job.reading),
            truth_name=job.annotations,
            images_root=job.images or "",
        ),
    )
