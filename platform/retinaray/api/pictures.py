"""The images that a program hands in: locations, bytes or pixels.

Pixels become files in memory, so that whatever comes is decoded, checked against the limits and
resized by the code that reads the images of a command.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from retinaray.data.image_decoding import decode_image
from retinaray.errors import ImageError
from retinaray.inference.image_sources import ImageSource
from retinaray.inference.pipeline import ReadSettings

Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor
"""One image: a path or URI, the bytes of a file, or RGB pixels: a PIL image, a uint8 array
[height, width, 3] or a uint8 tensor [3, height, width]."""

Pixels = UInt8[np.ndarray, "height width 3"]

_ORIENTATION_TAG = 0x0112
_NO_COPY = (str, os.PathLike, bytes, Image.Image, np.ndarray, Tensor)


def list_pictures(images: Picture | Iterable[Picture]) -> Iterator[Picture]:
    """One image, or each of many.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(images, _NO_COPY):
        yield images
    elif isinstance(images, Iterable):
        yield from images
    else:
        raise TypeError(f"images: {_describe_kinds()}, or several; got {type(images).__name__}")


def read_picture(image: Picture, name: str, read: Callable[[str], bytes]) -> bytes:
    """The file of an image; pixels become one that holds exactly them.

    Args:
        image: One image. The EXIF orientation of a PIL image is applied, as that of a file is.
        name: What messages call it.
        read: Gives the bytes at a path or URI.

    Raises:
        StorageError: If there is nothing to read at the path or URI.
        ImageError: If the PIL image cannot be loaded, or its mode has no defined white.
        TypeError: If it is no image, or its numbers are not uint8.
        ValueError: If its shape is not that of an RGB image.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        return read(os.fspath(image))
    if isinstance(image, Image.Image):
        return _write_pixels(_load_pil(image))
    if isinstance(image, np.ndarray):
        _expect_rgb(name, str(image.dtype), image.shape, channel_axis=2)
        return _write_pixels(image)
    if isinstance(image, Tensor):
        _expect_rgb(name, str(image.dtype).removeprefix("torch."), image.shape, channel_axis=0)
        return _write_pixels(image.detach().cpu().permute(1, 2, 0).numpy())
    raise TypeError(f"{name}: {_describe_kinds()}; got {type(image).__name__}")


def name_picture(image: Picture, index: int) -> str:
    """What messages call an image: its path or URI, or its position in the list."""
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    return f"images[{index}]"


def decode_picture(
    image: Picture, name: str, read: Callable[[str], bytes], settings: ReadSettings
) -> Pixels:
    """Upright RGB pixels of an image at its full size.

    Raises:
        ImageError: If it cannot be decoded; the name is in front of the reason.
        StorageError, TypeError, ValueError: See `read_picture`.
    """
    try:
        return decode_image(
            read_picture(image, name, read),
            max_pixels=settings.max_pixels,
            allow_truncated=settings.allow_truncated,
        ).pixels
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error


class PictureIntake:
    """Images on their way into the network: numbered, and read when their turn comes.

    Args:
        images: One image or many; consumed as needed, may be a generator.
        read: Gives the bytes at a path or URI.
    """

    def __init__(self, images: Picture | Iterable[Picture], read: Callable[[str], bytes]) -> None:
        self._images = images
        self._read = read
        self._under_way: dict[str, Picture] = {}
        self._contents: dict[str, bytes | ImageError] = {}

    def sources(self) -> Iterator[ImageSource]:
        """Images in their order, for `detect_placed`; the uri is the position as text.

        Raises:
            TypeError, ValueError: If one is no image.
        """
        for index, image in enumerate(list_pictures(self._images)):
            key = str(index)
            self._under_way[key] = image
            if not isinstance(image, str | os.PathLike):
                # Here and not in a thread: PIL images load themselves, and may come twice.
                try:
                    content = read_picture(image, name_picture(image, index), self._read)
                    self._contents[key] = content
                except ImageError as error:
                    self._contents[key] = error
            yield ImageSource(index, key)

    def read(self, uri: str) -> bytes:
        """The file of an image of `sources`.

        Raises:
            StorageError, ImageError: If it cannot be had.
        """
        content = self._contents.pop(uri, None)
        if isinstance(content, ImageError):
            raise content
        if content is not None:
            return content
        return self._read(os.fspath(self._under_way[uri]))  # type: ignore[arg-type]

    def take(self, source: ImageSource) -> tuple[Picture, str]:
        """An image that has been through, and its name; it is not kept any longer."""
        image = self._under_way.pop(source.uri)
        return image, name_picture(image, int(source.uri))


def _load_pil(image: Image.Image) -> Pixels:
    try:
        image.load()
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    # Pillow's plugins raise whatever their formats provoke.
    except Exception as error:
        raise ImageError(f"cannot load the PIL image: {type(error).__name__}: {error}") from error
    if image.mode == "F" or image.mode.startswith("I"):
        raise ImageError(
            f"a PIL image of mode {image.mode} has no defined white: convert it to RGB, or give "
            "the file"
        )
    turn = _TRANSPOSE_BY_ORIENTATION.get(orientation)
    upright = image if turn is None else image.transpose(turn)
    return np.asarray(upright.convert("RGB"))


# As `ImageOps.exif_transpose` does it, which warns of damaged EXIF.
_TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _expect_rgb(name: str, dtype: str, shape: tuple[int, ...], *, channel_axis: int) -> None:
    wanted = "[height, width, 3]" if channel_axis == 2 else "[3, height, width]"
    got = f"expected RGB as uint8 {wanted}, got {dtype} {list(shape)}"
    if dtype != "uint8":
        raise TypeError(f"{name}: {got}; scale to 0..255 and convert to uint8")
    if len(shape) != 3 or shape[channel_axis] != 3:
        raise ValueError(f"{name}: {got}; give several images as a list, and gray ones three times")


def _write_pixels(pixels: np.ndarray) -> bytes:
    """A binary PPM file: a header in front of the pixels."""
    height, width = pixels.shape[:2]
    return f"P6 {width} {height} 255\n".encode() + pixels.tobytes()


def _describe_kinds() -> str:
    return (
        "expected a path, a URI, bytes, a PIL image, a uint8 array [height, width, 3] or a uint8 "
        "tensor [3, height, width]"
    )
