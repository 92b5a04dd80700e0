"""Tiled detection, files to results: once per object, in order, whole batches, bounded memory."""

from __future__ import annotations

import gc
import io
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from retinaray.artifact import ModelCard
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import InferenceError, StorageError, UnreadableFileError
from retinaray.inference import image_loader, tile_feed
from retinaray.inference.pipeline import ImageResult, ImageSource, ReadSettings, detect_images
from retinaray.inference.predictor import PredictorSettings
from retinaray.inference.tiled_pipeline import detect_tiled
from retinaray.inference.tiling import TileSettings, make_tile_predictor_settings
from retinaray.inference.torch_backend import TorchPredictor
from retinaray.inference.watched_threads import WatchedThreads

Square = tuple[int, int, int]
MakeCard = Callable[..., ModelCard]
Script = Callable[..., Any]


def encode(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def draw(height: int, width: int, squares: list[Square]) -> bytes:
    """White squares (left, top, side) on black."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    for left, top, side in squares:
        pixels[top : top + side, left : left + side] = 255
    return encode(pixels)


def scatter(height: int, width: int, *, largest: int, num: int, seed: int) -> list[Square]:
    """Squares that are at least 3 pixels apart."""
    rng = random.Random(seed)
    squares: list[Square] = []
    taken = np.zeros((height, width), dtype=np.bool_)
    for _ in range(20 * num):
        side = rng.randint(max(1, largest // 2), largest)
        left, top = rng.randint(0, width - side), rng.randint(0, height - side)
        around = taken[max(0, top - 3) : top + side + 3, max(0, left - 3) : left + side + 3]
        if len(squares) < num and not around.any():
            around[:] = True
            squares.append((left, top, side))
    assert len(squares) > num // 2
    return squares


def find_squares(canvas: torch.Tensor) -> list[list[float]]:
    """The boxes of bright squares, equally sure of all of them."""
    # At 2 or 3 times its size a square has 0.44 in its corners and 0.33 around its edges.
    bright = np.pad(canvas[0].numpy() > 0.4 * 255, 1)
    starts = bright & ~np.roll(bright, 1, axis=0) & ~np.roll(bright, 1, axis=1)
    rows = []
    for y, x in np.argwhere(starts).tolist():
        width, height = np.argmin(bright[y, x:]), np.argmin(bright[y:, x])
        corners = (x - 1, y - 1, x - 1 + width, y - 1 + height)
        rows.append([*map(float, corners), 0.9, 0.0])
    return rows


def find_whole_squares(canvas: torch.Tensor) -> list[list[float]]:
    """Those that no border of a tile cuts; the canvas must have no room beside the tile."""
    height, width = canvas.shape[1:]
    return [
        row
        for row in find_squares(canvas)
        if min(row[:2]) > 0 and row[2] < width and row[3] < height
    ]


def boxes_of(result: ImageResult) -> list[list[float]]:
    assert not result.error
    return sorted(found["bbox"] for found in result.detections)


def run(predictor: Any, sources: Any, read: Any, **options: Any) -> list[ImageResult]:
    return list(start(predictor, sources, read, **options))


def start(
    predictor: Any,
    sources: Any,
    read: Any,
    *,
    batch: int = 4,
    threads: int = 3,
    max_pixels: int = 10**6,
    **tiling: Any,
) -> Any:
    return detect_tiled(
        predictor,
        sources,
        read=read,
        batch=batch,
        settings=ReadSettings(threads=threads, max_pixels=max_pixels),
        tiling=TileSettings(**tiling),
    )


def sources_of(names: Any) -> list[ImageSource]:
    return [ImageSource(f"id-{name}", str(name)) for name in names]


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize(
    ("tile", "canvas", "overlap", "has_full"),
    [
        ((40, 40), (40, 40), 0.5, False),
        ((64, 64), (128, 128), 0.25, False),  # enlarged
        ((48, 96), (48, 96), 0.4, False),
        ((64, 64), (64, 96), 0.3, False),  # the canvas has room beside the tile
        ((200, 300), (160, 240), 0.2, False),  # the whole image in one
        ((80, 120), (160, 240), 0.2, True),  # tiles enlarged, the whole image as it is
    ],
)
def test_detect_tiled_reports_every_square_once(
    make_tiny_card: MakeCard,
    script_predictor: Script,
    batch: int,
    tile: tuple[int, int],
    canvas: tuple[int, int],
    overlap: float,
    has_full: bool,
) -> None:
    largest = min(24, int(min(tile) * overlap))
    images = {str(seed): scatter(160, 240, largest=largest, num=25, seed=seed) for seed in range(2)}
    results = run(
        script_predictor(find_squares, make_tiny_card(canvas=canvas)),
        sources_of(images),
        lambda uri: draw(160, 240, images[uri]),
        batch=batch,
        tile_height=tile[0],
        tile_width=tile[1],
        overlap=overlap,
        has_full=has_full,
    )
    for result, squares in zip(results, images.values(), strict=True):
        assert boxes_of(result) == sorted([x, y, side, side] for x, y, side in squares)
        assert {found["score"] for found in result.detections} == {0.9}
        assert (result.height, result.width) == (160, 240)


@pytest.mark.parametrize("merge", ["ios", "nms"])
@pytest.mark.parametrize("seed", range(12))
def test_detect_tiled_reports_every_square_once_with_random_tiles(
    make_tiny_card: MakeCard, script_predictor: Script, merge: str, seed: int
) -> None:
    rng = random.Random(seed)
    height, width = rng.randint(30, 100), rng.randint(30, 100)
    overlap, factor = rng.uniform(0.25, 0.8), rng.randint(1, 3)
    # With a pixel of the background on either side, so that it touches no border.
    largest = min(20, int(min(height, width) * overlap) - 2)
    squares = scatter(150, 230, largest=largest, num=20, seed=seed)
    squares = [(x + 1, y + 1, side) for x, y, side in squares]
    # NMS keeps the small parts that borders cut off: it is for detectors that find none of them.
    find = find_squares if merge == "ios" else find_whole_squares
    (result,) = run(
        script_predictor(find, make_tiny_card(canvas=(height * factor, width * factor))),
        sources_of(["x"]),
        lambda _: draw(152, 232, squares),
        batch=rng.randint(1, 20),
        threads=rng.randint(1, 4),
        tile_height=height,
        tile_width=width,
        overlap=overlap,
        has_full=False,
        merge=merge,
    )
    assert boxes_of(result) == sorted([x, y, side, side] for x, y, side in squares)


@pytest.mark.parametrize("has_full", [False, True])
def test_detect_tiled_finds_what_is_larger_than_a_tile_in_the_whole_image_only(
    make_tiny_card: MakeCard, script_predictor: Script, has_full: bool
) -> None:
    predictor = script_predictor(find_squares, make_tiny_card(canvas=(64, 64)))
    (result,) = run(
        predictor,
        sources_of(["x"]),
        lambda _: draw(128, 128, [(10, 20, 90)]),
        tile_height=64,
        tile_width=64,
        has_full=has_full,
    )
    # The whole image is halved.
    assert (boxes_of(result) == [[10, 20, 90, 90]]) == has_full
    assert has_full or all(max(box[2:]) <= 64 for box in boxes_of(result))


def test_detect_tiled_reports_hundreds_of_objects_and_cuts_after_merging(
    make_tiny_card: MakeCard, script_predictor: Script
) -> None:
    # 24 x 24 squares less two = 574 as in the fullest of the NEON tree tiles.
    squares = [(10 * column + 3, 10 * row + 3, 4) for row in range(24) for column in range(24)][2:]
    options = {"tile_height": 80, "tile_width": 80, "overlap": 0.2, "has_full": False}
    predictor = script_predictor(find_squares, make_tiny_card(canvas=(80, 80)))
    image = draw(240, 240, squares)
    (result,) = run(predictor, sources_of(["x"]), lambda _: image, **options)
    assert boxes_of(result) == sorted([x, y, side, side] for x, y, side in squares)
    (cut,) = run(predictor, sources_of(["x"]), lambda _: image, max_detections=301, **options)
    assert cut.detections == result.detections[:301]


@pytest.fixture
def lively_predictor(
    make_tiny_card: MakeCard, make_lively_model: Callable[[ModelCard], RetinaNet], one_thread: None
) -> TorchPredictor:
    """A real network on 64x96 that answers with many boxes of all classes."""
    card = make_tiny_card()
    settings = make_tile_predictor_settings(PredictorSettings(score_threshold=0.3))
    return TorchPredictor(make_lively_model(card), card=card, settings=settings)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_detect_tiled_equals_the_untiled_pipeline_when_images_fit_one_tile(
    lively_predictor: TorchPredictor, kind: str
) -> None:
    rng = np.random.default_rng(0)
    # JPEGs that are shrunk a lot are decoded at reduced size in both pipelines.
    sizes = [(64, 96), (30, 200), (500, 400), (97, 61)]
    files = {
        str(number): encode(rng.integers(0, 256, (*size, 3), dtype=np.uint8), kind)
        for number, size in enumerate(sizes)
    }
    sources, settings = sources_of(files), ReadSettings(threads=2)
    untiled = list(
        detect_images(lively_predictor, sources, read=files.__getitem__, batch=2, settings=settings)
    )
    options = {"tile_height": 500, "tile_width": 400, "batch": 2}
    assert run(lively_predictor, sources, files.__getitem__, has_full=False, **options) == untiled
    # The whole image is the only tile already.
    assert run(lively_predictor, sources, files.__getitem__, has_full=True, **options) == untiled
    assert min(len(result.detections) for result in untiled) > 3


def test_detect_tiled_gives_the_same_whatever_the_threads(
    lively_predictor: TorchPredictor,
) -> None:
    rng = np.random.default_rng(1)
    files = {
        str(number): encode(rng.integers(0, 256, (70, 60 + 40 * number, 3), dtype=np.uint8))
        for number in range(3)
    }
    results = [
        run(
            lively_predictor,
            sources_of(files),
            files.__getitem__,
            threads=threads,
            tile_height=48,
            tile_width=64,
            max_bytes=max_bytes,
        )
        for threads, max_bytes in ((1, 1), (4, 40_000), (3, 1 << 29))
    ]
    assert results[0] == results[1] == results[2]
    assert all(result.detections for result in results[0])


def test_detect_tiled_applies_the_orientation_of_a_photo(
    make_tiny_card: MakeCard, script_predictor: Script
) -> None:
    pixels = np.zeros((60, 100, 3), dtype=np.uint8)
    pixels[10:18, 20:36] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: upright it is 100 high, x' = 60 - y, y' = x
    photo = encode(pixels, "PNG", exif=exif.tobytes())
    predictor = script_predictor(find_squares, make_tiny_card(canvas=(40, 40)))
    (result,) = run(
        predictor,
        sources_of(["x"]),
        lambda _: photo,
        tile_height=40,
        tile_width=40,
        overlap=0.5,
        has_full=False,
    )
    assert (result.height, result.width) == (100, 60)
    assert boxes_of(result) == [[42.0, 20.0, 8.0, 16.0]]


@pytest.fixture
def files() -> dict[str, bytes]:
    """Images 0 to 9 of 40x(40 + 20 n) pixels with n + 1 squares; 3 and 7 are broken, 5 is empty."""
    content = {
        str(n): draw(40, 40 + 20 * n, [(20 * i + 10, 10, 8) for i in range(n + 1)])
        for n in range(10)
    }
    # The header of 3 is whole, so that it fails while it is decoded.
    return content | {"3": content["3"][:-30], "7": b"no image", "5": b""}


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
@pytest.mark.parametrize("max_bytes", [1, 1 << 29])
def test_detect_tiled_makes_broken_images_errors_and_changes_no_other(
    make_tiny_card: MakeCard,
    script_predictor: Script,
    files: dict[str, bytes],
    batch: int,
    max_bytes: int,
) -> None:
    def read(uri: str) -> bytes:
        if uri == "1":
            raise UnreadableFileError("cannot read 1: access denied")
        return files[uri]

    order = [4, 1, 7, 0, 3, 9, 5, 2, 8, 6, 3, 1]
    results = run(
        script_predictor(find_squares, make_tiny_card(canvas=(40, 40))),
        sources_of(order),
        read,
        batch=batch,
        tile_height=40,
        tile_width=40,
        has_full=False,
        max_bytes=max_bytes,
    )
    assert [result.source.uri for result in results] == list(map(str, order))
    for number, result in zip(order, results, strict=True):
        if number in (1, 3, 5, 7):
            expected = "UnreadableFileError" if number == 1 else "ImageError"
            assert result.exception == expected
            assert result.error
            assert (result.height, result.width, result.detections) == (0, 0, ())
        else:
            assert boxes_of(result) == [[20 * i + 10, 10, 8, 8] for i in range(number + 1)]


def test_detect_tiled_refuses_images_above_the_limit(
    script_predictor: Script, files: dict[str, bytes]
) -> None:
    results = run(script_predictor(), sources_of([0, 9]), files.__getitem__, max_pixels=40 * 219)
    assert [result.exception for result in results] == ["", "ImageError"]
    assert "max_pixels=8760" in results[1].error


def test_detect_tiled_fills_batches_across_images(
    make_tiny_card: MakeCard, script_predictor: Script, files: dict[str, bytes]
) -> None:
    predictor = script_predictor(find_squares, make_tiny_card(canvas=(40, 40)))
    names = [0, 9, 3, 1, 2, 4]
    options = {"tile_height": 40, "tile_width": 40, "overlap": 0.2, "batch": 4}
    run(predictor, sources_of(names), files.__getitem__, **options)
    # 40, 220, 60, 80, 120 pixels in steps of 32: 1, 7, 2, 3, 4 tiles; and the whole images.
    assert predictor.batch_sizes == [4, 4, 4, 4, 4, 1]
    predictor.batch_sizes.clear()
    run(predictor, sources_of(names), files.__getitem__, has_full=False, **options)
    assert predictor.batch_sizes == [4, 4, 4, 4, 1]


@pytest.mark.parametrize("max_bytes", [1, 30_000, 1 << 29])
def test_detect_tiled_gives_results_in_the_order_of_the_sources(
    make_tiny_card: MakeCard, script_predictor: Script, files: dict[str, bytes], max_bytes: int
) -> None:
    order, done, changed = [8, 1, 6, 0, 9, 4, 2], [], threading.Condition()

    def read(uri: str) -> bytes:
        with changed:
            # The three behind the first one, and the last behind the fifth, are ready before it.
            earlier = {"8": {"1", "6", "0"}, "9": {"4", "2"}}.get(uri, set())
            assert changed.wait_for(lambda: earlier <= set(done), timeout=60)
            done.append(uri)
            changed.notify_all()
        return files[uri]

    results = run(
        script_predictor(find_squares, make_tiny_card(canvas=(40, 40))),
        sources_of(order),
        read,
        threads=4,
        tile_height=40,
        tile_width=40,
        has_full=False,
        max_bytes=max_bytes,
    )
    assert [result.source.image_id for result in results] == [f"id-{n}" for n in order]
    assert [len(result.detections) for result in results] == [n + 1 for n in order]
    assert done.index("0") < done.index("8")


def test_detect_tiled_gives_nothing_when_there_are_no_sources(script_predictor: Script) -> None:
    predictor = script_predictor()
    assert run(predictor, [], lambda _: b"") == []
    assert predictor.batch_sizes == []


@dataclass
class Live:
    """Arrays that somebody still holds."""

    bytes_now: int = 0
    num_now: int = 0
    bytes_most: int = 0
    num_most: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.RLock()

    def add(self, size_bytes: int) -> None:
        with self._lock:
            self.num_now += 1
            self.bytes_now += size_bytes
            self.num_most = max(self.num_most, self.num_now)
            self.bytes_most = max(self.bytes_most, self.bytes_now)

    def remove(self, size_bytes: int) -> None:
        with self._lock:
            self.num_now -= 1
            self.bytes_now -= size_bytes

    def watch(self, array: np.ndarray) -> None:
        self.add(array.nbytes)
        weakref.finalize(array, self.remove, array.nbytes)


@pytest.fixture
def live_images(monkeypatch: pytest.MonkeyPatch) -> Live:
    """Counts decoded images, from the start of decoding to the release of the pixels."""
    live, decode = Live(), image_loader.decode_image

    def count_decoded(data: bytes, **options: Any) -> Any:
        height, width = image_loader.read_image_size(data)
        live.add(height * width * 3)
        decoded = decode(data, **options)
        weakref.finalize(decoded.pixels, live.remove, height * width * 3)
        return decoded

    monkeypatch.setattr(image_loader, "decode_image", count_decoded)
    return live


@pytest.fixture
def live_tiles(monkeypatch: pytest.MonkeyPatch) -> Live:
    """Counts letterboxed tiles."""
    live, letterbox = Live(), tile_feed.letterbox

    def count_cut(*inputs: Any, **options: Any) -> Any:
        canvas, placement = letterbox(*inputs, **options)
        live.watch(canvas)
        return canvas, placement

    monkeypatch.setattr(tile_feed, "letterbox", count_cut)
    return live


@pytest.mark.parametrize(
    ("batch", "threads", "max_images"), [(4, 3, 2), (1, 8, 1), (2, 2, 3), (3, 8, 100)]
)
def test_detect_tiled_holds_no_more_than_promised(
    make_tiny_card: MakeCard,
    script_predictor: Script,
    live_images: Live,
    live_tiles: Live,
    batch: int,
    threads: int,
    max_images: int,
) -> None:
    image, size_bytes = draw(100, 150, [(10, 10, 9)]), 100 * 150 * 3
    ahead = max(3 * batch, threads)
    num_drawn = 0
    deadline = time.monotonic() + 20

    def find_when_all_are_ahead(canvas: torch.Tensor) -> list[list[float]]:
        # The threads get as far ahead as they may while the network holds its first batch.
        while live_tiles.num_most < ahead and time.monotonic() < deadline:
            time.sleep(0.001)
        return find_squares(canvas)

    def draw_sources() -> Iterator[ImageSource]:
        nonlocal num_drawn
        for number in count():
            num_drawn += 1
            yield ImageSource(number, "x")

    # 40 pixels in steps of 32 at most: 3 x 5 tiles and the whole image.
    results = start(
        script_predictor(find_when_all_are_ahead, make_tiny_card(canvas=(40, 40))),
        draw_sources(),
        lambda _: image,
        batch=batch,
        threads=threads,
        tile_height=40,
        tile_width=40,
        max_bytes=int((max_images + 0.9) * size_bytes),
    )
    with closing(results):
        for number in range(15):
            result = next(results)
            assert result.source.image_id == number
            assert boxes_of(result) == [[10.0, 10.0, 9.0, 9.0]]
            # Of 16 tiles each, the ones ahead reach into at most this many images.
            num_reached = number + 1 + -(-(ahead + batch) // 16)
            assert num_drawn <= num_reached + ahead + 1
    gc.collect()
    assert live_images.num_most <= max_images
    assert live_images.bytes_most <= max_images * size_bytes
    # Those ahead, those of the batch that is gathered or in the network, and the one in hand.
    assert ahead <= live_tiles.num_most <= ahead + batch + 1
    assert live_images.num_now == 0
    assert live_tiles.num_now == 0


def test_detect_tiled_takes_an_image_above_the_bound_alone(
    make_tiny_card: MakeCard, script_predictor: Script, live_images: Live
) -> None:
    sizes = [50, 400, 60, 500, 70, 50, 50]
    files = {str(n): draw(50, width, [(20, 20, 9)]) for n, width in enumerate(sizes)}
    results = run(
        script_predictor(find_squares, make_tiny_card(canvas=(40, 40))),
        sources_of(files),
        files.__getitem__,
        batch=2,
        threads=6,
        tile_height=40,
        tile_width=40,
        overlap=0.5,
        has_full=False,
        max_bytes=50 * 200 * 3,
    )
    assert [boxes_of(result) for result in results] == [[[20, 20, 9, 9]]] * 7
    assert live_images.bytes_most == 50 * 500 * 3


def names_of_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("load", "cut"))]


@pytest.mark.parametrize(
    "error",
    [MemoryError("no room"), KeyError("bug"), OSError("disk"), StorageError("the server is away")],
)
def test_detect_tiled_does_not_swallow_other_exceptions(
    script_predictor: Script, files: dict[str, bytes], error: Exception
) -> None:
    def read(uri: str) -> bytes:
        if uri == "6":
            raise error
        return files[uri]

    with pytest.raises(type(error), match=str(error.args[0])):
        run(script_predictor(), sources_of([0, 2, 4, 6, 8, 9]), read, threads=4, max_bytes=1)
    assert names_of_threads() == []


def test_detect_tiled_ends_its_threads_when_the_network_fails(
    script_predictor: Script, files: dict[str, bytes]
) -> None:
    def fail(_: torch.Tensor) -> list[list[float]]:
        raise InferenceError("the device is lost")

    with pytest.raises(InferenceError, match="device is lost"):
        run(script_predictor(fail), sources_of([0, 2] * 20), files.__getitem__, max_bytes=1)
    assert names_of_threads() == []


def test_detect_tiled_drops_what_was_queued_when_the_caller_stops(
    script_predictor: Script, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    release, started = threading.Event(), []
    close = WatchedThreads.close

    def release_and_close(threads: WatchedThreads) -> None:
        release.set()
        close(threads)

    def read(uri: str) -> bytes:
        started.append(uri)
        if len(started) > 1:
            assert release.wait(60)
        return files["0"]

    monkeypatch.setattr(WatchedThreads, "close", release_and_close)
    sources = sources_of(range(100))
    results = start(script_predictor(), sources, read, batch=1, threads=1)
    assert next(results).source.uri == "0"
    results.close()
    assert started in (["0"], ["0", "1"])
    assert names_of_threads() == []
