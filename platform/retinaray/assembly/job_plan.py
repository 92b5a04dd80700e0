"""`plan`: what a job will take and what is missing, said before anything is started."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from retinaray.assembly.job_plan_files import assume_files
from retinaray.assembly.job_plan_inference import (
    add_network_memory,
    add_reading_memory,
    check_backend,
    choose_canvas,
    plan_infer,
    read_planned_card,
)
from retinaray.assembly.job_plan_memory import measure_inference
from retinaray.assembly.job_plan_nodes import NodeKind, describe_this_machine, resolve_nodes
from retinaray.assembly.job_plan_room import WORKER_BASE_BYTES, check_gpu_room, check_host_room
from retinaray.assembly.job_plan_training import plan_train
from retinaray.assembly.job_plan_workers import ClusterSize, WorkerPlan, add_up
from retinaray.assembly.reading import read_json
from retinaray.config.nodes import ClusterConfig
from retinaray.config.plan_schema import PlanJob, PlannedJob, load_planned, parse_nodes
from retinaray.config.schema import ENGINE_ENDINGS, EvaluateJob, ExportJob, InferJob, TrainJob
from retinaray.errors import ConfigError, DatasetError, StorageError
from retinaray.reporting.plan_table import PlanSheet, render_plan
from retinaray.storage import Storage, is_s3

_LOCAL_INFERENCE_CPUS = 2


@dataclass(frozen=True)
class PlanOutcome:
    """What was found.

    Attributes:
        sheet: Figures and what is missing.
        nodes: The machines that were planned for, in words.
        exit_code: 0 = it fits, 1 = something is missing.
    """

    sheet: PlanSheet
    nodes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 when nothing is missing."""
        return 1 if self.sheet.missing else 0

    def to_json(self) -> str:
        """One line for machines."""
        return json.dumps({**self.sheet.to_dict(), "nodes": list(self.nodes)})

    def to_text(self) -> str:
        """A table for people."""
        return f"{self.sheet.verb} on {', '.join(self.nodes)}\n{render_plan(self.sheet)}"


def run_plan(plan: PlanJob) -> PlanOutcome:
    """Say what a job will take; nothing is started, no model is run, nothing is written.

    Raises:
        ConfigError: If the job's settings are wrong, or it cannot be told which job it is.
    """
    job = load_planned(plan)
    sheet = PlanSheet(job.verb)
    nodes, is_local = _find_nodes(plan, sheet)
    if isinstance(job, TrainJob):
        cluster = add_up(nodes, is_local=is_local, min_cpus=job.run.workers)
        cluster = _count_on(job.cluster, cluster, sheet)
        plan_train(job, plan, nodes, cluster, sheet)
    elif isinstance(job, InferJob):
        cluster = add_up(nodes, is_local=is_local, min_cpus=_LOCAL_INFERENCE_CPUS)
        cluster = _count_on(job.cluster, cluster, sheet)
        plan_infer(job, plan, nodes, cluster, sheet)
    else:
        cluster = add_up(nodes, is_local=is_local)
        _plan_single(job, nodes, cluster, sheet, image_bytes=plan.image_bytes)
    return PlanOutcome(sheet, tuple(f"{node.count} x {node.name}" for node in nodes))


def _find_nodes(plan: PlanJob, sheet: PlanSheet) -> tuple[tuple[NodeKind, ...], bool]:
    if plan.nodes is None:
        return (describe_this_machine(),), True
    nodes, unknown = resolve_nodes(parse_nodes(plan.nodes))
    for line in unknown:
        sheet.miss(line)
    if not nodes:
        raise ConfigError("\n".join(unknown))
    return nodes, False


def _count_on(wanted: ClusterConfig, cluster: ClusterSize, sheet: PlanSheet) -> ClusterSize:
    """What the job takes of the nodes; says where it counts on more than they have."""
    for option, asked, there in (
        ("--gpus", wanted.gpus, cluster.num_gpus),
        ("--cpus", wanted.cpus, cluster.num_cpus),
    ):
        if asked is not None and asked > there:
            sheet.miss(f"nodes: {option} {asked} counts on more than the {there:g} of these nodes")
    return replace(
        cluster,
        num_gpus=min(cluster.num_gpus, cluster.num_gpus if wanted.gpus is None else wanted.gpus),
        num_cpus=min(cluster.num_cpus, cluster.num_cpus if wanted.cpus is None else wanted.cpus),
    )


def _plan_single(
    job: PlannedJob,
    nodes: Sequence[NodeKind],
    cluster: ClusterSize,
    sheet: PlanSheet,
    *,
    image_bytes: int,
) -> None:
    """Commands that run in one process on one machine: `evaluate` and `export`."""
    assert isinstance(job, EvaluateJob | ExportJob)
    if isinstance(job, EvaluateJob):
        _check_files(job, sheet)
        needs_gpu, batch, asked = False, job.batch, choose_canvas(job.detection, None)
    else:
        needs_gpu = job.output.endswith(ENGINE_ENDINGS)
        batch, asked = (job.batch or (1, 1, 1))[2], job.size
        _check_export(job, sheet)
    if needs_gpu and not cluster.num_gpus:
        sheet.miss(f"nodes: {sheet.verb} to an engine builds on a GPU, and none has one")
    if job.model is None or job.model.lower().endswith(".json"):
        return
    card = read_planned_card(job.model, job.reading, sheet)
    has_gpu = cluster.num_gpus > 0
    if isinstance(job, EvaluateJob):
        sheet.add(
            "work", "backend", check_backend(job.model, job.backend, has_gpu, sheet) or "none"
        )
    if card is None:
        return
    canvas = asked or card.canvas
    sheet.add("work", "canvas", f"{canvas[0]}x{canvas[1]}", "height x width")
    memory = measure_inference(card.build_model, batch=batch, canvas=canvas)
    host = WORKER_BASE_BYTES + add_network_memory(memory, batch, sheet, has_gpu=has_gpu)
    if isinstance(job, EvaluateJob):
        files = assume_files(0, image_bytes)
        host += add_reading_memory(job.batch, canvas, files, job.reading, sheet, pipelines=1)
    sheet.estimate("host memory per worker", "all_bytes", host)
    one = WorkerPlan(num_workers=1, num_cpus=1, num_gpus=float(has_gpu), num_threads=1)
    if has_gpu:
        check_gpu_room(memory.peak, 1, nodes, sheet)
    check_host_room(host, one, 1, nodes, sheet)


def _check_files(job: EvaluateJob, sheet: PlanSheet) -> None:
    try:
        truth = read_json(job.annotations, job.reading)
    except (StorageError, DatasetError) as error:
        sheet.miss(f"annotations: {error}")
        return
    images = truth.get("images") if isinstance(truth, dict) else None
    if not isinstance(images, list):
        sheet.miss(f"annotations: {job.annotations}: expected COCO JSON with a list 'images'")
        return
    sheet.add("work", "images", len(images))


def _check_export(job: ExportJob, sheet: PlanSheet) -> None:
    storage = Storage(endpoint_url=job.reading.endpoint_url)
    for name, place in (
        ("gate.images", job.gate.images),
        ("calibration.images", job.calibration.images),
    ):
        if place is None:
            continue
        try:
            found = next(iter(storage.list_files(place)), None)
        except StorageError as error:
            sheet.miss(f"{name}: {error}")
            continue
        if found is None:
            where = "on S3" if is_s3(place) else "in this folder"
            sheet.miss(f"{name}={place}: nothing is {where}; give images like those of the model")
