"""Batch inference with Ray Data: the driver's side, from a job to one merged result.

The images are cut into numbered parts once; a part is one row of the dataset, and the worker that
takes it fetches, decodes, detects and commits. So the driver sees parts, never images.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from retinaray.artifact import hash_content, model_kind
from retinaray.assembly.reading import read_json, read_model_file
from retinaray.assembly.run_plan import list_truth, make_choice, make_output
from retinaray.config.schema import InferJob
from retinaray.distributed.infer_outcome import InferOutcome
from retinaray.distributed.part_processing import process_parts
from retinaray.distributed.resources import connect
from retinaray.distributed.run_opening import open_run, read_card, resolve_paths, settle_backend
from retinaray.errors import ClusterError
from retinaray.evaluation.coco_map import evaluate_detections
from retinaray.inference.output_formats import OutputSettings, read_output_name
from retinaray.inference.predictor import choose_backend
from retinaray.inference.run_files import RunFiles, RunTotals
from retinaray.inference.run_lock import RunLock
from retinaray.log_format import log_fields
from retinaray.storage import Storage

logger = logging.getLogger(__name__)


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
    job = resolve_paths(job)
    storage = Storage(endpoint_url=job.reading.endpoint_url)
    choice = make_choice(job.select)
    output = read_output_name(job.output, job.write.format)
    files = RunFiles(output.root, storage, OutputSettings(format=job.write.format))
    truth = read_json(job.annotations, job.reading) if job.annotations else None
    content, sidecar = read_model_file(job.model, storage.read_bytes)
    card = read_card(content, sidecar, job)
    with RunLock(files.root, storage).held() as lock:
        record = open_run(job, files, truth, choice, hash_content(content), card)
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
    with (
        log_fields(run_id=record["run_id"]),
        connect(min_cpus=2, counting_on=job.cluster) as cluster,
    ):
        backend, reason = choose_backend(
            model_kind(job.model), job.backend, has_gpu=cluster.num_gpus > 0
        )
        logger.info("backend %s: %s", backend, reason)
        record = settle_backend(files, record, backend, job)
        processed = process_parts(job, files, lock, cluster, record)
    totals = _finish(files, record, num_parts, processed.failures)
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
    result = {
        "scores": scores.to_dict() if scores else None,
        "seconds": seconds,
        "totals": asdict(totals),
        "summary": dict(processed.summary),
    }
    files.write_record({**record, **result})
    storage.write_bytes(files.success, b"")
    return InferOutcome(
        run=files.root,
        detections=detections,
        totals=totals,
        errors=tuple(files.read_errors(5)),
        backend=f"{backend}: {reason}",
        seconds=seconds,
        images_per_s=processed.summary.get("images_per_s", 0.0),
        scores=scores,
        summary=processed.summary,
    )


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
