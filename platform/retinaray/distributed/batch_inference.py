"""Batch inference with Ray Data: the driver's side, from a job to one merged result.

The images are cut into numbered parts once; a part is one row of the dataset, and the worker that
takes it fetches, decodes, detects and commits. So the driver sees parts, never images.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, replace
from typing import Any

from retinaray.artifact import ModelCard, hash_content, model_kind
from retinaray.assembly.provenance import collect_versions, make_run_id
from retinaray.assembly.reading import (
    absolute_uri,
    make_predictor_settings,
    read_json,
    read_model_card,
    read_model_file,
)
from retinaray.assembly.run_plan import list_truth, make_choice, make_output
from retinaray.config.loading import load_from_dict, to_dict
from retinaray.config.schema import InferJob
from retinaray.distributed.infer_outcome import InferOutcome
from retinaray.distributed.resources import ClusterSize, WorkerPlan, connect, plan_inference
from retinaray.distributed.run_settings import compare_settings
from retinaray.errors import ClusterError, ConfigError
from retinaray.evaluation.coco_map import evaluate_detections
from retinaray.inference.manifest import cut_parts, list_sources
from retinaray.inference.output_formats import OutputSettings, read_output_name
from retinaray.inference.part_attempts import MAX_ATTEMPTS
from retinaray.inference.part_table import write_parts
from retinaray.inference.predictor import check_canvas, choose_backend
from retinaray.inference.run_files import RunFiles, RunTotals
from retinaray.inference.run_lock import RunLock
from retinaray.inference.source_filters import SourceChoice
from retinaray.reporting.inference_progress import InferenceView
from retinaray.storage import Storage, is_s3

logger = logging.getLogger(__name__)

_NO_PROGRESS_TIMEOUT_S = 900
# Settings that do not change the result: a run may be resumed with others.
_FREE_SETTINGS = ("workers", "batch", "overwrite", "output", "reading.threads", "write.compression")


def run_inference(job: InferJob) -> InferOutcome:
    """Detect in all images of a job; an interrupted run of the same settings goes on by itself.

    Raises:
        ConfigError: If the output holds a run with other settings or another model, or another
            driver is at work on it.
        CheckpointError, InferenceError: If the model cannot be run.
        DatasetError: If there are no images, or the annotations cannot be read.
        StorageError: If a location cannot be read or written.
        ClusterError: If parts could not be processed.
    """
    start = time.monotonic()
    job = _resolve_paths(job)
    storage = Storage(endpoint_url=job.reading.endpoint_url)
    choice = make_choice(job.select)
    output = read_output_name(job.output, job.write.format)
    files = RunFiles(output.root, storage, OutputSettings(format=job.write.format))
    truth = read_json(job.annotations, job.reading) if job.annotations else None
    content, sidecar = read_model_file(job.model, storage.read_bytes)
    card = _read_card(content, sidecar, job)
    with RunLock(files.root, storage).held() as lock:
        record = _open_run(job, files, truth, choice, hash_content(content), card)
        # What the parts look like is known only now.
        files = replace(files, output=make_output(job, record))
        return _drive(job, files, lock, truth=truth, record=record, start=start)


def _drive(
    job: InferJob,
    files: RunFiles,
    lock: RunLock,
    *,
    truth: Mapping[str, Any] | None,
    record: dict[str, Any],
    start: float,
) -> InferOutcome:
    """Bring a run that nobody else drives to its end."""
    storage = files.storage
    num_parts = record["num_parts"]
    with connect(min_cpus=2) as cluster:
        backend, reason = choose_backend(
            model_kind(job.model), job.backend, has_gpu=cluster.num_gpus > 0
        )
        logger.info("backend %s: %s", backend, reason)
        images_per_s, failures = _process(job, files, lock, cluster, record, backend)
    totals = _finish(files, record, num_parts, failures)
    detections = files.detections
    named = read_output_name(job.output, job.write.format).file
    if named is not None:
        detections = named
        with (
            storage.open_reader(files.detections) as source,
            storage.open_writer(detections) as out,
        ):
            while block := source.read(1 << 20):
                out.write(block)
    scores = None
    if truth is not None:
        taken = list_truth(job, files, num_parts, truth)
        scores = evaluate_detections(taken, list(files.read_results(num_parts)))
    seconds = round(time.monotonic() - start, 1)
    result = {"scores": scores.to_dict() if scores else None, "seconds": seconds}
    files.write_record(
        {
            **record,
            **result,
            "backend": backend,
            "totals": asdict(totals),
            "images_per_s": images_per_s,
        }
    )
    storage.write_bytes(files.success, b"")
    return InferOutcome(
        run=files.root,
        detections=detections,
        totals=totals,
        errors=tuple(files.read_errors(5)),
        backend=f"{backend}: {reason}",
        seconds=seconds,
        images_per_s=images_per_s,
        scores=scores,
    )


def _resolve_paths(job: InferJob) -> InferJob:
    changes: dict[str, object] = {
        "model": absolute_uri(job.model),
        "images": absolute_uri(job.images),
        "output": absolute_uri(job.output),
    }
    if job.annotations is not None:
        changes["annotations"] = absolute_uri(job.annotations)
    return load_from_dict(InferJob, to_dict(job), changes)


def _read_card(content: bytes, sidecar: bytes | None, job: InferJob) -> ModelCard:
    """The model's card; what no cluster could run is refused here, before Ray starts.

    Raises:
        CheckpointError: If the file is none of ours.
        InferenceError: If the backend cannot run it at all, or it has another canvas.
    """
    kind = model_kind(job.model)
    choose_backend(kind, job.backend, has_gpu=True)
    card = read_model_card(content, sidecar, job.model)
    if kind == "weights":
        return card
    asked = make_predictor_settings(job.detection, batch=job.batch, threads=1).canvas
    check_canvas(asked, card.canvas, job.model)
    return card


def _open_run(
    job: InferJob,
    files: RunFiles,
    truth: Mapping[str, Any] | None,
    choice: SourceChoice,
    model_sha256: str,
    card: ModelCard,
) -> dict[str, Any]:
    """The record of the interrupted run that is there, or of a new one, cut now.

    Raises:
        ConfigError: If the output holds another run and --overwrite is not given.
    """
    record = None if job.overwrite else files.read_record()
    truth_sha256 = hash_content(json.dumps(truth).encode()) if truth else None
    if record is not None:
        differences = compare_settings(record["job"], to_dict(job), free=_FREE_SETTINGS)
        if record["model_sha256"] != model_sha256:
            differences.append(
                f"model: {record['model_sha256'][:12]} -> {model_sha256[:12]} (SHA-256)"
            )
        if record["annotations_sha256"] != truth_sha256:
            differences.append("the content of the annotations")
        if differences:
            raise ConfigError(
                f"{files.root} holds a run with other settings: {'; '.join(differences)}. "
                "Give another --output, or --overwrite to start over (its files are removed)"
            )
        logger.info("resuming run %s: %d parts", record["run_id"], record["num_parts"])
        return record
    if not job.overwrite and files.has_results():
        raise ConfigError(
            f"{files.root} holds results but no run.json of a run to resume: "
            "give another --output, or --overwrite to replace them"
        )
    files.remove_all()
    sources = list_sources(
        job.images, truth, files.storage, choice=choice, threads=job.reading.threads
    )
    totals = write_parts(
        cut_parts(sources, job.part_size),
        files.manifest,
        files.storage,
        num_drawn=job.write.draw,
    )
    record = {
        "run_id": make_run_id(),
        "job": to_dict(job),
        "model_sha256": model_sha256,
        "annotations_sha256": truth_sha256,
        "training_run_id": card.run_id,
        "categories": card.categories.to_json(),
        "num_parts": totals.num_parts,
        "num_inputs": totals.num_images,
        "has_integer_ids": totals.has_integer_ids,
        "draw_limit": totals.draw_limit if job.write.draw else 0,
        "versions": collect_versions(),
    }
    files.write_record(record)
    return record


def _process(
    job: InferJob,
    files: RunFiles,
    lock: RunLock,
    cluster: ClusterSize,
    record: Mapping[str, Any],
    backend: str,
) -> tuple[float, list[str]]:
    """Run all parts that are not committed yet.

    Returns:
        Images per second, and what workers said about parts that they could not commit.

    Raises:
        ClusterError: If Ray ended the run, or another driver took it over.
    """
    done = files.list_committed()
    num_parts: int = record["num_parts"]
    if len(done) == num_parts:
        return 0.0, []
    plan = plan_inference(job.workers, num_parts - len(done), cluster)
    logger.info(
        "%d of %d parts to do, %d workers with %d threads",
        num_parts - len(done),
        num_parts,
        plan.num_workers,
        plan.num_threads,
    )
    from ray.exceptions import RayError

    receipts = _lay_out(job, files, plan, done, backend, draw_limit=record["draw_limit"])
    view = InferenceView(num_parts=num_parts, num_done=len(done))
    failures: list[str] = []
    with view:
        try:
            batch: Any
            for batch in receipts.iter_batches(batch_size=None, batch_format="pyarrow"):
                lock.check()
                for row in batch.to_pylist():
                    if row["failure"]:
                        failures.append(row["failure"])
                        continue
                    view.add(row["num_images"] + row["num_errors"], row["num_errors"])
        except (RayError, OSError) as error:
            raise ClusterError(
                f"batch inference stopped: {_first_line(error)}; the finished parts are kept, "
                "run the same command again to go on"
            ) from error
    return view.images_per_s, failures


def _lay_out(
    job: InferJob,
    files: RunFiles,
    plan: WorkerPlan,
    done: Set[int],
    backend: str,
    *,
    draw_limit: int,
) -> Any:
    """The lazy dataset of receipts: manifest in, one row per part, a pool of engines."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.util.annotations import RayDeprecationWarning

    from retinaray.distributed.detect_worker import DetectWorker

    for handler in logging.getLogger("ray.data").handlers:
        # Plans and statistics stay in its files; people see our own progress.
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
    context = DataContext.get_current()
    # Ray Data waits half an hour before it says that nothing moves.
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = _NO_PROGRESS_TIMEOUT_S
    context.enable_progress_bars = False
    # A part whose worker dies again and again must not end the run: the others go on, and it is
    # reported.
    context.max_errored_blocks = -1
    parts = ray.data.read_parquet(_ray_paths(files), filesystem=_ray_filesystem(files)).repartition(
        target_num_rows_per_block=1
    )
    with warnings.catch_warnings():
        # Bounds on restarts and retries have no named parameter yet; pyproject pins Ray below the
        # version that takes this way away.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return parts.map_batches(
            DetectWorker,
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ActorPoolStrategy(size=plan.num_workers),
            num_cpus=plan.num_cpus,
            num_gpus=plan.num_gpus or None,
            max_restarts=-1,
            max_task_retries=MAX_ATTEMPTS,
            fn_constructor_kwargs={
                "job": to_dict(job),
                "backend": backend,
                "root": files.root,
                "output": files.output,
                "draw_limit": draw_limit,
                "threads": plan.num_threads,
                "done": frozenset(done),
            },
        )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _ray_paths(files: RunFiles) -> str:
    return files.manifest.removeprefix("s3://")


def _ray_filesystem(files: RunFiles) -> Any:
    """Where Ray Data reads the manifest: the job's endpoint, else the environment's, else AWS.

    An explicit pyarrow file system does not look at AWS_ENDPOINT_URL by itself.
    """
    from pyarrow import fs

    if not is_s3(files.root):
        return fs.LocalFileSystem()
    named = (os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
    endpoint = files.storage.endpoint_url or next(filter(None, named), None)
    return fs.S3FileSystem(endpoint_override=endpoint)


def _finish(
    files: RunFiles, record: Mapping[str, Any], num_parts: int, failures: Sequence[str]
) -> RunTotals:
    """Merge, and hold the law: every input is an image or an error, exactly once.

    Raises:
        ClusterError: If parts are missing, or the counts do not add up.
    """
    missing = sorted(set(range(num_parts)) - files.list_committed())
    if missing:
        died = "their workers died each time (out of memory, or an image that kills its decoder)"
        raise ClusterError(
            f"{len(missing)} of {num_parts} parts were not finished, first {missing[:5]}: "
            f"{failures[0] if failures else died}; the other parts are kept, run the same command "
            "again to retry these"
        )
    totals = files.merge(num_parts)
    if totals.num_images + totals.num_errors != record["num_inputs"]:
        raise ClusterError(
            f"{record['num_inputs']} images went in, {totals.num_images} images and "
            f"{totals.num_errors} errors "
            f"came out in {files.root}: its files were changed by somebody else; use --overwrite"
        )
    return totals
