"""One image to one canvas: the pixels of `letterbox`, limits, faults, and threads that hang."""

from __future__ import annotations

import io
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retinaray.data.image_decoding import decode_image
from retinaray.data.transforms import Placement, letterbox
from retinaray.errors import ImageError, InferenceError, StorageError, UnreadableFileError
from retinaray.inference import canvas_loading
from retinaray.inference.canvas_loading import ReadSettings, ThreadLoader, load_canvas
from retinaray.inference.image_sources import ImageSource, TarMember
from retinaray.inference.stage_times import StageClock

CANVAS = (64, 96)
SOURCE = ImageSource(1, "a")


@pytest.fixture
def open_loader() -> Iterator[Callable[..., ThreadLoader]]:
    """Loaders that are closed after the test: open_loader(read, threads=...)."""
    loaders: list[ThreadLoader] = []

    def make(read: Callable[[str], bytes], **options: Any) -> ThreadLoader:
        clock = options.pop("clock", None)
        settings = ReadSettings(**options)
        loaders.append(ThreadLoader(canvas=CANVAS, read=read, settings=settings, clock=clock))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize(
    "size", [(64, 96), (128, 64), (50, 300), (1, 1), (7, 96), (700, 900), (65, 97)]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_load_writes_the_pixels_of_letterbox_into_used_memory(
    open_loader: Callable[..., ThreadLoader], size: tuple[int, int], kind: str
) -> None:
    rng = np.random.default_rng(sum(size))
    content = encode(rng.integers(0, 256, (*size, 3), dtype=np.uint8), kind)
    decoded = decode_image(content, fit_height=64, fit_width=96)
    expected, placement = letterbox(
        decoded.pixels, height=size[0], width=size[1], canvas_height=64, canvas_width=96
    )
    into = np.full((*CANVAS, 3), 201, dtype=np.uint8)
    loaded = open_loader(lambda _: content).load(SOURCE, into).result(60)
    assert loaded.pixels is into
    np.testing.assert_array_equal(into, expected)
    assert loaded.placement == placement
    alone = load_canvas(SOURCE, CANVAS, lambda _: content, ReadSettings())
    np.testing.assert_array_equal(alone.pixels, expected)


def test_load_makes_memory_when_none_is_given(
    open_loader: Callable[..., ThreadLoader], encode_png: Callable[..., bytes]
) -> None:
    pixels, placement = open_loader(lambda _: encode_png(32, 24, 9)).load(SOURCE).result(60)
    # 32 x 24 becomes 64 x 48, the right half of the canvas is black.
    assert placement == Placement(32, 24, 64, 48)
    assert (pixels[:, :48] == 9).all()
    assert not pixels[:, 48:].any()


# --- limits -------------------------------------------------------------------------------------


def test_load_refuses_files_above_max_bytes(
    open_loader: Callable[..., ThreadLoader], encode_png: Callable[..., bytes]
) -> None:
    content = encode_png(64, 96)
    exact = open_loader(lambda _: content, max_bytes=len(content))
    assert exact.load(SOURCE).result(60).placement == Placement(64, 96, 64, 96)
    below = open_loader(lambda _: content, max_bytes=len(content) - 1)
    with pytest.raises(
        ImageError, match=f"at most max_bytes={len(content) - 1}, got {len(content)}"
    ):
        below.load(SOURCE).result(60)
    with pytest.raises(ImageError, match="max_bytes=10"):
        load_canvas(SOURCE, CANVAS, lambda _: content, ReadSettings(max_bytes=10))


def test_load_does_not_fetch_from_a_tar_what_is_too_long(
    open_loader: Callable[..., ThreadLoader],
) -> None:
    asked: list[str] = []

    def read(uri: str) -> bytes:
        asked.append(uri)
        return b""

    source = ImageSource(1, "t.tar/a.png", member=TarMember("t.tar", "a.png", 512, 1001))
    with pytest.raises(ImageError, match="max_bytes=1000, got 1001 bytes"):
        open_loader(read, max_bytes=1000).load(source).result(60)
    assert asked == []


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Ends whatever hangs."""
    event = threading.Event()
    yield event
    event.set()
    for thread in threading.enumerate():
        if thread.name.startswith("hung-"):
            thread.join(60)


@pytest.fixture
def hanging_decoder(
    monkeypatch: pytest.MonkeyPatch, release: threading.Event
) -> list[tuple[int, int]]:
    """Images of 10 rows are decoded when the test is over; gives the sizes that were asked for."""
    decode, asked = canvas_loading.decode_image, []

    def decode_or_hang(data: bytes, **options: Any) -> Any:
        decoded = decode(data, **options)
        asked.append(decoded.pixels.shape[:2])
        if decoded.full_height == 10:
            assert release.wait(60)
        return decoded

    monkeypatch.setattr(canvas_loading, "decode_image", decode_or_hang)
    return asked


def test_load_gives_up_an_image_that_hangs_and_leaves_its_canvas_alone(
    open_loader: Callable[..., ThreadLoader],
    encode_png: Callable[..., bytes],
    hanging_decoder: list[tuple[int, int]],
    release: threading.Event,
) -> None:
    files = {"bad": encode_png(10, 15, 250), "good": encode_png(64, 96, 40)}
    # Room for one image at a time: what hangs gives its room back.
    loader = open_loader(files.__getitem__, threads=1, max_seconds=0.05, decode_bytes=1)
    into = np.empty((*CANVAS, 3), dtype=np.uint8)
    with pytest.raises(ImageError, match=r"decoded within 0\.05 s"):
        loader.load(ImageSource(1, "bad"), into).result(60)
    # The memory goes to the next image, as in the pipeline.
    assert (loader.load(ImageSource(2, "good"), into).result(60).pixels == 40).all()
    release.set()
    loader.close()
    for thread in threading.enumerate():
        if thread.name.startswith("hung-"):
            thread.join(60)
    assert hanging_decoder == [(10, 15), (64, 96)]
    assert (into == 40).all()


def test_load_fails_the_part_when_too_many_images_hang(
    open_loader: Callable[..., ThreadLoader],
    encode_png: Callable[..., bytes],
    hanging_decoder: list[tuple[int, int]],
) -> None:
    content = encode_png(10, 15)
    loader = open_loader(lambda _: content, threads=2, max_seconds=0.05, max_hung=1)
    loading = [loader.load(SOURCE) for _ in range(9)]
    errors = [future.exception(60) for future in loading]
    assert {type(error) for error in errors[:2]} == {ImageError}
    assert isinstance(errors[-1], InferenceError)
    assert len(hanging_decoder) <= 4


# --- faults -------------------------------------------------------------------------------------


HEIC = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(100)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "got 0 bytes"),
        (b"hello, world", "starting with b'hello, world'"),
        (HEIC, "ftypheic"),
        (b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + struct.pack(">II", 60000, 60000) + bytes(60),
         "60000x60000 pixels is above the limit"),
        (b"GIF89a" + bytes(7) + b"," + bytes(12), "size is 0x0"),
    ],
    ids=["empty", "text", "heic", "bomb", "no-size"],
)  # fmt: skip
def test_load_gives_an_image_error_when_the_file_is_none(
    open_loader: Callable[..., ThreadLoader], content: bytes, reason: str
) -> None:
    with pytest.raises(ImageError, match=reason):
        open_loader(lambda _: content).load(SOURCE).result(60)


def test_load_gives_a_canvas_or_one_image_error_for_every_odd_file(
    open_loader: Callable[..., ThreadLoader], shared_data: Path
) -> None:
    paths = sorted((shared_data / "odd_images" / "images").iterdir())
    assert len(paths) == 38
    loader = open_loader(lambda uri: Path(uri).read_bytes(), threads=2)
    loading = [loader.load(ImageSource(path.name, str(path))) for path in paths]
    errors = [future.exception(120) for future in loading]
    assert {type(error) for error in errors} == {ImageError, type(None)}
    assert 0 < sum(error is not None for error in errors) < 20


@pytest.mark.parametrize(
    "error", [StorageError("away"), UnreadableFileError("forbidden"), MemoryError("full")]
)
def test_load_raises_what_the_reader_raises(
    open_loader: Callable[..., ThreadLoader], error: Exception
) -> None:
    def read(_: str) -> bytes:
        raise error

    with pytest.raises(type(error), match=str(error)):
        open_loader(read).load(SOURCE).result(60)


def test_load_counts_times_and_bytes(
    open_loader: Callable[..., ThreadLoader], encode_png: Callable[..., bytes]
) -> None:
    content, clock = encode_png(64, 96), StageClock()
    slowly = threading.Event()

    def read(_: str) -> bytes:
        slowly.wait(0.03)
        return content

    loader = open_loader(read, clock=clock, threads=2)
    for future in [loader.load(SOURCE) for _ in range(4)]:
        future.result(60)
    assert clock.times.num_bytes == 4 * len(content)
    assert 4 * 0.03 <= clock.times.fetch_s < 10
    assert 0 < clock.times.decode_s < 10
    assert clock.times.engine_s == clock.times.starved_s == 0
