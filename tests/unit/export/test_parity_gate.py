"""The gate on predictors that find what a test tells them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import onnx
import pytest
import torch
from torch import Tensor

from retinaray.artifact import ModelCard
from retinaray.detector.postprocess import Detections
from retinaray.evaluation.parity_rows import CasePrecision, ParityCase, ParityTolerance
from retinaray.export import parity_gate
from retinaray.export.parity_gate import (
    GateEntry,
    ParityGate,
    compare_runtimes,
    make_gate_setting,
    make_gate_settings,
    read_top_k,
)
from retinaray.inference.predictor import PredictorSettings

Rows = list[list[float]]

# x1, y1, x2, y2, score, label. The tiny card's thresholds are 0.3. The second suppresses the third
# (IoU 0.9), which is left for the comparison of candidates.
ROWS: Rows = [
    [10, 10, 30, 30, 0.9, 0],
    [40, 10, 60, 30, 0.8, 1],
    [40, 10, 60, 28, 0.79, 1],
    [70, 10, 90, 40, 0.2, 0],
]


class FixedPredictor:
    """Finds the same in every image; remembers the size of its batches."""

    backend = "fixed"

    def __init__(self, card: ModelCard, rows: Rows) -> None:
        self.card, self.canvas, self.rows = card, card.canvas, rows
        self.sizes: list[int] = []

    def predict(self, images: Tensor) -> list[Detections]:
        self.sizes.append(len(images))
        table = torch.tensor(self.rows, dtype=torch.float32).reshape(-1, 6)
        found = Detections(table[:, :4], table[:, 4], table[:, 5].long())
        return [found] * len(images)


def change(place: int, values: dict[int, float]) -> Rows:
    rows = [list(row) for row in ROWS]
    for column, value in values.items():
        rows[place][column] = value
    return rows


def make_entry(
    predictor: FixedPredictor, name: str = "case", precision: CasePrecision = "fp32"
) -> GateEntry:
    case = ParityCase(name, "m.onnx", "fixed", precision)
    return GateEntry(case, predictor, top_k=1000)


@pytest.fixture
def make_gate(tiny_card: ModelCard) -> Callable[..., ParityGate[int]]:
    """A gate for predictors that find these rows: make_gate(rows, more_rows, num_worst=2)."""

    def make(*candidates: Rows, batch: int = 1, **settings: object) -> ParityGate[int]:
        return ParityGate(
            FixedPredictor(tiny_card, ROWS),
            [
                make_entry(FixedPredictor(tiny_card, rows), f"case {place}")
                for place, rows in enumerate(candidates)
            ],
            setting=make_gate_setting(tiny_card),
            batch=batch,
            reference_top_k=1000,
            **settings,  # type: ignore[arg-type]
        )

    return make


def feed(gate: ParityGate[int], num_images: int = 1) -> None:
    for number in range(num_images):
        gate.add(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), [number])


def test_gate_passes_what_finds_the_same(make_gate: Callable[..., ParityGate[int]]) -> None:
    gate = make_gate(ROWS)
    feed(gate, 2)
    (row,) = gate.rows(ParityTolerance())
    assert row.has_passed
    assert row.num_images == gate.num_images == 2
    # Three candidates lie above the threshold, and one of two overlapping ones is a detection.
    assert (row.candidates.num_reference, row.detections.num_reference) == (6, 4)
    assert (row.candidates.box_px.max, row.candidates.scores.max) == (0.0, 0.0)


def test_gate_judges_candidates_and_shows_what_suppression_makes_of_them(
    make_gate: Callable[..., ParityGate[int]],
) -> None:
    # By 2e-5 of score the third becomes better than the second: suppression keeps the other one.
    nearly = [list(row) for row in ROWS]
    nearly[1][4], nearly[2][4] = 0.79001, 0.79003
    reference = [list(row) for row in ROWS]
    reference[1][4], reference[2][4] = 0.79003, 0.79001
    gate = make_gate(nearly)
    gate._predictors[0].rows = reference  # type: ignore[union-attr]
    feed(gate)
    (row,) = gate.rows(ParityTolerance())
    assert row.has_passed
    assert row.candidates.scores.max == pytest.approx(2e-5, rel=0.01)
    assert row.candidates.box_px.max == 0
    assert row.detections.box_px.max == 2  # 30 against 28
    strict = gate.rows(ParityTolerance(score=1e-5))[0]
    assert strict.reasons[0].startswith("a candidate's score differs by 2.0")


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (change(0, {0: 10.1}), "a candidate's box differs by 0.1 px"),
        (change(2, {4: 0.78}), "a candidate's score differs by 0.01"),
        (ROWS[1:], "of 3 candidates 1 are missing"),
        (change(0, {5: 2}), "1 have another class"),
        ([], "of 3 candidates 3 are missing"),
        ([*ROWS, [1, 1, 9, 9, 0.5, 0]], "1 are too many"),
        (change(0, {0: float("nan")}), "1 are missing"),
    ],
)
def test_gate_fails_what_differs(
    make_gate: Callable[..., ParityGate[int]], candidate: Rows, reason: str
) -> None:
    gate = make_gate(candidate, ROWS)
    feed(gate)
    failed, passed = gate.rows(ParityTolerance())
    assert reason in failed.reasons[0]
    assert passed.has_passed


def test_gate_does_not_pass_when_nothing_was_compared(
    make_gate: Callable[..., ParityGate[int]],
) -> None:
    (row,) = make_gate(ROWS).rows(ParityTolerance())
    assert row.reasons[0].startswith("nothing was compared")
    assert (row.num_images, row.latency_ms) == (0, None)


def test_gate_does_not_miss_candidates_behind_the_end_of_a_full_list(
    tiny_card: ModelCard,
) -> None:
    # The reference gives four candidates, the file two: what lies behind them is not missing.
    def compare(top_k: int | None) -> tuple[int, int]:
        entry = replace(make_entry(FixedPredictor(tiny_card, ROWS[:2])), top_k=top_k)
        row = compare_runtimes(
            FixedPredictor(tiny_card, ROWS),
            entry,
            [torch.zeros(3, 64, 96, dtype=torch.uint8)],
            tolerance=ParityTolerance(),
            reference_top_k=4,
        )
        return row.candidates.num_reference, row.candidates.num_missing

    # Above the file's last score and its margin lies the first box only.
    assert compare(2) == (1, 0)
    assert compare(None) == (1, 0)
    assert compare(4) == (3, 1)


def test_gate_uses_the_models_thresholds_and_suppression(tiny_card: ModelCard) -> None:
    card = replace(tiny_card, score_thresholds=(0.15, 0.85, 0.3), nms_kind="none", max_detections=3)
    row = compare_runtimes(
        FixedPredictor(card, ROWS),
        make_entry(FixedPredictor(card, ROWS)),
        [torch.zeros(3, 64, 96, dtype=torch.uint8)],
        tolerance=ParityTolerance(),
    )
    # Of class 0 both (0.9, 0.2), of class 1 none; the list of detections ends at 0.79, whose margin
    # hides the box of 0.2.
    assert row.candidates.num_reference == 2
    assert row.detections.num_reference == 1


def test_gate_settings_ask_for_everything_and_keep_the_runtime() -> None:
    settings = make_gate_settings(
        PredictorSettings(batch=3, threads=2, canvas=(64, 96), precision="fp32", nms_iou=0.9)
    )
    assert (settings.score_threshold, settings.nms_kind) == (0.0, "none")
    assert settings.max_detections == 3839
    assert (settings.batch, settings.threads, settings.precision) == (3, 2, "fp32")


def test_gate_keeps_the_worst_images_only(tiny_card: ModelCard) -> None:
    reference = FixedPredictor(tiny_card, ROWS)
    shifted = FixedPredictor(tiny_card, ROWS)
    gate: ParityGate[int] = ParityGate(
        reference,
        [make_entry(shifted)],
        setting=make_gate_setting(tiny_card),
        batch=1,
        num_worst=3,
    )
    # Shifts of a box in px by number of the image; image 4 lacks a box, images 0 and 6 are equal,
    # image 5 has another score: 0.09 weighs as much as 4.5 px.
    for number, shift in enumerate([0, 5, 1, 4, None, 2, 0]):
        rows = ROWS[1:] if shift is None else change(0, {0: 10 + shift, 2: 30 + shift})
        if number == 5:
            rows = change(0, {4: 0.81})
        shifted.rows = rows
        feed_one(gate, number)
    worst = gate.worst("case")
    assert [image.key for image in worst] == [4, 1, 5]
    assert [image.severity[0] for image in worst] == [1, 0, 0]
    assert [image.severity[1] for image in worst] == pytest.approx([0, 5, 4.5], rel=1e-5)
    assert len(worst[0].candidate) == len(worst[0].reference) - 1


def feed_one(gate: ParityGate[int], number: int) -> None:
    gate.add(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), [number])


def test_gate_leaves_out_worst_images_without_difference(
    make_gate: Callable[..., ParityGate[int]],
) -> None:
    gate = make_gate(ROWS, num_worst=3)
    feed(gate, 2)
    assert gate.worst("case 0") == []


def test_gate_gives_back_the_detections_that_it_was_asked_to_keep(
    make_gate: Callable[..., ParityGate[int]],
) -> None:
    low = change(3, {4: 0.06})
    gate = make_gate(low, keeps_detections=True)
    feed(gate, 2)
    assert [key for key, _ in gate.detections()] == [0, 1]
    (_, reference), _ = gate.detections()
    # Down to 0.05, where AP is computed, and suppressed.
    assert reference.scores.tolist() == pytest.approx([0.9, 0.8, 0.2])
    assert reference.labels.tolist() == [0, 1, 0]
    (_, found), _ = gate.detections("case 0")
    assert found.scores.tolist() == pytest.approx([0.9, 0.8, 0.06])
    assert found.boxes_xyxy[0].tolist() == [10, 10, 30, 30]


def test_gate_takes_ap_from_the_caller(make_gate: Callable[..., ParityGate[int]]) -> None:
    gate = make_gate(ROWS, ROWS)
    feed(gate)
    same, worse = gate.rows(ParityTolerance(), ap={"case 0": 0.5, "case 1": 0.4}, ap_reference=0.5)
    assert same.has_passed
    assert worse.ap_difference == pytest.approx(-0.1)
    assert worse.reasons == ("AP differs by 0.1 (tolerance 0.0005)",)


def test_gate_times_whole_batches_in_turn_and_leaves_out_the_first_call(
    tiny_card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    class Clocked(FixedPredictor):
        def __init__(self, name: str, cost_s: float) -> None:
            super().__init__(tiny_card, ROWS)
            self.name, self.cost_s = name, cost_s

        def predict(self, images: Tensor) -> list[Detections]:
            order.append(self.name)
            clock[0] += self.cost_s * (100 if len(order) <= 3 else 1)
            return super().predict(images)

    clock = [0.0]
    monkeypatch.setattr(parity_gate.time, "perf_counter", lambda: clock[0])
    runtimes = [Clocked("torch", 0.4), Clocked("a", 0.2), Clocked("b", 0.1)]
    gate: ParityGate[int] = ParityGate(
        runtimes[0],
        [make_entry(runtime, runtime.name) for runtime in runtimes[1:]],
        setting=make_gate_setting(tiny_card),
        batch=2,
    )
    images = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    for number in range(2):
        gate.add(images, [number, number + 1])
    gate.add(images[:1], [4])  # a partial batch tells nothing
    assert len(gate._latencies_ms[0]) == 2
    gate.time_more(5)
    rows = gate.rows(ParityTolerance())
    assert gate.reference_latency_ms == pytest.approx(200)
    assert [row.latency_ms for row in rows] == pytest.approx([100, 50])
    assert rows[0].num_images == 5
    assert [len(times) for times in gate._latencies_ms] == [5, 5, 5]
    # Warm-up, then another one begins each time.
    assert order[:9] == ["torch", "a", "b", "torch", "a", "b", "a", "b", "torch"]
    assert all(set(runtime.sizes[-3:]) == {2} for runtime in runtimes)


def test_time_more_needs_images(make_gate: Callable[..., ParityGate[int]]) -> None:
    gate = make_gate(ROWS)
    gate.time_more(3)
    assert gate.reference_latency_ms is None


def test_time_more_fills_a_batch_when_there_are_fewer_images(
    make_gate: Callable[..., ParityGate[int]],
) -> None:
    gate = make_gate(ROWS, batch=4)
    feed(gate, 3)
    assert gate.reference_latency_ms is None
    gate.time_more(2)
    assert gate.reference_latency_ms is not None
    assert gate._predictors[0].sizes == [1, 1, 1, 1, 4, 4]  # type: ignore[union-attr]
    assert gate.rows(ParityTolerance())[0].num_images == 3


def test_gate_memory_does_not_grow_with_the_number_of_images(
    make_gate: Callable[..., ParityGate[int]],
) -> None:
    gate = make_gate(change(0, {0: 10.01}), num_worst=2)
    feed(gate, 30)
    tracemalloc.start()
    feed(gate, 10)
    before = tracemalloc.get_traced_memory()[0]
    feed(gate, 60)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    # Canvases would be 1.1 MB, detections 0.1 MB; the latencies of two runtimes are 120 numbers.
    assert grown < 30_000


def test_read_top_k_is_the_length_of_the_scores(tiny_onnx: bytes) -> None:
    model = onnx.load_model_from_string(tiny_onnx)
    (scores,) = (value for value in model.graph.output if value.name == "scores")
    expected = scores.type.tensor_type.shape.dim[1].dim_value
    assert read_top_k(tiny_onnx) == expected > 100
    scores.type.tensor_type.shape.dim[1].Clear()
    assert read_top_k(model.SerializeToString()) is None
    del model.graph.output[:]
    assert read_top_k(model.SerializeToString()) is None
