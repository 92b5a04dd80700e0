"""Batches through a predictor: one ahead where it can, the same results, times kept apart."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retinaray.data.transforms import Placement
from retinaray.detector.postprocess import Detections
from retinaray.errors import ImageError, InferenceError, StorageError
from retinaray.inference.canvas_loading import DeviceCanvas, LoadedCanvas
from retinaray.inference.pipeline import ImageSource, ReadSettings, detect_images
from retinaray.inference.stage_times import StageClock
from retinaray.inference.tensorrt_buffers import EngineBuffers
from retinaray.inference.tiled_pipeline import detect_tiled
from retinaray.inference.tiling import TileSettings


class DoubleBuffered:
    """As TensorRT: takes batch k + 1 before it gives the results of batch k; writes down both."""

    def __init__(self, inner: Any) -> None:
        self.backend, self.card, self.canvas = inner.backend, inner.card, inner.canvas
        self.inner = inner
        self.events: list[str] = []
        self.is_open = False

    def predict(self, _: Tensor) -> list[Detections]:
        raise AssertionError("expected predict_batches")

    def predict_batches(self, batches: Iterable[Tensor]) -> Iterator[list[Detections]]:
        self.is_open = True
        try:
            waiting: tuple[int, Tensor] | None = None
            for number, images in enumerate(batches):
                self.events.append(f"in {number}")
                if waiting is not None:
                    yield self._give(*waiting)
                # Not copied: a batch must stay as it is until its results have been given.
                waiting = number, images
            if waiting is not None:
                yield self._give(*waiting)
        finally:
            self.is_open = False

    def _give(self, number: int, images: Tensor) -> list[Detections]:
        self.events.append(f"out {number}")
        return self.inner.predict(images)


def find_grey(canvas: Tensor) -> list[list[float]]:
    grey = round(canvas.float().mean().item() / 10)
    return [[1, 1, 2 + grey, 11, 0.9, 0]]


@pytest.fixture
def files(encode_png: Callable[..., bytes]) -> dict[str, bytes]:
    """Images 0 to 22, whose grey is 10 times their number; 3 and all from 8 to 15 are broken."""
    content = {str(number): encode_png(64, 96, 10 * number) for number in range(23)}
    return content | {str(number): b"broken" for number in (3, *range(8, 16))}


SOURCES = [ImageSource(number, str(number)) for number in range(23)]


@pytest.mark.parametrize("batch", [1, 2, 4, 5, 40])
def test_detect_images_finds_the_same_when_batches_overlap(
    script_predictor: Callable[..., Any], files: dict[str, bytes], batch: int
) -> None:
    def run(predictor: Any) -> list[Any]:
        return list(
            detect_images(
                predictor,
                SOURCES,
                read=files.__getitem__,
                batch=batch,
                settings=ReadSettings(threads=3),
            )
        )

    plain, ahead = script_predictor(find_grey), script_predictor(find_grey)
    expected = run(plain)
    assert run(DoubleBuffered(ahead)) == expected
    assert ahead.batch_sizes == plain.batch_sizes
    assert [result.source for result in expected] == SOURCES
    widths = {n: r.detections[0]["bbox"][2] for n, r in enumerate(expected) if not r.error}
    assert widths == {n: 1 + n for n in range(23) if n not in (3, *range(8, 16))}


def test_detect_images_gives_the_next_batch_before_it_takes_results(
    script_predictor: Callable[..., Any], files: dict[str, bytes]
) -> None:
    predictor = DoubleBuffered(script_predictor(find_grey))
    results = detect_images(
        predictor, SOURCES, read=files.__getitem__, batch=4, settings=ReadSettings(threads=2)
    )
    seen = [(result.source.image_id, len(predictor.events)) for result in results]
    # Batches 2 and 3, images 8 to 15, are broken throughout: the predictor never sees them.
    assert predictor.events == [
        "in 0", "in 1", "out 0", "in 2", "out 1", "in 3", "out 2", "out 3"
    ]  # fmt: skip
    assert [number for number, _ in seen] == list(range(23))
    assert dict(seen)[0] == 3
    assert dict(seen)[4] == 5


def test_detect_tiled_finds_the_same_when_batches_overlap(
    script_predictor: Callable[..., Any], files: dict[str, bytes]
) -> None:
    def run(predictor: Any, clock: StageClock | None = None) -> list[Any]:
        return list(
            detect_tiled(
                predictor,
                SOURCES,
                read=files.__getitem__,
                batch=4,
                settings=ReadSettings(threads=3),
                tiling=TileSettings(tile_height=40, tile_width=40),
                clock=clock,
            )
        )

    predictor, clock = DoubleBuffered(script_predictor(find_grey)), StageClock()
    found = run(predictor, clock)
    assert found == run(script_predictor(find_grey))
    assert predictor.events[:5] == ["in 0", "in 1", "out 0", "in 2", "out 1"]
    assert clock.times.num_bytes == sum(map(len, files.values()))
    assert min(clock.times.fetch_s, clock.times.decode_s, clock.times.engine_s) > 0


@pytest.mark.parametrize("fault", ["store", "engine", "caller"])
def test_detect_images_lets_go_of_the_engine_when_it_ends_early(
    script_predictor: Callable[..., Any], files: dict[str, bytes], fault: str
) -> None:
    def read(uri: str) -> bytes:
        if fault == "store" and uri == "20":
            raise StorageError("the server is away")
        return files[uri]

    def find(canvas: Tensor) -> list[list[float]]:
        if fault == "engine" and canvas.float().mean() > 50:
            raise InferenceError("the device is lost")
        return []

    predictor = DoubleBuffered(script_predictor(find))
    results = detect_images(
        predictor, SOURCES, read=read, batch=4, settings=ReadSettings(threads=2)
    )
    assert next(results).source.image_id == 0
    assert predictor.is_open
    if fault == "caller":
        results.close()
    else:
        with pytest.raises((StorageError, InferenceError), match=r"away|lost"):
            list(results)
    assert not predictor.is_open
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


@pytest.mark.parametrize("is_ahead", [False, True])
def test_detect_images_counts_the_engine_apart_from_the_waiting(
    script_predictor: Callable[..., Any], encode_png: Callable[..., bytes], is_ahead: bool
) -> None:
    png, never, clock = encode_png(64, 96), threading.Event(), StageClock()

    def read(_: str) -> bytes:
        never.wait(0.02)
        return png

    def find(_: Tensor) -> list[list[float]]:
        never.wait(0.01)
        return []

    predictor = script_predictor(find)
    results = detect_images(
        DoubleBuffered(predictor) if is_ahead else predictor,
        SOURCES[:10],
        read=read,
        batch=1,
        settings=ReadSettings(threads=1),
        clock=clock,
    )
    start = time.perf_counter()
    assert len(list(results)) == 10
    wall_s = time.perf_counter() - start
    times = clock.times
    assert times.fetch_s >= 10 * 0.02
    assert times.engine_s >= 10 * 0.01
    # At least for the first image, which nobody could decode ahead.
    assert times.starved_s >= 0.02
    # No moment counts for both.
    assert times.engine_s + times.starved_s <= wall_s


class ReadyLoader:
    """A loader that has its canvases in memory of its own, as one in other processes would."""

    def __init__(self, shape: tuple[int, ...] = (64, 96, 3)) -> None:
        self.shape = shape
        self.num_closed = 0

    def load(self, source: ImageSource) -> Future[LoadedCanvas]:
        future: Future[LoadedCanvas] = Future()
        if source.image_id in (1, 5):
            future.set_exception(ImageError("broken"))
        else:
            pixels = np.full(self.shape, 10 * int(source.image_id), dtype=np.uint8)
            future.set_result(LoadedCanvas(pixels, Placement(64, 96, 64, 96)))
        return future

    def close(self) -> None:
        self.num_closed += 1


def test_detect_images_takes_canvases_from_another_loader(
    script_predictor: Callable[..., Any],
) -> None:
    loader, predictor = ReadyLoader(), script_predictor(find_grey)
    results = list(
        detect_images(
            predictor,
            SOURCES[:8],
            read=lambda _: pytest.fail("the loader reads"),
            batch=3,
            settings=ReadSettings(),
            loader=loader,
        )
    )
    assert predictor.batch_sizes == [2, 2, 2]
    assert [result.error for result in results] == ["", "broken", "", "", "", "broken", "", ""]
    widths = {n: r.detections[0]["bbox"][2] for n, r in enumerate(results) if not r.error}
    assert widths == {n: 1 + n for n in (0, 2, 3, 4, 6, 7)}
    assert loader.num_closed == 0


class AskedFuture(Future[LoadedCanvas]):
    """Begins when somebody asks for it, as the last group of a loader that collects images."""

    def __init__(self, begin: Callable[[], None]) -> None:
        super().__init__()
        self.begin = begin

    def result(self, timeout: float | None = None) -> LoadedCanvas:
        self.begin()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.begin()
        return super().exception(timeout)


class LazyLoader(ReadyLoader):
    def load(self, source: ImageSource) -> Future[LoadedCanvas]:
        ready = super().load(source)

        def begin() -> None:
            if not asked.done():
                asked.set_result(ready.result())

        asked = AskedFuture(begin)
        return asked


def test_detect_images_asks_for_canvases_that_wait_to_be_asked_for(
    script_predictor: Callable[..., Any],
) -> None:
    results = detect_images(
        script_predictor(find_grey),
        [SOURCES[number] for number in (0, 2, 3, 4, 6)],
        read=lambda _: pytest.fail("the loader reads"),
        batch=2,
        settings=ReadSettings(),
        loader=LazyLoader(),
    )
    assert [found.detections[0]["bbox"][2] for found in results] == [1, 3, 4, 5, 7]


def test_detect_images_refuses_canvases_of_another_size(
    script_predictor: Callable[..., Any],
) -> None:
    results = detect_images(
        script_predictor(),
        SOURCES[:2],
        read=lambda _: b"",
        batch=2,
        settings=ReadSettings(),
        loader=ReadyLoader((1, 1, 3)),
    )
    with pytest.raises(ValueError, match=r"canvas of \(64, 96, 3\).* got \(1, 1, 3\)"):
        next(results)


def test_detect_images_hands_over_batches_without_a_copy(
    script_predictor: Callable[..., Any], files: dict[str, bytes]
) -> None:
    addresses: list[int] = []
    predictor = script_predictor(find_grey)
    predict = predictor.predict

    def watch(images: Tensor) -> list[Detections]:
        # Pixel by pixel in memory, as the decoder wrote them.
        assert images.is_contiguous(memory_format=torch.channels_last)
        addresses.append(images.data_ptr())
        return predict(images)

    predictor.predict = watch
    many = [ImageSource(number, str(number % 3)) for number in range(200)]
    settings = ReadSettings(threads=2)
    list(detect_images(predictor, many, read=files.__getitem__, batch=4, settings=settings))
    assert len(addresses) == 50
    # The one in the network and the three ahead.
    assert len(set(addresses)) == 4


class _DeviceLoader:
    """Leaves canvases on a device, as a GPU's decoder does; the last one is broken."""

    def __init__(self, greys: dict[str, int]) -> None:
        self._greys = greys

    def load(self, source: ImageSource) -> Future[DeviceCanvas]:
        loaded: Future[DeviceCanvas] = Future()
        if source.uri in self._greys:
            pixels = torch.full((3, 64, 96), self._greys[source.uri], dtype=torch.uint8)
            loaded.set_result(DeviceCanvas(pixels, Placement(64, 96, 64, 96)))
        else:
            loaded.set_exception(ImageError("broken"))
        return loaded

    def close(self) -> None:
        """Nothing runs."""


def test_detect_images_takes_canvases_that_lie_on_a_device(
    script_predictor: Callable[..., Any],
) -> None:
    greys = {"a": 30, "b": 50, "c": 70}
    results = list(
        detect_images(
            script_predictor(lambda canvas: [[1, 1, 2 + canvas[0, 0, 0].item(), 11, 0.9, 0]]),
            [ImageSource(name, name) for name in ("a", "broken", "b", "c")],
            read=lambda uri: pytest.fail(f"{uri} was read by the worker itself"),
            batch=2,
            settings=ReadSettings(threads=1),
            loader=_DeviceLoader(greys),
        )
    )
    widths = [found["bbox"][2] for result in results for found in result.detections]
    assert [result.error for result in results] == ["", "broken", "", ""]
    assert widths == [31, 51, 71]


def test_slot_leaves_images_where_they_are_when_they_lie_on_the_device() -> None:
    copied: list[tuple[Tensor, Tensor]] = []

    class Device:
        def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.full(shape, 9, dtype=dtype)

        allocate_staging = allocate

        def new_event(self) -> Any:
            return SimpleNamespace(synchronize=lambda: None, record=lambda _: None)

        def copy(self, target: Tensor, source: Tensor) -> None:
            copied.append((target, source))

    shapes = {"boxes": (3, 5, 4), "scores": (3, 5), "labels": (3, 5)}
    buffers = EngineBuffers(
        Device(),  # type: ignore[arg-type]
        batch=3,
        canvas=(2, 4),
        input_dtype=torch.uint8,
        output_shapes=shapes,
    )
    slot = buffers.take_slot()
    # The one device that tests have beside the processor: it has no memory.
    slot.fill(torch.zeros(2, 3, 2, 4, dtype=torch.uint8, device="meta"))
    buffers.queue_batch(slot, lambda: None, None)
    target, source = copied[0]
    assert (source.device.type, tuple(source.shape), tuple(target.shape)) == (
        "meta",
        (2, 2, 4, 3),
        (2, 2, 4, 3),
    )
    copied.clear()
    slot.fill(torch.zeros(2, 3, 2, 4, dtype=torch.uint8))
    buffers.queue_batch(slot, lambda: None, None)
    assert copied[0][1] is slot.staging
    assert not slot.staging.any()
