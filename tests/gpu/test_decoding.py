"""nvJPEG and the resize on the GPU against the definition of a canvas on the CPU.

The bounds are what these pictures show on the CPU when libjpeg repeats halved colour, as nvJPEG
does (mean 0.4, most 4), and as much again or more for nvJPEG's own arithmetic. Hard edges of pure
colour differ more: in real photos, on the CPU likewise, mean 0.44 and most 30.
"""

from __future__ import annotations

import io
from concurrent.futures import Future
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from retinaray.errors import ImageError
from retinaray.inference.canvas_loading import DeviceCanvas, ReadSettings, load_canvas
from retinaray.inference.gpu_decoding import GpuJpegLoader
from retinaray.inference.image_sources import ImageSource

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings(
        "ignore:The image decoding and encoding capabilities of TorchVision:DeprecationWarning"
    ),
]

CANVAS = (300, 400)
SETTINGS = ReadSettings(threads=4)
TIMEOUT_S = 120.0


def make_photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """As in photos, brightness has details (of 8 pixels) that colour has not (of 80)."""
    generator = np.random.default_rng(seed)

    def draw_waves(detail_px: int, channels: int) -> np.ndarray:
        shape = (height // detail_px + 2, width // detail_px + 2)
        bands = [
            Image.fromarray(generator.uniform(-1, 1, shape).astype(np.float32))
            for _ in range(channels)
        ]
        return np.stack(
            [np.asarray(band.resize((width, height), Image.Resampling.BICUBIC)) for band in bands],
            axis=-1,
        )

    pixels = 128 + 70 * draw_waves(8, 1) + 50 * draw_waves(80, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, file_format: str = "JPEG", **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = options.pop("orientation", 1)
    stream = io.BytesIO()
    image.save(stream, file_format, exif=exif, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def load_all(files: list[bytes], batch: int = 16) -> list[DeviceCanvas | BaseException]:
    """What becomes of each file on the GPU."""
    named = {str(index): content for index, content in enumerate(files)}
    loader = GpuJpegLoader(
        canvas=CANVAS, read=named.__getitem__, settings=SETTINGS, batch=batch, device="cuda"
    )
    with closing(loader):
        futures = [loader.load(ImageSource(name, name)) for name in named]
        return [settle(future) for future in futures]


def settle(future: Future[DeviceCanvas]) -> DeviceCanvas | BaseException:
    return future.exception(TIMEOUT_S) or future.result(TIMEOUT_S)


def difference(canvas: DeviceCanvas | BaseException, content: bytes) -> np.ndarray:
    """How far a canvas on the GPU is from its definition; the placement must be the same."""
    assert isinstance(canvas, DeviceCanvas)
    assert canvas.pixels.device.type == "cuda"
    assert canvas.pixels.shape == (3, *CANVAS)
    expected = load_canvas(ImageSource(0, "a"), CANVAS, lambda _: content, SETTINGS)
    assert canvas.placement == expected.placement
    on_host = canvas.pixels.cpu().permute(1, 2, 0).numpy().astype(int)
    return np.abs(on_host - expected.pixels)


@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_load_is_near_the_definition_when_colour_is_whole(
    orientation: int, progressive: bool
) -> None:
    content = encode(
        make_photo(450, 620), orientation=orientation, subsampling=0, progressive=progressive
    )
    off = difference(load_all([content])[0], content)
    assert off.max() <= 4
    assert off.mean() < 0.6


@pytest.mark.parametrize("subsampling", [1, 2], ids=["4:2:2", "4:2:0"])
@pytest.mark.parametrize("size", [(300, 400), (450, 620), (1400, 1900), (90, 120)])
def test_load_is_near_the_definition_when_colour_is_halved(
    size: tuple[int, int], subsampling: int
) -> None:
    content = encode(make_photo(*size), subsampling=subsampling, quality=90)
    off = difference(load_all([content])[0], content)
    assert off.mean() < 1.0
    assert off.max() <= 12


def test_load_is_near_the_definition_when_grey() -> None:
    content = encode(make_photo(450, 620).convert("L"))
    canvas = load_all([content])[0]
    assert difference(canvas, content).max() <= 3
    assert isinstance(canvas, DeviceCanvas)
    assert canvas.pixels[0].equal(canvas.pixels[1])
    assert canvas.pixels[0].equal(canvas.pixels[2])


def test_load_copies_up_what_the_cpu_decodes() -> None:
    photo = make_photo(450, 620)
    files = [
        encode(photo, "PNG"),
        encode(photo.convert("CMYK")),
        encode(photo, keep_rgb=True),
        encode(make_photo(48, 30_000)),
    ]
    for canvas, content in zip(load_all(files), files, strict=True):
        assert not difference(canvas, content).any()


def test_load_leaves_good_images_alone_when_others_are_broken() -> None:
    good = [encode(make_photo(450, 620, seed), subsampling=0) for seed in range(6)]
    cut = good[0][: len(good[0]) // 2]
    outcomes = load_all([good[0], cut, *good[1:3], b"no image", *good[3:]])
    assert [type(outcome) for outcome in outcomes[1:5:3]] == [ImageError, ImageError]
    kept = [outcome for outcome in outcomes if isinstance(outcome, DeviceCanvas)]
    for canvas, content in zip(kept, good, strict=True):
        assert difference(canvas, content).max() <= 4


def test_load_gives_the_same_pixels_alone_and_in_crowds() -> None:
    files = [
        encode(make_photo(200 + 30 * (seed % 5), 260 + 20 * (seed % 7), seed)) for seed in range(60)
    ]
    alone = load_all(files, batch=1)
    for _ in range(3):
        # The engine's own work keeps the memory of freed images busy meanwhile.
        busy = torch.rand(64, 3, *CANVAS, device="cuda").sum()
        crowd = load_all(files, batch=32)
        assert busy.isfinite()
        for one, other in zip(alone, crowd, strict=True):
            assert isinstance(one, DeviceCanvas)
            assert isinstance(other, DeviceCanvas)
            assert one.pixels.equal(other.pixels)
