"""The imported network and its detections against ODTK's, both written from its description."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from retinaray.artifact import ModelCard
from retinaray.detector.anchors import AnchorSpec, count_level_anchors
from retinaray.detector.box_coding import MAX_LOG_GROWTH, decode_boxes
from retinaray.detector.postprocess import Detections, select_candidates, suppress_overlaps
from retinaray.detector.retinanet import RetinaNet
from retinaray.inference.predictor import PredictorSettings
from retinaray.inference.torch_backend import TorchPredictor

MEAN = torch.tensor((0.485, 0.456, 0.406)).reshape(3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).reshape(3, 1, 1)
STRIDES = (8, 16, 32, 64, 128)


def make_images(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)


def odtk_anchors(stride: int, *, is_legacy: bool) -> Tensor:
    """Nine anchors with inclusive corners, scale by scale."""
    rows = []
    for scale in (4 * 2 ** (i / 3) for i in range(3)):
        for ratio in (1.0, 2.0, 0.5):
            width = (stride * stride / ratio) ** 0.5
            height = width * ratio
            if is_legacy:
                width = round(width)
                height = round(width * ratio)
            off = 1 if is_legacy else 0
            rows.append(
                [
                    0.5 * (stride - width * scale),
                    0.5 * (stride - height * scale),
                    0.5 * (stride + width * scale) - off,
                    0.5 * (stride + height * scale) - off,
                ]
            )
    return torch.tensor(rows)


def odtk_decode(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Inclusive corners; nothing is clamped."""
    sides = anchors[:, 2:] - anchors[:, :2] + 1
    centres = anchors[:, :2] + 0.5 * sides + deltas[:, :2] * sides
    grown = deltas[:, 2:].exp() * sides
    return torch.cat((centres - 0.5 * grown, centres + 0.5 * grown - 1), dim=1)


def odtk_candidates(
    scores: list[Tensor], deltas: list[Tensor], canvas: tuple[int, int], *, is_legacy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One image: of each level the 1000 best above 0.05, over all classes."""
    height, width = canvas
    found = []
    for stride, level_scores, level_deltas in zip(STRIDES, scores, deltas, strict=True):
        rows, columns = level_scores.shape[-2:]
        classes = level_scores.shape[0] // 9
        flat = level_scores.flatten()
        chosen = (flat > 0.05).nonzero().flatten()
        chosen = chosen[flat[chosen].argsort(descending=True)[:1000]]
        x, y = chosen % columns, chosen // columns % rows
        label, anchor = chosen // (columns * rows) % classes, chosen // (columns * rows * classes)
        corner = torch.stack((x, y, x, y), dim=1) * stride
        boxes = odtk_decode(
            level_deltas.reshape(9, 4, rows, columns)[anchor, :, y, x],
            odtk_anchors(stride, is_legacy=is_legacy)[anchor] + corner,
        )
        boxes = torch.cat(
            (
                boxes[:, :2].clamp(min=0),
                torch.minimum(boxes[:, 2:], torch.tensor([width - 1.0, height - 1.0])),
            ),
            dim=1,
        )
        found.append((boxes, flat[chosen], label))
    boxes, best, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return boxes, best, labels


def odtk_nms(boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The 100 best that no better box of their class overlaps by more than half, inclusive."""
    order = scores.argsort(descending=True)
    boxes, scores, labels = boxes[order].double(), scores[order], labels[order]
    areas = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    alive = torch.ones(len(boxes), dtype=torch.bool)
    kept = []
    for index in range(len(boxes)):
        if not alive[index]:
            continue
        kept.append(index)
        low = torch.maximum(boxes[index, :2], boxes[:, :2])
        high = torch.minimum(boxes[index, 2:], boxes[:, 2:])
        shared = (high - low + 1).clamp(min=0).prod(1)
        overlap = shared / (areas + areas[index] - shared)
        alive &= (overlap <= 0.5) | (labels != labels[index])
    return boxes[kept][:100], scores[kept][:100], labels[kept][:100]


def detect(model: RetinaNet, card: ModelCard, images: Tensor) -> list[Detections]:
    """Ours with ODTK's 1000 candidates of each level."""
    height, width = images.shape[-2:]
    with torch.no_grad():
        logits, deltas = model(images)
    candidates = select_candidates(
        logits,
        deltas,
        model.anchors_for(images),
        height=height,
        width=width,
        level_sizes=count_level_anchors(card.anchors, height, width),
    )
    return suppress_overlaps(
        *candidates,
        score_thresholds=torch.tensor(card.score_thresholds),
        nms_iou=card.nms_iou,
        max_detections=card.max_detections,
    )


def compare_raw_outputs(net: Any, model: RetinaNet, canvas: tuple[int, int]) -> None:
    images = make_images(*canvas)
    normalised = (images.float() - 255 * MEAN) / (255 * STD)
    with torch.no_grad():
        outputs, levels = model(images), net(normalised)
    for ours, maps, num_values in zip(outputs, levels, (3, 4), strict=True):
        rows = [m.unflatten(1, (9, num_values)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps]
        theirs = torch.cat(rows, dim=1)
        assert theirs.std() > 0.01
        assert (ours - theirs).abs().max() == 0


# 160 x 224: no multiples of 128, which ODTK pads to; 124 x 190: no multiples of 32 either, but
# each map is twice the next, without which ODTK's own pyramid does not run.
@pytest.mark.parametrize("canvas", [(128, 256), (160, 224), (124, 190)])
def test_imported_resnet18_gives_the_raw_outputs_of_odtk_to_the_last_bit(
    canvas: tuple[int, int], odtk_net: Any, imported: tuple[ModelCard, RetinaNet]
) -> None:
    compare_raw_outputs(odtk_net, imported[1], canvas)


def test_imported_resnet50_gives_the_raw_outputs_of_odtk_to_the_last_bit(
    make_odtk_net: Callable[..., Any],
    import_net: Callable[[Any], tuple[ModelCard, RetinaNet]],
) -> None:
    net = make_odtk_net("ResNet50FPN", 3)
    # 53 convolutions, 4 tensors for each of 53 norms, the classifier's 2, 8 and 10 biased layers.
    assert len(net.to_values()["state_dict"]) == 303
    compare_raw_outputs(net, import_net(net)[1], (160, 224))


def test_normalisation_is_odtks_to_float_rounding() -> None:
    images = torch.arange(256, dtype=torch.float32).expand(3, 1, 256)
    ours = (images - 255 * MEAN) / (255 * STD)
    assert torch.allclose(ours, (images / 255 - MEAN) / STD, rtol=0, atol=1e-6)


@pytest.mark.parametrize("generation", ["odtk", "odtk-legacy"])
def test_imported_network_gives_the_detections_of_odtk(
    generation: Any,
    odtk_net: Any,
    imported: tuple[ModelCard, RetinaNet],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = make_images(128, 256)[:1]
    card, model = imported
    card = dataclasses.replace(card, anchors=AnchorSpec(convention=generation))
    monkeypatch.setattr(model, "anchor_spec", card.anchors)
    with torch.no_grad():
        class_levels, box_levels = odtk_net((images / 255 - MEAN) / STD)
    scores, deltas = [x[0].sigmoid() for x in class_levels], [x[0] for x in box_levels]
    assert (scores[0] > 0.05).sum() > 1000, "the limit of each level is not reached"
    theirs = {
        is_legacy: odtk_nms(*odtk_candidates(scores, deltas, (128, 256), is_legacy=is_legacy))
        for is_legacy in (False, True)
    }
    boxes, best, labels = theirs[generation == "odtk-legacy"]
    assert len(best) == 100
    assert not torch.allclose(boxes[:20], theirs[generation == "odtk"][0][:20], atol=0.3)
    predictor = TorchPredictor(model, card=card, settings=PredictorSettings(canvas=(128, 256)))
    # By ODTK's rule for candidates, and by that of every command here.
    for found in (detect(model, card, images)[0], predictor.predict(images)[0]):
        assert torch.equal(found.labels, labels)
        assert torch.allclose(found.scores, best, rtol=0, atol=1e-5)
        # Inclusive corners against edges: one more in x2 and y2.
        edges = boxes.float() + torch.tensor([0.0, 0.0, 1.0, 1.0])
        assert torch.allclose(found.boxes_xyxy, edges, rtol=0, atol=2e-3)


@pytest.mark.parametrize("is_legacy", [False, True])
def test_decode_boxes_is_odtks_decoding_below_the_largest_growth(is_legacy: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    deltas = 3 * torch.randn(500, 4, generator=generator)
    deltas[:, 2:].clamp_(max=MAX_LOG_GROWTH)
    inclusive = odtk_anchors(32, is_legacy=is_legacy).repeat(56, 1)[:500]
    edges = inclusive + torch.tensor([0.0, 0.0, 1.0, 1.0])
    theirs = odtk_decode(deltas, inclusive) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert torch.allclose(decode_boxes(deltas, edges), theirs, rtol=1e-5, atol=1e-2)
    # A deliberate difference: beyond 62.5 times its anchor a box stops growing here, because
    # half precision ends at 65504.
    wild = torch.tensor([[0.0, 0.0, 5.0, 5.0]])
    ours, odtks = decode_boxes(wild, edges[:1])[0], odtk_decode(wild, inclusive[:1])[0]
    assert (ours[2] - ours[0]) / (edges[0, 2] - edges[0, 0]) == pytest.approx(62.5)
    assert odtks[2] - odtks[0] + 1 == pytest.approx(
        148.41316 * float(edges[0, 2] - edges[0, 0]), rel=1e-5
    )


def test_suppress_overlaps_drops_what_odtk_keeps_outside_the_image() -> None:
    # ODTK's GPU code gives a box left of the image the corners (0, 10) to (-6, 29); here it goes.
    outside = torch.tensor([[[-25.0, 10.0, -5.0, 30.0], [5.0, 10.0, 25.0, 30.0]]])
    clipped = outside.clamp(min=0)
    (found,) = suppress_overlaps(
        clipped,
        torch.tensor([[0.9, 0.8]]),
        torch.tensor([[0, 0]]),
        score_thresholds=torch.tensor([0.05]),
    )
    assert found.boxes_xyxy.tolist() == [[5.0, 10.0, 25.0, 30.0]]
