"""What a training or a sweep will take: steps, workers, memory, traffic. Starts nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from retinaray.assembly.job_plan_facts import TrainingFacts, learn_facts
from retinaray.assembly.job_plan_memory import StepShape, TrainingMemory, measure_training
from retinaray.assembly.job_plan_nodes import NodeKind
from retinaray.assembly.job_plan_room import (
    LOADER_BASE_BYTES,
    WORKER_BASE_BYTES,
    check_gpu_room,
    check_host_room,
    estimate_decoding,
)
from retinaray.assembly.job_plan_workers import (
    CHECKPOINTS_KEPT,
    PREFETCHED_BATCHES,
    ClusterSize,
    WorkerPlan,
    count_loaders,
    plan_sweep,
    plan_training,
)
from retinaray.assembly.training import (
    DEFAULT_EPOCHS,
    choose_autocast,
    count_steps,
    make_anchor_spec,
    make_architecture,
    make_loop_settings,
)
from retinaray.config.plan_schema import PlanJob
from retinaray.config.schema import TrainJob, TuneJob
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import ClusterError
from retinaray.reporting.plan_table import PlanSheet
from retinaray.training.loop import plan_checkpoints


def plan_train(
    job: TrainJob, plan: PlanJob, nodes: Sequence[NodeKind], cluster: ClusterSize, sheet: PlanSheet
) -> None:
    """Fill a sheet with what a training or a sweep will take.

    Args:
        job: The training, or the sweep.
        plan: What nobody can look up.
        nodes: The machines.
        cluster: What they are together.
        sheet: Gets figures, and what is missing.
    """
    facts = learn_facts(job, plan, sheet)
    workers, num_trials_at_once = _place_workers(job, cluster, sheet)
    memory = _measure(job, facts, is_on_gpu=workers.num_gpus > 0, is_here=cluster.is_local)
    _add_work(job, facts, sheet)
    _add_memory(job, memory, workers, sheet)
    host_bytes = _add_host_memory(job, facts, memory, workers, sheet)
    num_processes = workers.num_workers * num_trials_at_once
    if workers.num_gpus:
        check_gpu_room(memory.peak, 1, nodes, sheet)
    check_host_room(host_bytes, workers, num_processes, nodes, sheet)
    _add_traffic(job, facts, memory, workers, sheet)


def count_trials(job: TuneJob) -> int:
    """Trials of the whole sweep: every point of a grid, else as many as asked for."""
    if job.sweep.search == "grid":
        return math.prod(len(choices) for choices in job.space.values())
    return job.sweep.trials


def _place_workers(job: TrainJob, cluster: ClusterSize, sheet: PlanSheet) -> tuple[WorkerPlan, int]:
    """The workers of one training, and how many trainings run at once."""
    asked = job.run.workers
    at_once = 1
    # What the memory of workers is reckoned for where there are too few of everything.
    enough = replace(cluster, num_cpus=max(asked, cluster.num_cpus))
    if cluster.num_gpus:
        enough = replace(enough, num_gpus=max(asked, cluster.num_gpus))
    try:
        workers = plan_training(asked, cluster)
    except ClusterError as error:
        sheet.miss(str(error))
        workers = plan_training(asked, enough)
    if isinstance(job, TuneJob):
        num_trials = count_trials(job)
        try:
            sweep = plan_sweep(
                num_trials=num_trials,
                num_concurrent=job.sweep.concurrent,
                num_workers=asked,
                cluster=cluster,
            )
        except ClusterError as error:
            sheet.miss(str(error))
        else:
            workers, at_once = sweep.workers, sweep.num_concurrent
        sheet.add("sweep", "trials", num_trials)
        sheet.add("sweep", "trials_at_once", at_once)
        sheet.add(
            "sweep", "trials_in_the_longest_queue", -(-num_trials // at_once), "trainings in a row"
        )
        if job.sweep.time_budget_s is not None:
            sheet.add("sweep", "time_budget_s", job.sweep.time_budget_s, "ends the sweep earlier")
        note = f"figures below are of the job's own settings; trials vary {', '.join(job.space)}"
        sheet.add("sweep", "varied_settings", len(job.space), note)
    total = asked * at_once
    sheet.add("workers", "workers", asked, "of each trial" if isinstance(job, TuneJob) else "")
    sheet.add(
        "workers", "gpus", int(total * workers.num_gpus), f"the nodes have {cluster.num_gpus:g}"
    )
    sheet.add("workers", "cpus", total, f"reserved, one each; the nodes have {cluster.num_cpus:g}")
    sheet.add("workers", "threads_per_worker", workers.num_threads)
    return workers, at_once


def make_network(job: TrainJob, num_classes: int) -> RetinaNet:
    """The network of a training with random weights; reads no file."""
    architecture = make_architecture(job.model, is_random=job.model.is_random, is_caffe=False)
    network = architecture.build_model(make_anchor_spec(job.anchors), num_classes)
    network.backbone.freeze(job.model.freeze_at)
    return network


def _measure(
    job: TrainJob, facts: TrainingFacts, *, is_on_gpu: bool, is_here: bool
) -> TrainingMemory:
    autocast: torch.dtype | None = None
    if job.run.precision != "fp32" and is_on_gpu:
        autocast = torch.bfloat16
    elif is_here or job.run.precision == "bf16":
        autocast = choose_autocast(job.run.precision, torch.device("cpu"))
    # Processors elsewhere are taken for such without bf16, which need more.
    shape = StepShape(
        batch=max(1, job.run.batch // job.run.workers // job.run.accumulate),
        canvas=facts.train_canvas,
        num_boxes=facts.num_boxes,
        autocast_dtype=autocast,
        is_on_gpu=is_on_gpu,
    )
    return measure_training(
        partial(make_network, job, facts.num_classes),
        shape,
        optimizer=job.optim.optimizer,
        has_average=job.optim.ema_decay > 0,
        loss=make_loop_settings(job, facts.num_images or 1, autocast_dtype=autocast).loss,
    )


def _add_work(job: TrainJob, facts: TrainingFacts, sheet: PlanSheet) -> None:
    height, width = facts.canvas
    sheet.add("work", "canvas", f"{height}x{width}", facts.assumed or "height x width")
    if facts.train_canvas != facts.canvas:
        height, width = facts.train_canvas
        sheet.add("work", "training_canvas", f"{height}x{width}", "of the training batches")
    sheet.add("work", "classes", facts.num_classes, facts.assumed)
    if facts.num_images is None:
        sheet.miss("the number of training images is unknown: give --num-images")
        return
    steps, batch = count_steps(job, facts.num_images), job.run.batch
    validations = _count_checkpoints(job, facts.num_images)
    add = sheet.estimate if facts.assumed else sheet.add
    add("work", "images", facts.num_images)
    add("work", "epochs", steps * batch / facts.num_images, _explain_length(job))
    add("work", "steps", steps, f"of {batch} images, {batch // job.run.workers} per worker")
    add("work", "images_trained_on", steps * batch)
    note = "at most: early stopping may end it sooner"
    if job.run.checkpoint_minutes is not None:
        note = f"at most, and one after {job.run.checkpoint_minutes:g} minutes without"
    add("work", "checkpoints_written", validations, note)
    add("work", "validation_images", facts.num_val_images, "at each of these")


def _explain_length(job: TrainJob) -> str:
    if job.run.iters is not None:
        return f"run.iters={job.run.iters}"
    if job.run.epochs is not None:
        return f"run.epochs={job.run.epochs}"
    return f"none was given: {DEFAULT_EPOCHS}"


def _count_checkpoints(job: TrainJob, num_images: int) -> int:
    return len(
        plan_checkpoints(
            total_steps=count_steps(job, num_images),
            num_images=num_images,
            batch=job.run.batch,
            every_epochs=job.run.val_every,
        )
    )


def _add_memory(
    job: TrainJob, memory: TrainingMemory, workers: WorkerPlan, sheet: PlanSheet
) -> None:
    section = "GPU memory per worker" if workers.num_gpus else "memory of a step per worker"
    sheet.add(section, "weights_bytes", memory.weights)
    sheet.add(section, "gradients_bytes", memory.gradients)
    sheet.add(section, "optimizer_bytes", memory.optimizer, job.optim.optimizer)
    sheet.add(section, "averaged_weights_bytes", memory.average)
    share = job.run.batch // job.run.workers
    note = f"kept for the backward pass of {share} images; counted in a step without content"
    sheet.estimate(section, "activations_bytes", memory.saved, note)
    note = "of the whole step, counted likewise; without workspaces of kernels and fragmentation"
    sheet.estimate(section, "peak_bytes", memory.peak, note)


def _add_host_memory(
    job: TrainJob,
    facts: TrainingFacts,
    memory: TrainingMemory,
    workers: WorkerPlan,
    sheet: PlanSheet,
) -> int:
    """Bytes of host memory of one worker with its loaders."""
    height, width = facts.train_canvas
    batch_bytes = 3 * height * width * (job.run.batch // job.run.workers)
    has_gpu = workers.num_gpus > 0
    loaders = count_loaders(
        job.data.loader_processes, num_threads=workers.num_threads, has_gpu=has_gpu
    )
    decoding = estimate_decoding(facts.largest_pixels, facts.files.largest_bytes)
    prefetched = loaders * PREFETCHED_BATCHES * batch_bytes
    section = "host memory per worker"
    sheet.add("workers", "loader_processes_per_worker", loaders)
    sheet.estimate(section, "process_bytes", WORKER_BASE_BYTES, "Python, torch and Ray, measured")
    sheet.estimate(section, "loader_processes_bytes", loaders * (LOADER_BASE_BYTES + decoding))
    sheet.add(section, "prefetched_batches_bytes", prefetched, "in shared memory")
    step = 0 if has_gpu else memory.peak
    # The file is put together in memory, and once more when it is handed on.
    checkpoint = 2 * memory.checkpoint + (0 if has_gpu else memory.state)
    largest = max(step, checkpoint)
    note = "a checkpoint being written" if checkpoint > step else "a step; see above"
    sheet.estimate(section, "network_bytes", largest, note)
    own = WORKER_BASE_BYTES + largest + (decoding + 2 * batch_bytes if not loaders else 0)
    total = own + loaders * (LOADER_BASE_BYTES + decoding) + prefetched
    sheet.estimate(section, "all_bytes", total)
    return total


def _add_traffic(
    job: TrainJob,
    facts: TrainingFacts,
    memory: TrainingMemory,
    workers: WorkerPlan,
    sheet: PlanSheet,
) -> None:
    count = workers.num_workers
    sheet.add("traffic", "checkpoint_bytes", memory.checkpoint, "training.pth and weights.pth")
    kept = CHECKPOINTS_KEPT * (count_trials(job) if isinstance(job, TuneJob) else 1)
    sheet.add("traffic", "checkpoints_kept", kept, "the best and the last of each training")
    sheet.add("traffic", "checkpoints_on_disk_bytes", kept * memory.checkpoint, "at the end")
    if count > 1:
        note = f"sent by each worker, ring of {count}: 2 x {count - 1}/{count} of the gradients"
        sent = 2 * (count - 1) * memory.gradients // count
        sheet.add("traffic", "all_reduce_per_step_bytes", memory.gradients, "gradients, float32")
        sheet.estimate("traffic", "sent_per_step_bytes", sent, note)
    if facts.num_images is None:
        return
    files = facts.files
    looked = "assumed with --image-bytes" if files.is_assumed else "mean of the files"
    note = f"{files.mean_bytes:,.0f} bytes per image, {looked}"
    epoch = files.mean_bytes * facts.num_images
    images = count_steps(job, facts.num_images) * job.run.batch
    val = facts.val_files.mean_bytes * facts.num_val_images
    run = files.mean_bytes * images + val * _count_checkpoints(job, facts.num_images)
    add = sheet.estimate if files.is_assumed else sheet.add
    add("traffic", "read_per_epoch_bytes", round(epoch), note)
    mosaic = "; mosaic reads up to 4 times as much" if job.augment.mosaic else ""
    add("traffic", "read_per_training_bytes", round(run), f"validation included{mosaic}")
