"""Whatever form an image comes in, its pixels are those of its file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from retinaray.api.pictures import PictureIntake, decode_picture, list_pictures, name_picture
from retinaray.data.image_decoding import decode_image
from retinaray.errors import ImageError, MissingFileError
from retinaray.inference.pipeline import ReadSettings
from retinaray.storage import Storage


@pytest.fixture
def pixels() -> np.ndarray:
    """40x60 RGB, every value different from its neighbours."""
    return np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def decode(image: object) -> np.ndarray:
    return decode_picture(image, "a picture", Storage().read_bytes, ReadSettings())  # type: ignore[arg-type]


def to_file(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_decode_picture_gives_the_same_pixels_for_every_form(
    pixels: np.ndarray, tmp_path: Path
) -> None:
    content = to_file(Image.fromarray(pixels), "PNG")
    path = tmp_path / "ä b#1.png"
    path.write_bytes(content)
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = [path, str(path), path.as_uri(), content, Image.fromarray(pixels), pixels, chw]
    forms += [np.asfortranarray(pixels), Image.open(path), chw.contiguous()]
    for form in forms:
        np.testing.assert_array_equal(decode(form), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_picture_turns_a_pil_image_as_its_file(pixels: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = to_file(Image.fromarray(pixels), "PNG", exif=exif)
    turned = decode(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(turned, decode_image(content).pixels)
    assert turned.shape == ((40, 60, 3) if orientation < 5 else (60, 40, 3))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_decode_picture_makes_rgb_of_other_modes_as_of_their_files(
    pixels: np.ndarray, mode: str
) -> None:
    image = Image.fromarray(pixels).convert(mode)
    np.testing.assert_array_equal(decode(image), decode_image(to_file(image, "PNG")).pixels)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_decode_picture_refuses_a_pil_image_without_defined_white(mode: str) -> None:
    with pytest.raises(
        ImageError, match=rf"^a picture: a PIL image of mode {mode} has no defined white"
    ):
        decode(Image.new(mode, (4, 4)))


def test_decode_picture_names_the_image_when_it_is_broken(pixels: np.ndarray) -> None:
    content = to_file(Image.fromarray(pixels), "PNG")
    with pytest.raises(ImageError, match=r"^a picture: cannot decode PNG"):
        decode(content[:-300])
    with pytest.raises(ImageError, match=r"^a picture: cannot load the PIL image: OSError"):
        decode(Image.open(io.BytesIO(content[:-300])))
    with pytest.raises(ImageError, match="got 0 bytes"):
        decode(b"")
    with pytest.raises(MissingFileError, match=r"absent\.jpg"):
        decode("absent.jpg")


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((4, 5, 3), np.float32), TypeError, r"uint8 \[height, width, 3\], got float32"),
        (np.zeros((4, 5), np.uint8), ValueError, r"got uint8 \[4, 5\]; give several .* gray"),
        (np.zeros((2, 4, 5, 3), np.uint8), ValueError, r"got uint8 \[2, 4, 5, 3\]"),
        (np.zeros((3, 4, 5), np.uint8), ValueError, r"got uint8 \[3, 4, 5\]"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), ValueError, r"\[3, height, width\], got uint8"),
        (torch.zeros(3, 4, 5), TypeError, r"\[3, height, width\], got float32 \[3, 4, 5\]"),
        (7, TypeError, r"expected a path, a URI, bytes, .*; got int"),
        (None, TypeError, r"got NoneType"),
    ],
)
def test_decode_picture_says_what_it_wants_when_it_is_no_image(
    image: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"a picture: .*{message}"):
        decode(image)


def test_list_pictures_takes_one_or_many(pixels: np.ndarray) -> None:
    assert list(list_pictures("a.jpg")) == ["a.jpg"]
    assert list(list_pictures(pixels)) == [pixels]
    assert list(list_pictures(b"abc")) == [b"abc"]
    assert list(list_pictures(iter(["a.jpg", Path("b.jpg")]))) == ["a.jpg", Path("b.jpg")]
    assert list(list_pictures(())) == []
    with pytest.raises(TypeError, match=r"images: expected a path.* or several; got int"):
        list(list_pictures(3))  # type: ignore[arg-type]


def test_name_picture_is_the_path_or_the_position(pixels: np.ndarray) -> None:
    assert name_picture(Path("a") / "b.jpg", 4) == "a/b.jpg"
    assert name_picture(pixels, 4) == "images[4]"


def test_picture_intake_keeps_nothing_of_what_has_been_through(pixels: np.ndarray) -> None:
    intake = PictureIntake([pixels, "images[0]", b"xyz"], Storage().read_bytes)
    sources = list(intake.sources())
    # A path may be called as pixels are.
    with pytest.raises(MissingFileError, match=r"images\[0\]"):
        intake.read(sources[1].uri)
    assert intake.read(sources[2].uri) == b"xyz"
    assert intake.read(sources[0].uri) == b"P6 60 40 255\n" + pixels.tobytes()
    assert [intake.take(source)[1] for source in sources] == [
        *("images[0]", "images[0]", "images[2]")
    ]
    assert not intake._under_way
    assert not intake._contents
