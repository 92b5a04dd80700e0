"""A COCO data set to look at: its boxes as arrays, and drawn on its images."""

from __future__ import annotations

import os
from typing import Literal

from PIL import Image

from retinaray.api.detections import list_truth
from retinaray.api.pictures import Picture, decode_picture, name_picture
from retinaray.assembly.reading import make_read_settings
from retinaray.config.nodes import ReadingConfig
from retinaray.data.coco import CocoDataset, ImageTargets, load_coco
from retinaray.reporting.overlays import draw_detections
from retinaray.storage import Storage


def read_dataset(
    annotations: str | os.PathLike[str],
    *,
    on_bad_box: Literal["drop", "error"] = "drop",
    endpoint_url: str | None = None,
) -> CocoDataset:
    """Read a COCO file as `train` does; no image is read.

    Args:
        annotations: Path or URI of the JSON.
        on_bad_box: What to do with boxes without area, outside their image or not finite: leave
            them out with a warning, or refuse the set.
        endpoint_url: S3 server; none = AWS_ENDPOINT_URL, else AWS.

    Returns:
        Images, classes and boxes: `len(dataset)`, `dataset.images[i].file_name`,
        `dataset.targets(i)`, `dataset.categories.names`. Images without boxes are kept.

    Raises:
        StorageError: If the file cannot be read.
        DatasetError: If it is not COCO, or has faults; all are listed.
    """
    uri = os.fspath(annotations)
    content = Storage(endpoint_url=endpoint_url).read_bytes(uri)
    return load_coco(content, on_bad_box=on_bad_box, source=uri)


def draw_truth(
    image: Picture, truth: ImageTargets, *, endpoint_url: str | None = None
) -> Image.Image:
    """An image with its ground truth in white; small images are enlarged.

    Args:
        image: A path, a URI, bytes, a PIL image, an array or a tensor; see `Model.predict`.
        truth: Its boxes, from `read_dataset(...).targets(i)`; there may be none.
        endpoint_url: S3 server; none = AWS_ENDPOINT_URL, else AWS.

    Raises:
        ImageError: If the image cannot be decoded.
        StorageError: If it cannot be read.
        TypeError, ValueError: If it is no image.
    """
    pixels = decode_picture(
        image,
        name_picture(image, 0),
        Storage(endpoint_url=endpoint_url).read_bytes,
        make_read_settings(ReadingConfig()),
    )
    return Image.fromarray(draw_detections(pixels, (), list_truth(truth), names={}))
