"""Canvases made on the GPU: nvJPEG, orientation, resize; whatever is not a plain JPEG on the CPU.

This is a second, approximate way to the canvas that `data.transforms` defines, and therefore only
for those who ask for it. Three things differ, and nothing else:

- the whole JPEG is decoded, where the CPU takes it at 1/2, 1/4 or 1/8 when the canvas is small;
- nvJPEG repeats subsampled colour, where libjpeg interpolates it;
- the resize rounds floats, where the CPU's 8-bit kernel rounds its weights.

nvJPEG may also accept damage inside the compressed pixels that the CPU refuses, or fill it in
otherwise. Files that end early never reach it.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional

from retinaray.data.image_decoding import read_header
from retinaray.data.transforms import Placement, fit_size
from retinaray.errors import InferenceError
from retinaray.inference.canvas_loading import (
    DeviceCanvas,
    ReadSettings,
    fetch_file,
    load_canvas,
)
from retinaray.inference.image_sources import ImageSource
from retinaray.inference.stage_times import StageClock

logger = logging.getLogger(__name__)

# A batch holds its whole images at once, and one of them in float32: 0.2 and at most 0.8 GB.
_MAX_BATCH_PIXELS = 1 << 26
# The antialiasing kernel keeps its weights in 48 KiB of shared memory: enough up to 94 to 1.
_MAX_SHRINK = 64
_BASELINE, _PROGRESSIVE, _START_OF_SCAN, _ADOBE = 0xC0, 0xC2, 0xDA, 0xEE
_OTHER_FRAMES = frozenset(range(0xC1, 0xD0)) - {_PROGRESSIVE, 0xC4, 0xC8, 0xCC}
_PLAIN_SAMPLINGS = frozenset([0x11, 0x21, 0x12, 0x22])


@dataclass(frozen=True)
class JpegLayout:
    """What the header of a plain JPEG says.

    Attributes:
        height: Rows as stored, not yet upright; at least 1.
        width: Columns as stored; at least 1.
        orientation: EXIF's, 1 to 8.
    """

    height: int
    width: int
    orientation: int

    @property
    def num_pixels(self) -> int:
        """Height x width."""
        return self.height * self.width

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width once it is turned."""
        is_sideways = self.orientation >= 5
        return (self.width, self.height) if is_sideways else (self.height, self.width)


@dataclass(eq=False)
class _Order:
    """An image that somebody waits for, with a layout for the GPU or a canvas from the CPU."""

    source: ImageSource
    content: bytes = b""
    layout: JpegLayout | None = None
    cpu_canvas: DeviceCanvas | None = None
    loaded: Future[DeviceCanvas] = field(default_factory=Future)


class GpuJpegLoader:
    """Fetches in threads; decodes plain JPEGs on the GPU, as many at once as have arrived.

    The canvases are uint8 tensors [3, H, W] that stay on the device, ready for every stream. They
    must be held until what reads them has finished, which `Predictor.predict` has when it returns.

    Args:
        canvas: Network height and width.
        read: Gives the bytes at a URI; raises StorageError.
        settings: Threads that fetch, and decode what the GPU does not; limits of a file. Those on
            time and on the memory of all threads together are not held.
        clock: Counts fetching, decoding and bytes.
        batch: Images decoded at once at most, and at most 64 megapixels of them.
        device: `cuda`, `cuda:1`, ...; `cpu` runs the same steps without nvJPEG, for tests.

    Raises:
        InferenceError: If there is no such GPU.
    """

    def __init__(
        self,
        *,
        canvas: tuple[int, int],
        read: Callable[[str], bytes],
        settings: ReadSettings,
        clock: StageClock | None = None,
        batch: int = 32,
        device: str = "cuda",
    ) -> None:
        if device != "cpu" and not torch.cuda.is_available():
            raise InferenceError(
                f"expected a CUDA GPU to decode on ({device}), found none: decode on the CPU"
            )
        self._canvas = canvas
        self._read = read
        self._settings = settings
        self._clock = clock or StageClock()
        self._batch = batch
        self._device = torch.device(device)
        self._stream = _make_stream(self._device)
        self._threads = ThreadPoolExecutor(settings.threads, thread_name_prefix="fetch")
        # All work on the device is done by one thread, on one stream.
        self._device_thread = ThreadPoolExecutor(1, thread_name_prefix="gpu-decode")
        self._lock = threading.Lock()
        self._fetched: deque[_Order] = deque()
        self._is_closed = False
        self._num_refused = 0

    def load(self, source: ImageSource) -> Future[DeviceCanvas]:
        """Make one canvas; the caller bounds how many are on their way.

        Returns:
            The canvas; or its ImageError or UnreadableFileError, or whatever else was raised.
        """
        order = _Order(source)
        self._submit(self._threads, self._fetch, order)
        return order.loaded

    def close(self) -> None:
        """Stop; what was not loaded never will be."""
        with self._lock:
            self._is_closed = True
        self._threads.shutdown(cancel_futures=True)
        self._device_thread.shutdown(cancel_futures=True)

    def _submit(
        self, pool: ThreadPoolExecutor, work: Callable[[_Order], None], order: _Order
    ) -> None:
        def run() -> None:
            try:
                work(order)
            except BaseException as error:
                order.loaded.set_exception(error)
                raise

        with self._lock:
            if not self._is_closed:
                pool.submit(run)

    def _fetch(self, order: _Order) -> None:
        order.content = fetch_file(
            order.source, self._read, max_bytes=self._settings.max_bytes, clock=self._clock
        )
        layout = read_jpeg_layout(order.content, max_pixels=self._settings.max_pixels)
        if layout is None or not self._suits_gpu(layout):
            self._decode_on_cpu(order)
            return
        order.layout = layout
        self._pass_to_device(order)

    def _suits_gpu(self, layout: JpegLayout) -> bool:
        if layout.num_pixels > _MAX_BATCH_PIXELS:
            return False
        height, width = layout.upright_size
        content_height, content_width = fit_size(height, width, *self._canvas)
        return max(height / content_height, width / content_width) <= _MAX_SHRINK

    def _decode_on_cpu(self, order: _Order) -> None:
        with self._clock.measure("decode"):
            canvas = load_canvas(
                order.source, self._canvas, lambda _: order.content, self._settings
            )
        order.layout = None
        pixels = torch.from_numpy(canvas.pixels).permute(2, 0, 1)
        order.cpu_canvas = DeviceCanvas(pixels, canvas.placement)
        self._pass_to_device(order)

    def _pass_to_device(self, order: _Order) -> None:
        with self._lock:
            if not self._is_closed:
                self._fetched.append(order)
                self._device_thread.submit(self._work_off)

    def _work_off(self) -> None:
        """Finish what has arrived meanwhile; nothing, if an earlier call took it along."""
        orders = self._take_batch()
        try:
            with self._clock.measure("decode"), torch.cuda.stream(self._stream):
                self._finish(orders)
        except BaseException as error:
            for order in orders:
                if not order.loaded.done():
                    order.loaded.set_exception(error)
            raise

    def _take_batch(self) -> list[_Order]:
        taken: list[_Order] = []
        room = _MAX_BATCH_PIXELS
        with self._lock:
            while self._fetched and len(taken) < self._batch:
                layout = self._fetched[0].layout
                room -= layout.num_pixels if layout else 0
                if room < 0:
                    break
                taken.append(self._fetched.popleft())
        return taken

    def _finish(self, orders: Sequence[_Order]) -> None:
        jpegs = [order for order in orders if order.layout is not None]
        pixels = dict(zip(jpegs, self._decode_jpegs(jpegs), strict=True))
        done: list[tuple[_Order, DeviceCanvas]] = []
        for order in orders:
            if order.cpu_canvas is not None:
                on_device = order.cpu_canvas.pixels.contiguous().to(self._device)
                done.append((order, order.cpu_canvas._replace(pixels=on_device)))
            elif order.layout is not None and (decoded := pixels[order]) is not None:
                upright = turn_upright(decoded, order.layout.orientation)
                done.append((order, DeviceCanvas(*place_pixels(upright, self._canvas))))
            else:
                self._submit(self._threads, self._decode_on_cpu, order)
        # Whoever gets a canvas may read it in another stream at once.
        self._synchronize()
        for order, canvas in done:
            order.loaded.set_result(canvas)

    def _decode_jpegs(self, orders: Sequence[_Order]) -> list[UInt8[Tensor, "3 h w"] | None]:
        """RGB as stored; none for a file that is refused."""
        if not orders:
            return []
        # The decoder writes in a stream of its own, into memory that ours may still be reading.
        self._synchronize()
        try:
            decoded = decode_jpegs([order.content for order in orders], self._device)
        except RuntimeError as error:
            # The decoder gives nothing at all if it refuses one of many.
            if len(orders) > 1:
                return [self._decode_jpegs([order])[0] for order in orders]
            self._num_refused += 1
            # None would hide a decoder that does not work at all, each would be too many.
            level = logging.WARNING if self._num_refused == 1 else logging.DEBUG
            logger.log(level, "%s is decoded on the CPU: %s", orders[0].source.uri, error)
            return [None]
        return list(decoded)

    def _synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def decode_jpegs(files: Sequence[bytes], device: torch.device) -> list[UInt8[Tensor, "3 h w"]]:
    """Decode JPEGs to RGB as they are stored, without regard to EXIF.

    Args:
        files: Whole JPEGs of one or three components, at least one.
        device: By nvJPEG on a GPU, by libjpeg on the CPU.

    Raises:
        RuntimeError: If one of them cannot be decoded, or the device fails.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    # A bytearray is writable, as torch wants its memory to be; nothing writes to it.
    contents = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in files]
    decoded: list[Tensor] = decode_jpeg(contents, mode=ImageReadMode.RGB, device=device)
    return decoded


def place_pixels(
    pixels: UInt8[Tensor, "3 h w"], canvas: tuple[int, int]
) -> tuple[UInt8[Tensor, "3 H W"], Placement]:
    """Fit an image into a black canvas on its own device, as `data.transforms.letterbox` does.

    Args:
        pixels: Upright RGB of full size.
        canvas: Height and width.

    Returns:
        The canvas, at most 1 away from letterbox's of the same pixels; where the image lies on it.
    """
    size = (pixels.shape[1], pixels.shape[2])
    fitted = fit_size(*size, *canvas)
    placed = torch.zeros((3, *canvas), dtype=torch.uint8, device=pixels.device)
    if size != fitted:
        # CUDA has no 8-bit kernel.
        resized = functional.interpolate(
            pixels[None].float(), fitted, mode="bilinear", antialias=True
        )
        pixels = resized[0].round_().clamp_(0, 255).to(torch.uint8)
    placed[:, : fitted[0], : fitted[1]] = pixels
    return placed, Placement(*size, *fitted)


def turn_upright(pixels: UInt8[Tensor, "3 h w"], orientation: int) -> UInt8[Tensor, "3 H W"]:
    """Apply an EXIF orientation, 1 to 8; from 5 on height and width change places."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 2)
    mirrored = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation)
    return pixels.flip(mirrored) if mirrored else pixels


def read_jpeg_layout(data: bytes, *, max_pixels: int) -> JpegLayout | None:
    """Read the header of a plain JPEG.

    Plain is: whole to its end marker; baseline or progressive; 8 bits; grey, or YCbCr with the
    colour in full or halved along one or both sides.

    Args:
        data: The whole file.
        max_pixels: Largest accepted height x width.

    Returns:
        The layout; none for every other file, among them all that are not JPEG.

    Raises:
        ImageError: If a plain JPEG is larger.
    """
    if not (data.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9")):
        return None
    size: tuple[int, int] | None = None
    marker = 0
    for marker, segment in _read_segments(data):
        if marker in _OTHER_FRAMES or (marker == _ADOBE and not _is_ycbcr(segment)):
            return None
        if marker in (_BASELINE, _PROGRESSIVE):
            size = _read_frame(segment)
    if size is None or marker != _START_OF_SCAN:
        return None
    header = read_header(data, max_pixels)
    if (header.height, header.width) != size:
        return None
    return JpegLayout(*size, header.orientation)


def _read_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers and their contents up to the first scan; ends early where that makes no sense."""
    start = 2
    while start + 4 <= len(data):
        prefix, marker, length = struct.unpack_from(">BBH", data, start)
        # A marker may be preceded by filling bytes.
        if prefix == marker == 0xFF:
            start += 1
            continue
        if prefix != 0xFF or length < 2 or start + 2 + length > len(data):
            return
        yield marker, data[start + 4 : start + 2 + length]
        if marker == _START_OF_SCAN:
            return
        start += 2 + length


def _read_frame(segment: bytes) -> tuple[int, int] | None:
    """Height and width of a plain frame (ITU-T T.81, B.2.2)."""
    if len(segment) < 6:
        return None
    bits, height, width, num_components = struct.unpack_from(">BHHB", segment)
    components = segment[6:]
    if bits != 8 or not (height and width) or len(components) != 3 * num_components:
        return None
    identifiers, samplings = components[::3], components[1::3]
    is_grey = num_components == 1
    is_colour = (
        num_components == 3
        and identifiers != b"RGB"
        and samplings[0] in _PLAIN_SAMPLINGS
        and samplings[1:] == b"\x11\x11"
    )
    return (height, width) if is_grey or is_colour else None


def _is_ycbcr(adobe: bytes) -> bool:
    """Whether Adobe's marker names the usual colour transform, or is none of Adobe's."""
    return not adobe.startswith(b"Adobe") or adobe[11:12] == b"\x01"


def _make_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
