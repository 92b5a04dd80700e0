"""The GPU's way to a canvas, run on the CPU: everything but nvJPEG itself."""

from __future__ import annotations

import io
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from retinaray.data.transforms import Placement, letterbox
from retinaray.errors import ImageError, InferenceError, MissingFileError, StorageError
from retinaray.inference import gpu_decoding
from retinaray.inference.canvas_loading import (
    DeviceCanvas,
    LoadedCanvas,
    ReadSettings,
    load_canvas,
)
from retinaray.inference.gpu_decoding import (
    GpuJpegLoader,
    JpegLayout,
    place_pixels,
    read_jpeg_layout,
    turn_upright,
)
from retinaray.inference.image_sources import ImageSource
from retinaray.inference.stage_times import StageClock
from retinaray.storage import Storage

pytestmark = pytest.mark.filterwarnings(
    "ignore:The image decoding and encoding capabilities of TorchVision:DeprecationWarning"
)

# No image below is more than twice as large, so that no JPEG is decoded at reduced size.
CANVAS = (300, 400)
SETTINGS = ReadSettings(threads=2, max_pixels=4_000_000)
TIMEOUT_S = 60.0


def make_canvas(content: bytes) -> LoadedCanvas:
    """The definition: decode and letterbox on the CPU."""
    return load_canvas(ImageSource(0, "a"), CANVAS, lambda _: content, SETTINGS)


def load_all(
    files: dict[str, bytes], read: Callable[[str], bytes] | None = None, **options: Any
) -> list[DeviceCanvas | BaseException]:
    """What becomes of each file, in their order."""
    settings: dict[str, Any] = {"batch": 4, "settings": SETTINGS} | options
    loader = GpuJpegLoader(canvas=CANVAS, read=read or files.__getitem__, device="cpu", **settings)
    with closing(loader):
        futures = [loader.load(ImageSource(index, uri)) for index, uri in enumerate(files)]
        return [settle(future) for future in futures]


def read_layout(content: bytes) -> JpegLayout | None:
    return read_jpeg_layout(content, max_pixels=4_000_000)


def settle(future: Future[DeviceCanvas]) -> DeviceCanvas | BaseException:
    return future.exception(TIMEOUT_S) or future.result(TIMEOUT_S)


def difference(canvas: DeviceCanvas | BaseException, content: bytes) -> np.ndarray:
    """How far a canvas is from its definition; the placement must be the same."""
    assert isinstance(canvas, DeviceCanvas)
    assert canvas.pixels.dtype == torch.uint8
    assert canvas.pixels.is_contiguous()
    expected, placement = make_canvas(content)
    assert canvas.placement == placement
    return np.abs(canvas.pixels.permute(1, 2, 0).numpy().astype(int) - expected)


def encode_jpeg(image: Image.Image, orientation: int = 1, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=exif, **options)  # type: ignore[arg-type]
    return stream.getvalue()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Waves and ramps of 301x450 pixels, without symmetry; another ramp in each colour."""
    rows, columns = np.mgrid[:301, :450].astype(np.float64)
    waves = 128 + 60 * np.sin(rows / 5 + columns / 9) + 40 * np.sin(columns / 3)
    pixels = np.stack([waves, 255 * rows / 300, 255 * columns / 449], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def odd(shared_data: Path) -> Callable[[str], bytes]:
    """The bytes of one of the awkward real files."""
    return lambda name: (shared_data / "odd_images" / "images" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("Landscape_1.jpg", JpegLayout(1200, 1800, 1)),
        ("Landscape_3.jpg", JpegLayout(1200, 1800, 3)),
        ("Portrait_6.jpg", JpegLayout(1200, 1800, 6)),
        ("photo_progressive.jpg", JpegLayout(1200, 1800, 1)),
        ("hopper_gray.jpg", JpegLayout(128, 128, 1)),
        ("icc_profile_big.jpg", JpegLayout(250, 425, 1)),
        ("hopper_bad_exif.jpg", JpegLayout(500, 500, 1)),
        ("photo_cmyk.jpg", None),
        ("photo_cut_half.jpg", None),
        ("truncated_jpeg.jpg", None),
        ("empty.jpg", None),
        ("text.jpg", None),
        ("hopper.bmp", None),
        ("mode_16bit.png", None),
    ],
)
def test_read_jpeg_layout_knows_plain_jpegs_from_all_others(
    odd: Callable[[str], bytes], name: str, layout: JpegLayout | None
) -> None:
    assert read_layout(odd(name)) == layout


@pytest.mark.parametrize("subsampling", [0, 1, 2], ids=["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_read_jpeg_layout_takes_the_usual_kinds(
    photo: Image.Image, subsampling: int, progressive: bool
) -> None:
    content = encode_jpeg(photo, 8, subsampling=subsampling, progressive=progressive)
    layout = read_layout(content)
    assert layout == JpegLayout(301, 450, 8)
    assert layout.upright_size == (450, 301)


def test_read_jpeg_layout_leaves_exotic_jpegs_to_the_cpu(photo: Image.Image) -> None:
    plain = encode_jpeg(photo)
    frame = plain.index(b"\xff\xc0\x00\x11")
    exotic = {
        "stored as RGB": encode_jpeg(photo, keep_rgb=True),
        "CMYK": encode_jpeg(photo.convert("CMYK")),
        "12 bits": plain[: frame + 4] + b"\x0c" + plain[frame + 5 :],
        "arithmetic coding": plain[:frame] + b"\xff\xc9" + plain[frame + 2 :],
        "lossless": plain[:frame] + b"\xff\xc3" + plain[frame + 2 :],
        "height to follow": plain[: frame + 5] + b"\0\0" + plain[frame + 7 :],
        "colour at a quarter": plain[: frame + 11] + b"\x41" + plain[frame + 12 :],
        "bytes after its end": plain + b"\0",
        "no frame": plain[:frame] + b"\xff\xe5" + plain[frame + 2 :],
    }
    assert read_layout(plain) == JpegLayout(301, 450, 1)
    assert {name: read_layout(content) for name, content in exotic.items()} == dict.fromkeys(exotic)


@pytest.mark.parametrize(("transform", "is_plain"), [(0, False), (1, True), (2, False)])
def test_read_jpeg_layout_heeds_adobes_colour_transform(
    photo: Image.Image, transform: int, is_plain: bool
) -> None:
    plain = encode_jpeg(photo)
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])
    assert (read_layout(plain[:2] + adobe + plain[2:]) is not None) == is_plain


def test_read_jpeg_layout_survives_every_cut(photo: Image.Image) -> None:
    content = encode_jpeg(photo)
    header = content.index(b"\xff\xda")
    assert read_layout(content[:2] + b"\xff\xff" + content[2:]) is not None
    for length in range(header):
        assert read_layout(content[:length] + b"\xff\xd9") is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turn_upright_agrees_with_pillow(photo: Image.Image, orientation: int) -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo.save(stream, "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(stream)))
    stored = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    assert np.array_equal(turn_upright(stored, orientation).permute(1, 2, 0), expected)


def test_place_pixels_has_hand_computed_values() -> None:
    # Two columns become one: the antialiasing triangle is 4 wide and its centre lies between them,
    # so both weigh the same. (10 + 21) / 2 = 15.5, rounded to even: 16.
    pixels = torch.tensor([[10, 21], [10, 21]], dtype=torch.uint8).expand(3, 2, 2)
    placed, placement = place_pixels(pixels, (1, 3))
    assert placed.tolist() == [[[16, 0, 0]]] * 3
    assert placement == Placement(2, 2, 1, 1)


def test_place_pixels_copies_when_the_size_is_right() -> None:
    pixels = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(3, 4, 5)
    placed, placement = place_pixels(pixels, (4, 9))
    assert placed[:, :, :5].equal(pixels)
    assert not placed[:, :, 5:].any()
    assert placement == Placement(4, 5, 4, 5)


@pytest.mark.parametrize("size", [(301, 450), (450, 301), (40, 30), (900, 31)])
def test_place_pixels_is_within_one_of_letterbox(photo: Image.Image, size: tuple[int, int]) -> None:
    pixels = np.array(photo.resize((size[1], size[0])))
    expected, placement = letterbox(
        pixels, height=size[0], width=size[1], canvas_height=160, canvas_width=224
    )
    placed, own = place_pixels(torch.from_numpy(pixels).permute(2, 0, 1), (160, 224))
    off = np.abs(placed.permute(1, 2, 0).numpy().astype(int) - expected)
    assert own == placement
    assert off.max() <= 1
    assert off.mean() < 0.25


@pytest.mark.parametrize("orientation", range(1, 9))
def test_load_turns_and_places_jpegs(photo: Image.Image, orientation: int) -> None:
    content = encode_jpeg(photo, orientation)
    (canvas,) = load_all({"a.jpg": content})
    off = difference(canvas, content)
    assert off.max() <= 1
    assert off.mean() < 0.25


def test_load_agrees_with_the_definition_on_real_photos(shared_data: Path) -> None:
    paths = sorted((shared_data / "coco128" / "images").glob("*.jpg"))[:12]
    files = {str(path): path.read_bytes() for path in paths}
    assert len(files) == 12
    for canvas, content in zip(load_all(files), files.values(), strict=True):
        off = difference(canvas, content)
        assert off.max() <= 1
        assert off.mean() < 0.25


@pytest.mark.parametrize(
    "name", ["Landscape_3.jpg", "Landscape_6.jpg", "photo_progressive.jpg", "Portrait_6.jpg"]
)
def test_load_stays_near_the_definition_when_the_cpu_decodes_at_reduced_size(
    odd: Callable[[str], bytes], name: str
) -> None:
    content = odd(name)
    (canvas,) = load_all({name: content})
    off = difference(canvas, content)
    assert off.mean() < 0.5
    assert np.quantile(off, 0.999) <= 6


@pytest.mark.parametrize(
    "name",
    [
        "photo_cmyk.jpg",
        "photo_gray16.png",
        "hopper.webp",
        "hopper.gif",
        "hopper_orientation_6.webp",
    ],
)
def test_load_gives_the_cpu_canvas_of_other_files(odd: Callable[[str], bytes], name: str) -> None:
    (canvas,) = load_all({name: odd(name)})
    assert not difference(canvas, odd(name)).any()


def test_load_gives_the_cpu_canvas_when_the_shrinkage_is_extreme(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 26000 / 400 = 65 to 1: more than the GPU's kernel is used for.
    content = encode_jpeg(photo.resize((26_000, 8)))
    monkeypatch.setattr(gpu_decoding, "decode_jpegs", None)
    (canvas,) = load_all({"long.jpg": content})
    assert not difference(canvas, content).any()


@pytest.mark.parametrize("name", ["photo_cut_half.jpg", "truncated_jpeg.jpg", "broken.png"])
def test_load_words_a_broken_file_as_the_cpu_does(odd: Callable[[str], bytes], name: str) -> None:
    with pytest.raises(ImageError) as expected:
        make_canvas(odd(name))
    (error,) = load_all({name: odd(name)})
    assert isinstance(error, ImageError)
    assert str(error) == str(expected.value)


def test_load_refuses_too_many_pixels(photo: Image.Image) -> None:
    content = encode_jpeg(photo.resize((2001, 2000)))
    (error,) = load_all({"large.jpg": content})
    assert isinstance(error, ImageError)
    assert "max_pixels=4000000" in str(error)


def test_load_refuses_long_files(photo: Image.Image) -> None:
    content = encode_jpeg(photo)
    (error,) = load_all({"long.jpg": content}, settings=replace(SETTINGS, max_bytes=100))
    assert isinstance(error, ImageError)
    assert "at most max_bytes=100" in str(error)


def test_load_raises_what_the_store_raises(tmp_path: Path) -> None:
    (error,) = load_all({str(tmp_path / "no.jpg"): b""}, read=Storage().read_bytes)
    assert isinstance(error, MissingFileError)

    def fail(uri: str) -> bytes:
        raise StorageError(f"no answer for {uri}")

    (error,) = load_all({"a.jpg": b""}, read=fail)
    assert type(error) is StorageError


def test_load_decodes_on_the_cpu_what_the_decoder_refuses(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = {f"{width}.jpg": encode_jpeg(photo.resize((width, 200))) for width in range(100, 108)}
    refused = [files["102.jpg"], files["105.jpg"]]
    decode = gpu_decoding.decode_jpegs

    def decode_some(contents: Sequence[bytes], device: torch.device) -> list[Tensor]:
        if any(content in refused for content in contents):
            raise RuntimeError("not supported")
        return decode(contents, device)

    monkeypatch.setattr(gpu_decoding, "decode_jpegs", decode_some)
    canvases = load_all(files)
    for canvas, content in zip(canvases, files.values(), strict=True):
        off = difference(canvas, content)
        assert off.max() <= (0 if content in refused else 1)
    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1
    assert "is decoded on the CPU: not supported" in warned[0].getMessage()


def test_load_keeps_batches_within_their_bounds(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = encode_jpeg(photo.resize((100, 100))), encode_jpeg(photo.resize((200, 150)))
    files = {f"{index}.jpg": large if index % 4 == 3 else small for index in range(16)}
    sizes: list[list[int]] = []
    decode = gpu_decoding.decode_jpegs

    def decode_noted(contents: Sequence[bytes], device: torch.device) -> list[Tensor]:
        sizes.append([30_000 if content == large else 10_000 for content in contents])
        return decode(contents, device)

    monkeypatch.setattr(gpu_decoding, "decode_jpegs", decode_noted)
    monkeypatch.setattr(gpu_decoding, "_MAX_BATCH_PIXELS", 40_000)
    canvases = load_all(files, batch=3)
    assert [len(batch) for batch in sizes if len(batch) > 3 or sum(batch) > 40_000] == []
    assert sum(map(len, sizes)) == 16
    for canvas, content in zip(canvases, files.values(), strict=True):
        assert difference(canvas, content).max() <= 1


def test_load_passes_a_failing_device_on(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pixels: Tensor, canvas: tuple[int, int]) -> tuple[Tensor, Placement]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_decoding, "place_pixels", fail)
    for error in load_all({"a.jpg": encode_jpeg(photo), "b.jpg": encode_jpeg(photo)}):
        assert isinstance(error, RuntimeError)
        assert "illegal memory access" in str(error)


def test_load_counts_bytes_and_times(photo: Image.Image) -> None:
    clock = StageClock()
    content = encode_jpeg(photo)
    load_all({"a.jpg": content, "b.jpg": content}, clock=clock)
    assert clock.times.num_bytes == 2 * len(content)
    assert clock.times.decode_s > 0


def test_close_ends_the_loading(photo: Image.Image) -> None:
    files = {"a.jpg": encode_jpeg(photo)}
    loader = GpuJpegLoader(canvas=CANVAS, read=files.__getitem__, settings=SETTINGS, device="cpu")
    loader.close()
    before = threading.active_count()
    assert not loader.load(ImageSource(0, "a.jpg")).done()
    assert threading.active_count() == before


def test_loader_refuses_a_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InferenceError, match=r"expected a CUDA GPU to decode on \(cuda\)"):
        GpuJpegLoader(canvas=CANVAS, read=Storage().read_bytes, settings=SETTINGS)


def test_read_jpeg_layout_reads_big_endian_exif(photo: Image.Image) -> None:
    plain = encode_jpeg(photo)
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 5, 0, 0)
    block = b"Exif\0\0" + tiff
    start = plain.index(b"\xff\xe1")
    (length,) = struct.unpack_from(">H", plain, start + 2)
    rest = plain[start + 2 + length :]
    content = plain[:start] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + rest
    assert read_layout(content) == JpegLayout(301, 450, 5)
