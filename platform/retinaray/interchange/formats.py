"""Every label format by name, and what is done to the boxes of all of them alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from retinaray.interchange import (
    coco_labels,
    kitti,
    label_studio,
    labelme_json,
    open_images,
    voc,
    yolo,
)
from retinaray.interchange.labelled_set import (
    FormatTraits,
    LabelledBox,
    LabelledImage,
    LabelledSet,
)

FORMATS: Mapping[str, FormatTraits] = {
    "coco": coco_labels.TRAITS,
    "voc": voc.TRAITS,
    "yolo": yolo.TRAITS,
    "kitti": kitti.TRAITS,
    "open-images": open_images.TRAITS,
    "labelme": labelme_json.TRAITS,
    "label-studio": label_studio.TRAITS,
}
"""What each format that can be written gives back."""

ENDLESS = frozenset({"yolo", "kitti", "open-images"})
"""Formats whose labels tell neither the ending nor the size of an image."""

Difficult = Literal["keep", "crowd", "drop"]


def without_outsiders(labels: LabelledSet) -> LabelledSet:
    """The data set without boxes that enclose nothing of their image; they are counted."""
    images = tuple(
        replace(image, boxes=tuple(box for box in image.boxes if _is_inside(box, image)))
        for image in labels.images
    )
    left_out = sum(map(len, (image.boxes for image in labels.images))) - sum(
        len(image.boxes) for image in images
    )
    notes = {"boxes that lie outside their image are left out": left_out} if left_out else {}
    return replace(labels, images=images, notes={**labels.notes, **notes})


def _is_inside(box: LabelledBox, image: LabelledImage) -> bool:
    left, top, right, bottom = box.xyxy
    return left < image.width and top < image.height and right > 0 and bottom > 0


def settle_difficult(labels: LabelledSet, difficult: Difficult) -> LabelledSet:
    """Decide what becomes of boxes with the attribute `difficult`.

    Args:
        labels: The data set.
        difficult: `keep` leaves them ordinary boxes, `crowd` makes them regions to ignore as VOC's
            scoring does, `drop` leaves them out.
    """
    if difficult == "keep":
        return labels
    images = tuple(
        replace(
            image,
            boxes=tuple(
                replace(box, is_crowd=True) if _is_difficult(box) else box
                for box in image.boxes
                if difficult == "crowd" or not _is_difficult(box)
            ),
        )
        for image in labels.images
    )
    count = sum(_is_difficult(box) for box in labels.boxes)
    text = "become crowd regions" if difficult == "crowd" else "are left out"
    notes = {f"difficult boxes {text}": count} if count else {}
    return replace(labels, images=images, notes={**labels.notes, **notes})


def _is_difficult(box: LabelledBox) -> bool:
    return bool(box.attributes.get("difficult"))
