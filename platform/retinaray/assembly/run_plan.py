"""Settings of a batch inference as what its parts are made of: which images, what is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

from retinaray.artifact import ModelCard
from retinaray.assembly.reading import make_predictor_settings, make_read_settings
from retinaray.assembly.run_pictures import PictureSettings, RunPictures
from retinaray.config.schema import InferJob, SelectionConfig
from retinaray.data.image_decoding import decode_image
from retinaray.evaluation.coco_map import restrict_truth
from retinaray.inference.canvas_loading import CanvasLoader, fetch_file
from retinaray.inference.manifest import source_root
from retinaray.inference.output_formats import OutputSettings, read_output_name
from retinaray.inference.pipeline import ImageResult, ImageSource, detect_images
from retinaray.inference.predictor import Predictor, PredictorSettings
from retinaray.inference.run_files import RunFiles
from retinaray.inference.source_filters import SourceChoice, parse_moment
from retinaray.inference.stage_times import StageClock
from retinaray.inference.tiled_pipeline import detect_tiled
from retinaray.inference.tiling import TileSettings, make_tile_predictor_settings
from retinaray.inference.watched_threads import Watch, WatchedThreads

_DRAW_SEED = 0
# A photo that is worth tiling holds more objects than a card's 100.
_MAX_TILED_DETECTIONS = 1000


def make_choice(select: SelectionConfig) -> SourceChoice:
    """Which of the images that are found are taken.

    Raises:
        ConfigError: If values contradict each other.
    """
    sample = select.sample
    return SourceChoice(
        include=select.include,
        exclude=select.exclude,
        min_bytes=select.min_bytes,
        max_bytes=select.max_bytes,
        modified_after=parse_moment(select.modified_after) if select.modified_after else None,
        modified_before=parse_moment(select.modified_before) if select.modified_before else None,
        limit=select.limit,
        sample=int(sample) if sample is not None and sample == int(sample) else sample,
        seed=select.seed,
    )


def list_truth(job: InferJob, files: RunFiles, num_parts: int, truth: Any) -> Any:
    """The ground truth of the images that a finished run has taken.

    Args:
        job: Whether it chose among them.
        files: The run.
        num_parts: Its parts.
        truth: Content of the annotations.
    """
    if job.select == SelectionConfig():
        return truth
    taken = {row["image_id"] for row in (*files.read_rows(num_parts), *files.list_errors())}
    return restrict_truth(truth, taken)


def make_output(job: InferJob, record: Mapping[str, Any]) -> OutputSettings:
    """What a run writes, from its settings and its record."""
    return OutputSettings(
        format=job.write.format,
        compression=job.write.compression,
        merged_compression=read_output_name(job.output, job.write.format).merged_compression,
        categories=tuple(record["categories"]),
        images_root=source_root(job.images, {} if job.annotations else None),
        has_integer_ids=record["has_integer_ids"],
    )


def make_infer_settings(job: InferJob, *, threads: int) -> PredictorSettings:
    """How the engine of a worker runs: tiles are suppressed one by one and merged afterwards."""
    settings = make_predictor_settings(job.detection, batch=job.batch, threads=threads)
    return settings if job.tiling.tile is None else make_tile_predictor_settings(settings)


def make_tiling(job: InferJob, card: ModelCard) -> TileSettings | None:
    """How images are cut; none = not at all."""
    if job.tiling.tile is None:
        return None
    height, width = job.tiling.tile
    asked = job.detection.max_detections
    return TileSettings(
        tile_height=height,
        tile_width=width,
        overlap=job.tiling.overlap,
        has_full=job.tiling.full,
        merge=job.tiling.merge,
        merge_threshold=job.tiling.threshold,
        is_class_agnostic=(job.detection.nms_kind or card.nms_kind) == "agnostic",
        max_detections=_MAX_TILED_DETECTIONS if asked is None else asked,
    )


def detect_part(
    predictor: Predictor,
    sources: Iterable[ImageSource],
    job: InferJob,
    *,
    read: Callable[[str], bytes],
    loader: CanvasLoader | None = None,
    ahead: int = 0,
    clock: StageClock | None = None,
) -> Iterator[ImageResult]:
    """Detect in the images of a part, cut or whole as the job says.

    Args:
        predictor: The model.
        sources: The images.
        job: The job.
        read: Gives the bytes at a URI; raises StorageError.
        loader: Makes the canvases of whole images in place of threads of this process; of no use
            to tiles, which are cut from the pixels of the image.
        ahead: Images that are asked of it ahead, if that is more than three batches.
        clock: Counts where the time goes.

    Raises:
        StorageError: If the store fails for other reasons than one file; while results are taken.
        InferenceError: If too many threads hang in decoding; likewise.
    """
    settings = make_read_settings(job.reading)
    if loader is not None:
        # As many as there would be threads.
        settings = replace(settings, threads=max(1, ahead))
    tiling = make_tiling(job, predictor.card)
    if tiling is None:
        return detect_images(
            predictor,
            sources,
            read=read,
            batch=job.batch,
            settings=settings,
            loader=loader,
            clock=clock,
        )
    return detect_tiled(
        predictor,
        sources,
        read=read,
        batch=job.batch,
        settings=settings,
        tiling=tiling,
        clock=clock,
    )


def load_as_used(
    source: ImageSource, job: InferJob, canvas: tuple[int, int], read: Callable[[str], bytes]
) -> None:
    """Read one image as `detect_part` would, and forget it.

    Raises:
        ImageError, StorageError: If it cannot be read or decoded.
        InferenceError: If too many threads hang in decoding.
    """
    settings = make_read_settings(job.reading)
    content = fetch_file(source, read, max_bytes=settings.max_bytes)
    fit_height, fit_width = canvas if job.tiling.tile is None else (None, None)

    def decode(watch: Watch) -> None:
        with watch.limited(lambda: None):
            decode_image(
                content,
                fit_height=fit_height,
                fit_width=fit_width,
                max_pixels=settings.max_pixels,
                allow_truncated=settings.allow_truncated,
            )

    threads = WatchedThreads(
        1, name="probe", max_seconds=settings.max_seconds, max_hung=settings.max_hung
    )
    with closing(threads):
        threads.submit(decode).result()


def make_pictures(
    job: InferJob, files: RunFiles, card: ModelCard, read: Callable[[str], bytes], *, limit: int
) -> RunPictures:
    """The writer of overlays and cut-outs.

    Args:
        job: The job.
        files: The run.
        card: Names of the classes.
        read: Gives the bytes at a URI.
        limit: Of the hashes of the images that are drawn.
    """
    settings = PictureSettings(
        limit=limit,
        seed=_DRAW_SEED,
        has_crops=job.write.crops,
        max_pixels=job.reading.max_pixels,
        allow_truncated=job.reading.allow_truncated,
    )
    names = dict(zip(card.categories.ids, card.categories.names, strict=True))
    return RunPictures(files, settings, names=names, read=read)
