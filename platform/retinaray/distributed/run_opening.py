"""How a batch inference begins: its settings resolved, its record found again or made new."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from retinaray.artifact import ModelCard, hash_content, model_kind
from retinaray.assembly.provenance import describe_making, make_run_id
from retinaray.assembly.reading import absolute_uri, make_predictor_settings, read_model_card
from retinaray.config.loading import load_from_dict, to_dict
from retinaray.config.schema import InferJob
from retinaray.distributed.run_settings import CLUSTER_SETTINGS, compare_settings
from retinaray.errors import ConfigError
from retinaray.inference.manifest import cut_parts, list_sources
from retinaray.inference.part_table import write_parts
from retinaray.inference.predictor import check_canvas, choose_backend
from retinaray.inference.run_files import RunFiles
from retinaray.inference.source_filters import SourceChoice

logger = logging.getLogger(__name__)

# Settings that do not change the result: a run may be resumed with others.
_FREE_SETTINGS = (
    "workers",
    "gpus_per_worker",
    "batch",
    "overwrite",
    "output",
    "reading.threads",
    "reading.decode_memory_mib",
    "decoding.num_cpus",
    "decoding.resource",
    *CLUSTER_SETTINGS,
    "write.compression",
)


def resolve_paths(job: InferJob) -> InferJob:
    """The job with locations that hold on every machine and in every folder."""
    changes: dict[str, object] = {
        "model": absolute_uri(job.model),
        "images": absolute_uri(job.images),
        "output": absolute_uri(job.output),
    }
    if job.annotations is not None:
        changes["annotations"] = absolute_uri(job.annotations)
    return load_from_dict(InferJob, to_dict(job), changes)


def read_card(content: bytes, sidecar: bytes | None, job: InferJob) -> ModelCard:
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


def open_run(
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
        **describe_making(job),
        "model_sha256": model_sha256,
        "annotations_sha256": truth_sha256,
        "training_run_id": card.run_id,
        "categories": card.categories.to_json(),
        "num_parts": totals.num_parts,
        "num_inputs": totals.num_images,
        "has_integer_ids": totals.has_integer_ids,
        "draw_limit": totals.draw_limit if job.write.draw else 0,
    }
    files.write_record(record)
    return record


def settle_backend(
    files: RunFiles, record: dict[str, Any], backend: str, job: InferJob
) -> dict[str, Any]:
    """The record with its runtime, which stays that of the whole run.

    Processors compute the same at any batch size, which was measured; TensorRT chooses other
    kernels at another one, so there the batch belongs to the result.

    Raises:
        ConfigError: If the run was begun with another runtime, or on a GPU with another batch; or
            if a GPU shall decode for an engine that has none.
    """
    if job.decoding.device == "gpu" and backend != "tensorrt":
        raise ConfigError(
            f"decoding.device=gpu decodes on the engine's GPU, and backend {backend!r} has none: "
            "leave --decode out, or run on a cluster with NVIDIA GPUs"
        )
    begun = record.get("backend")
    if begun is None:
        record = {**record, "backend": backend}
        files.write_record(record)
        return record
    batch = record["job"]["batch"]
    if begun != backend:
        difference = f"backend: {begun} -> {backend}; give --backend {begun} to go on"
    elif backend == "tensorrt" and batch != job.batch:
        difference = f"batch: {batch} -> {job.batch}; give --batch {batch} to go on"
    else:
        return record
    raise ConfigError(
        f"{files.root} holds a run that would not end as it was begun: {difference}, another "
        "--output, or --overwrite to start over (its files are removed)"
    )
