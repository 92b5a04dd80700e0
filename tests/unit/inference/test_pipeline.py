"""From files to results: order, errors, batches, how far ahead it reads, and coordinates."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch

from retinaray.errors import StorageError, UnreadableFileError
from retinaray.inference.pipeline import ImageResult, ImageSource, ReadSettings, detect_images
from retinaray.inference.watched_threads import WatchedThreads

Reader = Callable[[str], bytes]


@pytest.fixture
def files(encode_png: Callable[..., bytes]) -> dict[str, bytes]:
    """Twelve images named 0 to 11, whose grey is 10 times their number; 3 and 8 are broken."""
    content = {str(number): encode_png(64, 96, 10 * number) for number in range(12)}
    return content | {"3": content["3"][:40], "8": b"no image"}


def sources_of(names: Any) -> list[ImageSource]:
    return [ImageSource(f"id-{name}", str(name)) for name in names]


def find_grey(canvas: torch.Tensor) -> list[list[float]]:
    """One box whose width is the canvas's grey over ten."""
    grey = round(canvas.float().mean().item() / 10)
    return [[1, 1, 2 + grey, 11, 0.9, 0]]


def run(predictor: Any, sources: Any, read: Reader, **options: Any) -> list[ImageResult]:
    threads = options.pop("threads", 3)
    return list(
        detect_images(
            predictor,
            sources,
            read=read,
            batch=options.pop("batch", 4),
            settings=ReadSettings(threads=threads, **options),
        )
    )


def test_results_come_in_the_order_of_the_sources(
    script_predictor: Callable[..., Any], files: dict[str, bytes]
) -> None:
    def read_slowly(uri: str) -> bytes:
        time.sleep(0.02 if int(uri) % 3 == 0 else 0)  # later files are ready before earlier ones
        return files[uri]

    order = [7, 0, 11, 2, 9, 4, 5, 6, 1, 10]
    results = run(script_predictor(find_grey), sources_of(order), read_slowly, threads=4)
    assert [result.source.image_id for result in results] == [f"id-{number}" for number in order]
    widths = [result.detections[0]["bbox"][2] for result in results]
    assert widths == [1 + number for number in order]
    assert {(result.height, result.width) for result in results} == {(64, 96)}
    assert not any(result.error or result.exception for result in results)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 12, 50])
def test_broken_images_are_errors_and_change_no_other_image(
    script_predictor: Callable[..., Any], files: dict[str, bytes], batch: int
) -> None:
    predictor = script_predictor(find_grey)
    results = run(predictor, sources_of(range(12)), files.__getitem__, batch=batch)
    failed = [index for index, result in enumerate(results) if result.error]
    assert failed == [3, 8]
    for index in failed:
        assert results[index].exception == "ImageError"
        assert results[index].detections == ()
        assert (results[index].height, results[index].width) == (0, 0)
    widths = {i: r.detections[0]["bbox"][2] for i, r in enumerate(results) if not r.error}
    assert widths == {number: 1 + number for number in range(12) if number not in (3, 8)}


def test_a_batch_is_cut_from_the_sources_whether_or_not_they_can_be_read(
    script_predictor: Callable[..., Any], files: dict[str, bytes]
) -> None:
    predictor = script_predictor(find_grey)
    run(predictor, sources_of(range(12)), files.__getitem__, batch=4)
    # 3 and 8 are missing from the first and the third batch, nobody takes their place.
    assert predictor.batch_sizes == [3, 4, 3]


def test_no_network_call_is_made_when_a_whole_batch_is_broken(
    script_predictor: Callable[..., Any], files: dict[str, bytes]
) -> None:
    predictor = script_predictor(find_grey)
    results = run(predictor, sources_of([3, 8, 0]), files.__getitem__, batch=2)
    assert [bool(result.error) for result in results] == [True, True, False]
    assert predictor.batch_sizes == [1]


def test_no_sources_give_no_results(script_predictor: Callable[..., Any]) -> None:
    assert run(script_predictor(), [], lambda _: b"") == []


def test_storage_errors_are_errors_of_their_image(
    script_predictor: Callable[..., Any], files: dict[str, bytes]
) -> None:
    def read(uri: str) -> bytes:
        if uri == "1":
            raise UnreadableFileError("cannot read 1: access denied")
        return files[uri]

    results = run(script_predictor(), sources_of([0, 1, 2]), read)
    assert [result.error for result in results] == ["", "cannot read 1: access denied", ""]
    assert results[1].exception == "UnreadableFileError"


@pytest.mark.parametrize(
    "error",
    [MemoryError("no room"), KeyError("bug"), OSError("disk"), StorageError("the server is away")],
)
def test_other_exceptions_are_not_swallowed(
    script_predictor: Callable[..., Any], files: dict[str, bytes], error: Exception
) -> None:
    def read(uri: str) -> bytes:
        if uri == "5":
            raise error
        return files[uri]

    with pytest.raises(type(error), match=str(error.args[0])):
        run(script_predictor(), sources_of([0, 1, 2, 4, 5, 6]), read)


def test_files_that_are_too_large_or_cut_short_follow_the_settings(
    script_predictor: Callable[..., Any], files: dict[str, bytes]
) -> None:
    sources = sources_of([0, 3])
    small = run(script_predictor(), sources, files.__getitem__, max_pixels=64 * 96 - 1)
    assert [result.exception for result in small] == ["ImageError", "ImageError"]
    assert "6144" in small[0].error or "64" in small[0].error


@pytest.mark.parametrize(("batch", "threads", "ahead"), [(4, 3, 12), (1, 8, 8), (2, 2, 6)])
def test_never_more_than_the_window_is_read_ahead(
    script_predictor: Callable[..., Any],
    encode_png: Callable[..., bytes],
    batch: int,
    threads: int,
    ahead: int,
) -> None:
    png = encode_png(64, 96)
    lock = threading.Lock()
    num_drawn = num_read = num_found = 0
    full = threading.Condition(lock)

    def draw() -> Iterator[ImageSource]:
        nonlocal num_drawn
        for number in count():
            with lock:
                num_drawn += 1
                assert num_drawn <= num_found + batch + ahead
            yield ImageSource(number, "x")

    def read(_: str) -> bytes:
        nonlocal num_read
        with full:
            num_read += 1
            full.notify_all()
        return png

    def find(_: torch.Tensor) -> list[list[float]]:
        nonlocal num_found
        with full:
            # The images behind this batch are fetched while the network works on it.
            first = num_found - num_found % batch
            assert full.wait_for(lambda: num_read == first + batch + ahead, timeout=60)
            num_found += 1
        return []

    results = detect_images(
        script_predictor(find), draw(), read=read, batch=batch, settings=ReadSettings(threads)
    )
    for number in range(5 * batch):
        assert next(results).source.image_id == number
    results.close()
    assert num_drawn <= num_found + batch + ahead


def test_what_was_queued_is_dropped_when_the_caller_stops(
    script_predictor: Callable[..., Any],
    encode_png: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    png, release, started = encode_png(64, 96), threading.Event(), []
    close = WatchedThreads.close

    def release_and_close(threads: WatchedThreads) -> None:
        release.set()
        close(threads)

    def read(uri: str) -> bytes:
        started.append(uri)
        if uri == "1":
            assert release.wait(60)
        return png

    monkeypatch.setattr(WatchedThreads, "close", release_and_close)
    results = detect_images(
        script_predictor(),
        sources_of(range(100)),
        read=read,
        batch=1,
        settings=ReadSettings(threads=1),
    )
    assert next(results).source.uri == "0"
    results.close()
    # 1 holds the only thread, 2 and 3 stand in the queue behind it.
    assert started in (["0"], ["0", "1"])


@pytest.mark.parametrize(
    ("size", "network_box", "bbox"),
    [
        # Landscape 128x192 on 64x96: factor 2 both ways.
        ((128, 192), [10, 5, 30, 25], [20.0, 10.0, 40.0, 40.0]),
        # Portrait 128x64 on 64x96: 64 rows, 32 columns, factor 2.
        ((128, 64), [8, 4, 24, 60], [16.0, 8.0, 32.0, 112.0]),
        # A small portrait image is enlarged: 32x16 to 64x32.
        ((32, 16), [8, 16, 24, 64], [4.0, 8.0, 8.0, 24.0]),
        # 100x77: content is 64 rows by floor(64 * 77 / 100) = 49 columns; x by 77/49, y by 100/64.
        ((100, 77), [0, 0, 49, 64], [0.0, 0.0, 77.0, 100.0]),
        ((100, 77), [7, 16, 14, 32], [11.0, 25.0, 11.0, 25.0]),
        # What reaches into the padding is cut at the image's edge.
        ((128, 64), [8, 4, 96, 64], [16.0, 8.0, 48.0, 120.0]),
    ],
)
def test_boxes_come_back_in_original_pixels(
    script_predictor: Callable[..., Any],
    encode_png: Callable[..., bytes],
    size: tuple[int, int],
    network_box: list[float],
    bbox: list[float],
) -> None:
    predictor = script_predictor(lambda _: [[*network_box, 0.8765432, 2]])
    (result,) = run(predictor, sources_of([0]), lambda _: encode_png(*size))
    assert (result.height, result.width) == size
    (found,) = result.detections
    assert found["bbox"] == pytest.approx(bbox, abs=0.006)
    assert found["category_id"] == 27  # the third class of the tiny card
    assert found["score"] == 0.876543
    assert result.coco_results == [{"image_id": "id-0", **found}]


@pytest.mark.parametrize(
    "box",
    [
        [40, 10, 60, 20],  # right of the 32 columns of the image
        [32, 0, 96, 64],  # starts exactly where the padding starts
        [31.9999, 0, 96, 64],  # less than a hundredth of a pixel inside
    ],
)
def test_boxes_in_the_padding_are_left_out(
    script_predictor: Callable[..., Any], encode_png: Callable[..., bytes], box: list[float]
) -> None:
    predictor = script_predictor(lambda _: [[*box, 0.9, 0], [1, 1, 9, 9, 0.5, 0]])
    (result,) = run(predictor, sources_of([0]), lambda _: encode_png(128, 64))
    assert [found["score"] for found in result.detections] == [0.5]


def test_boxes_never_leave_their_image_by_rounding(
    script_predictor: Callable[..., Any], encode_png: Callable[..., bytes]
) -> None:
    starts = torch.linspace(0.001, 40, 400).tolist()
    predictor = script_predictor(lambda _: [[x, x, 96, 64, 0.9, 0] for x in starts])
    (result,) = run(predictor, sources_of([0]), lambda _: encode_png(67, 101))
    assert len(result.detections) == 400
    for found in result.detections:
        x, y, width, height = found["bbox"]
        assert round(x + width, 6) <= 101
        assert round(y + height, 6) <= 67
