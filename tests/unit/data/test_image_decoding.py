from __future__ import annotations

import io
import json
import random
import re
import resource
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from retinaray.data.image_decoding import decode_image, read_image_size
from retinaray.errors import ImageError

Encode = Callable[..., bytes]

ODD_SIZES = {  # file: (height, width) upright
    "hopper_gray.jpg": (128, 128),
    "icc_profile_big.jpg": (250, 425),
    "hopper_bad_exif.jpg": (500, 500),
    "exif-dpi-zerodivision.jpg": (200, 200),
    "hopper_orientation_6.jpg": (128, 128),
    "hopper_orientation_6.webp": (128, 128),
    "i_trns.png": (64, 64),
    "tiff_16bit_RGB.tiff": (40, 100),
    "uncompressed_la.png": (128, 128),
    "hopper_bw_500.png": (500, 500),
    "hopper.webp": (128, 128),
    "transparent.webp": (150, 200),
    "chi.gif": (240, 320),
    "hopper.gif": (128, 128),
    "test-card-lossy-tiled.jp2": (480, 640),
    "sugarshack.mpo": (480, 640),
    "hopper.bmp": (128, 128),
    "no_palette.gif": (1, 1),
    "hopper.avif": (128, 128),
    "mode_16bit.png": (64, 128),
    "Landscape_3.jpg": (1200, 1800),
    "Landscape_6.jpg": (1200, 1800),
    "Portrait_6.jpg": (1800, 1200),
    "Landscape_1.jpg": (1200, 1800),
    "dayride_type1_001.mp4#t=1055.jpg": (720, 1280),
    "photo_bitflip.jpg": (1200, 1800),
    "one_pixel.png": (1, 1),
    "photo_cmyk.jpg": (1200, 1800),
    "photo_progressive.jpg": (1200, 1800),
    "photo_gray16.png": (300, 450),
}
ODD_ERRORS = {
    "truncated_jpeg.jpg": "JPEG of 100x100 pixels: .*truncated",
    "broken_data_stream.png": "PNG of 128x128 pixels: .*unrecognized data stream",
    "broken.png": "expected JPEG, PNG, .*; got 80 bytes",
    "decompression_bomb.gif": "GIF of 65535x66601 pixels is above the limit max_pixels=178956970",
    "empty.jpg": "got 0 bytes",
    "text.jpg": "got 21 bytes starting with b'this is not '",
    "photo_cut_half.jpg": "JPEG of 1800x1200 pixels: .*truncated",
    "huge_30000x30000.png": "PNG of 30000x30000 pixels is above the limit max_pixels=178956970",
}

# Each letter is one flat block; upright the picture reads ABC over DEF. EXIF 2.32, tag 0x0112,
# tells which visual sides the stored row 0 and column 0 are: 6 is right and top, so row 0 is C, F.
STORED_BY_ORIENTATION = {
    1: ("ABC", "DEF"),
    2: ("CBA", "FED"),
    3: ("FED", "CBA"),
    4: ("DEF", "ABC"),
    5: ("AD", "BE", "CF"),
    6: ("CF", "BE", "AD"),
    7: ("FC", "EB", "DA"),
    8: ("DA", "EB", "FC"),
}
COLOURS = {
    "A": (200, 30, 30),
    "B": (30, 200, 30),
    "C": (30, 30, 200),
    "D": (210, 210, 20),
    "E": (20, 210, 210),
    "F": (128, 128, 128),
}
BLOCK_PX = 16


def paint(rows: tuple[str, ...]) -> np.ndarray:
    letters = np.array([[COLOURS[letter] for letter in row] for row in rows], np.uint8)
    return letters.repeat(BLOCK_PX, axis=0).repeat(BLOCK_PX, axis=1)


def orientation_block(value: int) -> bytes:
    """An EXIF block with nothing but the orientation, written out byte by byte."""
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, value, 0)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)


def png_chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def insert_before_end(png: bytes, chunk: bytes) -> bytes:
    return png[:-12] + chunk + png[-12:]


# --- all awkward files --------------------------------------------------------------------------


def test_odd_files_are_all_in_the_tables(odd_folder: Path) -> None:
    index = json.loads((odd_folder.parent / "index.json").read_text())
    assert {entry["file"] for entry in index} == ODD_SIZES.keys() | ODD_ERRORS.keys()
    assert len(index) == 38


@pytest.mark.parametrize("name", ODD_SIZES)
def test_decode_image_gives_upright_rgb_when_file_is_odd(odd_folder: Path, name: str) -> None:
    data = (odd_folder / name).read_bytes()
    decoded = decode_image(data)
    assert (decoded.full_height, decoded.full_width) == ODD_SIZES[name]
    assert decoded.pixels.shape == (*ODD_SIZES[name], 3)
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.flags.c_contiguous
    assert decoded.pixels.flags.writeable
    assert read_image_size(data) == ODD_SIZES[name]


@pytest.mark.parametrize("name", ODD_ERRORS)
def test_decode_image_refuses_with_reason_when_file_is_broken(odd_folder: Path, name: str) -> None:
    with pytest.raises(ImageError, match=ODD_ERRORS[name]):
        decode_image((odd_folder / name).read_bytes())


@pytest.mark.parametrize("name", ["Landscape_3.jpg", "Landscape_6.jpg"])
def test_decode_image_agrees_with_upright_photo_when_stored_rotated(
    odd_folder: Path, name: str
) -> None:
    upright = decode_image((odd_folder / "Landscape_1.jpg").read_bytes()).pixels.astype(int)
    rotated = decode_image((odd_folder / name).read_bytes()).pixels.astype(int)
    # The files were compressed separately: 1.6 and 3.7; turned wrongly they differ by 74.
    assert np.abs(rotated - upright).mean() < 5


@pytest.mark.parametrize("name", ["photo_cmyk.jpg", "photo_progressive.jpg"])
def test_decode_image_agrees_with_baseline_photo_when_coded_otherwise(
    odd_folder: Path, name: str
) -> None:
    baseline = decode_image((odd_folder / "Landscape_1.jpg").read_bytes()).pixels.astype(int)
    other = decode_image((odd_folder / name).read_bytes()).pixels.astype(int)
    assert np.abs(other - baseline).mean() < 1.5  # measured 0.72 and 0.76


def test_decode_image_keeps_high_byte_when_photo_is_16_bit_gray(odd_folder: Path) -> None:
    data = (odd_folder / "photo_gray16.png").read_bytes()
    samples = np.asarray(Image.open(io.BytesIO(data)))
    assert samples.dtype == np.uint16
    pixels = decode_image(data).pixels
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], samples // 256)


@pytest.mark.parametrize("name", ["photo_cut_half.jpg", "truncated_jpeg.jpg"])
def test_decode_image_accepts_cut_jpeg_when_truncated_is_allowed(
    odd_folder: Path, name: str
) -> None:
    data = (odd_folder / name).read_bytes()
    assert decode_image(data, allow_truncated=True).pixels.shape == (*read_image_size(data), 3)


def test_decode_image_keeps_what_is_there_when_photo_is_cut_in_half(odd_folder: Path) -> None:
    whole = decode_image((odd_folder / "Landscape_1.jpg").read_bytes()).pixels
    cut = decode_image((odd_folder / "photo_cut_half.jpg").read_bytes(), allow_truncated=True)
    np.testing.assert_array_equal(cut.pixels[:400], whole[:400])
    assert cut.pixels[-100:].std(axis=(0, 1)).max() == 0  # the missing end is flat


def test_decode_image_scales_close_to_full_decode_when_photo_is_large(shared_data: Path) -> None:
    drone = sorted(
        path
        for path in (shared_data / "aerial_cars" / "images").rglob("*")
        if path.stat().st_size > 2_000_000
    )
    data = drone[0].read_bytes()
    scaled = decode_image(data, fit_height=512, fit_width=512)
    assert (scaled.full_height, scaled.full_width) == (2250, 4000)
    assert scaled.pixels.shape == (1125, 2000, 3)  # 1/2; the fitted size is 288 x 512
    assert mean_error_after_resize(scaled.pixels, decode_image(data).pixels, (512, 288)) < 1.0


def mean_error_after_resize(first: np.ndarray, second: np.ndarray, size: tuple[int, int]) -> float:
    resized = [
        np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR), dtype=int)
        for pixels in (first, second)
    ]
    return float(np.abs(resized[0] - resized[1]).mean())


# --- orientation --------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("file_format", "options", "tolerance"),
    [
        ("JPEG", {"quality": 95, "subsampling": 0}, 2),
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 4),
    ],
    ids=["jpeg", "png", "webp", "tiff", "tiff-lzw", "avif"],
)
def test_decode_image_turns_upright_when_file_has_orientation(
    odd_encode: Encode,
    file_format: str,
    options: dict[str, object],
    tolerance: int,
    orientation: int,
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = paint(STORED_BY_ORIENTATION[orientation])
    data = odd_encode(stored, file_format, exif=exif, **options)
    decoded = decode_image(data)
    assert (decoded.full_height, decoded.full_width) == (2 * BLOCK_PX, 3 * BLOCK_PX)
    assert read_image_size(data) == (2 * BLOCK_PX, 3 * BLOCK_PX)
    np.testing.assert_allclose(decoded.pixels, paint(("ABC", "DEF")), atol=tolerance)
    assert decoded.pixels.flags.c_contiguous


def test_decode_image_turns_upright_when_png_exif_follows_the_pixels(odd_encode: Encode) -> None:
    data = insert_before_end(
        odd_encode(paint(STORED_BY_ORIENTATION[6]), "PNG"),
        png_chunk(b"eXIf", orientation_block(6)[6:]),
    )
    assert read_image_size(data) == (2 * BLOCK_PX, 3 * BLOCK_PX)
    np.testing.assert_array_equal(decode_image(data).pixels, paint(("ABC", "DEF")))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0garbage that is no TIFF",
        orientation_block(6)[:20],
        orientation_block(6)[:10] + b"\xff\xff\xff\x7f" + orientation_block(6)[14:],
        orientation_block(6)[:14] + b"\xff\xff\x0f\x01" + bytes(20),
        orientation_block(0),
        orientation_block(9),
    ],
    ids=["empty", "garbage", "cut", "far-directory", "endless-directory", "zero", "nine"],
)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_decode_image_takes_file_as_upright_when_exif_is_bad(
    odd_encode: Encode, file_format: str, exif: bytes
) -> None:
    data = odd_encode(paint(("ABC", "DEF")), file_format, exif=exif)
    assert decode_image(data).pixels.shape == (2 * BLOCK_PX, 3 * BLOCK_PX, 3)
    assert read_image_size(data) == (2 * BLOCK_PX, 3 * BLOCK_PX)


def test_decode_image_ignores_what_follows_when_png_has_ended(odd_encode: Encode) -> None:
    png = odd_encode(paint(("ABC", "DEF")), "PNG")
    data = png + png_chunk(b"eXIf", orientation_block(6)[6:])
    assert read_image_size(data) == (2 * BLOCK_PX, 3 * BLOCK_PX)


def test_decode_image_ignores_png_extras_when_they_are_damaged(odd_encode: Encode) -> None:
    png = odd_encode(paint(("ABC", "DEF")), "PNG")
    extras = png_chunk(b"acTL", bytes(8)) + png_chunk(b"eXIf", b"II*\0", crc=1)
    extras += png_chunk(b"zTXt", b"no compression here", crc=2)
    data = png[:33] + extras + png[33:]  # after the 8-byte signature and the 25-byte header chunk
    np.testing.assert_array_equal(decode_image(data).pixels, paint(("ABC", "DEF")))


def test_decode_image_survives_when_tiff_directory_points_outside(
    odd_tiff: Callable[..., bytes],
) -> None:
    # 34665 is the EXIF directory: its offset lies behind the end of the file.
    data = odd_tiff(bytes(range(6)), width=3, height=2, bits=8, tags={34665: 60000, 274: 6})
    assert read_image_size(data) == (3, 2)
    np.testing.assert_array_equal(decode_image(data).pixels[..., 0], [[3, 0], [4, 1], [5, 2]])


# --- sample formats -----------------------------------------------------------------------------

SAMPLES_16_BIT = [0, 1, 255, 256, 257, 32768, 65279, 65535]
HIGH_BYTES = [0, 0, 0, 1, 1, 128, 254, 255]


def test_decode_image_keeps_high_byte_when_png_is_16_bit(odd_encode: Encode) -> None:
    data = odd_encode(np.array([SAMPLES_16_BIT], np.uint16), "PNG")
    np.testing.assert_array_equal(decode_image(data).pixels[0, :, 1], HIGH_BYTES)


def test_decode_image_keeps_high_byte_when_pgm_is_16_bit() -> None:
    data = b"P5 8 1 65535\n" + struct.pack(">8H", *SAMPLES_16_BIT)
    assert Image.open(io.BytesIO(data)).mode == "I"
    np.testing.assert_array_equal(decode_image(data).pixels[0, :, 1], HIGH_BYTES)


@pytest.mark.parametrize("order", ["<", ">"], ids=["little-endian", "big-endian"])
def test_decode_image_keeps_high_byte_when_tiff_is_16_bit(
    odd_tiff: Callable[..., bytes], order: str
) -> None:
    payload = struct.pack(f"{order}8H", *SAMPLES_16_BIT)
    data = odd_tiff(payload, width=8, height=1, bits=16, order=order)
    np.testing.assert_array_equal(decode_image(data).pixels[0, :, 2], HIGH_BYTES)


def test_decode_image_turns_16_bit_tiff_when_it_has_orientation(
    odd_tiff: Callable[..., bytes],
) -> None:
    payload = struct.pack("<2H", 256, 512)
    data = odd_tiff(payload, width=2, height=1, bits=16, tags={274: 6})
    np.testing.assert_array_equal(decode_image(data).pixels[..., 0], [[1], [2]])


def test_decode_image_inverts_when_16_bit_tiff_counts_from_white(
    odd_tiff: Callable[..., bytes],
) -> None:
    data = odd_tiff(struct.pack("<2H", 0, 65535), width=2, height=1, bits=16, photometric=0)
    np.testing.assert_array_equal(decode_image(data).pixels[0, :, 0], [255, 0])


def test_decode_image_keeps_top_bits_when_tiff_is_12_bit(odd_tiff: Callable[..., bytes]) -> None:
    # Packed samples 0x000, 0x00f, 0x800, 0xfff; 0x800 >> 4 = 128.
    payload = bytes([0x00, 0x00, 0x0F, 0x80, 0x0F, 0xFF])
    data = odd_tiff(payload, width=4, height=1, bits=12)
    np.testing.assert_array_equal(decode_image(data).pixels[0, :, 0], [0, 0, 128, 255])


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.array([[0.5]], np.float32), "float pixels have no defined white"),
        (np.array([[0, 70000]], np.int32), r"pixels 0\.\.70000 have no defined white"),
        (np.array([[-5, 7]], np.int32), r"pixels -5\.\.7 have no defined white"),
    ],
    ids=["float", "above-16-bit", "negative"],
)
def test_decode_image_refuses_when_white_is_undefined(
    odd_encode: Encode, pixels: np.ndarray, message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        decode_image(odd_encode(pixels, "TIFF"))


def test_decode_image_drops_alpha_when_file_is_transparent(odd_encode: Encode) -> None:
    rgba = np.array([[(10, 20, 30, 0), (40, 50, 60, 128)]], np.uint8)
    expected = [[(10, 20, 30), (40, 50, 60)]]
    for file_format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(decode_image(odd_encode(rgba, file_format)).pixels, expected)
    gray_alpha = Image.fromarray(np.array([[(7, 0), (9, 255)]], np.uint8), "LA")
    pixels = decode_image(odd_encode(gray_alpha, "PNG")).pixels
    np.testing.assert_array_equal(pixels, [[(7, 7, 7), (9, 9, 9)]])


@pytest.mark.parametrize("transparency", [1, b"\x00\x80"], ids=["one-index", "per-index"])
@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_decode_image_looks_up_palette_when_an_entry_is_transparent(
    odd_encode: Encode, file_format: str, transparency: int | bytes
) -> None:
    if file_format == "GIF":
        transparency = 1
    image = Image.fromarray(np.array([[0, 1, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    data = odd_encode(image, file_format, transparency=transparency)
    expected = [[(10, 20, 30), (200, 100, 50), (200, 100, 50)]]
    np.testing.assert_array_equal(decode_image(data).pixels, expected)


@pytest.mark.parametrize("lossless", [True, False], ids=["VP8L", "VP8"])
def test_decode_image_reads_size_when_webp_has_no_extras(
    odd_encode: Encode, odd_photo: np.ndarray, lossless: bool
) -> None:
    data = odd_encode(odd_photo[:33, :77], "WEBP", lossless=lossless)
    assert data[12:16] == (b"VP8L" if lossless else b"VP8 ")
    assert read_image_size(data) == (33, 77)
    assert decode_image(data).pixels.shape == (33, 77, 3)


def test_decode_image_spreads_to_black_and_white_when_file_is_1_bit(odd_encode: Encode) -> None:
    data = odd_encode(Image.fromarray(np.array([[True, False, True]])), "PNG")
    np.testing.assert_array_equal(decode_image(data).pixels[0, :, 0], [255, 0, 255])


def test_decode_image_gives_original_colours_when_jpeg_is_cmyk(
    odd_encode: Encode, odd_photo: np.ndarray
) -> None:
    data = odd_encode(Image.fromarray(odd_photo).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode_image(data).pixels.astype(int) - odd_photo).mean() < 3


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 2}),
        ("RGB", {"subsampling": 2, "progressive": True}),
        ("L", {}),
        ("CMYK", {}),
    ],
    ids=["444", "420", "420-progressive", "gray", "cmyk"],
)
def test_decode_image_equals_pillow_when_jpeg_is_sound(
    odd_encode: Encode, odd_photo: np.ndarray, mode: str, options: dict[str, object]
) -> None:
    image = Image.fromarray(odd_photo[:301, :403]).convert(mode)
    data = odd_encode(image, "JPEG", **options)
    oracle = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode_image(data).pixels, oracle)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
def test_decode_image_gives_first_frame_when_file_has_two(
    odd_encode: Encode, file_format: str
) -> None:
    frames = [Image.new("RGB", (32, 16), colour) for colour in ((200, 40, 40), (40, 40, 200))]
    data = odd_encode(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    pixels = decode_image(data).pixels
    assert pixels.shape == (16, 32, 3)
    np.testing.assert_allclose(pixels, np.full((16, 32, 3), (200, 40, 40)), atol=6)


# --- limits, damage -----------------------------------------------------------------------------


@pytest.fixture
def bombs(odd_encode: Encode, odd_tiff: Callable[..., bytes]) -> dict[str, bytes]:
    """Small files whose headers claim 0.9 to 4.3 billion pixels."""
    jpeg = odd_encode(paint(("ABC", "DEF")), "JPEG")
    size_at = jpeg.index(b"\xff\xc0") + 5
    bmp = odd_encode(paint(("ABC", "DEF")), "BMP")
    png_header = struct.pack(">II5B", 30000, 30000, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(30000 * 30))
    canvas = b"VP8X" + struct.pack("<I4B", 10, 0, 0, 0, 0) + b"\xff\xff\x00\xff\xff\x01"
    return {
        "PNG": b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", png_header) + png_chunk(b"IDAT", pixels),
        "GIF": b"GIF89a"
        + struct.pack("<HHBBB", 1, 1, 0, 0, 0)
        + b",\0\0\0\0\xff\xff\xff\xff\0\2\0",
        "WebP": b"RIFF" + struct.pack("<I", 4 + len(canvas)) + b"WEBP" + canvas,
        "JPEG": jpeg[:size_at] + struct.pack(">HH", 65500, 65500) + jpeg[size_at + 4 :],
        "TIFF": odd_tiff(bytes(4), width=60000, height=60000, bits=8),
        "BMP": bmp[:18] + struct.pack("<ii", 60000, 60000) + bmp[26:],
    }


@pytest.mark.parametrize(
    ("file_format", "size"),
    [
        ("PNG", "30000x30000"),
        ("GIF", "65535x65535"),
        ("WebP", "65536x131072"),
        ("JPEG", "65500x65500"),
        ("TIFF", "60000x60000"),
        ("BMP", "60000x60000"),
    ],
)
def test_decode_image_refuses_before_decoding_when_header_is_too_large(
    bombs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, file_format: str, size: str
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # Pillow's own guard must not be needed
    kilobytes_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match=f"{file_format} of {size} pixels is above the limit"):
        decode_image(bombs[file_format])
    with pytest.raises(ImageError, match=f"{file_format} of {size} pixels is above the limit"):
        read_image_size(bombs[file_format])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - kilobytes_before < 50_000


def test_decode_image_refuses_before_decoding_when_png_has_two_sizes(
    odd_encode: Encode, bombs: dict[str, bytes]
) -> None:
    small = odd_encode(paint(("ABC", "DEF")), "PNG")
    data = small[:33] + bombs["PNG"][8:]  # a second header chunk; Pillow believes the last
    with pytest.raises(ImageError, match=r"two sizes, 48x32 and \(30000, 30000\)"):
        decode_image(data)


def test_decode_image_leaves_jpeg_to_pillow_when_simplejpeg_reads_another_size(
    odd_encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = odd_encode(paint(("ABC", "DEF")), "JPEG")
    expected = decode_image(data).pixels
    monkeypatch.setattr("simplejpeg.decode_jpeg_header", lambda _: (65500, 65500, "YCbCr", "420"))
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *_, **__: pytest.fail("would allocate"))
    np.testing.assert_array_equal(decode_image(data).pixels, expected)


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "WEBP", "JPEG", "TIFF", "BMP"])
def test_decode_image_obeys_max_pixels_instead_of_pillows_limit(
    odd_encode: Encode, monkeypatch: pytest.MonkeyPatch, file_format: str
) -> None:
    data = odd_encode(paint(("ABC", "DEF")), file_format)  # 48 x 32 = 1536 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # from 1001 to 2000 Pillow warns
    assert decode_image(data, max_pixels=1536).pixels.shape == (32, 48, 3)
    with pytest.raises(ImageError, match="48x32 pixels is above the limit max_pixels=1535"):
        decode_image(data, max_pixels=1535)
    with pytest.raises(ImageError, match="48x32 pixels is above the limit max_pixels=1535"):
        read_image_size(data, max_pixels=1535)


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "JPEG", "BMP", "TIFF", "WEBP"])
def test_decode_image_refuses_when_cut_in_the_header(odd_encode: Encode, file_format: str) -> None:
    data = odd_encode(paint(("ABC", "DEF")), file_format)[:18]
    with pytest.raises(ImageError, match="cannot read the header of a 18-byte"):
        decode_image(data)
    with pytest.raises(ImageError, match="cannot read the header"):
        decode_image(data, allow_truncated=True)


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_decode_image_refuses_when_a_cut_file_is_no_jpeg(
    odd_encode: Encode, odd_photo: np.ndarray, file_format: str
) -> None:
    data = odd_encode(odd_photo[:64, :64], file_format)
    with pytest.raises(ImageError, match=r"cannot (read the header|decode)"):
        decode_image(data[: len(data) // 2], allow_truncated=True)


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
@pytest.mark.parametrize("fit", [None, 40], ids=["full", "scaled"])
def test_decode_image_accepts_cut_jpeg_only_when_allowed(
    odd_encode: Encode, odd_photo: np.ndarray, options: dict[str, object], fit: int | None
) -> None:
    data = odd_encode(odd_photo, "JPEG", **options)
    for missing in (1, 20, len(data) // 2):
        with pytest.raises(ImageError, match="truncated"):
            decode_image(data[:-missing], fit_width=fit)
        decoded = decode_image(data[:-missing], fit_width=fit, allow_truncated=True)
        assert (decoded.full_height, decoded.full_width) == (600, 800)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"expected JPEG, .*; got 0 bytes starting with b''"),
        (b"hello, world", r"got 12 bytes starting with b'hello, world'"),
        (b"GIF89a" + bytes(7) + b"," + bytes(12), "GIF file: its size is 0x0"),
        (b"RIFF\x04\0\0\0WEBP", "WebP file: its size is 0x0"),
        (b"\xff\xd8\xff\xd9", "header of a 4-byte JPEG file"),
        (b"BM" + bytes(60), "header of a 62-byte BMP file"),
        (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", bytes(13)), "PNG file: its size is 0x0"),
    ],
    ids=["empty", "text", "zero-gif", "no-webp", "no-jpeg", "zero-bmp", "zero-png"],
)
def test_decode_image_says_what_is_wrong_when_there_is_no_image(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode_image(data)
    with pytest.raises(ImageError, match=message):
        read_image_size(data)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000"])
def test_decode_image_gives_pixels_or_image_error_when_bytes_are_damaged(
    odd_encode: Encode, odd_photo: np.ndarray, file_format: str
) -> None:
    chance = random.Random(7)
    whole = odd_encode(odd_photo[:40, :56], file_format, exif=orientation_block(6))
    num_refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 3, 12])):
            # Half of the damage goes where most formats keep their headers.
            end = min(len(whole), 300) if chance.random() < 0.5 else len(whole)
            damaged[chance.randrange(4, end)] = chance.choice([0, 0xFF, chance.randrange(256)])
        try:
            decoded = decode_image(bytes(damaged), max_pixels=1_000_000)
        except ImageError:
            num_refused += 1
        else:
            assert decoded.pixels.shape == (decoded.full_height, decoded.full_width, 3)
    assert num_refused < 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit_height": 0}, "fit size must be positive or None, got 0 x None"),
        ({"fit_width": -3}, "fit size must be positive or None, got None x -3"),
        ({"max_pixels": 0}, "max_pixels must be positive, got 0"),
    ],
)
def test_decode_image_refuses_options_when_they_are_not_positive(
    options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decode_image(b"P5 1 1 255\n0", **options)


# --- scaled decoding ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fit_height", "fit_width", "expected"),
    [  # of 600 x 800: a divisor d needs 600 / d >= 2 * fitted height, and the same of the width
        (None, None, (600, 800)),
        (600, 800, (600, 800)),
        (1000, 1000, (600, 800)),
        (None, 201, (600, 800)),  # 800 / 2 < 2 * 201
        (None, 200, (300, 400)),  # fitted 150 x 200
        (150, None, (300, 400)),
        (150, 999, (300, 400)),
        (999, 101, (300, 400)),  # 800 / 4 < 2 * 101
        (100, 100, (150, 200)),  # fitted 75 x 100
        (None, 50, (150, 200)),  # fitted 38 x 50, rounded up: 600 / 8 < 2 * 38
        (37, 999, (75, 100)),  # fitted 37 x 50: 75 >= 74, 100 >= 100
        (1, 1, (75, 100)),
    ],
)
def test_decode_image_scales_jpeg_when_twice_the_fitted_size_remains(
    odd_encode: Encode,
    odd_photo: np.ndarray,
    fit_height: int | None,
    fit_width: int | None,
    expected: tuple[int, int],
) -> None:
    data = odd_encode(odd_photo, "JPEG")
    decoded = decode_image(data, fit_height=fit_height, fit_width=fit_width)
    assert decoded.pixels.shape == (*expected, 3)
    assert (decoded.full_height, decoded.full_width) == (600, 800)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(("fit_width", "divisor"), [(190, 2), (95, 4), (48, 8)])
def test_decode_image_equals_pillows_draft_when_scaled(
    odd_encode: Encode, odd_photo: np.ndarray, mode: str, fit_width: int, divisor: int
) -> None:
    data = odd_encode(Image.fromarray(odd_photo[:599, :797]).convert(mode), "JPEG")
    oracle = Image.open(io.BytesIO(data))
    oracle.draft(None, (797 // divisor, 599 // divisor))
    scaled = decode_image(data, fit_width=fit_width).pixels
    np.testing.assert_array_equal(scaled, np.asarray(oracle.convert("RGB")))
    assert scaled.shape[:2] == (-(-599 // divisor), -(-797 // divisor))


def test_decode_image_swaps_fit_axes_when_orientation_is_sideways(
    odd_encode: Encode, odd_photo: np.ndarray
) -> None:
    data = odd_encode(odd_photo, "JPEG", exif=orientation_block(6))  # upright 800 x 600
    decoded = decode_image(data, fit_height=200, fit_width=10_000)
    assert (decoded.full_height, decoded.full_width) == (800, 600)
    assert decoded.pixels.shape == (400, 300, 3)
    decoded = decode_image(data, fit_height=10_000, fit_width=200)  # 300 < 2 * 200
    assert decoded.pixels.shape == (800, 600, 3)


def test_decode_image_scales_close_to_full_decode_when_jpeg_is_detailed(
    odd_encode: Encode, odd_photo: np.ndarray
) -> None:
    data = odd_encode(odd_photo, "JPEG", quality=92)
    full = decode_image(data).pixels
    for fit_width, divisor in ((200, 2), (100, 4), (48, 8)):
        scaled = decode_image(data, fit_width=fit_width).pixels
        assert scaled.shape[1] == 800 // divisor
        size = (fit_width, fit_width * 3 // 4)
        assert mean_error_after_resize(scaled, full, size) < 1.0


def test_decode_image_does_not_scale_when_format_is_not_jpeg(
    odd_encode: Encode, odd_photo: np.ndarray
) -> None:
    decoded = decode_image(odd_encode(odd_photo, "PNG"), fit_height=10, fit_width=10)
    np.testing.assert_array_equal(decoded.pixels, odd_photo)


# --- many threads -------------------------------------------------------------------------------


def test_decode_image_keeps_options_apart_when_threads_mix_them(
    odd_encode: Encode, odd_photo: np.ndarray, odd_tiff: Callable[..., bytes]
) -> None:
    photo = odd_encode(odd_photo, "JPEG")
    cut = photo[: len(photo) // 2]
    noisy_tiff = odd_tiff(bytes(6), width=3, height=2, bits=8, tags={34665: 60000})
    filters_before = list(warnings.filters)
    whole_pixels = decode_image(photo).pixels
    cut_pixels = decode_image(cut, allow_truncated=True).pixels

    def decode_one(index: int) -> bool:
        kind = index % 4
        if kind == 0:
            return bool((decode_image(photo).pixels == whole_pixels).all())
        if kind == 1:
            decoded = decode_image(cut, allow_truncated=True)
            return bool((decoded.pixels == cut_pixels).all())
        if kind == 2:
            return decode_image(noisy_tiff).pixels.shape == (2, 3, 3)
        with pytest.raises(ImageError, match="truncated"):
            decode_image(cut)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(decode_one, range(160)))
    assert warnings.filters == filters_before
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_read_image_size_restores_warning_filters_when_threads_interleave(
    odd_tiff: Callable[..., bytes],
) -> None:
    data = odd_tiff(bytes(6), width=3, height=2, bits=8)
    filters_before = list(warnings.filters)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # change threads as often as possible
    try:
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(read_image_size, [data] * 400)) == {(2, 3)}
    finally:
        sys.setswitchinterval(interval_s)
    assert warnings.filters == filters_before


def test_image_error_names_format_and_size_when_decoding_fails(
    odd_encode: Encode, odd_photo: np.ndarray
) -> None:
    data = odd_encode(odd_photo, "PNG")
    with pytest.raises(ImageError) as caught:
        decode_image(data[:500])
    assert re.search(r"cannot decode PNG of 800x600 pixels: \w+: .*; fetch it", str(caught.value))
    assert caught.value.__cause__ is not None
