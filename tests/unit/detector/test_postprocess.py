"""Selection and suppression against torchvision's RetinaNet and against brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet

from retinaray.detector.anchors import AnchorSpec, count_level_anchors, make_anchors
from retinaray.detector.box_coding import clip_boxes, decode_boxes
from retinaray.detector.postprocess import (
    Detections,
    NmsKind,
    select_candidates,
    suppress_overlaps,
)

HEIGHT, WIDTH = 90, 110
SPEC = AnchorSpec()
LEVELS = count_level_anchors(SPEC, HEIGHT, WIDTH)
Outputs = tuple[Tensor, Tensor, Tensor]


def random_outputs(num_classes: int, *, num_images: int = 2, offset: float = -2.0) -> Outputs:
    """Logits, offsets and anchors of a canvas of 90x110 pixels."""
    generator = torch.Generator().manual_seed(num_classes)
    anchors = make_anchors(SPEC, HEIGHT, WIDTH)
    logits = torch.randn(num_images, len(anchors), num_classes, generator=generator) * 1.5 + offset
    # Small, so that no box leaves the canvas: ours drops boxes without area, theirs keeps them.
    deltas = torch.randn(num_images, len(anchors), 4, generator=generator) * 0.05
    return logits, deltas, anchors


class ReturnLevels(nn.Module):
    """Stands in for torchvision's backbone, of which postprocessing needs nothing."""

    out_channels = 8


@pytest.mark.parametrize("num_classes", [1, 4, 20])
@pytest.mark.parametrize("top_k", [1000, 50])
def test_postprocessing_equals_torchvision_when_candidates_are_kept_per_level(
    num_classes: int, top_k: int
) -> None:
    logits, deltas, anchors = random_outputs(num_classes)
    reference = TorchvisionRetinaNet(
        ReturnLevels(),
        num_classes,
        score_thresh=0.05,
        nms_thresh=0.5,
        topk_candidates=top_k,
        detections_per_img=300,
    )
    expected = reference.postprocess_detections(
        {
            "cls_logits": list(logits.split(LEVELS, dim=1)),
            "bbox_regression": list(deltas.split(LEVELS, dim=1)),
        },
        [list(anchors.split(LEVELS))] * 2,
        [(HEIGHT, WIDTH)] * 2,
    )
    candidates = select_candidates(
        logits, deltas, anchors, height=HEIGHT, width=WIDTH, top_k=top_k, level_sizes=LEVELS
    )
    found = suppress_overlaps(
        *candidates,
        score_thresholds=torch.full((num_classes,), 0.05),
        nms_iou=0.5,
        max_detections=300,
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) > 30
        torch.testing.assert_close(ours.scores, theirs["scores"])
        torch.testing.assert_close(ours.boxes_xyxy, theirs["boxes"], rtol=1e-5, atol=1e-4)
        assert ours.labels.equal(theirs["labels"])


@pytest.mark.parametrize("num_classes", [1, 3, 7])
@pytest.mark.parametrize("top_k", [1, 64, 1000])
def test_select_candidates_equals_brute_force_over_all_pairs(num_classes: int, top_k: int) -> None:
    logits, deltas, anchors = random_outputs(num_classes)
    boxes, scores, labels = select_candidates(
        logits, deltas, anchors, height=HEIGHT, width=WIDTH, top_k=top_k
    )
    assert boxes.shape == (2, top_k, 4)
    for image in range(2):
        pairs = sorted(
            (
                (value, anchor, label)
                for anchor, row in enumerate(logits[image].tolist())
                for label, value in enumerate(row)
            ),
            reverse=True,
        )[:top_k]
        picked = torch.tensor([anchor for _, anchor, _ in pairs])
        expected = decode_boxes(deltas[image, picked], anchors[picked])
        torch.testing.assert_close(boxes[image], clip_boxes(expected, HEIGHT, WIDTH))
        best = torch.tensor([value for value, _, _ in pairs])
        torch.testing.assert_close(scores[image], 1 / (1 + torch.exp(-best)))
        assert labels[image].tolist() == [label for _, _, label in pairs]


def test_select_candidates_keeps_the_best_of_every_level_when_level_sizes_are_given() -> None:
    logits, deltas, anchors = random_outputs(2)
    logits[:, : LEVELS[0]] += 20  # the finest level would take all places otherwise
    settings = {"height": HEIGHT, "width": WIDTH, "top_k": 10}
    boxes, scores, labels = select_candidates(
        logits, deltas, anchors, **settings, level_sizes=LEVELS
    )
    assert scores.shape == (2, 50)
    for level, (part, own_deltas, own_anchors) in enumerate(
        zip(logits.split(LEVELS, 1), deltas.split(LEVELS, 1), anchors.split(LEVELS), strict=True)
    ):
        alone = select_candidates(part, own_deltas, own_anchors, **settings)
        own = slice(10 * level, 10 * level + 10)
        for whole, expected in zip((boxes, scores, labels), alone, strict=True):
            torch.testing.assert_close(whole[:, own], expected)


def test_select_candidates_keeps_all_pairs_when_there_are_fewer_than_top_k() -> None:
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0]])
    logits = torch.tensor([[[0.0, 2.0, -1.0], [1.0, -3.0, 3.0]]])
    boxes, scores, labels = select_candidates(
        logits, torch.zeros(1, 2, 4), anchors, height=100, width=100, top_k=1000
    )
    # Pairs by falling logit: 3 (1, 2), 2 (0, 1), 1 (1, 0), 0 (0, 0), -1 (0, 2), -3 (1, 1).
    assert labels.tolist() == [[2, 1, 0, 0, 2, 1]]
    assert boxes[0, :, 0].tolist() == [20.0, 0.0, 20.0, 0.0, 0.0, 20.0]
    expected = torch.sigmoid(torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0, -3.0]]))
    torch.testing.assert_close(scores, expected)


def test_select_candidates_gives_float32_scores_and_int32_labels_when_outputs_are_bfloat16() -> (
    None
):
    logits, deltas, anchors = random_outputs(3)
    boxes, scores, labels = select_candidates(
        logits.bfloat16(), deltas.bfloat16(), anchors, height=HEIGHT, width=WIDTH
    )
    assert (boxes.dtype, scores.dtype, labels.dtype) == (torch.float32, torch.float32, torch.int32)


def test_select_candidates_clips_to_the_canvas() -> None:
    logits, deltas, anchors = random_outputs(1)
    boxes, _, _ = select_candidates(logits, deltas + 0.5, anchors, height=HEIGHT, width=WIDTH)
    assert boxes.min() == 0
    assert boxes[..., 0::2].max() == WIDTH
    assert boxes[..., 1::2].max() == HEIGHT


class CandidateTail(nn.Module):
    """The part of an exported graph behind the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchors", make_anchors(SPEC, HEIGHT, WIDTH))

    def forward(self, logits: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return select_candidates(logits, deltas, self.anchors, height=HEIGHT, width=WIDTH)


def test_select_candidates_exports_with_only_the_batch_dynamic() -> None:
    logits, deltas, _ = random_outputs(3)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        CandidateTail(), (logits, deltas), dynamic_shapes=({0: batch}, {0: batch}), strict=False
    )
    logits, deltas = (torch.cat((value, value.flip(1))) for value in (logits, deltas))
    made, expected = program.module()(logits, deltas), CandidateTail()(logits, deltas)
    for ours, eager in zip(made, expected, strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("level_sizes", [None, LEVELS], ids=["all levels", "per level"])
def test_select_candidates_needs_no_values_for_its_shapes(
    level_sizes: tuple[int, ...] | None,
) -> None:
    # The meta device holds shapes only: whatever depends on a value raises there.
    outputs = (value.to("meta") for value in random_outputs(3))
    boxes, _, _ = select_candidates(
        *outputs, height=HEIGHT, width=WIDTH, top_k=9, level_sizes=level_sizes
    )
    assert boxes.shape == (2, 9 * len(level_sizes or [0]), 4)


def suppress(rows: list[list[float]], *, thresholds: list[float], **settings: Any) -> Detections:
    """One image of rows (x1, y1, x2, y2, score, label)."""
    table = torch.tensor(rows).reshape(-1, 6)
    (found,) = suppress_overlaps(
        table[None, :, :4],
        table[None, :, 4],
        table[None, :, 5].to(torch.int32),
        score_thresholds=torch.tensor(thresholds),
        **settings,
    )
    return found


def test_suppress_overlaps_keeps_the_best_of_each_class() -> None:
    rows = [
        [0, 0, 10, 10, 0.6, 0],
        [0, 0, 10, 12, 0.9, 0],  # IoU 100 / 120 = 0.83 with the first, and better
        [0, 0, 10, 10, 0.5, 1],  # same place, another class
        [0, 0, 10, 20, 0.7, 0],  # IoU with the best: 120 / 200 = 0.6 > 0.5
        [0, 5, 10, 20, 0.4, 0],  # IoU with the best: 70 / 200 = 0.35
    ]
    found = suppress(rows, thresholds=[0.05, 0.05])
    assert found.labels.tolist() == [0, 1, 0]
    assert found.boxes_xyxy.tolist() == [[0, 0, 10, 12], [0, 0, 10, 10], [0, 5, 10, 20]]
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.5, 0.4]))
    # At 0.65 the box of IoU 0.6 stays, and removes the last: IoU 150 / 200 = 0.75.
    found = suppress(rows, thresholds=[0.05, 0.05], nms_iou=0.65)
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.7, 0.5]))


@pytest.mark.parametrize(
    ("nms_kind", "scores"),
    [
        ("class", [0.9, 0.8, 0.5]),
        ("agnostic", [0.9, 0.5]),
        ("none", [0.9, 0.8, 0.7, 0.6, 0.5]),
    ],
)
def test_suppress_overlaps_lets_those_compete_that_the_kind_says(
    nms_kind: NmsKind, scores: list[float]
) -> None:
    rows = [
        [0, 0, 10, 10, 0.6, 1],  # IoU 1 with the 0.8 of its class
        [0, 0, 10, 12, 0.9, 0],
        [0, 0, 10, 10, 0.8, 1],  # IoU 100 / 120 = 0.83 with the best, of another class
        [40, 40, 50, 50, 0.5, 1],
        [0, 0, 10, 10, 0.7, 0],  # IoU 0.83 with the best, of its class
        [0, 0, 10, 10, 0.2, 0],  # not above its threshold
    ]
    settings = {"thresholds": [0.2, 0.2], "nms_kind": nms_kind}
    found = suppress(rows, **settings)
    assert found.scores.tolist() == pytest.approx(scores)
    capped = suppress(rows, max_detections=2, **settings)
    assert capped.scores.tolist() == pytest.approx(scores[:2])


def test_suppress_overlaps_keeps_equal_scores_in_the_candidates_order_when_nothing_competes() -> (
    None
):
    rows = [[20.0 * i, 0, 20.0 * i + 10, 10, 0.5, i % 2] for i in range(40)]
    found = suppress(rows, thresholds=[0.05, 0.05], nms_kind="none")
    assert found.boxes_xyxy[:, 0].tolist() == [20.0 * i for i in range(40)]


def test_suppress_overlaps_refuses_another_kind() -> None:
    with pytest.raises(ValueError, match="expected one of class, agnostic, none, got 'soft'"):
        suppress([], thresholds=[0.05], nms_kind="soft")


@pytest.mark.parametrize("nms_kind", ["class", "agnostic", "none"])
def test_suppress_overlaps_keeps_the_same_above_a_threshold_whatever_lies_below(
    nms_kind: NmsKind,
) -> None:
    # The law that lets one matching serve all thresholds. Classes far down the table, and boxes
    # whose overlaps lie close to the limit, would show a rounding that depends on the others.
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(1500, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 20 + torch.rand(1500, 2, generator=generator)], dim=1)
    boxes[0] = torch.tensor([0.0, 0.0, 8000.0, 8000.0])
    scores = torch.rand(1500, generator=generator)
    scores[0] = 0.01
    labels = torch.randint(70, 80, (1500,), generator=generator)
    options = {"nms_iou": 0.5, "max_detections": 10_000, "nms_kind": nms_kind}
    everything, high = (
        suppress_overlaps(
            boxes[None],
            scores[None],
            labels[None],
            score_thresholds=torch.full((80,), threshold),
            **options,  # type: ignore[arg-type]
        )[0]
        for threshold in (0.0, 0.4)
    )
    above = everything.scores > 0.4
    assert 0 < len(high) < len(everything)
    assert everything.boxes_xyxy[above].equal(high.boxes_xyxy)
    assert everything.labels[above].equal(high.labels)


def test_suppress_overlaps_does_not_round_boxes_of_late_classes() -> None:
    # IoU 100 / 199.9 = 0.50025 of class 89: shifted in float32 its edges would move by hundredths.
    rows = [[0, 0, 10, 19.99, 0.9, 89], [0, 0, 10, 10, 0.8, 89], [0, 0, 8000, 8000, 0.7, 0]]
    assert len(suppress(rows, thresholds=[0.05] * 90)) == 2
    rows[0][3] = 20.01  # IoU 100 / 200.1 = 0.49975
    assert len(suppress(rows, thresholds=[0.05] * 90)) == 3


def test_suppress_overlaps_uses_the_threshold_of_each_class() -> None:
    rows = [
        [0, 0, 10, 10, 0.5, 0],  # not above its threshold
        [20, 0, 30, 10, 0.51, 0],
        [40, 0, 50, 10, 0.2, 1],
        [60, 0, 70, 10, 0.1, 1],
    ]
    found = suppress(rows, thresholds=[0.5, 0.15])
    assert found.boxes_xyxy[:, 0].tolist() == [20, 40]


def test_suppress_overlaps_keeps_the_best_when_there_are_too_many() -> None:
    rows = [[20.0 * i, 0, 20.0 * i + 10, 10, 0.1 + 0.1 * i, 0] for i in range(6)]
    found = suppress(rows, thresholds=[0.05], max_detections=2)
    assert found.boxes_xyxy[:, 0].tolist() == [100, 80]


def test_suppress_overlaps_drops_boxes_without_area() -> None:
    nan = float("nan")
    rows = [
        [100, 0, 100, 50, 0.99, 0],
        [0, 90, 50, 90, 0.98, 0],
        [nan, 0, 10, 10, 0.97, 0],
        [0, 0, 10, 10, 0.5, 0],
    ]
    assert suppress(rows, thresholds=[0.05]).boxes_xyxy.tolist() == [[0, 0, 10, 10]]


@pytest.mark.parametrize("num_rows", [0, 3])
def test_suppress_overlaps_gives_empty_detections_when_nothing_passes(num_rows: int) -> None:
    found = suppress([[0, 0, 10, 10, 0.01, 0]] * num_rows, thresholds=[0.05])
    assert len(found) == 0
    assert found.boxes_xyxy.shape == (0, 4)
    assert found.scores.shape == found.labels.shape == (0,)
    assert not found.labels.is_floating_point()


def test_suppress_overlaps_treats_images_apart() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0]], [[0.0, 0.0, 10.0, 10.0]]])
    scores, labels = torch.tensor([[0.9], [0.01]]), torch.zeros(2, 1, dtype=torch.int32)
    found = suppress_overlaps(boxes, scores, labels, score_thresholds=torch.tensor([0.05]))
    assert [len(image) for image in found] == [1, 0]
