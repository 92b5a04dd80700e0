"""From files to detections in original pixels: fetched and decoded ahead, found in batches.

The same code serves the evaluation of a model, the validation during training and each worker of a
cluster run. One bad image is one error, never a failed run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import UInt8

from retinaray.data.coco_results import coco_results
from retinaray.data.image_decoding import decode_image
from retinaray.data.transforms import Placement, letterbox
from retinaray.detector.postprocess import Detections
from retinaray.errors import ImageError, UnreadableFileError
from retinaray.inference.predictor import Predictor

# Batches that are fetched and decoded while the network works on one.
_BATCHES_AHEAD = 3

IMAGE_FAULTS = (ImageError, UnreadableFileError)
"""What becomes the error of one image. A store that fails altogether is no fault of the image: it
ends the part, to be tried again."""

Scalar = str | int | float | bool | None
"""What a pass-through column may hold: whatever JSON writes without brackets."""


@dataclass(frozen=True)
class TarMember:
    """Where an image lies inside a tar.

    Attributes:
        shard: URI of the tar.
        name: The member's name, as it stands there; only a name, never a path.
        offset: Position of its first byte in the tar.
        num_bytes: Its length.
    """

    shard: str
    name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class ImageSource:
    """One image to process: its id in the results, and where its bytes are.

    Attributes:
        image_id: Of any size, or text.
        uri: Its file; of an image in a tar the tar's URI, a slash and the member's name.
        member: Where it lies in its tar; none for a file of its own.
        columns: What a manifest says of it and the results repeat; none without a manifest.
    """

    image_id: int | str
    uri: str
    member: TarMember | None = None
    columns: Mapping[str, Scalar] | None = None


@dataclass(frozen=True)
class ImageResult:
    """What came of one image.

    Attributes:
        source: Which image.
        height: Upright height in pixels; 0 when it failed.
        width: Upright width in pixels; 0 when it failed.
        detections: COCO results of this image: category_id, bbox xywh in original pixels, score;
            best first.
        error: Why there are none; empty when there was no error.
        exception: Class of the error.
    """

    source: ImageSource
    height: int = 0
    width: int = 0
    detections: tuple[dict[str, object], ...] = ()
    error: str = ""
    exception: str = ""

    @property
    def coco_results(self) -> list[dict[str, object]]:
        """The detections as a COCO results list, each with its image_id."""
        return [{"image_id": self.source.image_id, **found} for found in self.detections]


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


@dataclass(frozen=True)
class ReadSettings:
    """How files become canvases.

    Attributes:
        threads: Files fetched and decoded at once.
        max_pixels: Larger files are refused before they are decoded.
        allow_truncated: Accept files that end early.
    """

    threads: int = 8
    max_pixels: int = 178_956_970
    allow_truncated: bool = False


_Loaded = tuple[UInt8[np.ndarray, "H W 3"], Placement]


def detect_images(
    predictor: Predictor,
    sources: Iterable[ImageSource],
    *,
    read: Callable[[str], bytes],
    batch: int,
    settings: ReadSettings,
) -> Iterator[ImageResult]:
    """Detect in many images.

    Args:
        predictor: The model.
        sources: Images; see `detect_placed`.
        read: Gives the bytes at a URI; raises StorageError.
        batch: Images per network call.
        settings: Reading.

    Raises:
        StorageError: If the store fails for other reasons than one file.

    Yields:
        One result per source, in their order. Images that cannot be read or decoded have an error,
        and do not change which other images share a batch.
    """
    placed = detect_placed(predictor, sources, read=read, batch=batch, settings=settings)
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
) -> Generator[PlacedDetections | ImageResult, None, None]:
    """Detect in many images, and leave the detections in network pixels.

    Args:
        predictor: The model.
        sources: Images, consumed as needed: at most three batches (or one image per thread, if
            that is more) beyond the batch in the network; may be endless.
        read: Gives the bytes at a URI; raises StorageError.
        batch: Images per network call.
        settings: Reading.

    Yields:
        One item per source, in their order: detections, or the error of an image that cannot be
        read or decoded.
    """
    remaining = iter(sources)
    window = count_ahead(batch, settings.threads)
    waiting: list[tuple[ImageSource, Future[_Loaded]]] = []
    pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="decode")

    def refill() -> None:
        for source in islice(remaining, window - len(waiting)):
            loading = pool.submit(load_canvas, source, predictor.canvas, read, settings)
            waiting.append((source, loading))

    try:
        refill()
        while waiting:
            current, waiting[:] = waiting[:batch], waiting[batch:]
            results = [_settle(source, loading) for source, loading in current]
            refill()
            yield from _predict_batch(predictor, results)
    finally:
        # After an error, or when the caller wants no more, nobody waits for what was queued.
        pool.shutdown(cancel_futures=True)


def count_ahead(batch: int, threads: int) -> int:
    """How many canvases are made ready beyond the batch in the network."""
    # Small batches must not leave threads without work.
    return max(batch * _BATCHES_AHEAD, threads)


def load_canvas(
    source: ImageSource,
    canvas: tuple[int, int],
    read: Callable[[str], bytes],
    settings: ReadSettings,
) -> _Loaded:
    """Fetch, decode and letterbox one image.

    Raises:
        StorageError: If the bytes cannot be had.
        ImageError: If they are no usable image.
    """
    decoded = decode_image(
        read(source.uri),
        fit_height=canvas[0],
        fit_width=canvas[1],
        max_pixels=settings.max_pixels,
        allow_truncated=settings.allow_truncated,
    )
    return letterbox(
        decoded.pixels,
        height=decoded.full_height,
        width=decoded.full_width,
        canvas_height=canvas[0],
        canvas_width=canvas[1],
    )


def _settle(
    source: ImageSource, loading: Future[_Loaded]
) -> ImageResult | tuple[ImageSource, _Loaded]:
    try:
        return source, loading.result()
    except IMAGE_FAULTS as error:
        return failed_result(source, error)


def failed_result(source: ImageSource, error: ImageError | UnreadableFileError) -> ImageResult:
    """The result of an image that cannot be read or decoded."""
    return ImageResult(source=source, error=str(error), exception=type(error).__name__)


def predict_canvases(
    predictor: Predictor, canvases: Sequence[UInt8[np.ndarray, "H W 3"]]
) -> list[Detections]:
    """Run one batch.

    Args:
        predictor: The model.
        canvases: Of the predictor's size; at most its batch, may be empty.

    Returns:
        The detections of each canvas in network pixels, on the CPU.
    """
    if not canvases:
        return []
    stacked = torch.from_numpy(np.stack(canvases))
    return predictor.predict(stacked.permute(0, 3, 1, 2))


def _predict_batch(
    predictor: Predictor, items: Sequence[ImageResult | tuple[ImageSource, _Loaded]]
) -> Iterator[PlacedDetections | ImageResult]:
    canvases = [item[1][0] for item in items if not isinstance(item, ImageResult)]
    found = iter(predict_canvases(predictor, canvases))
    for item in items:
        if isinstance(item, ImageResult):
            yield item
        else:
            source, (_, placement) = item
            yield PlacedDetections(source, placement, next(found))
