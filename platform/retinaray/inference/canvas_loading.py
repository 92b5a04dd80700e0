"""From where an image is to its canvas: what loads, and the loader that uses threads of its own.

Knows no network and no batch.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from retinaray.data.decode_memory import estimate_decode_bytes
from retinaray.data.image_decoding import (
    DEFAULT_MAX_PIXELS,
    DecodedImage,
    decode_image,
)
from retinaray.data.transforms import Placement, fit_size, resize_pixels
from retinaray.errors import ImageError
from retinaray.inference.byte_budget import ByteBudget
from retinaray.inference.image_sources import ImageSource
from retinaray.inference.stage_times import StageClock
from retinaray.inference.watched_threads import Watch, WatchedThreads

Canvas = UInt8[np.ndarray, "H W 3"]

# Above what `max_pixels` lets through by default, were it stored without compression.
DEFAULT_MAX_BYTES = 1 << 29


class LoadedCanvas(NamedTuple):
    """An image as the network takes it.

    Attributes:
        pixels: RGB on a black canvas of the network's size, uint8, in host memory.
        placement: Where the image lies on it.
    """

    pixels: Canvas
    placement: Placement


class DeviceCanvas(NamedTuple):
    """What `LoadedCanvas` is in host memory, on the device of the network; channels come first.

    Attributes:
        pixels: As in `LoadedCanvas`; whoever gets it may read it on every stream.
        placement: Where the image lies on it.
    """

    pixels: UInt8[Tensor, "3 H W"]
    placement: Placement


class CanvasLoader(Protocol):
    """Fetches, decodes and letterboxes images somewhere else than in the thread that asks.

    It knows the network's canvas from its making. Whoever made it closes it; it may serve several
    loops over images, one after the other.
    """

    def load(self, source: ImageSource) -> Future[LoadedCanvas] | Future[DeviceCanvas]:
        """Start to load an image; returns at once.

        At most `count_ahead` images plus one batch are asked for and not yet taken. They are waited
        for in their order, by `exception` and `result` alone; `cancel` says that one need not come.

        Returns:
            The canvas, an array that nobody else writes to; or ImageError or UnreadableFileError,
            which become the error of this image; or whatever else was raised, which ends the part.
        """
        ...

    def close(self) -> None:
        """Stop, and wait for what runs; what was not loaded never will be."""
        ...


@dataclass(frozen=True)
class ReadSettings:
    """How files become canvases.

    Attributes:
        threads: Files fetched and decoded at once.
        max_pixels: Larger files are refused before they are decoded.
        allow_truncated: Accept files that end early.
        max_bytes: Longer files are refused: those in tars before they are fetched.
        max_seconds: An image that takes longer to decode is refused; fetching does not count.
        max_hung: Threads of a process that may hang in decoding, which cannot be ended, at a time;
            with one more the part fails.
        decode_bytes: What decoding may take in all threads together, as `estimate_decode_bytes`
            says; an image that takes more is decoded alone. The default is enough for 13 PNG files
            of 4000x2250.
    """

    threads: int = 8
    max_pixels: int = DEFAULT_MAX_PIXELS
    allow_truncated: bool = False
    max_bytes: int = DEFAULT_MAX_BYTES
    max_seconds: float = 60.0
    max_hung: int = 4
    decode_bytes: int = 1 << 30


def load_canvas(
    source: ImageSource,
    canvas: tuple[int, int],
    read: Callable[[str], bytes],
    settings: ReadSettings,
) -> LoadedCanvas:
    """Fetch, decode and letterbox one image, in this thread, for as long as it takes.

    Raises:
        StorageError: If the bytes cannot be had.
        ImageError: If they are no usable image.
    """
    content = fetch_file(source, read, max_bytes=settings.max_bytes)
    decoded = _decode(content, canvas, settings)
    return _place(decoded, np.empty((*canvas, 3), dtype=np.uint8))


def fetch_file(
    source: ImageSource,
    read: Callable[[str], bytes],
    *,
    max_bytes: int,
    clock: StageClock | None = None,
) -> bytes:
    """Fetch one file, or refuse it for its length.

    Args:
        source: Which.
        read: Gives the bytes at a URI; raises StorageError.
        max_bytes: Longest file that is accepted.
        clock: Counts the time and the bytes.

    Raises:
        StorageError: If the bytes cannot be had.
        ImageError: If there are more than that; what lies in a tar is not fetched then.
    """
    if source.member is not None:
        _refuse_long(source.member.num_bytes, max_bytes)
    clock = clock or StageClock()
    with clock.measure("fetch"):
        content = read(source.uri)
    clock.count_bytes(len(content))
    _refuse_long(len(content), max_bytes)
    return content


class ThreadLoader:
    """Loads canvases in threads of this process; a `CanvasLoader`.

    In memory lie, beside the canvases: of each thread one file, of at most `max_bytes`; and what
    decoding takes, at most `decode_bytes`, or one image if that takes more. Of each thread that
    hangs, both of its own image stay too.

    Args:
        canvas: Network height and width.
        read: Gives the bytes at a URI; raises StorageError.
        settings: Threads and limits.
        clock: Counts fetching and decoding.
    """

    def __init__(
        self,
        *,
        canvas: tuple[int, int],
        read: Callable[[str], bytes],
        settings: ReadSettings,
        clock: StageClock | None = None,
    ) -> None:
        self._canvas = canvas
        self._read = read
        self._settings = settings
        self._clock = clock or StageClock()
        self._room = ByteBudget(settings.decode_bytes)
        self._threads = WatchedThreads(
            settings.threads,
            name="decode",
            max_seconds=settings.max_seconds,
            max_hung=settings.max_hung,
        )

    def load(self, source: ImageSource, into: Canvas | None = None) -> Future[LoadedCanvas]:
        """See `CanvasLoader`.

        Args:
            source: Which.
            into: Where the canvas is written, then the array that is given back; none = a new
                array. What failed has not touched it.
        """
        return self._threads.submit(lambda watch: self._load(source, into, watch))

    def close(self) -> None:
        """Drop what has not begun, and wait for the rest."""
        self._threads.close()

    def _load(self, source: ImageSource, into: Canvas | None, watch: Watch) -> LoadedCanvas:
        settings = self._settings
        content = fetch_file(source, self._read, max_bytes=settings.max_bytes, clock=self._clock)
        with self._clock.measure("decode"), watch.limited(lambda: None):
            needed = estimate_decode_bytes(
                content,
                fit_height=self._canvas[0],
                fit_width=self._canvas[1],
                max_pixels=settings.max_pixels,
            )
        give_back = self._room.take(needed)
        try:
            with self._clock.measure("decode"):
                return self._decode_into(into, content, watch, give_back)
        finally:
            give_back()

    def _decode_into(
        self, into: Canvas | None, content: bytes, watch: Watch, give_back: Callable[[], None]
    ) -> LoadedCanvas:
        """A function of its own: with its end the pixels are gone, and only then their room is."""
        with watch.limited(give_back):
            decoded = _decode(content, self._canvas, self._settings)
        # Not before it is known that the image is still waited for: the canvas of one that is not
        # belongs to another image by now.
        return _place(decoded, self._new_canvas() if into is None else into)

    def _new_canvas(self) -> Canvas:
        return np.empty((*self._canvas, 3), dtype=np.uint8)


def _refuse_long(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise ImageError(
            f"expected a file of at most max_bytes={max_bytes}, got {num_bytes} bytes: drop the "
            "file or raise the limit"
        )


def _decode(content: bytes, canvas: tuple[int, int], settings: ReadSettings) -> DecodedImage:
    return decode_image(
        content,
        fit_height=canvas[0],
        fit_width=canvas[1],
        max_pixels=settings.max_pixels,
        allow_truncated=settings.allow_truncated,
    )


def _place(decoded: DecodedImage, canvas: Canvas) -> LoadedCanvas:
    """Letterbox as `transforms.letterbox` does, into memory that holds anything."""
    canvas_height, canvas_width = canvas.shape[:2]
    height, width = fit_size(decoded.full_height, decoded.full_width, canvas_height, canvas_width)
    canvas[:height, :width] = resize_pixels(decoded.pixels, height, width)
    canvas[height:] = 0
    canvas[:height, width:] = 0
    return LoadedCanvas(canvas, Placement(decoded.full_height, decoded.full_width, height, width))
