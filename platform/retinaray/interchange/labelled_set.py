"""Boxes, images and classes as every label format has them, and what a format cannot hold.

Knows no format. Boxes are in original-image pixels, continuous (no +1), not cut to the image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from retinaray.data.coco_ids import Id
from retinaray.errors import DatasetError

Xywh = tuple[float, float, float, float]

# Sides that come from corners or from shares of an image: what is below is noise of float64.
_DIGITS = 9


@dataclass(frozen=True, slots=True)
class LabelledBox:
    """One box.

    Attributes:
        name: Class name.
        xywh: Left, top, width, height.
        is_crowd: A region to ignore.
        score: In 0..1, of a detection; none = ground truth.
        attributes: What else the format says of it: `difficult`, `truncated`, `occluded`, ...
    """

    name: str
    xywh: Xywh
    is_crowd: bool = False
    score: float | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def xyxy(self) -> Xywh:
        """Left, top, right, bottom."""
        left, top, width, height = self.xywh
        return left, top, round(left + width, _DIGITS), round(top + height, _DIGITS)


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image; it may have no boxes.

    Attributes:
        file_name: Relative to the image folder, with `/`.
        height: In pixels, of the upright image.
        width: Likewise.
        boxes: In the order of the file.
        image_id: As COCO has it; none = the format has no ids.
    """

    file_name: str
    height: int
    width: int
    boxes: tuple[LabelledBox, ...] = ()
    image_id: Id | None = None


@dataclass(frozen=True, slots=True)
class LabelledSet:
    """A data set.

    Attributes:
        images: In the order of the source.
        names: Class names, each once, in class order.
        category_ids: COCO's ids of these classes; none = the format has no ids.
        notes: What was left out or changed while reading: sentence to number of cases.
    """

    images: tuple[LabelledImage, ...]
    names: tuple[str, ...]
    category_ids: tuple[Id, ...] | None = None
    notes: Mapping[str, int] = field(default_factory=dict)

    @property
    def boxes(self) -> Iterator[LabelledBox]:
        """All boxes, image by image."""
        return (box for image in self.images for box in image.boxes)


@dataclass(frozen=True, slots=True)
class FormatTraits:
    """What a format can hold of a `LabelledSet`, for ours and for other tools' readers.

    Attributes:
        has_image_ids: Image ids come back.
        has_category_ids: Category ids come back.
        has_scores: Scores come back.
        crowd: What a crowd region becomes: `flag` comes back as it was, `region` without its class,
            `left out` is not written.
        attributes: Names that come back; none = all.
        is_relative: Boxes are shares of the image, in 0..1: they are cut to it.
    """

    has_image_ids: bool = False
    has_category_ids: bool = False
    has_scores: bool = False
    crowd: Literal["flag", "region", "left out"] = "flag"
    attributes: frozenset[str] | None = None
    is_relative: bool = False


def box_from_corners(left: float, top: float, right: float, bottom: float) -> Xywh:
    """Corners as a corner and sides, rounded to a billionth of a pixel: noise of float64."""
    x, y, width, height = (
        round(number, _DIGITS) for number in (left, top, right - left, bottom - top)
    )
    return x, y, width, height


def box_from_shares(
    x_centre: float, y_centre: float, width: float, height: float, image: LabelledImage
) -> Xywh:
    """Centre and sides in 0..1 of the image, as pixels, rounded to a billionth."""
    return (
        round((x_centre - width / 2) * image.width, _DIGITS),
        round((y_centre - height / 2) * image.height, _DIGITS),
        round(width * image.width, _DIGITS),
        round(height * image.height, _DIGITS),
    )


def cut_to_image(box: LabelledBox, image: LabelledImage) -> LabelledBox:
    """The box without what lies outside its image; the same object where nothing does."""
    left, top, right, bottom = box.xyxy
    cut = (
        min(max(left, 0.0), image.width),
        min(max(top, 0.0), image.height),
        min(max(right, 0.0), image.width),
        min(max(bottom, 0.0), image.height),
    )
    return box if cut == box.xyxy else replace(box, xywh=box_from_corners(*cut))


def order_names(
    found: Iterable[str], given: tuple[str, ...] | None, source: str
) -> tuple[str, ...]:
    """Class names in class order.

    Args:
        found: Names that the labels use.
        given: The names in their order; none = by alphabet.
        source: What messages call the labels.

    Raises:
        DatasetError: If labels use a name that was not given, or there is none at all.
    """
    used = set(found)
    if given is None:
        if not used:
            raise DatasetError(
                f"{source}: expected at least one class, found no box; name the classes with "
                "--class-names FILE"
            )
        return tuple(sorted(used))
    unknown = sorted(used - set(given))
    if unknown:
        raise DatasetError(
            f"{source}: the class {unknown[0]!r} is none of the names given ({', '.join(given)}); "
            "add it to the file of --class-names, or correct the label"
        )
    return given


def list_losses(labels: LabelledSet, traits: FormatTraits) -> dict[str, int]:
    """What a format will not give back of a data set.

    Returns:
        Sentence to number of boxes, images or classes; empty when everything comes back.
    """
    losses: Counter[str] = Counter()
    if not traits.has_image_ids:
        losses["image ids are not held (convert back with --reference)"] = sum(
            image.image_id is not None for image in labels.images
        )
    if not traits.has_category_ids:
        losses["category ids are not held (convert back with --reference)"] = len(
            labels.category_ids or ()
        )
    for image in labels.images:
        for box in image.boxes:
            losses.update(_list_box_losses(box, image, traits))
    return {text: count for text, count in losses.items() if count}


def _list_box_losses(box: LabelledBox, image: LabelledImage, traits: FormatTraits) -> Iterator[str]:
    if box.is_crowd and traits.crowd != "flag":
        yield (
            "crowd regions lose their class"
            if traits.crowd == "region"
            else "crowd regions are left out"
        )
        if traits.crowd == "left out":
            return
    if box.score is not None and not traits.has_scores:
        yield "scores are not held"
    if traits.attributes is not None:
        for name in sorted(set(box.attributes) - traits.attributes):
            yield f"attribute {name} is not held"
    if traits.is_relative and cut_to_image(box, image) is not box:
        yield "boxes are cut to their image"


def with_references(labels: LabelledSet, reference: LabelledSet, source: str) -> LabelledSet:
    """Give images and classes the ids, order and sizes that a COCO file has for them.

    Args:
        labels: What was read; its images are found by file name, its classes by name.
        reference: The COCO file.
        source: What messages call `labels`.

    Returns:
        All images of the reference, in its order, with the boxes read.

    Raises:
        DatasetError: If an image or a class is not in the reference.
    """
    order_names((box.name for box in labels.boxes), reference.names, source)
    known = {image.file_name for image in reference.images}
    unknown = [image.file_name for image in labels.images if image.file_name not in known]
    if unknown:
        raise DatasetError(
            f"{source}: the file of --reference has no image {unknown[0]!r} ({len(unknown)} in "
            "all); give the COCO file that these labels belong to"
        )
    boxes = {image.file_name: image.boxes for image in labels.images}
    return replace(
        reference,
        images=tuple(
            replace(image, boxes=boxes.get(image.file_name, ())) for image in reference.images
        ),
        notes=labels.notes,
    )
