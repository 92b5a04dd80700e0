"""How much memory the decoding of a file will take, told from its header alone."""

from __future__ import annotations

from retinaray.data.image_decoding import DEFAULT_MAX_PIXELS, choose_dct_divisor, read_header

# Peak bytes per pixel of the file, its pixels as RGB (3) included, rounded up from what photos of
# 4000x2250 took (tests/unit/data/test_decode_memory.py measures it again); of formats with samples
# of 32 bits, what those take.
_PEAK_BYTES_PER_PIXEL = {
    "PNG": 8.0,
    "WebP": 17.0,
    "GIF": 8.0,
    "TIFF": 14.0,
    "BMP": 8.0,
    "AVIF": 11.0,
    "JPEG 2000": 20.0,
    "PNM": 14.0,
}
_TURNING_BYTES_PER_PIXEL = 3.0
# A progressive JPEG is held as coefficients of 2 bytes, of 4 colours at most, however much its
# pixels are scaled down.
_COEFFICIENT_BYTES_PER_PIXEL = 8.0
_JPEG_BYTES_PER_PIXEL = 8.0


def estimate_decode_bytes(
    data: bytes,
    *,
    fit_height: int | None = None,
    fit_width: int | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> int:
    """Upper bound of the memory that `decode_image` takes for a file.

    Args:
        data: The whole file.
        fit_height: As for `decode_image`.
        fit_width: As for `decode_image`.
        max_pixels: As for `decode_image`.

    Returns:
        Bytes at the moment when it takes most, its result and a copy of the file included, the file
        itself not.

    Raises:
        ImageError: If the header is none of a usable image; see `read_image_size`.
    """
    header = read_header(data, max_pixels)
    height, width = header.upright_size()
    if header.file_format == "JPEG":
        divisor = choose_dct_divisor(height, width, fit_height, fit_width)
        per_pixel = _JPEG_BYTES_PER_PIXEL / divisor**2
        if "progressive" in header.open_image().info:
            per_pixel += _COEFFICIENT_BYTES_PER_PIXEL
    else:
        per_pixel = _PEAK_BYTES_PER_PIXEL[header.file_format]
        per_pixel += _TURNING_BYTES_PER_PIXEL * (header.orientation != 1)
    return int(height * width * per_pixel) + len(data)
