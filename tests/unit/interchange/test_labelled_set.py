from __future__ import annotations

from dataclasses import replace

import pytest

from retinaray.errors import DatasetError
from retinaray.interchange.labelled_set import (
    FormatTraits,
    LabelledBox,
    LabelledImage,
    LabelledSet,
    box_from_shares,
    cut_to_image,
    list_losses,
    order_names,
    with_references,
)

IMAGE = LabelledImage("a.png", 50, 100)


def test_cut_to_image_gives_the_part_inside() -> None:
    box = LabelledBox("dog", (-5, 40, 20, 20))
    assert cut_to_image(box, IMAGE).xywh == (0, 40, 15, 10)


def test_cut_to_image_leaves_boxes_inside_alone() -> None:
    box = LabelledBox("dog", (0.1, 0.2, 99.9, 49.8))
    assert cut_to_image(box, IMAGE) is box


def test_box_from_shares_gives_pixels() -> None:
    # Centre (50, 25), sides 20 and 10.
    assert box_from_shares(0.5, 0.5, 0.2, 0.2, IMAGE) == (40, 20, 20, 10)


def test_list_losses_counts_what_a_format_cannot_hold() -> None:
    image = replace(
        IMAGE,
        image_id=3,
        boxes=(
            LabelledBox("dog", (0, 0, 1, 1), score=0.5, attributes={"difficult": True}),
            LabelledBox("dog", (0, 0, 101, 1)),
            LabelledBox("dog", (0, 0, 101, 1), is_crowd=True, score=0.5),
        ),
    )
    labels = LabelledSet((image,), ("dog",), category_ids=(5,))
    traits = FormatTraits(crowd="left out", attributes=frozenset(), is_relative=True)
    assert list_losses(labels, traits) == {
        "image ids are not held (convert back with --reference)": 1,
        "category ids are not held (convert back with --reference)": 1,
        "scores are not held": 1,
        "attribute difficult is not held": 1,
        "boxes are cut to their image": 1,
        "crowd regions are left out": 1,
    }
    everything = FormatTraits(has_image_ids=True, has_category_ids=True, has_scores=True)
    assert list_losses(labels, everything) == {}


def test_with_references_takes_ids_and_order_and_keeps_boxes() -> None:
    box = LabelledBox("dog", (0, 0, 1, 1))
    labels = LabelledSet((replace(IMAGE, boxes=(box,)),), ("dog",), notes={"x": 1})
    first = LabelledImage("b.png", 5, 6, (box, box), image_id=1)
    second = replace(IMAGE, image_id=2)
    reference = LabelledSet((first, second), ("cat", "dog"), category_ids=(8, 9))
    assert with_references(labels, reference, "labels") == LabelledSet(
        (replace(first, boxes=()), replace(second, boxes=(box,))),
        ("cat", "dog"),
        category_ids=(8, 9),
        notes={"x": 1},
    )


def test_with_references_refuses_images_that_the_reference_has_not() -> None:
    reference = LabelledSet((replace(IMAGE, file_name="b.png"),), ("dog",))
    with pytest.raises(DatasetError, match=r"labels: .* --reference has no image 'a.png' \(1 in"):
        with_references(LabelledSet((IMAGE,), ("dog",)), reference, "labels")


def test_order_names_sorts_what_was_found_when_none_is_given() -> None:
    assert order_names(iter(["b", "a", "b"]), None, "x") == ("a", "b")


@pytest.mark.parametrize(
    ("found", "given", "message"),
    [([], None, "x: expected at least one class"), (["c"], ("a",), "x: the class 'c' is none of")],
)
def test_order_names_refuses_unknown_and_missing_classes(
    found: list[str], given: tuple[str, ...] | None, message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        order_names(found, given, "x")
