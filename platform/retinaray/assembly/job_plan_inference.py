"""What a batch inference will take: parts, workers, memory, requests. Starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from retinaray.artifact import ModelCard, model_kind
from retinaray.assembly.job_plan_files import (
    FileFacts,
    assume_files,
    count_parts,
    inspect_inference_files,
)
from retinaray.assembly.job_plan_memory import InferenceMemory, measure_inference
from retinaray.assembly.job_plan_nodes import NodeKind
from retinaray.assembly.job_plan_room import (
    WORKER_BASE_BYTES,
    check_gpu_room,
    check_host_room,
    estimate_decoding,
)
from retinaray.assembly.job_plan_workers import (
    DECODE_GROUP,
    PARTS_AT_ONCE,
    ClusterSize,
    WorkerPlan,
    plan_inference,
)
from retinaray.assembly.reading import make_predictor_settings, read_model_card, read_model_file
from retinaray.config.inference_schema import DetectionConfig
from retinaray.config.nodes import ReadingConfig
from retinaray.config.plan_schema import PlanJob
from retinaray.config.schema import InferJob
from retinaray.errors import (
    CheckpointError,
    ClusterError,
    ConfigError,
    DatasetError,
    InferenceError,
    StorageError,
)
from retinaray.inference.pipeline import count_ahead
from retinaray.inference.predictor import choose_backend
from retinaray.reporting.plan_table import PlanSheet
from retinaray.storage import Storage, is_s3

_S3_PAGE = 1000
_PARTS_PER_MANIFEST_FILE = 500
# A receipt as an Arrow row: 20 columns of 8 bytes, two short texts; with what a block adds.
_RECEIPT_BYTES = 1024
# Per image as COCO JSON lines and as Parquet, 10 detections each: measured; cluster/README.md.
_RESULT_BYTES = {"parquet": 450}
_JSON_RESULT_BYTES = 880


def plan_infer(
    job: InferJob, plan: PlanJob, nodes: Sequence[NodeKind], cluster: ClusterSize, sheet: PlanSheet
) -> None:
    """Fill a sheet with what a batch inference will take.

    Args:
        job: The inference.
        plan: What nobody can look up.
        nodes: The machines.
        cluster: What they are together.
        sheet: Gets figures, and what is missing.
    """
    card = read_planned_card(job.model, job.reading, sheet)
    backend = check_backend(job.model, job.backend, cluster.num_gpus > 0, sheet)
    if job.decoding.device == "gpu" and backend not in ("", "tensorrt"):
        sheet.miss(
            f"decoding.device=gpu decodes on the engine's GPU, and backend {backend!r} has none: "
            "leave --decode out, or add GPU nodes"
        )
    files = _inspect(job, plan, sheet)
    num_parts = max(1, count_parts(max(1, files.num_files), job.part_size))
    workers = _place_workers(job, num_parts, cluster, sheet)
    _add_work(job, files, num_parts, sheet)
    sheet.add("workers", "backend", backend or "none")
    memory = None if card is None else _measure(job, card)
    canvas = choose_canvas(job.detection, card)
    if canvas is not None:
        sheet.add("work", "canvas", f"{canvas[0]}x{canvas[1]}", "height x width")
    host_bytes = WORKER_BASE_BYTES + add_reading_memory(
        job.batch, canvas, files, job.reading, sheet, pipelines=PARTS_AT_ONCE
    )
    if memory is not None:
        host_bytes += add_network_memory(memory, job.batch, sheet, has_gpu=workers.num_gpus > 0)
        if workers.num_gpus:
            check_gpu_room(memory.peak, round(1 / job.gpus_per_worker), nodes, sheet)
    sheet.estimate("host memory per worker", "all_bytes", host_bytes, "its process included")
    store = _add_object_store(job, canvas, num_parts, workers, sheet)
    check_host_room(host_bytes, workers, workers.num_workers, nodes, sheet, store_bytes=store)
    _add_requests(job, files, num_parts, sheet)


def read_planned_card(uri: str, reading: ReadingConfig, sheet: PlanSheet) -> ModelCard | None:
    """The card of a model; none when it cannot be had, which the sheet then says."""
    storage = Storage(endpoint_url=reading.endpoint_url)
    try:
        content, sidecar = read_model_file(uri, storage.read_bytes)
        card = read_model_card(content, sidecar, uri)
    except (StorageError, CheckpointError, InferenceError) as error:
        sheet.miss(f"model: {error}")
        return None
    sheet.add("work", "model_file_bytes", len(content))
    return card


def check_backend(uri: str, asked: str, has_gpu: bool, sheet: PlanSheet) -> str:
    """The runtime of a model; empty when none can run it there, which the sheet then says."""
    try:
        return choose_backend(model_kind(uri), asked, has_gpu=has_gpu)[0]
    except (InferenceError, CheckpointError) as error:
        sheet.miss(f"nodes: {error}")
        return ""


def choose_canvas(detection: DetectionConfig, card: ModelCard | None) -> tuple[int, int] | None:
    """Height and width of the network; none = unknown."""
    asked = make_predictor_settings(detection, batch=1, threads=1).canvas
    return asked or (card.canvas if card is not None else None)


def _measure(job: InferJob, card: ModelCard) -> InferenceMemory:
    canvas = choose_canvas(job.detection, card) or card.canvas
    return measure_inference(card.build_model, batch=job.batch, canvas=canvas)


def _inspect(job: InferJob, plan: PlanJob, sheet: PlanSheet) -> FileFacts:
    storage = Storage(endpoint_url=job.reading.endpoint_url)
    try:
        files = inspect_inference_files(
            job,
            storage,
            num_images=plan.num_images,
            limit=plan.max_listed,
            image_bytes=plan.image_bytes,
        )
    except (ConfigError, DatasetError, StorageError) as error:
        sheet.miss(f"images: {error}")
        return assume_files(0, plan.image_bytes)
    if files.is_cut_off:
        sheet.miss(
            f"images: more than {plan.max_listed:,} are in {job.images}, and the figures are for "
            "these: give --num-images, or a larger --max-listed"
        )
    return files


def _place_workers(
    job: InferJob, num_parts: int, cluster: ClusterSize, sheet: PlanSheet
) -> WorkerPlan:
    def place(there: ClusterSize) -> WorkerPlan:
        return plan_inference(
            job.workers,
            num_parts,
            there,
            gpus_per_worker=job.gpus_per_worker,
            decode_cpus=job.decoding.num_cpus,
        )

    try:
        workers = place(cluster)
    except ClusterError as error:
        sheet.miss(str(error))
        asked = job.workers or 1
        # What the memory of workers is reckoned for where there are too few of everything.
        workers = place(
            replace(
                cluster,
                num_cpus=cluster.num_cpus + job.decoding.num_cpus + asked + 1,
                num_gpus=max(cluster.num_gpus, asked) if cluster.num_gpus else 0,
            )
        )
    if job.workers is not None and job.workers > num_parts:
        sheet.miss(
            f"workers={job.workers}, and there are {num_parts} parts: {job.workers - num_parts} "
            "would idle: lower --workers or --part-size"
        )
    total = workers.num_workers * workers.num_cpus
    sheet.add("workers", "workers", workers.num_workers)
    note = f"each; the nodes have {cluster.num_gpus:g}"
    sheet.add("workers", "gpus_per_worker", workers.num_gpus, note)
    note = f"each; {total + job.decoding.num_cpus:g} of {cluster.num_cpus:g} with those that decode"
    sheet.add("workers", "cpus_per_worker", workers.num_cpus, note)
    sheet.add("workers", "cpus_for_decoding", job.decoding.num_cpus)
    free = cluster.num_cpus - total - job.decoding.num_cpus
    sheet.add("workers", "cpus_left_to_ray", round(free, 2), "Ray Data stalls without any")
    if job.decoding.num_cpus and not cluster.is_local and job.decoding.resource is not None:
        note = f"custom resource {job.decoding.resource}: whether nodes have it is not known here"
        sheet.add("workers", "decoding_placed_by", job.decoding.resource, note)
    sheet.add("workers", "threads_per_worker", workers.num_threads)
    return workers


def _add_work(job: InferJob, files: FileFacts, num_parts: int, sheet: PlanSheet) -> None:
    sheet.add("work", "images", files.num_files)
    note = "the cut does not depend on the number of workers"
    sheet.add("work", "parts", num_parts if files.num_files else 0, note)
    sheet.add("work", "images_per_call", job.batch)


def add_network_memory(
    memory: InferenceMemory, batch: int, sheet: PlanSheet, *, has_gpu: bool
) -> int:
    """Figures of the network; returns the bytes of host memory that it takes."""
    section = "GPU memory per worker" if has_gpu else "host memory per worker"
    sheet.add(section, "weights_bytes", memory.weights, "in float32")
    note = (
        f"weights and activations of {batch} images in float32, counted in a call without content; "
        "TensorRT and OpenVINO plan their own, as a rule less"
    )
    sheet.estimate(section, "network_peak_bytes", memory.peak, note)
    # The file is read into host memory before it is loaded.
    return memory.weights + (0 if has_gpu else memory.peak)


def add_reading_memory(
    batch: int,
    canvas: tuple[int, int] | None,
    files: FileFacts,
    reading: ReadingConfig,
    sheet: PlanSheet,
    *,
    pipelines: int,
) -> int:
    """Figures of reading, by the formula of `detect_placed`; returns their bytes.

    Args:
        batch: Images per network call.
        canvas: Height and width of the network; none = unknown, and not counted.
        files: How long they are.
        reading: Threads and limits.
        sheet: Gets the figures.
        pipelines: Such readers at once in a process.
    """
    section = "host memory per worker"
    height, width = canvas or (0, 0)
    batches = -(-count_ahead(batch, reading.threads) // batch) + 2
    canvases = pipelines * 3 * height * width * batch * batches
    sheet.add(section, "canvases_bytes", canvases, f"{pipelines} x {batches} batches at most")
    threads = pipelines * reading.threads
    in_flight = threads * files.largest_bytes
    source = "assumed" if files.is_assumed else "the largest"
    note = f"{threads} files of {files.largest_bytes:,} bytes ({source})"
    sheet.estimate(section, "files_bytes", in_flight, note)
    limit = pipelines * (reading.decode_memory_mib << 20)
    expected = threads * estimate_decoding(None, files.largest_bytes)
    note = "photos of 4000x2250 in all threads, or --decode-memory if that is less"
    sheet.estimate(section, "decoding_bytes", min(limit, expected), note)
    sheet.add(section, "decoding_at_most_bytes", limit, "or one image, if that takes more")
    return canvases + in_flight + min(limit, expected)


def _add_object_store(
    job: InferJob,
    canvas: tuple[int, int] | None,
    num_parts: int,
    workers: WorkerPlan,
    sheet: PlanSheet,
) -> int:
    """Bytes in the object stores of all machines together."""
    receipts = num_parts * _RECEIPT_BYTES
    sheet.estimate("object store", "receipts_bytes", receipts, "pixels never pass through it")
    if not job.decoding.num_cpus or canvas is None:
        return receipts
    height, width = canvas
    num_tasks = max(1, job.decoding.num_cpus // (workers.num_workers * PARTS_AT_ONCE))
    images = workers.num_workers * PARTS_AT_ONCE * num_tasks * DECODE_GROUP
    note = f"{images:,} canvases: tasks x {DECODE_GROUP}, for each part in hand"
    sheet.add("object store", "remote_decoding_bytes", images * 3 * height * width, note)
    return receipts + images * 3 * height * width


def count_requests(
    num_images: int, num_parts: int, *, images_on_s3: bool, run_on_s3: bool, is_merged: bool
) -> dict[str, int]:
    """S3 requests of a run without faults, by kind; as in the scaling sheet of cluster/README.md.

    Args:
        num_images: Images.
        num_parts: Parts.
        images_on_s3: Whether the images are there.
        run_on_s3: Whether the run is written there.
        is_merged: Whether the parts are read once more, to be merged.
    """
    counts = {"GET": 0, "PUT": 0, "LIST": 0, "DELETE": 0}
    if images_on_s3:
        counts["GET"] += num_images
        counts["LIST"] += -(-num_images // _S3_PAGE)
    if run_on_s3:
        # Of each part a journal that is looked for and written, the run's record, the part itself.
        counts["GET"] += num_parts * (3 if is_merged else 2)
        counts["PUT"] += 2 * num_parts + -(-num_parts // _PARTS_PER_MANIFEST_FILE)
        counts["DELETE"] += num_parts
    return counts


def _add_requests(job: InferJob, files: FileFacts, num_parts: int, sheet: PlanSheet) -> None:
    counts = count_requests(
        files.num_files,
        num_parts,
        images_on_s3=is_s3(job.images),
        run_on_s3=is_s3(job.output),
        is_merged=job.write.format != "parquet",
    )
    for kind, count in counts.items():
        sheet.estimate("traffic", f"s3_{kind.lower()}_requests", count)
    looked = "assumed with --image-bytes" if files.is_assumed else "mean of the files"
    note = f"{files.mean_bytes:,.0f} bytes per image, {looked}"
    sheet.estimate("traffic", "read_bytes", round(files.mean_bytes * files.num_files), note)
    per_image = _RESULT_BYTES.get(job.write.format, _JSON_RESULT_BYTES)
    note = f"{per_image} bytes per image: 10 detections each, uncompressed"
    sheet.estimate("traffic", "result_bytes", per_image * files.num_files, note)
