"""The parts of a run through a pool of engines: the dataset, its workers, and what they report."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from retinaray.assembly.job_plan_workers import (
    PARTS_AT_ONCE,
    ClusterSize,
    WorkerPlan,
    plan_inference,
)
from retinaray.config.loading import to_dict
from retinaray.config.schema import InferJob
from retinaray.distributed.detect_worker import DetectWorker
from retinaray.distributed.spilling import SpillWatch
from retinaray.errors import ClusterError
from retinaray.inference.bottleneck import WorkerPool
from retinaray.inference.manifest import count_images
from retinaray.inference.part_attempts import MAX_ATTEMPTS
from retinaray.inference.run_files import RunFiles
from retinaray.inference.run_lock import RunLock
from retinaray.inference.run_pace import PartReport, RunPace
from retinaray.log_format import describe_worker_log
from retinaray.reporting.inference_progress import InferenceView
from retinaray.storage import is_s3

logger = logging.getLogger(__name__)

_NO_PROGRESS_TIMEOUT_S = 900


@dataclass(frozen=True)
class Processed:
    """What came of the parts that one command had to do.

    Attributes:
        summary: See `RunPace.summary`; empty when there was nothing to do.
        failures: What workers said of parts that they could not commit.
    """

    summary: Mapping[str, Any] = field(default_factory=dict)
    failures: Sequence[str] = ()


def process_parts(
    job: InferJob,
    files: RunFiles,
    lock: RunLock,
    cluster: ClusterSize,
    record: Mapping[str, Any],
) -> Processed:
    """Run all parts that are not committed yet.

    Raises:
        ClusterError: If Ray ended the run, or another driver took it over.
    """
    done = files.list_committed()
    num_parts, num_images = record["num_parts"], record["num_inputs"]
    if len(done) == num_parts:
        return Processed()
    plan = plan_inference(
        job.workers,
        num_parts - len(done),
        cluster,
        gpus_per_worker=job.gpus_per_worker,
        decode_cpus=job.decoding.num_cpus,
    )
    logger.info(
        "%d of %d parts to do, %d workers with %d threads",
        num_parts - len(done),
        num_parts,
        plan.num_workers,
        plan.num_threads,
    )
    num_done = count_images(
        done, part_size=job.part_size, num_parts=num_parts, num_images=num_images
    )
    pool = WorkerPool(
        num_workers=plan.num_workers,
        read_threads=PARTS_AT_ONCE * job.reading.threads,
        cores=max(1.0, cluster.num_cpus / plan.num_workers),
        has_gpu=plan.num_gpus > 0,
    )
    pace = RunPace(num_images=num_images, num_done=num_done, pool=pool)
    view = InferenceView(num_images=num_images, num_done=num_done)
    receipts = _lay_out(job, files, plan, done, record)
    with view:
        failures = _follow(receipts, lock, pace, view)
    return Processed(pace.summary(), failures)


def _follow(receipts: Any, lock: RunLock, pace: RunPace, view: InferenceView) -> list[str]:
    """Take the receipts as they come.

    Raises:
        ClusterError: If Ray ended the run, or another driver took it over.
    """
    from ray.exceptions import RayError

    watch = SpillWatch()
    failures: list[str] = []
    try:
        batch: Any
        for batch in receipts.iter_batches(batch_size=None, batch_format="pyarrow"):
            lock.check()
            for row in batch.to_pylist():
                if row["failure"]:
                    failures.append(row["failure"])
                else:
                    pace.add(PartReport.from_row(row))
            view.show(pace.progress())
            watch.check()
    except (RayError, OSError) as error:
        raise ClusterError(
            f"batch inference stopped: {_first_line(error)}; the finished parts are kept, "
            "run the same command again to go on"
        ) from error
    watch.check(now=True)
    return failures


def _lay_out(
    job: InferJob,
    files: RunFiles,
    plan: WorkerPlan,
    done: Set[int],
    record: Mapping[str, Any],
) -> Any:
    """The lazy dataset of receipts: manifest in, one row per part, a pool of engines."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.util.annotations import RayDeprecationWarning

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
            compute=ActorPoolStrategy(
                size=plan.num_workers,
                max_concurrent_calls_per_actor=PARTS_AT_ONCE,
                max_tasks_in_flight_per_actor=2 * PARTS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
            num_cpus=plan.num_cpus,
            num_gpus=plan.num_gpus or None,
            max_restarts=-1,
            max_task_retries=MAX_ATTEMPTS,
            fn_constructor_kwargs={
                "job": to_dict(job),
                "record": {
                    **{key: record[key] for key in ("run_id", "backend", "draw_limit")},
                    "log": describe_worker_log(),
                },
                "root": files.root,
                "output": files.output,
                "threads": plan.num_threads,
                "num_decode_tasks": max(
                    1, job.decoding.num_cpus // (plan.num_workers * PARTS_AT_ONCE)
                ),
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
    # Nor at the certificates that botocore takes from these.
    bundles = (os.environ.get(name) for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"))
    return fs.S3FileSystem(
        endpoint_override=endpoint, tls_ca_file_path=next(filter(None, bundles), None)
    )
