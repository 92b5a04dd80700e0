"""Decoded images, kept on a local disk, so that a small set is decoded once and not every epoch.

What is kept is what `decode_image` gave, bit for bit: a JPEG at each of the scales 1, 1/2, 1/4 and
1/8 that zooms have asked for, all other formats at full size. Nothing is resized further, because
every draw of an augmentation asks for another size. A pixel takes 3 bytes: 10 to 20 times as much
as in a JPEG.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from hashlib import sha256

import numpy as np
import PIL

from retinaray.data import image_decoding
from retinaray.data.cache_entry import Keepsake
from retinaray.data.image_decoding import DecodedImage, choose_dct_divisor, decode_image
from retinaray.data.read_cache import CheckedCache, VersionedBytes

_JPEG_MAGIC = b"\xff\xd8\xff"
_ANY_SCALE = 0


class DecodedCache:
    """Decodes files through a cache.

    Args:
        cache: Where pixels are kept, and what reads.
        max_pixels: Larger files are refused before they are decoded.
        allow_truncated: Accept files that end early.
    """

    def __init__(self, cache: CheckedCache, *, max_pixels: int, allow_truncated: bool) -> None:
        self._cache = cache
        self._max_pixels = max_pixels
        self._allow_truncated = allow_truncated
        # Pixels of another decoder are other pixels.
        own = sha256(inspect.getsource(image_decoding).encode()).hexdigest()[:16]
        jpeg = importlib.metadata.version("simplejpeg")
        self._decoder = f"{own} {PIL.__version__} {jpeg} {int(allow_truncated)}"

    def decode(
        self, uri: str, *, height: int, width: int, fit_height: int, fit_width: int
    ) -> DecodedImage:
        """The pixels that `decode_image` gives of a file as it is now.

        Args:
            uri: The file.
            height: Upright height that the file should have; of a file with another size nothing is
                kept.
            width: Upright width that it should have.
            fit_height: As for `decode_image`.
            fit_width: As for `decode_image`.

        Raises:
            StorageError: If the file cannot be read, or nobody can say whether it has changed.
            ImageError: If it cannot be decoded.
        """
        scale = choose_dct_divisor(height, width, fit_height, fit_width)
        keys = [self._key(uri, scale), self._key(uri, _ANY_SCALE)]
        source = self._cache.find(uri, keys)
        if isinstance(source, Keepsake):
            image = _unpack(source)
            if image.full_height * image.full_width <= self._max_pixels:
                return image
            # Kept by a training with a higher limit: the decoder words the refusal.
            source = self._cache.read_now(uri)
        image = decode_image(
            source.content,
            fit_height=fit_height,
            fit_width=fit_width,
            max_pixels=self._max_pixels,
            allow_truncated=self._allow_truncated,
        )
        if (image.full_height, image.full_width) == (height, width):
            self._keep(uri, scale, source, image)
        return image

    def _keep(self, uri: str, scale: int, source: VersionedBytes, image: DecodedImage) -> None:
        if not source.content.startswith(_JPEG_MAGIC):
            scale = _ANY_SCALE
        numbers = (image.full_height, image.full_width, *image.pixels.shape[:2])
        pixels = image.pixels.data.cast("B")
        self._cache.keep(self._key(uri, scale), source, Keepsake(source.version, pixels, numbers))

    def _key(self, uri: str, scale: int) -> str:
        return f"pixels {scale} {self._decoder} {uri}"


def _unpack(keepsake: Keepsake) -> DecodedImage:
    full_height, full_width, height, width = keepsake.numbers
    pixels = np.frombuffer(keepsake.content, dtype=np.uint8).reshape(height, width, 3)
    return DecodedImage(pixels, full_height, full_width)
