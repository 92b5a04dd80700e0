"""Memory of the pipeline with photos of 4000x2250 and an engine that does not get on."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

import retinaray
from retinaray.data.decode_memory import estimate_decode_bytes
from retinaray.inference import canvas_loading
from retinaray.inference.pipeline import ImageSource, ReadSettings, detect_images

HEIGHT, WIDTH = 2250, 4000
MB = 1_000_000


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A photo of gradients and noise as JPEG and as PNG."""
    rng = np.random.default_rng(0)
    pixels = np.repeat(np.linspace(0, 240, WIDTH, dtype=np.uint8)[None, :, None], HEIGHT, axis=0)
    pixels = pixels + rng.integers(0, 16, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    folder = tmp_path_factory.mktemp("photos")
    Image.fromarray(pixels).save(folder / "a.jpg", quality=85)
    # Not compressed: it costs less time, and is the longest file of its kind.
    Image.fromarray(pixels).save(folder / "a.png", compress_level=0)
    return {name: folder / name for name in ("a.jpg", "a.png")}


class Held:
    """What is held of some kind, now and at most: how many, and how many bytes."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.num = self.most = self.num_bytes = self.most_bytes = self.total = 0
        self.has_company = threading.Event()

    def add(self, num_bytes: int) -> None:
        with self.lock:
            self.total += 1
            self.num += 1
            self.num_bytes += num_bytes
            if self.num > 1:
                self.has_company.set()
            self.most, self.most_bytes = (
                max(self.most, self.num),
                max(self.most_bytes, self.num_bytes),
            )

    def remove(self, num_bytes: int) -> None:
        with self.lock:
            self.num -= 1
            self.num_bytes -= num_bytes


def make_counted(content: bytes, held: Held) -> bytes:
    """A copy of a file that counts for as long as somebody holds it."""

    class Counted(bytes):
        def __del__(self) -> None:
            held.remove(len(self))

    held.add(len(content))
    return Counted(content)


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Held:
    """Images from the start of decoding to the end of their pixels, at their estimates."""
    held, decode = Held(), canvas_loading.decode_image

    def count_decode(data: bytes, **options: Any) -> Any:
        sizes = {key: options[key] for key in ("fit_height", "fit_width")}
        needed = estimate_decode_bytes(data, **sizes)
        held.add(needed)
        # On a busy machine one image may be decoded before a thread comes to the next.
        if held.total == 1:
            held.has_company.wait(1.0)
        decoded = decode(data, **options)
        weakref.finalize(decoded.pixels, held.remove, needed)
        return decoded

    monkeypatch.setattr(canvas_loading, "decode_image", count_decode)
    return held


@pytest.mark.parametrize(("decode_mb", "most_png"), [(1, 1), (150, 1), (250, 2)])
def test_detect_images_holds_no_more_than_promised_while_the_engine_is_blocked(
    script_predictor: Callable[..., Any],
    photos: dict[str, Path],
    decoding: Held,
    decode_mb: int,
    most_png: int,
) -> None:
    batch, threads, ahead = 2, 4, 6
    contents = {name: path.read_bytes() for name, path in photos.items()}
    files, num_drawn = Held(), 0

    def draw() -> Any:
        nonlocal num_drawn
        for number in count():
            num_drawn += 1
            yield ImageSource(number, "a.jpg" if number % 4 == 3 else "a.png")

    def is_idle() -> bool:
        return decoding.total == batch + ahead and decoding.num == files.num == 0

    def block(_: Tensor) -> list[list[float]]:
        # All that may be made ready is ready: then only canvases are left.
        idle = threading.Event()
        for _ in range(6000):
            if is_idle():
                break
            idle.wait(0.01)
        assert is_idle()
        assert num_drawn == batch + ahead
        return []

    results = detect_images(
        script_predictor(block),
        draw(),
        read=lambda uri: make_counted(contents[uri], files),
        batch=batch,
        settings=ReadSettings(threads=threads, decode_bytes=decode_mb * MB),
    )
    assert not next(results).error
    results.close()
    png_bytes = estimate_decode_bytes(contents["a.png"], fit_height=64, fit_width=96)
    assert 70 * MB < png_bytes < 110 * MB
    assert decoding.most_bytes <= max(decode_mb * MB, png_bytes)
    assert decoding.most >= most_png
    assert 1 < files.most <= threads
    assert files.most_bytes <= threads * len(contents["a.png"])


def test_errors_that_wait_hold_no_files(
    script_predictor: Callable[..., Any], photos: dict[str, Path]
) -> None:
    content = photos["a.png"].read_bytes()
    broken, files, sizes = content[: len(content) // 2], Held(), []

    def block(_: Tensor) -> list[list[float]]:
        idle = threading.Event()
        for _ in range(6000):
            if files.total == 8 and files.num == 0:
                break
            idle.wait(0.01)
        sizes.append((files.total, files.num))
        return []

    results = detect_images(
        script_predictor(block),
        [ImageSource(0, "whole"), *(ImageSource(number, "cut") for number in range(1, 8))],
        read=lambda uri: make_counted(content if uri == "whole" else broken, files),
        batch=2,
        settings=ReadSettings(threads=4),
    )
    assert [bool(result.error) for result in results] == [False] + 7 * [True]
    # An exception keeps the frames that it was raised in, with all that they held.
    assert sizes == [(8, 0)]


PROGRAM = """
import sys, threading
from pathlib import Path
from retinaray.inference.pipeline import ImageSource, ReadSettings, detect_placed, load_canvas
from retinaray.detector.postprocess import Detections
import torch

path, threads, num = sys.argv[1], 4, 6
read_all, num_read = threading.Condition(), 0

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

def read(uri):
    global num_read
    content = Path(uri).read_bytes()
    with read_all:
        num_read += 1
        read_all.notify_all()
    return content

class Slow:
    canvas = (800, 1333)
    num = 0
    def predict(self, images):
        # Not before all are read that may be.
        with read_all:
            assert read_all.wait_for(lambda: num_read >= min(num, self.num + 1 + threads), 60)
        self.num += 1
        return [Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))]

def measure(decode_bytes):
    global num_read
    num_read = 0
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    settings = ReadSettings(threads=threads, decode_bytes=decode_bytes)
    sources = [ImageSource(number, path) for number in range(num)]
    found = list(detect_placed(Slow(), sources, read=read, batch=1, settings=settings))
    assert len(found) == num and all(hasattr(item, "detections") for item in found), found[0]
    return status("VmHWM") - before

torch.set_num_threads(1)
load_canvas(ImageSource(0, path), Slow.canvas, read, ReadSettings())
print(*(measure(int(decode_bytes)) for decode_bytes in sys.argv[2:]))
"""


def measure_peaks(path: Path, *decode_bytes: int) -> list[int]:
    """Growth of a process by runs of 4 threads over one file, with several bounds on decoding."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux's /proc/self/clear_refs to measure peaks of memory")
    # What is freed goes back at once, so that it counts again when it is taken again.
    environment = os.environ | {
        "PYTHONPATH": str(Path(retinaray.__path__[0]).parent),
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "MALLOC_TRIM_THRESHOLD_": "1048576",
    }
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), *map(str, decode_bytes)],
        env=environment,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    return [int(peak) for peak in ended.stdout.split()]


def test_detect_placed_keeps_its_bound_on_the_memory_of_the_process(
    photos: dict[str, Path],
) -> None:
    threads, decode_bytes = 4, 110 * MB
    peak, free = measure_peaks(photos["a.png"], decode_bytes, 1 << 30)
    # The formula of `detect_placed`, with the length of the file that there is for max_bytes.
    canvases = 3 * 800 * 1333 * (math.ceil(threads / 1) + 2)
    files = threads * photos["a.png"].stat().st_size
    bound = canvases + files + decode_bytes
    # 20 MB: stacks of the threads, and what the interpreter itself needs.
    assert peak <= bound + 20 * MB
    # Where decoding has room, four photos at once take more than that.
    assert free > bound + 40 * MB
