"""Bytes of an image file in, upright 8-bit RGB pixels out, or an `ImageError` with the reason.

Knows nothing of file names, storage, resizing or boxes. It sets no Pillow global, lets no Pillow
warning out and may run in many threads at once; the codecs work without the GIL.

JPEGs go through simplejpeg; CMYK and damaged ones, and all other formats, through Pillow. Both give
the same pixels of a JPEG, simplejpeg sooner (tests/benchmarks/decode.py).

What becomes of unusual files:
- EXIF orientation is applied; an unreadable EXIF block counts as upright. Orientation written only
  in XMP or in a PNG text chunk is not read.
- Of 16-bit samples the high byte is kept, as by libpng, OpenCV and torchvision; of 12-bit TIFF the
  top 8 bits. 32-bit integers beyond 16 bits and floats have no defined white: refused.
- Alpha and colour keys are dropped, not composited: no background suits every detector.
- Of several frames the first is used. Embedded colour profiles are ignored.
"""

import io
import math
import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from retinaray.errors import ImageError

DEFAULT_MAX_PIXELS = 178_956_970
"""Largest accepted height x width: 0.5 GB of RGB, and where Pillow too refuses by default."""

_ORIENTATION_TAG, _BITS_TAG, _PHOTOMETRIC_TAG = 0x0112, 0x0102, 0x0106
_TURN_BY_ORIENTATION: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, 3),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}
_BAND_PIXELS = 1 << 18  # Pillow's way to an array makes copies: of so many pixels at a time
_WARNINGS_LOCK = threading.Lock()

RgbPixels = UInt8[np.ndarray, "height width 3"]
_Plugin = TypeVar("_Plugin", bound=ImageFile.ImageFile)


@dataclass(frozen=True)
class DecodedImage:
    """Pixels of one image with the size that its file has at full resolution."""

    pixels: RgbPixels
    """RGB, upright, C-contiguous, writable; smaller than the file's size if a JPEG was scaled."""
    full_height: int
    """Height in pixels of the upright image in the file; the file's boxes refer to this."""
    full_width: int
    """Width in pixels of the upright image in the file."""


@dataclass(frozen=True)
class ImageHeader:
    """What is known before any pixel is decoded; height and width as stored, not yet upright."""

    file_format: str
    height: int
    width: int
    orientation: int
    open_image: Callable[[], ImageFile.ImageFile]

    def upright_size(self) -> tuple[int, int]:
        """Height and width after EXIF orientation."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


def read_image_size(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """Read the upright size from the header; no pixel is decoded.

    Args:
        data: The whole file; its format is told by its content.
        max_pixels: Largest accepted height x width.

    Returns:
        Height and width in pixels after EXIF orientation, both at least 1.

    Raises:
        ImageError: If the format is not supported, the header is damaged or the image is too large.
        ValueError: If max_pixels is not positive.
    """
    return read_header(data, max_pixels).upright_size()


def decode_image(
    data: bytes,
    *,
    fit_height: int | None = None,
    fit_width: int | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    allow_truncated: bool = False,
) -> DecodedImage:
    """Decode one file to upright RGB.

    Args:
        data: The whole file; its format is told by its content.
        fit_height: Height in pixels of the box into which the caller will shrink the upright image,
            keeping its aspect; None is unbounded. It permits JPEG decoding at 1/2, 1/4 or 1/8, if
            both sides stay at least twice the shrunk size. The caller still has to resize.
        fit_width: As fit_height, for the width.
        max_pixels: Largest accepted height x width in the file, checked before decoding. TIFF, WebP
            and GIF are also held to twice `PIL.Image.MAX_IMAGE_PIXELS`.
        allow_truncated: Accept a JPEG whose end is missing; the missing part becomes flat colour.

    Returns:
        The pixels, and the size at full resolution.

    Raises:
        ImageError: If the file is empty, of another format, damaged, truncated or too large.
        ValueError: If fit_height, fit_width or max_pixels is not positive.
    """
    if any(side is not None and side < 1 for side in (fit_height, fit_width)):
        raise ValueError(f"fit size must be positive or None, got {fit_height} x {fit_width}")
    if allow_truncated and data.startswith(b"\xff\xd8"):
        data += b"\xff\xd9"  # an end marker, because Pillow's own switch is global to all threads
    header = read_header(data, max_pixels)
    full_height, full_width = header.upright_size()
    divisor = choose_dct_divisor(full_height, full_width, fit_height, fit_width)
    with _library_errors(f"decode {header.file_format} of {full_width}x{full_height} pixels"):
        pixels = _decode_plain_jpeg(data, header, divisor)
        if pixels is None:
            pixels = _decode_with_pillow(header, divisor)
    return DecodedImage(pixels, full_height, full_width)


def _decode_plain_jpeg(data: bytes, header: ImageHeader, divisor: int) -> RgbPixels | None:
    """Decode an undamaged gray or colour JPEG; None for any other file."""
    if header.file_format != "JPEG" or header.open_image().mode == "CMYK":
        return None
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != (header.height, header.width):
            return None
        height, width = -(-header.height // divisor), -(-header.width // divisor)
        pixels: RgbPixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:  # stricter than Pillow, which decides and words the reason
        return None
    return _turn_upright(pixels, header.orientation)


def _decode_with_pillow(header: ImageHeader, divisor: int) -> RgbPixels:
    image = header.open_image()
    if image.size != (header.width, header.height):  # else the limit was held against another size
        raise ImageError(f"two sizes, {header.width}x{header.height} and {image.size}")
    if divisor > 1 and isinstance(image, JpegImageFile):
        image.draft("RGB", (header.width // divisor, header.height // divisor))
    is_large = header.height * header.width > (Image.MAX_IMAGE_PIXELS or math.inf)
    # The TIFF plugin alone warns of large images while loading.
    with _silenced_warnings() if is_large and header.file_format == "TIFF" else nullcontext():
        image.load()
    return _turn_upright(_gather_rgb(image), header.orientation)


def _turn_upright(pixels: RgbPixels, orientation: int) -> RgbPixels:
    turn = _TURN_BY_ORIENTATION.get(orientation)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _gather_rgb(image: Image.Image) -> RgbPixels:
    if image.mode == "F":
        raise ImageError("float pixels have no defined white: use 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray(_top_bits(image))
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    num_rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, num_rows):
        band = image.crop((0, top, image.width, min(top + num_rows, image.height)))
        pixels[top : top + num_rows] = np.asarray(band.convert("RGB"))
    return pixels


def _top_bits(image: Image.Image) -> UInt8[np.ndarray, "height width"]:
    """Scale 16-bit gray, or 12-bit gray of TIFF, to 8 bits with 0 as black."""
    values = np.asarray(image)
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest > 0xFFFF:
        raise ImageError(f"pixels {lowest}..{highest} have no defined white: use 8 or 16 bits")
    bits, is_white_zero = 16, False
    if isinstance(image, TiffImageFile):
        bits = min(16, image.tag_v2.get(_BITS_TAG, (16,))[0])
        is_white_zero = image.tag_v2.get(_PHOTOMETRIC_TAG) == 0
    gray = (values >> (bits - 8)).astype(np.uint8)
    return 255 - gray if is_white_zero else gray


def choose_dct_divisor(
    height: int, width: int, fit_height: int | None, fit_width: int | None
) -> int:
    """Largest of 8, 4, 2, 1 that leaves both sides at least twice the fitted size, rounded up."""
    fitted_height, fitted_width = height, width
    if fit_width is not None and fit_width < fitted_width:
        fitted_height, fitted_width = -(-height * fit_width // width), fit_width
    if fit_height is not None and fit_height < fitted_height:
        fitted_height, fitted_width = fit_height, -(-width * fit_height // height)
    most = min(height // (2 * fitted_height), width // (2 * fitted_width))
    return next((divisor for divisor in (8, 4, 2) if divisor <= most), 1)


def read_header(data: bytes, max_pixels: int) -> ImageHeader:
    """Read the header; arguments and errors as of `read_image_size`."""
    if max_pixels < 1:
        raise ValueError(f"max_pixels must be positive, got {max_pixels}")
    matches = (name for name, (magic, _) in _FORMATS.items() if re.match(magic, data, re.DOTALL))
    file_format = next(matches, None)
    if file_format is None:
        raise ImageError(
            f"expected {', '.join(_FORMATS)}; got {len(data)} bytes starting with {data[:12]!r}: "
            "convert or drop the file"
        )
    with _library_errors(f"read the header of a {len(data)}-byte {file_format} file"):
        header = _FORMATS[file_format][1](data)
        if min(header.height, header.width) < 1:
            raise ImageError(f"its size is {header.width}x{header.height}")
    if header.height * header.width > max_pixels:
        raise ImageError(
            f"{file_format} of {header.width}x{header.height} pixels is above the limit "
            f"max_pixels={max_pixels}: drop the file or raise the limit"
        )
    return header


class _Jpeg(JpegImageFile):
    """A JPEG, or the first image of an MPO."""

    def _read_dpi_from_exif(self) -> None:
        """Skip Pillow's EXIF parser: it warns of damaged blocks, for an unneeded resolution."""


def _read_jpeg(data: bytes) -> ImageHeader:
    image = _Jpeg(io.BytesIO(data))
    orientation = _exif_orientation(image.info.get("exif", b""))
    return ImageHeader("JPEG", image.height, image.width, orientation, lambda: image)


def _read_png(data: bytes) -> ImageHeader:
    """Find size and EXIF, which may follow the pixels; hide other extras, which may be damaged."""
    exif, kind, start = b"", b"", 8
    kept = [memoryview(data)[:start]]
    while start + 8 <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if kind == b"eXIf":
            exif = data[start + 8 : end - 4]
        elif kind[:1].isupper():  # critical: header, palette, pixels, end
            kept.append(memoryview(data)[start:end])
        start = end
    width, height = struct.unpack_from(">II", data, 16)
    turn = _exif_orientation(exif)
    return ImageHeader("PNG", height, width, turn, lambda: PngImageFile(io.BytesIO(b"".join(kept))))


def _read_webp(data: bytes) -> ImageHeader:
    """Find canvas size and EXIF; to tell them, Pillow would already allocate the canvas."""
    exif = b""
    size: tuple[int, int] | None = None
    start = 12
    while start + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, start)
        if kind == b"EXIF":
            exif = data[start + 8 : start + 8 + length]
        size = size or _webp_size(kind, data, start + 8)
        start += 8 + length + length % 2
    height, width = size or (0, 0)
    orientation = _exif_orientation(exif)
    return ImageHeader("WebP", height, width, orientation, lambda: WebPImageFile(io.BytesIO(data)))


def _webp_size(kind: bytes, data: bytes, start: int) -> tuple[int, int] | None:
    """Height and width from a chunk's content (RFC 9649, sections 2.5 to 2.7), if it tells them."""
    if kind == b"VP8X":
        width_low, width_high, height_low, height_high = struct.unpack_from(
            "<HBHB", data, start + 4
        )
        return (height_high << 16) + height_low + 1, (width_high << 16) + width_low + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, start + 6)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, start + 1)
        return ((bits >> 14) & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    return None


def _read_gif(data: bytes) -> ImageHeader:
    """Find the size of the screen, widened as Pillow does if the first frame sticks out of it."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    start = 13 + ((6 << (flags & 7)) if flags & 0x80 else 0)
    while data[start] != 0x2C:  # extensions, 0x21, precede the first frame, 0x2C
        is_extension = data[start] == 0x21
        start += 1
        if is_extension:
            start += 1
            while data[start]:
                start += 1 + data[start]
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, start + 1)
    height, width = max(height, top + frame_height), max(width, left + frame_width)
    return ImageHeader("GIF", height, width, 1, lambda: _open_silently(GifImageFile, data))


def _read_tiff(data: bytes) -> ImageHeader:
    image = _open_silently(TiffImageFile, data)
    # While loading, Pillow turns a TIFF upright by itself and reads all of its EXIF for that, with
    # warnings and failures. Given this block, it does not look into the file.
    orientation = image.tag_v2.get(_ORIENTATION_TAG)
    exif = Image.Exif()
    exif[_ORIENTATION_TAG] = orientation if orientation in _TURN_BY_ORIENTATION else 1
    image.info["exif"] = exif.tobytes()
    return ImageHeader("TIFF", image.height, image.width, 1, lambda: image)


def _reader(name: str, plugin: type[ImageFile.ImageFile]) -> Callable[[bytes], ImageHeader]:
    def read(data: bytes) -> ImageHeader:
        image = _open_silently(plugin, data)
        orientation = _exif_orientation(image.info.get("exif", b""))
        return ImageHeader(name, image.height, image.width, orientation, lambda: image)

    return read


def _exif_orientation(block: bytes) -> int:
    """Orientation 1 to 8 from an EXIF block (a small TIFF); 1 if it is absent or damaged."""
    while block.startswith(b"Exif\0\0"):
        block = block[6:]
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", block, 4)
        (num_entries,) = struct.unpack_from(order + "H", block, directory)
        for start in range(directory + 2, directory + 2 + 12 * num_entries, 12):
            tag, value_type = struct.unpack_from(order + "HH", block, start)
            if tag == _ORIENTATION_TAG:
                code = {1: "B", 3: "H"}.get(value_type, "I")
                (value,) = struct.unpack_from(order + code, block, start + 8)
                return int(value) if value in _TURN_BY_ORIENTATION else 1
    except struct.error:
        return 1
    return 1


@contextmanager
def _library_errors(action: str) -> Iterator[None]:
    """Turn whatever damaged bytes provoke into ImageError.

    MemoryError too: one image whose pixels do not fit must not end a run over millions.
    """
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, ImageError) else f"{type(error).__name__}: {error}"
        raise ImageError(f"cannot {action}: {reason}; fetch it again or drop it") from error


@contextmanager
def _silenced_warnings() -> Iterator[None]:
    """Hide warnings, one thread at a time: `catch_warnings` interleaved would leave filters."""
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open_silently(plugin: type[_Plugin], data: bytes) -> _Plugin:
    with _silenced_warnings():
        return plugin(io.BytesIO(data))


_FORMATS: dict[str, tuple[bytes, Callable[[bytes], ImageHeader]]] = {
    "JPEG": (rb"\xff\xd8\xff", _read_jpeg),
    "PNG": (rb"\x89PNG\r\n\x1a\n.{4}IHDR", _read_png),
    "WebP": (rb"RIFF.{4}WEBP", _read_webp),
    "GIF": (rb"GIF8[79]a", _read_gif),
    "TIFF": (rb"II[*+]\0|MM\0[*+]", _read_tiff),
    "BMP": (rb"BM", _reader("BMP", BmpImageFile)),
    "AVIF": (rb".{4}ftypavi[fs]", _reader("AVIF", AvifImageFile)),
    "JPEG 2000": (rb"\xff\x4f\xff\x51|.{4}jP  ", _reader("JPEG 2000", Jpeg2KImageFile)),
    "PNM": (rb"P[1-6]\s", _reader("PNM", PpmImageFile)),
}
