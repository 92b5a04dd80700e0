"""DeepStream's KITTI dump as detections of annotated images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from retinaray.assembly.reading import make_reader
from retinaray.config.schema import KittiConfig, ReadingConfig
from retinaray.data.coco import CategoryTable
from retinaray.errors import DatasetError
from retinaray.evaluation.kitti_dump import read_kitti_dump
from retinaray.storage import Storage


def read_kitti_detections(
    kitti: KittiConfig, reading: ReadingConfig, truth: Mapping[str, Any], categories: CategoryTable
) -> list[dict[str, object]]:
    """The dump of a run over the annotated images, as COCO results.

    Args:
        kitti: Where it is, and how its frames belong to the images.
        reading: How files are read.
        truth: Content of the annotations.
        categories: Their categories.

    Raises:
        DatasetError: If there is no dump, or it does not fit the images.
        StorageError: If it cannot be read.
    """
    folder = kitti.dump or ""
    storage = Storage(endpoint_url=reading.endpoint_url)
    read = make_reader(reading)
    files = {
        PurePosixPath(uri).name: read(uri)
        for uri in storage.list_files(folder)
        if uri.endswith(".txt")
    }
    if not files:
        raise DatasetError(
            f"{folder}: expected the .txt files of a KITTI dump, found none; name the folder of "
            "gie-kitti-output-dir"
        )
    order = None
    if kitti.order is not None:
        order = [line.strip() for line in read(kitti.order).decode().splitlines() if line.strip()]
    return read_kitti_dump(
        files,
        categories,
        truth["images"],
        order=order,
        frame=kitti.frame,
        has_track_ids=kitti.has_track_ids,
        stream=kitti.stream,
        source=folder,
    )
