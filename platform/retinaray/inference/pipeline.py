"""From files to detections in original pixels: fetched and decoded ahead, found in batches.

The same code serves the evaluation of a model, the validation during training and each worker of a
cluster run. One bad image is one error, never a failed run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass

from retinaray.data.coco_results import coco_results
from retinaray.data.transforms import Placement
from retinaray.detector.postprocess import Detections
from retinaray.inference.batch_stream import predict_stream
from retinaray.inference.canvas_batches import (
    CanvasBatch,
    CanvasBatches,
    StartLoading,
    count_ahead,
)
from retinaray.inference.canvas_loading import (
    CanvasLoader,
    ReadSettings,
    ThreadLoader,
    load_canvas,
)
from retinaray.inference.image_sources import (
    IMAGE_FAULTS,
    ImageResult,
    ImageSource,
    Scalar,
    TarMember,
    failed_result,
)
from retinaray.inference.predictor import Predictor
from retinaray.inference.stage_times import StageClock

__all__ = [
    "IMAGE_FAULTS",
    "ImageResult",
    "ImageSource",
    "PlacedDetections",
    "ReadSettings",
    "Scalar",
    "TarMember",
    "count_ahead",
    "detect_images",
    "detect_placed",
    "failed_result",
    "load_canvas",
]


@dataclass(frozen=True)
class PlacedDetections:
    """What was found in one image, before it is translated into its own pixels.

    Attributes:
        source: Which image.
        placement: Where it lay on the canvas.
        detections: In network pixels, on the CPU.
    """

    source: ImageSource
    placement: Placement
    detections: Detections


def detect_images(
    predictor: Predictor,
    sources: Iterable[ImageSource],
    *,
    read: Callable[[str], bytes],
    batch: int,
    settings: ReadSettings,
    loader: CanvasLoader | None = None,
    clock: StageClock | None = None,
) -> Iterator[ImageResult]:
    """Detect in many images.

    Args:
        predictor: The model.
        sources: Images; see `detect_placed`.
        read: Gives the bytes at a URI; raises StorageError.
        batch: Images per network call.
        settings: Reading.
        loader: See `detect_placed`.
        clock: See `detect_placed`.

    Raises:
        StorageError: If the store fails for other reasons than one file.
        InferenceError: If too many threads hang in decoding.

    Yields:
        One result per source, in their order. Images that cannot be read or decoded have an error,
        and do not change which other images share a batch.
    """
    placed = detect_placed(
        predictor, sources, read=read, batch=batch, settings=settings, loader=loader, clock=clock
    )
    categories = predictor.card.categories
    with closing(placed):
        for item in placed:
            if isinstance(item, ImageResult):
                yield item
                continue
            yield ImageResult(
                source=item.source,
                height=item.placement.height,
                width=item.placement.width,
                detections=tuple(coco_results(item.detections, item.placement, categories)),
            )


def detect_placed(
    predictor: Predictor,
    sources: Iterable[ImageSource],
    *,
    read: Callable[[str], bytes],
    batch: int,
    settings: ReadSettings,
    loader: CanvasLoader | None = None,
    clock: StageClock | None = None,
) -> Generator[PlacedDetections | ImageResult, None, None]:
    """Detect in many images, and leave the detections in network pixels.

    Whatever the sizes of the images, this much memory is taken at most, where A = `count_ahead`,
    3 batches or one image per thread, and the canvas has H x W pixels:

        canvases: 3 H W * batch * (ceil(A / batch) + 2)
        files:    threads * max_bytes
        decoding: the larger of decode_bytes and what the largest image takes, which is at most 20
                  bytes for each of max_pixels (see `estimate_decode_bytes`)

    and for each thread that hangs one file and one image more. Of the batches two are not ahead:
    one in the network, and one whose detections are being taken, which without `predict_batches`
    are the same. Another loader has its own bounds for files and decoding.

    Args:
        predictor: The model; one with `predict_batches` gets the next batch while it computes.
        sources: Images, consumed as needed: at most three batches (or one image per thread, if
            that is more) beyond the batch that the network was given last; may be endless.
        read: Gives the bytes at a URI; raises StorageError.
        batch: Images per network call.
        settings: Reading.
        loader: Makes the canvases in place of threads of this process, then `read` and the limits
            of the settings are its own business. Who made it closes it.
        clock: Counts where the time goes: fetch, decode, engine, starved, bytes.

    Raises:
        StorageError: If the store fails for other reasons than one file.
        InferenceError: If too many threads hang in decoding.

    Yields:
        One item per source, in their order: detections, or the error of an image that cannot be
        read or decoded.
    """
    clock = clock or StageClock()
    with ExitStack() as closing_in_turn:
        batches = CanvasBatches(
            sources,
            _choose_start(predictor, read, settings, loader, clock, closing_in_turn),
            batch=batch,
            ahead=count_ahead(batch, settings.threads),
            canvas=predictor.canvas,
            clock=clock,
        )
        closing_in_turn.callback(batches.cancel)
        stream = closing_in_turn.enter_context(
            closing(predict_stream(predictor, iter(batches), clock))
        )
        for loaded, found in stream:
            yield from _join(loaded, found)
            batches.recycle(loaded)


def _choose_start(
    predictor: Predictor,
    read: Callable[[str], bytes],
    settings: ReadSettings,
    loader: CanvasLoader | None,
    clock: StageClock,
    closing_in_turn: ExitStack,
) -> StartLoading:
    if loader is not None:
        return lambda source, _: loader.load(source)
    threads = ThreadLoader(canvas=predictor.canvas, read=read, settings=settings, clock=clock)
    closing_in_turn.callback(threads.close)
    return threads.load


def _join(loaded: CanvasBatch, found: list[Detections]) -> Iterator[PlacedDetections | ImageResult]:
    detections = iter(found)
    for item in loaded.items:
        if isinstance(item, ImageResult):
            yield item
        else:
            yield PlacedDetections(*item, next(detections))
