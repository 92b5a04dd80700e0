"""Pictures of a batch inference: some images with their detections, and detections cut out.

Which images is decided by a hash, so every worker knows it of its own images, and a part that is
done again gives the same pictures. Pictures are no part of the result: one that cannot be drawn is
logged.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from retinaray.data.image_decoding import DEFAULT_MAX_PIXELS, DecodedImage, decode_image
from retinaray.errors import ImageError, MissingFileError
from retinaray.inference.hash_choice import is_chosen
from retinaray.inference.picture_names import safe_name
from retinaray.inference.pipeline import ImageResult
from retinaray.inference.run_files import RunFiles
from retinaray.reporting.overlays import draw_detections
from retinaray.storage import join_uri

logger = logging.getLogger(__name__)

_JPEG_QUALITY = 90
# Room round a cut-out box, as a share of its sides.
_CROP_MARGIN = 0.1


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """Of which images there are pictures, and how large they get.

    Attributes:
        limit: Of the hashes of the images; see `hash_choice.is_chosen`. 0 = no pictures.
        seed: Of the hash.
        has_crops: Also cut out the detections of these images.
        max_crops: Cut-outs per image, the best ones.
        max_side_px: Longer sides of images and cut-outs are shrunk to this.
        max_pixels: Larger files are not decoded.
        allow_truncated: Accept files that end early.
    """

    limit: int = 0
    seed: int = 0
    has_crops: bool = False
    max_crops: int = 50
    max_side_px: int = 1600
    max_pixels: int = DEFAULT_MAX_PIXELS
    allow_truncated: bool = False


class RunPictures:
    """Draws the chosen images among the results that pass.

    Args:
        files: The run; pictures go to `overlays/IMAGE.jpg` and `crops/CATEGORY/IMAGE_K.jpg`.
        settings: Which and how.
        names: Category names by id, in the order of the class index.
        read: Gives the bytes at a URI.
    """

    def __init__(
        self,
        files: RunFiles,
        settings: PictureSettings,
        *,
        names: Mapping[int | str, str],
        read: Callable[[str], bytes],
    ) -> None:
        self._files, self._settings = files, settings
        self._names, self._read = names, read

    def follow(self, results: Iterable[ImageResult]) -> Iterator[ImageResult]:
        """Pass results on; the pictures of each are written before it comes.

        Raises:
            StorageError: If a picture cannot be written, or an image cannot be read again.
        """
        for result in results:
            if not result.error and is_chosen(
                result.source, limit=self._settings.limit, seed=self._settings.seed
            ):
                self._try_draw(result)
            yield result

    def _try_draw(self, result: ImageResult) -> None:
        # Cut-outs come from the file's own pixels.
        fit = None if self._settings.has_crops else self._settings.max_side_px
        try:
            decoded = decode_image(
                self._read(result.source.uri),
                fit_height=fit,
                fit_width=fit,
                max_pixels=self._settings.max_pixels,
                allow_truncated=self._settings.allow_truncated,
            )
        except (ImageError, MissingFileError) as error:
            logger.warning("no picture of %s: %s", result.source.uri, error)
            return
        name = safe_name(result.source.image_id)
        self._write(self._draw(decoded, result), self._files.overlays, f"{name}.jpg")
        if self._settings.has_crops:
            self._write_crops(decoded.pixels, result, name)

    def _draw(
        self, decoded: DecodedImage, result: ImageResult
    ) -> UInt8[np.ndarray, "height width 3"]:
        pixels = _shrink(decoded.pixels, self._settings.max_side_px)
        scale = (pixels.shape[1] / decoded.full_width, pixels.shape[0] / decoded.full_height)
        found = [{**entry, "bbox": _scale(entry["bbox"], scale)} for entry in result.detections]
        return draw_detections(pixels, found, (), names=self._names)

    def _write_crops(
        self, pixels: UInt8[np.ndarray, "height width 3"], result: ImageResult, name: str
    ) -> None:
        for number, entry in enumerate(result.detections[: self._settings.max_crops], start=1):
            category: Any = entry["category_id"]
            crop = _shrink(_cut_out(pixels, entry["bbox"]), self._settings.max_side_px)
            folder = join_uri(self._files.crops, safe_name(self._names[category]))
            self._write(crop, folder, f"{name}_{number}.jpg")

    def _write(self, pixels: UInt8[np.ndarray, "height width 3"], folder: str, name: str) -> None:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=_JPEG_QUALITY)
        self._files.storage.write_bytes(join_uri(folder, name), stream.getvalue())


def _scale(bbox: Any, factors: tuple[float, float]) -> list[float]:
    return [value * factor for value, factor in zip(bbox, factors * 2, strict=True)]


def _shrink(
    pixels: UInt8[np.ndarray, "height width 3"], max_side_px: int
) -> UInt8[np.ndarray, "shrunk_height shrunk_width 3"]:
    height, width = pixels.shape[:2]
    factor = max_side_px / max(height, width)
    if factor >= 1:
        return pixels
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))


def _cut_out(
    pixels: UInt8[np.ndarray, "height width 3"], bbox: Any
) -> UInt8[np.ndarray, "crop_height crop_width 3"]:
    """A box with some room round it, at least one pixel of the image."""
    height, width = pixels.shape[:2]
    left, top, box_width, box_height = bbox
    margin_x, margin_y = box_width * _CROP_MARGIN, box_height * _CROP_MARGIN
    start_x = min(max(0, int(left - margin_x)), width - 1)
    start_y = min(max(0, int(top - margin_y)), height - 1)
    end_x = min(width, max(start_x + 1, -int(-(left + box_width + margin_x) // 1)))
    end_y = min(height, max(start_y + 1, -int(-(top + box_height + margin_y) // 1)))
    return np.ascontiguousarray(pixels[start_y:end_y, start_x:end_x])
