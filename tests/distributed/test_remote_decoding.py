"""Decoding in Ray tasks: the same canvases, whatever happens to the processes that make them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import NodeDiedError, ObjectLostError

from retinaray.assembly.job_plan_workers import ClusterSize
from retinaray.data.transforms import Placement
from retinaray.distributed.remote_decoding import (
    DecodePlacement,
    Outcome,
    RemoteDecoder,
    load_group,
)
from retinaray.errors import ClusterError, ImageError, MissingFileError, StorageError
from retinaray.inference.canvas_loading import LoadedCanvas, ReadSettings, load_canvas
from retinaray.inference.image_sources import ImageSource
from retinaray.storage import Storage

CANVAS = (256, 320)
TIMEOUT_S = 300.0
Load = Callable[[ImageSource], LoadedCanvas]


def make_load(marks: Path) -> Load:
    """A loader for files of any kind, and for names that tell it what to do.

    `die*` ends the process; `lost*` ends it as long as fewer than two have died of that name;
    `down*` finds the store down; `bug*` is a mistake of ours; `wait*` waits for `go` in the folder
    of marks. Each call leaves a mark. A nested function travels to the tasks by value.
    """

    settings = ReadSettings()

    def load(source: ImageSource) -> LoadedCanvas:
        uri = source.uri
        if "/" in uri:
            return load_canvas(source, CANVAS, Storage().read_bytes, settings)
        number = len(list(marks.glob(f"{uri}-*")))
        (marks / f"{uri}-{number}-{os.getpid()}").touch()
        if uri.startswith("die") or (uri.startswith("lost") and number < 2):
            os._exit(1)
        if uri.startswith("down"):
            raise StorageError(f"no answer for {uri}")
        if uri.startswith("bug"):
            raise KeyError(uri)
        while uri.startswith("wait") and not (marks / "go").exists():
            os.sched_yield()
        pixels = np.full((*CANVAS, 3), source.image_id, dtype=np.uint8)
        return LoadedCanvas(pixels, Placement(*CANVAS, *CANVAS))

    return load


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """Where the calls of the loader leave their marks."""
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


@pytest.fixture
def start(ray_cluster: ClusterSize, marks: Path) -> Iterator[Callable[..., RemoteDecoder]]:
    """Decoders of this test, closed after it."""
    made: list[RemoteDecoder] = []

    def make(**options: Any) -> RemoteDecoder:
        settings = {"load": make_load(marks), "num_tasks": 2, "group": 4} | options
        made.append(RemoteDecoder(**settings))
        return made[-1]

    yield make
    for decoder in made:
        decoder.close()


def name_sources(*names: str) -> list[ImageSource]:
    return [ImageSource(index, name) for index, name in enumerate(names, start=1)]


def count_calls(marks: Path, name: str) -> int:
    return len(list(marks.glob(f"{name}-*")))


@pytest.mark.local_ray
def test_load_gives_the_bytes_of_local_loading_when_images_are_real(
    start: Callable[..., RemoteDecoder], marks: Path, shared_data: Path
) -> None:
    folders = [shared_data / "coco128" / "images", shared_data / "odd_images" / "images"]
    names = sorted(str(path) for path in folders[0].iterdir())[:9]
    names[4:4] = [
        str(folders[1] / name)
        for name in ("Portrait_6.jpg", "photo_cmyk.jpg", "photo_cut_half.jpg", "no.jpg")
    ]
    decoder = start(group=3)
    sources = name_sources(*names)
    futures = [decoder.load(source) for source in sources]
    expected = load_group(make_load(marks), sources, 1)
    assert [type(value) for value in expected[6:8]] == [ImageError, MissingFileError]
    for future, value in zip(futures, expected, strict=True):
        if isinstance(value, Exception):
            with pytest.raises(type(value)) as caught:
                future.result(TIMEOUT_S)
            assert str(caught.value) == str(value)
            continue
        canvas = future.result(TIMEOUT_S)
        assert np.array_equal(canvas.pixels, value.pixels)
        assert canvas.placement == value.placement
        # It lies where Ray has put it.
        assert not canvas.pixels.flags.writeable
        assert not canvas.pixels.flags.owndata


@pytest.mark.local_ray
def test_load_isolates_an_image_that_ends_its_process(
    start: Callable[..., RemoteDecoder], marks: Path
) -> None:
    decoder = start()
    futures = [decoder.load(source) for source in name_sources("a", "die", "c", "d", "e")]
    for index in (0, 2, 3, 4):
        assert (futures[index].result(TIMEOUT_S).pixels == index + 1).all()
    with pytest.raises(ImageError, match="die ended 2 processes that decoded it and nothing else"):
        futures[1].result(TIMEOUT_S)
    # Four times with its group, which Ray repeats, and twice alone.
    assert count_calls(marks, "die") == 6


@pytest.mark.local_ray
def test_load_forgives_processes_that_die_of_something_else(
    start: Callable[..., RemoteDecoder], marks: Path
) -> None:
    decoder = start(num_tasks=1)
    futures = [decoder.load(source) for source in name_sources("a", "lost")]
    assert (futures[1].result(TIMEOUT_S).pixels == 2).all()
    assert count_calls(marks, "lost") == 3


@pytest.mark.local_ray
@pytest.mark.parametrize("death", [NodeDiedError("preempted"), ObjectLostError("0" * 56, None, "")])
def test_load_blames_no_image_for_nodes_that_go_away(
    start: Callable[..., RemoteDecoder], monkeypatch: pytest.MonkeyPatch, death: Exception
) -> None:
    decoder = start(group=2)
    sent: list[int] = []

    def lose(sources: Sequence[ImageSource], *, max_retries: int) -> list[Outcome]:
        sent.append(len(sources))
        raise death

    monkeypatch.setattr(decoder, "_run", lose)
    futures = [decoder.load(source) for source in name_sources("a", "b")]
    for future in futures:
        with pytest.raises(ClusterError, match="could not be decoded on another node"):
            future.result(TIMEOUT_S)
    assert sent == [2, 1, 1, 1, 1]


@pytest.mark.local_ray
def test_load_raises_a_failing_store_and_our_mistakes_as_they_are(
    start: Callable[..., RemoteDecoder],
) -> None:
    decoder = start(group=2)
    futures = [decoder.load(source) for source in name_sources("a", "down", "bug", "d")]
    assert (futures[0].result(TIMEOUT_S).pixels == 1).all()
    with pytest.raises(StorageError, match="no answer for down") as caught:
        futures[1].result(TIMEOUT_S)
    assert type(caught.value) is StorageError
    with pytest.raises(KeyError, match="bug"):
        futures[2].result(TIMEOUT_S)
    assert isinstance(futures[3].exception(TIMEOUT_S), KeyError)


@pytest.mark.local_ray
def test_load_sends_no_more_than_its_tasks_when_nothing_is_taken(
    start: Callable[..., RemoteDecoder],
    marks: Path,
    wait_until: Callable[[Callable[[], object], str], None],
) -> None:
    decoder = start(group=2)
    futures = [decoder.load(source) for source in name_sources(*"abcdefghij")]
    wait_until(lambda: all(future.done() for future in futures[:4]), "two groups were loaded")
    assert sorted(path.name[0] for path in marks.iterdir()) == list("abcd")
    assert not any(future.running() or future.done() for future in futures[4:])
    assert (futures[0].result(TIMEOUT_S).pixels == 1).all()
    assert len(list(marks.iterdir())) == 4
    assert (futures[1].result(TIMEOUT_S).pixels == 2).all()
    wait_until(lambda: all(future.done() for future in futures[4:6]), "a third group was loaded")
    assert sorted(path.name[0] for path in marks.iterdir()) == list("abcdef")
    # Out of order: the last group is sent before those in between.
    assert (futures[9].result(TIMEOUT_S).pixels == 10).all()
    assert not futures[6].done()
    assert [int(future.result(TIMEOUT_S).pixels[0, 0, 0]) for future in futures] == list(
        range(1, 11)
    )


@pytest.mark.local_ray
def test_load_sends_a_group_that_is_not_full_when_it_is_asked_for(
    start: Callable[..., RemoteDecoder], marks: Path
) -> None:
    decoder = start(group=100)
    futures = [decoder.load(source) for source in name_sources("a", "b")]
    assert not list(marks.iterdir())
    assert futures[1].exception(TIMEOUT_S) is None
    assert (futures[0].result(TIMEOUT_S).pixels == 1).all()
    assert count_calls(marks, "a") == count_calls(marks, "b") == 1


@pytest.mark.local_ray
def test_close_cancels_what_runs_and_what_waits(
    start: Callable[..., RemoteDecoder],
    marks: Path,
    wait_until: Callable[[Callable[[], object], str], None],
) -> None:
    decoder = start(num_tasks=1, group=1)
    futures = [decoder.load(source) for source in name_sources("wait", "b", "c")]
    wait_until(lambda: count_calls(marks, "wait"), "the first image is being loaded")
    decoder.close()
    for future in futures[1:]:
        with pytest.raises(CancelledError):
            future.result(TIMEOUT_S)
    assert futures[0].exception(TIMEOUT_S) is not None
    assert count_calls(marks, "b") == count_calls(marks, "c") == 0
    with pytest.raises(RuntimeError, match="load was called after close"):
        decoder.load(ImageSource(1, "a"))
    # The processor is free again.
    assert (start().load(ImageSource(7, "d")).result(TIMEOUT_S).pixels == 7).all()


@pytest.mark.local_ray
def test_load_works_inside_an_actor(ray_cluster: ClusterSize, marks: Path) -> None:
    load = make_load(marks)

    @ray.remote(num_cpus=0)
    class Worker:
        def sum_first_pixels(self, number: int) -> int:
            decoder = RemoteDecoder(load=load, num_tasks=2, group=4)
            futures = [decoder.load(ImageSource(index, f"i{index}")) for index in range(number)]
            total = sum(int(future.result(TIMEOUT_S).pixels[0, 0, 0]) for future in futures)
            decoder.close()
            return total

    total = ray.get(Worker.remote().sum_first_pixels.remote(10), timeout=TIMEOUT_S)
    # 0 + 1 + ... + 9
    assert total == 45


def test_load_group_keeps_the_order_and_gives_errors_as_values(marks: Path) -> None:
    outcomes = load_group(make_load(marks), name_sources("a", "down", "c"), threads=3)
    assert isinstance(outcomes[0], LoadedCanvas)
    assert isinstance(outcomes[1], StorageError)
    assert isinstance(outcomes[2], LoadedCanvas)
    assert (outcomes[2].pixels == 3).all()
    with pytest.raises(KeyError, match="bug"):
        load_group(make_load(marks), name_sources("a", "bug"), threads=1)


def test_to_options_names_only_what_was_asked_for() -> None:
    plain = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
    assert DecodePlacement().to_options() == plain
    placed = DecodePlacement(resources={"decode": 1}, labels={"group": "cpu"})
    assert placed.to_options() == {
        **plain,
        "resources": {"decode": 1},
        "label_selector": {"group": "cpu"},
    }


def test_decoder_refuses_numbers_below_one() -> None:
    with pytest.raises(ValueError, match="num_tasks=0, group=8"):
        RemoteDecoder(load=make_load(Path()), num_tasks=0)
