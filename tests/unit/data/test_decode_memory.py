"""What decoding takes, against what the operating system says."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import retinaray
from retinaray.data.decode_memory import estimate_decode_bytes
from retinaray.errors import ImageError

HEIGHT, WIDTH = 1500, 2000
EXIF_TURNED = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
FORMATS = {
    "plain.jpg": ("JPEG", {}),
    "progressive.jpg": ("JPEG", {"progressive": True, "subsampling": 0}),
    "turned.jpg": ("JPEG", {"exif": EXIF_TURNED}),
    "plain.png": ("PNG", {"compress_level": 1}),
    "turned.png": ("PNG", {"compress_level": 1, "exif": EXIF_TURNED[6:]}),
    "plain.webp": ("WEBP", {"method": 0}),
    "plain.gif": ("GIF", {}),
    "plain.tif": ("TIFF", {}),
    "plain.bmp": ("BMP", {}),
}
FITS = (None, 400)

PROGRAM = """
import json, sys
from pathlib import Path
from retinaray.data.image_decoding import decode_image

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

contents = {path: Path(path).read_bytes() for path in sys.argv[1:]}
measured = {}
for turn in range(2):  # the first loads the codecs
    for path, content in contents.items():
        for fit in (400, None)[: turn + 1]:
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS")
            decode_image(content, fit_height=fit, fit_width=fit)
            measured[f"{Path(path).name} {fit}"] = status("VmHWM") - before
print(json.dumps(measured))
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A picture of gradients and noise in several formats."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    gradient = np.stack([rows * 255 / HEIGHT, columns * 255 / WIDTH, rows * 0], axis=-1)
    noise = rng.integers(0, 12, gradient.shape)
    image = Image.fromarray(np.minimum(gradient + noise, 255).astype(np.uint8))
    folder = tmp_path_factory.mktemp("photos")
    for name, (kind, options) in FORMATS.items():
        image.save(folder / name, kind, **options)
    return {name: folder / name for name in FORMATS}


@pytest.fixture(scope="module")
def peaks(photos: dict[str, Path]) -> dict[str, int]:
    """Most memory that the decoding of each file took, in a process of its own."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux's /proc/self/clear_refs to measure peaks of memory")
    # What is freed goes back at once, so that it counts again when it is taken again.
    environment = os.environ | {
        "PYTHONPATH": str(Path(retinaray.__path__[0]).parent),
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "MALLOC_TRIM_THRESHOLD_": "1048576",
    }
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, photos.values())],
        env=environment,
        capture_output=True,
        timeout=300,
        check=True,
    )
    measured: dict[str, int] = json.loads(ended.stdout)
    return measured


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("name", FORMATS)
def test_estimate_decode_bytes_is_a_close_upper_bound(
    photos: dict[str, Path], peaks: dict[str, int], name: str, fit: int | None
) -> None:
    content = photos[name].read_bytes()
    estimate = estimate_decode_bytes(content, fit_height=fit, fit_width=fit)
    # 2 MB: buffers whose size does not depend on the image.
    assert peaks[f"{name} {fit}"] <= estimate + 2_000_000
    assert peaks[f"{name} {fit}"] >= estimate / 4


def test_estimate_decode_bytes_shrinks_with_scaled_jpegs(photos: dict[str, Path]) -> None:
    content = photos["plain.jpg"].read_bytes()
    whole, scaled = (estimate_decode_bytes(content, fit_height=fit) for fit in (None, 180))
    # 1500 rows in quarters are 375, at least twice 180; a sixteenth of the pixels.
    assert scaled - len(content) == (whole - len(content)) / 16


def test_estimate_decode_bytes_refuses_what_decoding_refuses(photos: dict[str, Path]) -> None:
    with pytest.raises(ImageError, match="starting with b'no image'"):
        estimate_decode_bytes(b"no image")
    with pytest.raises(ImageError, match="max_pixels=2999999"):
        estimate_decode_bytes(photos["plain.png"].read_bytes(), max_pixels=HEIGHT * WIDTH - 1)
    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, "PPM")
    assert estimate_decode_bytes(stream.getvalue()) == 14 + len(stream.getvalue())
