from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def odd_folder(shared_data: Path) -> Path:
    """The folder with the awkward image files and, one level up, their index.json."""
    return shared_data / "odd_images" / "images"


@pytest.fixture(scope="session")
def odd_encode() -> Callable[..., bytes]:
    """Encode an array with Pillow: odd_encode(pixels, "PNG", **Pillow's save options)."""

    def encode(pixels: np.ndarray | Image.Image, file_format: str, **options: object) -> bytes:
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        stream = io.BytesIO()
        image.save(stream, file_format, **options)
        return stream.getvalue()

    return encode


@pytest.fixture(scope="session")
def odd_photo() -> np.ndarray:
    """600x800 RGB without symmetry, smooth enough that JPEG changes it little, detailed enough to
    show a shift: two ramps and a sum of waves of 8 to 40 px.
    """
    rows, columns = np.mgrid[:600, :800].astype(np.float64)
    waves = sum(np.sin(rows / period + columns / (period + 3)) for period in (1.3, 2.5, 6.4))
    red = 255 * columns / 799
    green = 255 * rows / 599
    blue = 128 + 40 * waves
    return np.stack([red, green, blue], axis=-1).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def odd_tiff() -> Callable[..., bytes]:
    """Build an uncompressed one-strip gray TIFF: odd_tiff(payload, width, height, bits, ...)."""

    def build(
        payload: bytes,
        *,
        width: int,
        height: int,
        bits: int,
        photometric: int = 1,
        order: str = "<",
        tags: dict[int, int] | None = None,
    ) -> bytes:
        short_tags = {258: bits, 259: 1, 262: photometric, 277: 1} | (tags or {})
        long_tags = {256: width, 257: height, 273: 0, 278: height, 279: len(payload)}
        codes = sorted(short_tags | long_tags)
        long_tags[273] = 8 + 2 + 12 * len(codes) + 4  # the strip follows the directory
        entries = b"".join(
            struct.pack(f"{order}HHII", code, 4, 1, long_tags[code])
            if code in long_tags
            else struct.pack(f"{order}HHIHH", code, 3, 1, short_tags[code], 0)
            for code in codes
        )
        start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
        return start + struct.pack(f"{order}H", len(codes)) + entries + bytes(4) + payload

    return build
