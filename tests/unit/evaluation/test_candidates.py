"""Cached candidates: there and back, shares put together, settings applied."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from retinaray.data.coco import CategoryTable
from retinaray.errors import CheckpointError
from retinaray.evaluation.candidates import (
    CandidateSet,
    DetectionSetting,
    apply_setting,
    join_detections,
    merge,
)

Scene = tuple[dict[str, Any], CandidateSet]


@pytest.fixture
def candidates(draw_scene: Callable[..., Scene]) -> CandidateSet:
    return draw_scene(0)[1]


def assert_same(ours: CandidateSet, theirs: CandidateSet) -> None:
    assert ours.image_ids == theirs.image_ids
    assert [type(identity) for identity in ours.image_ids] == [
        type(identity) for identity in theirs.image_ids
    ]
    assert ours.placements == theirs.placements
    assert ours.floor == theirs.floor
    for name in ("boxes_xyxy", "scores", "labels", "offsets"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert mine.dtype == other.dtype
        assert np.array_equal(mine, other), name


def test_load_gives_back_what_dump_wrote(candidates: CandidateSet) -> None:
    ids: tuple[int | str, ...] = (2**60, "1", 1, "Zürich\n", 0, "日本")
    candidates = replace(candidates, image_ids=ids)
    content = candidates.dump()
    assert_same(CandidateSet.load(content, source="c.npz"), candidates)
    assert candidates.dump() == content


def test_load_gives_back_no_images() -> None:
    nothing = join_detections([], floor=0.02)
    assert len(nothing) == 0
    assert_same(CandidateSet.load(nothing.dump(), source="c.npz"), nothing)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_load_refuses_a_truncated_file(candidates: CandidateSet, share: float) -> None:
    content = candidates.dump()
    content = content[: int(share * len(content))]
    with pytest.raises(CheckpointError, match=rf"c\.npz: not a readable .*\({len(content)} bytes"):
        CandidateSet.load(content, source="c.npz")


def test_load_refuses_a_wrong_byte_in_an_array(candidates: CandidateSet) -> None:
    content = bytearray(candidates.dump())
    content[content.index(candidates.scores.tobytes()) + 5] ^= 0xFF
    with pytest.raises(CheckpointError, match=r"c\.npz: .*BadZipFile.*CRC.*collect .* again"):
        CandidateSet.load(bytes(content), source="c.npz")


def test_load_never_unpickles(candidates: CandidateSet) -> None:
    stream = io.BytesIO()
    np.savez(stream, header=np.array([{"format": "x"}], dtype=object))
    with pytest.raises(CheckpointError, match="allow_pickle=False"):
        CandidateSet.load(stream.getvalue(), source="c.npz")


def test_load_refuses_another_archive() -> None:
    stream = io.BytesIO()
    np.savez(stream, scores=np.zeros(3))
    with pytest.raises(CheckpointError, match="KeyError: 'header'"):
        CandidateSet.load(stream.getvalue(), source="c.npz")
    np.savez(stream, header=np.frombuffer(b'{"format": "v9"}', dtype=np.uint8))
    with pytest.raises(
        CheckpointError, match="expected format 'retinaray-candidates-1', found 'v9'"
    ):
        CandidateSet.load(stream.getvalue(), source="c.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.zeros(2, np.float32)}, r"boxes_xyxy: expected float32 \(2, 4\)"),
        ({"labels": np.zeros(3)}, r"labels: expected int64 .*float64"),
        ({"image_ids": ("a",)}, r"offsets: expected int64 \(2,\), got int64 \(7,\) for 1 images"),
        ({"placements": ()}, "0 placements for 6 images"),
        ({"image_ids": tuple("abcdea")}, "an image occurs twice"),
        ({"offsets": np.array([0, 9, 5, 5, 5, 5, 5])}, "offsets do not cut"),
    ],
)
def test_candidate_set_refuses_parts_that_do_not_fit(
    candidates: CandidateSet, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(candidates, **changes)


def test_merge_puts_shares_into_the_given_order(candidates: CandidateSet) -> None:
    def take(positions: list[int]) -> CandidateSet:
        ids, places = candidates.image_ids, candidates.placements
        return join_detections(
            ((ids[i], places[i], candidates.detections(i)) for i in positions),
            floor=candidates.floor,
        )

    shares = [take([5, 1, 3]), take([]), take([4, 0, 2])]
    assert_same(merge(shares, candidates.image_ids), candidates)
    ids = candidates.image_ids
    fewer = merge(shares[:1], [ids[0], "never read", ids[3], ids[1], ids[5]])
    assert_same(fewer, take([3, 1, 5]))


def test_merge_refuses_shares_that_do_not_belong_together(candidates: CandidateSet) -> None:
    ids = candidates.image_ids
    with pytest.raises(ValueError, match=r"one floor, got 2 with \[0.01, 0.02\]"):
        merge([candidates, replace(candidates, floor=0.02)], ids)
    with pytest.raises(ValueError, match="one floor, got 0"):
        merge([], ids)
    with pytest.raises(ValueError, match="image 1000 is in two shares"):
        merge([candidates, candidates], ids)
    with pytest.raises(ValueError, match="image 1000 of a share is not in the order"):
        merge([candidates], ids[1:])


def test_apply_setting_passes_everything_on(
    candidates: CandidateSet, three_classes: CategoryTable
) -> None:
    everything = apply_setting(
        candidates, DetectionSetting((0.01,) * 3, 0.5, "none", 100_000), three_classes
    )
    assert {found["image_id"] for found in everything} == set(candidates.image_ids)
    setting = DetectionSetting((0.2, 0.5, 0.8), 0.5, "none", 7)
    found = apply_setting(candidates, setting, three_classes)
    lowest = dict(zip(three_classes.ids, setting.score_thresholds, strict=True))
    # Suppression is off, so thresholds and the cap are all there is; images of the canvas's own
    # aspect have no padding whose boxes could take a place under the cap.
    unpadded = [candidates.image_ids[position] for position in (0, 3, 4)]
    expected = []
    for identity in unpadded:
        passing = [
            item
            for item in everything
            if item["image_id"] == identity and item["score"] > lowest[item["category_id"]]  # type: ignore[operator, index]
        ]
        expected += passing[:7]
    assert [item for item in found if item["image_id"] in unpadded] == expected
    assert 0 < len(expected) < len(everything)


def test_apply_setting_refuses_what_cannot_be_replayed(
    candidates: CandidateSet, three_classes: CategoryTable
) -> None:
    with pytest.raises(ValueError, match=r"\(0.5, 0.009, 0.5\) go below 0.01, the floor"):
        apply_setting(candidates, DetectionSetting((0.5, 0.009, 0.5)), three_classes)
    with pytest.raises(ValueError, match="2 score thresholds for 3 classes"):
        apply_setting(candidates, DetectionSetting((0.5, 0.5)), three_classes)
