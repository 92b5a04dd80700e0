"""Whole images ahead: in order, within bounds of pixels and of files, in nobody's way."""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retinaray.errors import ImageError, StorageError
from retinaray.inference.image_loader import ImageLoader
from retinaray.inference.pipeline import ImageSource, ReadSettings
from retinaray.inference.tiling import Tile, TileSettings

# One image of 20x30 pixels.
SIZE_BYTES = 20 * 30 * 3


class CountingReader:
    """Gives files by name, and remembers which were asked for."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.names: list[str] = []
        self.changed = threading.Condition()

    def __call__(self, uri: str) -> bytes:
        with self.changed:
            self.names.append(uri)
            self.changed.notify_all()
        if uri not in self.files:
            raise StorageError(f"{uri} is not there")
        return self.files[uri]

    def wait_for(self, num: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.names) >= num, timeout=60)


@pytest.fixture
def reader(encode_png: Callable[..., bytes]) -> CountingReader:
    """Images "0" to "19" of 20x30; "large" of 40x60, "cut" short, "empty"."""
    files = {str(n): encode_png(20, 30, n) for n in range(20)}
    cut = files["0"][:-30]
    return CountingReader(files | {"large": encode_png(40, 60), "cut": cut, "empty": b""})


@pytest.fixture
def open_loader(reader: CountingReader) -> Iterator[Callable[..., ImageLoader]]:
    """Loaders that are closed after the test: open_loader(threads=..., max_bytes=...)."""
    loaders: list[ImageLoader] = []

    def make(*, threads: int, max_bytes: int, **options: Any) -> ImageLoader:
        loader = ImageLoader(
            canvas=(8, 8),
            read=reader,
            settings=ReadSettings(threads=threads, **options),
            tiling=TileSettings(tile_height=10, tile_width=10, max_bytes=max_bytes),
        )
        loaders.append(loader)
        return loader

    yield make
    for loader in loaders:
        loader.close()


def sources_of(*names: object) -> list[ImageSource]:
    return [ImageSource(str(name), str(name)) for name in names]


def names_of_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("load")]


@pytest.mark.parametrize("threads", [1, 4])
def test_load_decodes_no_more_than_has_room(
    open_loader: Callable[..., ImageLoader], threads: int
) -> None:
    loader = open_loader(threads=threads, max_bytes=int(2.9 * SIZE_BYTES))
    loading = [loader.load(source) for source in sources_of(*range(6))]
    first, second = (future.result(timeout=60) for future in loading[:2])
    assert (first.source.uri, second.source.uri) == ("0", "1")
    assert [first.height, first.width] == [20, 30]
    assert first.pixels is not None
    loader.release(second)
    third = loading[2].result(timeout=60)
    assert second.pixels is None
    loader.release(first)
    fourth = loading[3].result(timeout=60)
    loader.close()
    # Two at a time were held: nothing else was let in.
    assert [future.done() for future in loading] == [True] * 4 + [False] * 2
    assert (third.source.uri, fourth.source.uri) == ("2", "3")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_load_holds_one_file_per_thread(
    open_loader: Callable[..., ImageLoader], reader: CountingReader, threads: int
) -> None:
    loader = open_loader(threads=threads, max_bytes=1)
    loading = [loader.load(source) for source in sources_of(*range(20))]
    image = loading[0].result(timeout=60)
    # One is decoded; each thread has fetched another one, which waits.
    reader.wait_for(1 + threads)
    loader.release(image)
    loading[1].result(timeout=60)
    reader.wait_for(2 + threads)
    loader.close()
    assert len(reader.names) == 2 + threads
    assert set(reader.names) == {str(n) for n in range(2 + threads)}


def test_load_takes_an_image_above_the_bound_alone(
    open_loader: Callable[..., ImageLoader],
) -> None:
    loader = open_loader(threads=3, max_bytes=2 * SIZE_BYTES)
    loading = [loader.load(source) for source in sources_of(0, "large", 1, 2)]
    first = loading[0].result(timeout=60)
    loader.release(first)
    large = loading[1].result(timeout=60)
    assert large.pixels is not None
    assert large.pixels.shape == (40, 60, 3)
    assert not loading[2].done()
    loader.release(large)
    wait(loading[2:], timeout=60)
    assert all(future.done() for future in loading)


@pytest.mark.parametrize("threads", [1, 3])
def test_load_gives_errors_and_goes_on(
    open_loader: Callable[..., ImageLoader], threads: int
) -> None:
    loader = open_loader(threads=threads, max_bytes=1)
    names = ["gone", "cut", 0, "empty", "cut", "cut", 1, "gone", "gone", "empty", 2, "cut"]
    loading = [loader.load(source) for source in sources_of(*names)]
    for name, future in zip(names, loading, strict=True):
        if isinstance(name, int):
            loader.release(future.result(timeout=60))
            continue
        expected = StorageError if name == "gone" else ImageError
        assert isinstance(future.exception(timeout=60), expected)


def test_load_refuses_images_above_the_limit(open_loader: Callable[..., ImageLoader]) -> None:
    loader = open_loader(threads=1, max_bytes=1, max_pixels=20 * 30)
    large, small = (loader.load(source) for source in sources_of("large", 0))
    with pytest.raises(ImageError, match="max_pixels=600"):
        large.result(timeout=60)
    assert small.result(timeout=60).height == 20


def test_load_survives_any_sequence(open_loader: Callable[..., ImageLoader]) -> None:
    rng = random.Random(3)
    for _ in range(40):
        loader = open_loader(
            threads=rng.randint(1, 6), max_bytes=rng.choice([1, SIZE_BYTES, 5 * SIZE_BYTES])
        )
        names = [rng.choice([*range(20), "large", "cut", "gone"]) for _ in range(30)]
        loading = [loader.load(source) for source in sources_of(*names)]
        for name, future in zip(names, loading, strict=True):
            if future.exception(timeout=60) is None:
                assert future.result().source.uri == str(name)
                loader.release(future.result())
            else:
                assert name in ("cut", "gone")


def test_load_decodes_a_single_tile_no_larger_than_the_canvas_needs(
    open_loader: Callable[..., ImageLoader], reader: CountingReader
) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((160, 160, 3), dtype=np.uint8)).save(stream, "JPEG")
    reader.files["photo"] = stream.getvalue()
    in_tiles = open_loader(threads=1, max_bytes=1).load(*sources_of("photo")).result(timeout=60)
    assert in_tiles.pixels is not None
    assert in_tiles.pixels.shape == (160, 160, 3)
    assert len(in_tiles.tiles) > 100
    loader = ImageLoader(
        canvas=(8, 8),
        read=reader,
        settings=ReadSettings(threads=1),
        tiling=TileSettings(tile_height=160, tile_width=160),
    )
    whole = loader.load(*sources_of("photo")).result(timeout=60)
    loader.close()
    assert whole.tiles == (Tile(0, 0, 160, 160),)
    assert (whole.height, whole.width) == (160, 160)
    # An eighth, 20 pixels, is still twice the canvas.
    assert whole.pixels is not None
    assert whole.pixels.shape == (20, 20, 3)


def test_close_ends_all_threads(open_loader: Callable[..., ImageLoader]) -> None:
    loader = open_loader(threads=4, max_bytes=1)
    loading = [loader.load(source) for source in sources_of(*range(20))]
    image = loading[0].result(timeout=60)
    loader.close()
    assert names_of_threads() == []
    loader.release(image)
    assert not any(future.done() for future in loading[1:])


def test_load_leaves_no_thread_waiting_when_nobody_takes_the_images(
    open_loader: Callable[..., ImageLoader],
) -> None:
    loader = open_loader(threads=3, max_bytes=1)
    loading = [loader.load(source) for source in sources_of(*range(20))]
    loading[0].result(timeout=60)
    # An exception that reaches the top of a program keeps its frames, and the loader with them: at
    # its end the interpreter then waits for the threads, as this does.
    at_exit = threading.Thread(target=loader.close, daemon=True)
    at_exit.start()
    at_exit.join(timeout=60)
    assert not at_exit.is_alive()
    assert names_of_threads() == []
