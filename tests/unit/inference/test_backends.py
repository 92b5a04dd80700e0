"""Every runtime of this machine finds the same boxes on the same model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torchvision.ops import box_iou

from retinaray.artifact import ModelCard
from retinaray.detector.postprocess import Detections, select_candidates, suppress_overlaps
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import CheckpointError
from retinaray.evaluation.parity_matching import match_detections
from retinaray.export.sample_canvases import make_test_canvases
from retinaray.inference.predictor import Predictor, PredictorSettings, load_predictor

BATCH = 4


@pytest.fixture(scope="module")
def canvases() -> torch.Tensor:
    return torch.stack(make_test_canvases((64, 96), count=6, seed=5))


@pytest.fixture(scope="module")
def predictors(tiny_weights: bytes, tiny_onnx: bytes) -> Iterator[dict[str, Predictor]]:
    threads = torch.get_num_threads()
    settings = PredictorSettings(batch=BATCH, threads=1)
    files = {"torch": ("m.pth", tiny_weights)}
    files |= {name: ("m.onnx", tiny_onnx) for name in ("onnxruntime", "openvino")}
    yield {
        name: load_predictor(content, uri=uri, backend=name, settings=settings)[0]
        for name, (uri, content) in files.items()
    }
    torch.set_num_threads(threads)


def predict_all(predictor: Predictor, canvases: torch.Tensor) -> list[Detections]:
    """In batches of BATCH; the last one has two images."""
    return [found for part in canvases.split(BATCH) for found in predictor.predict(part)]


def test_torch_predictor_is_the_network_and_its_postprocessing(
    predictors: dict[str, Predictor],
    tiny_card: ModelCard,
    tiny_model: RetinaNet,
    canvases: torch.Tensor,
) -> None:
    with torch.inference_mode():
        logits, deltas = tiny_model(canvases)
    expected = suppress_overlaps(
        *select_candidates(
            logits, deltas, tiny_model.anchors_for(canvases), height=64, width=96, top_k=1000
        ),
        score_thresholds=torch.tensor(tiny_card.score_thresholds),
        nms_iou=tiny_card.nms_iou,
    )
    for found, right in zip(predict_all(predictors["torch"], canvases), expected, strict=True):
        assert 5 < len(right) < 100
        assert torch.equal(found.labels, right.labels)
        torch.testing.assert_close(found.boxes_xyxy, right.boxes_xyxy, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.scores, right.scores, rtol=1e-4, atol=1e-5)


def test_onnxruntime_finds_the_boxes_of_torch(
    predictors: dict[str, Predictor], canvases: torch.Tensor
) -> None:
    expected = predict_all(predictors["torch"], canvases)
    found = predict_all(predictors["onnxruntime"], canvases)
    assert len(found) == len(canvases)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.boxes_xyxy, other.boxes_xyxy, rtol=0, atol=1e-2)
        torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-4)


def test_openvino_finds_the_boxes_of_torch_within_bf16(
    predictors: dict[str, Predictor], canvases: torch.Tensor
) -> None:
    # On processors with bf16 the convolutions have 8 bits of mantissa: a box may move by part of a
    # pixel, and one close to a threshold may come or go.
    expected = predict_all(predictors["torch"], canvases)
    found = predict_all(predictors["openvino"], canvases)
    assert len(found) == len(canvases)
    moved, changed, num_lost = [], [], 0
    for one, other in zip(found, expected, strict=True):
        overlap = box_iou(other.boxes_xyxy, one.boxes_xyxy)
        overlap[other.labels[:, None] != one.labels] = 0
        best, partner = overlap.max(dim=1)
        is_same = best > 0.7
        num_lost += int((~is_same).sum()) + abs(len(one) - len(other))
        partner = partner[is_same]
        difference = (one.boxes_xyxy[partner] - other.boxes_xyxy[is_same]).abs().amax(dim=1)
        moved.append(difference)
        changed.append((one.scores[partner] - other.scores[is_same]).abs())
    num_boxes = sum(map(len, expected))
    assert num_boxes > 60
    assert num_lost <= 0.1 * num_boxes
    assert torch.cat(moved).median() < 0.5
    assert torch.cat(changed).quantile(0.95) < 0.05


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "openvino"])
def test_a_partial_batch_gives_what_the_whole_batch_gave(
    predictors: dict[str, Predictor], canvases: torch.Tensor, backend: str
) -> None:
    whole = predictors[backend].predict(canvases[:BATCH])
    alone = predictors[backend].predict(canvases[:1])
    assert len(whole) == BATCH
    assert len(alone) == 1
    assert torch.equal(alone[0].labels, whole[0].labels)
    torch.testing.assert_close(alone[0].boxes_xyxy, whole[0].boxes_xyxy, rtol=0, atol=1e-2)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "openvino"])
def test_predictions_do_not_depend_on_the_memory_layout_or_on_earlier_batches(
    predictors: dict[str, Predictor], canvases: torch.Tensor, backend: str
) -> None:
    predictor = predictors[backend]
    # As the pipeline makes them: rows of RGB pixels, seen as channels first.
    layout = canvases.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    first = predictor.predict(layout[:2])
    kept = [found.boxes_xyxy.clone() for found in first]
    again = predictor.predict(canvases[:2])
    predictor.predict(255 - canvases[:2])
    for one, copy, other in zip(first, kept, again, strict=True):
        assert torch.equal(one.boxes_xyxy, copy)
        torch.testing.assert_close(one.boxes_xyxy, other.boxes_xyxy, rtol=0, atol=1e-2)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "openvino"])
def test_predictors_say_what_they_are(
    predictors: dict[str, Predictor], tiny_card: ModelCard, backend: str
) -> None:
    predictor = predictors[backend]
    assert predictor.backend == backend
    assert predictor.canvas == (64, 96)
    assert predictor.card == tiny_card


def test_parity_of_torch_and_onnxruntime_is_clean(
    predictors: dict[str, Predictor], tiny_card: ModelCard, canvases: torch.Tensor
) -> None:
    found = [predict_all(predictors[name], canvases) for name in ("torch", "onnxruntime")]
    thresholds = torch.tensor(tiny_card.score_thresholds)
    images = [
        match_detections(reference, candidate, score_thresholds=thresholds)
        for reference, candidate in zip(*found, strict=True)
    ]
    assert sum(image.num_reference for image in images) > 50
    assert sum(image.num_changed for image in images) == 0
    assert max(image.box_px.max() for image in images) < 1e-2
    assert max(image.scores.max() for image in images) < 1e-4


def test_torch_predictor_takes_the_callers_canvas(tiny_weights: bytes, one_thread: None) -> None:
    settings = PredictorSettings(canvas=(32, 64), score_threshold=0.01)
    predictor, _ = load_predictor(tiny_weights, uri="m.pth", backend="auto", settings=settings)
    assert predictor.canvas == (32, 64)
    (found,) = predictor.predict(torch.zeros(1, 3, 32, 64, dtype=torch.uint8))
    assert found.boxes_xyxy[:, 2].max() <= 64
    assert found.boxes_xyxy[:, 3].max() <= 32


def test_torch_predictor_leaves_a_training_network_in_training(
    tiny_card: ModelCard, make_lively_model: Callable[[ModelCard], RetinaNet], one_thread: None
) -> None:
    from retinaray.inference.torch_backend import TorchPredictor

    model = make_lively_model(tiny_card).train()
    predictor = TorchPredictor(model, card=tiny_card, settings=PredictorSettings())
    predictor.predict(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))
    assert model.training
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_graph_with_an_unknown_operator_is_refused_as_damaged(
    tiny_onnx: bytes, backend: str
) -> None:
    import onnx

    model: Any = onnx.load_model_from_string(tiny_onnx)
    model.graph.node[3].op_type = "NoSuchOperator"
    with pytest.raises(CheckpointError, match=r"bad\.onnx: .* cannot load it"):
        load_predictor(
            model.SerializeToString(),
            uri="bad.onnx",
            backend=backend,
            settings=PredictorSettings(),
        )
