"""Ten images that differ in what is wrong; each class 0 truth is 10 x 10 in a place of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

from retinaray.evaluation.confusion import OverlapTable
from retinaray.evaluation.error_taxonomy import ErrorLabels, label_errors
from retinaray.evaluation.gallery_choice import (
    GROUPS,
    Gallery,
    GalleryDetection,
    GalleryTruth,
    choose_gallery,
)
from retinaray.inference.hash_choice import hash_uri

MakeTable = Callable[..., OverlapTable]

HASH = partial(hash_uri, seed=0)


def hash_backwards(file_name: str) -> int:
    """9.jpg before 8.jpg."""
    return -int(file_name.removesuffix(".jpg"))


def list_images(gallery: Gallery, group: str) -> list[Any]:
    return [image.image_id for image in gallery.images if group in image.groups]


@pytest.fixture(scope="module")
def ten_images(make_table: MakeTable) -> ErrorLabels:
    truths: list[Sequence[float]] = []
    found: list[Sequence[float]] = []

    def add(image: int, *, hits: int = 0, missed: int = 0, false: int = 0, confused: int = 0):
        for i in range(hits + missed + confused):
            truths.append((image, 0, 0, 20 * i, 10, 10))
        for i in range(hits):
            found.append((image, 0, 0.9, 0, 20 * i, 10, 10))
        for i in range(confused):
            found.append((image, 1, 0.8, 0, 20 * (hits + missed + i), 10, 10))
        for i in range(false):
            found.append((image, 0, 0.7, 60, 20 * i, 10, 10))

    add(0, hits=1)
    add(1, hits=3)
    add(2, hits=2, missed=1)  # F1 4 / 5
    add(3, missed=2)
    add(4, missed=1, false=3)
    add(5, hits=1, confused=2)  # two false, two missed: F1 2 / 6
    add(6, confused=1)
    add(7)
    add(8, hits=3)
    add(9, false=1)
    found.append((9, 0, 0.3, 0, 0, 10, 10))  # not above the threshold
    return label_errors(make_table(truths, found, num_images=10))


def test_choose_gallery_ranks_each_group(ten_images: ErrorLabels) -> None:
    gallery = choose_gallery(ten_images, num_images=40, hash_image=hash_backwards)
    # Perfect ones by their hits, equals by hash; then by F1.
    assert sorted(list_images(gallery, "best")) == [0, 1, 2, 5, 8]
    assert [image.image_id for image in gallery.images][:5] == [8, 1, 0, 2, 5]
    forwards = choose_gallery(
        ten_images, num_images=40, hash_image=lambda name: -hash_backwards(name)
    )
    assert [image.image_id for image in forwards.images][:5] == [1, 8, 0, 2, 5]
    assert sorted(list_images(gallery, "worst")) == [2, 3, 4, 5, 6, 9]
    assert sorted(list_images(gallery, "confused")) == [5, 6]
    assert len(list_images(gallery, "random")) == 10


@pytest.mark.parametrize(
    ("num_images", "expected"),
    [
        # F1 0 and most errors: 4 (4), then 3 and 6 (2 each, the later name first).
        (8, {"best": [8, 1], "worst": [4, 6], "confused": [5, 6], "random": [9, 8]}),
        (3, {"best": [8], "worst": [4], "confused": [5], "random": []}),
        (1, {"best": [8], "worst": [], "confused": [], "random": []}),
        (0, {"best": [], "worst": [], "confused": [], "random": []}),
    ],
)
def test_choose_gallery_shares_the_places(
    ten_images: ErrorLabels, num_images: int, expected: dict[str, list[int]]
) -> None:
    gallery = choose_gallery(ten_images, num_images=num_images, hash_image=hash_backwards)
    assert len(gallery.images) <= num_images
    for group in GROUPS:
        assert sorted(list_images(gallery, group)) == sorted(expected[group])


def test_choose_gallery_counts_what_is_above_the_thresholds(ten_images: ErrorLabels) -> None:
    def count(threshold: float | list[float]) -> dict[Any, tuple[Any, ...]]:
        gallery = choose_gallery(
            ten_images, num_images=40, hash_image=HASH, score_thresholds=threshold
        )
        return {
            image.image_id: (
                image.f1,
                image.num_hits,
                image.num_false,
                image.num_missed,
                image.num_confused,
            )
            for image in gallery.images
        }

    above = count(0.3)
    assert above[5] == (pytest.approx(1 / 3), 1, 2, 2, 2)
    assert above[4] == (0, 0, 3, 1, 0)
    assert above[7] == (None, 0, 0, 0, 0)
    assert above[9] == (0, 0, 1, 0, 0)
    # A threshold of class 1 takes the confusions away, not what they missed.
    assert count([0.3, 0.85])[5] == (0.5, 1, 0, 2, 0)
    assert count(0.95)[1] == (0, 0, 0, 3, 0)


def test_choose_gallery_is_the_same_every_time_and_changes_with_the_seed(
    ten_images: ErrorLabels,
) -> None:
    def choose(seed: int) -> list[Any]:
        hashed = partial(hash_uri, seed=seed)
        gallery = choose_gallery(ten_images, num_images=12, hash_image=hashed)
        return list_images(gallery, "random")

    assert choose(0) == choose(0)
    names = [f"{number}.jpg" for number in range(10)]
    smallest = sorted(names, key=lambda name: hash_uri(name, 1))[:3]
    assert sorted(f"{number}.jpg" for number in choose(1)) == sorted(smallest)
    assert len({tuple(sorted(choose(seed))) for seed in range(5)}) > 1


def test_choose_gallery_flags_every_box(make_table: MakeTable) -> None:
    truths = [
        (0, 0, 0, 0, 10, 10),
        (0, 0, 50, 50, 10, 10),
        (0, 1, 0, 100, 50, 50, 1),
    ]
    found = [
        (0, 0, 0.8, 0, 0, 10, 8),
        (0, 0, 0.7, 0, 0, 10, 9),
        (0, 1, 0.6, 50, 50, 10, 10),
        (0, 1, 0.5, 5, 105, 10, 10),
        (0, 0, 0.4, 80, 180, 10, 10),
        (0, 0, 0.2, 50, 50, 10, 10),  # a hit, not above the threshold
        (0, 0, 0.05, 80, 0, 10, 10),  # not above the floor
    ]
    labels = label_errors(make_table(truths, found))
    (image,) = choose_gallery(labels, num_images=4, hash_image=HASH).images
    assert (image.file_name, image.height, image.width) == ("0.jpg", 200, 100)
    assert image.groups == GROUPS
    assert image.detections == (
        GalleryDetection((0, 0, 10, 8), 0, 0.8, "hit"),
        GalleryDetection((0, 0, 10, 9), 0, 0.7, "duplicate"),
        GalleryDetection((50, 50, 60, 60), 1, 0.6, "classification"),
        GalleryDetection((5, 105, 15, 115), 1, 0.5, "ignored"),
        GalleryDetection((80, 180, 90, 190), 0, 0.4, "background"),
        GalleryDetection((50, 50, 60, 60), 0, 0.2, "hit"),
    )
    assert image.truths == (
        GalleryTruth((0, 0, 10, 10), 0, False, 0.8),
        GalleryTruth((50, 50, 60, 60), 0, False, 0.2),
        GalleryTruth((0, 100, 50, 150), 1, True, None),
    )
    assert (image.num_hits, image.num_false, image.num_missed) == (1, 3, 1)


def test_choose_gallery_takes_images_by_hash_when_nothing_is_there(make_table: MakeTable) -> None:
    labels = label_errors(make_table([], [], num_images=3))
    gallery = choose_gallery(labels, num_images=9, hash_image=hash_backwards)
    assert [(image.image_id, image.groups) for image in gallery.images] == [
        (2, ("random",)),
        (1, ("random",)),
    ]
    with pytest.raises(ValueError, match="3 score thresholds for 2 classes"):
        choose_gallery(labels, num_images=9, hash_image=HASH, score_thresholds=[0.1] * 3)


def test_to_dict_is_plain_json(ten_images: ErrorLabels) -> None:
    gallery = choose_gallery(ten_images, num_images=4, hash_image=hash_backwards)
    plain = json.loads(json.dumps(gallery.to_dict()))
    assert plain["names"] == ["class 0", "class 1"]
    assert plain["score_thresholds"] == [0.3, 0.3]
    assert [image["image_id"] for image in plain["images"]] == [8, 4, 5, 9]
    assert plain["images"][0]["groups"] == ["best"]
