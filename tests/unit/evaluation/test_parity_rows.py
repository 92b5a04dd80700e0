from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from retinaray.evaluation.parity_matching import ImageDifferences
from retinaray.evaluation.parity_rows import (
    CasePrecision,
    DifferenceTally,
    ParityCase,
    ParityGroup,
    ParityResult,
    ParityRow,
    ParityTolerance,
    UnrunCase,
    judge_row,
)


def tally(
    box_px: float = 0.0,
    score: float = 0.0,
    *,
    num: int = 100,
    missing: int = 0,
    extra: int = 0,
    flips: int = 0,
) -> DifferenceTally:
    """Of `num` boxes; one pair has these differences, the others none."""
    made = DifferenceTally()
    made.add(
        ImageDifferences(
            num_reference=num,
            pairs=np.zeros((2, 2), dtype=np.int64),
            box_px=np.array([0, box_px]),
            scores=np.array([0, score]),
            missing=tuple(range(missing)),
            extra=tuple(range(extra)),
            flips=tuple((place, place) for place in range(flips)),
        )
    )
    return made


def make_row(precision: CasePrecision = "fp32", **values: Any) -> ParityRow:
    row = ParityRow(
        case=ParityCase("m.onnx runtime", "m.onnx", "runtime", precision),
        num_images=3,
        candidates=tally(),
        detections=tally(),
    )
    return replace(row, **values)


def test_tally_adds_up_images() -> None:
    made = tally(3.0, 0.5, missing=2, extra=1)
    made.add(
        ImageDifferences(
            num_reference=50,
            pairs=np.zeros((1, 2), dtype=np.int64),
            box_px=np.array([7.0]),
            scores=np.array([0.25]),
            missing=(),
            extra=(),
            flips=((4, 5), (6, 7)),
        )
    )
    values = made.to_dict()
    assert (made.num_reference, made.num_changed) == (150, 5)
    assert made.changed_share == pytest.approx(5 / 150)
    assert (values["num_pairs"], values["num_missing"], values["num_flips"]) == (3, 2, 2)
    assert values["box_px"]["max"] == 7.0
    assert values["box_px"]["mean"] == pytest.approx(10 / 3)
    assert values["score"]["max"] == 0.5


def test_changed_share_counts_boxes_that_came_where_there_was_none() -> None:
    assert tally(num=0).changed_share == 0.0
    assert tally(num=0, extra=3).changed_share == 3.0


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"candidates": tally(0.05, 1e-4)}, ""),  # the tolerances themselves
        (
            {"candidates": tally(0.0501)},
            "a candidate's box differs by 0.0501 px (tolerance 0.05 px)",
        ),
        (
            {"candidates": tally(0, 2e-4)},
            "a candidate's score differs by 0.0002 (tolerance 0.0001)",
        ),
        (
            {"candidates": tally(missing=1)},
            "of 100 candidates 1 are missing, 0 are too many, 0 have another class",
        ),
        ({"candidates": tally(extra=2)}, "of 100 candidates 0 are missing, 2 are too many"),
        ({"candidates": tally(flips=3)}, "0 are too many, 3 have another class"),
        ({"candidates": tally(float("nan"))}, "a candidate's box differs by inf px"),
        # Suppression may choose another of two boxes that are equal but for rounding.
        ({"detections": tally(30.0, 0.2, missing=9)}, ""),
        ({"ap": 0.5, "ap_reference": 0.5005}, ""),
        ({"ap": 0.5, "ap_reference": 0.501}, "AP differs by 0.001 (tolerance 0.0005)"),
        ({"ap": 0.501, "ap_reference": 0.5}, "AP differs by 0.001 (tolerance 0.0005)"),
        ({"candidates": tally(num=0)}, "nothing was compared: the reference found no box in 3"),
        ({"candidates": tally(num=0, extra=1)}, "of 0 candidates 0 are missing, 1 are too many"),
    ],
)
def test_judge_row_holds_fp32_to_every_candidate(values: dict[str, Any], reason: str) -> None:
    reasons = judge_row(make_row("fp32", **values), ParityTolerance())
    assert len(reasons) == bool(reason)
    assert reason in "".join(reasons)


@pytest.mark.parametrize(("precision", "limit"), [("bf16", 0.005), ("fp16", 0.002), ("int8", 0.01)])
def test_judge_row_holds_coarser_types_to_ap_when_there_is_ground_truth(
    precision: CasePrecision, limit: float
) -> None:
    rough = {"candidates": tally(9.0, 0.3, missing=5), "detections": tally(30.0, 0.2)}
    close = make_row(precision, ap=0.5, ap_reference=0.5 + 0.99 * limit, **rough)
    assert judge_row(close, ParityTolerance()) == ()
    (reason,) = judge_row(replace(close, ap_reference=0.5 + 1.01 * limit), ParityTolerance())
    assert reason == f"AP differs by {1.01 * limit:.4g} (tolerance {limit:g})"


@pytest.mark.parametrize(("precision", "share"), [("bf16", 0.03), ("fp16", 0.01), ("int8", 0.1)])
def test_judge_row_holds_coarser_types_to_changed_detections(
    precision: CasePrecision, share: float
) -> None:
    most = round(share * 1000)
    row = make_row(precision, candidates=tally(9.0, 0.3), detections=tally(num=1000, flips=most))
    assert judge_row(row, ParityTolerance()) == ()
    more = replace(row, detections=tally(num=1000, missing=most, extra=1))
    (reason,) = judge_row(more, ParityTolerance())
    assert reason == (f"{(most + 1) / 1000:.1%} of 1000 detections changed (tolerance {share:.1%})")


def test_judge_row_names_every_broken_limit() -> None:
    row = make_row(candidates=tally(1.0, 0.1, missing=1), ap=0.4, ap_reference=0.5)
    assert len(judge_row(row, ParityTolerance())) == 4
    # A good AP on few images excuses no changes.
    row = make_row("int8", detections=tally(missing=60), ap=0.5, ap_reference=0.5)
    assert judge_row(row, ParityTolerance()) == (
        "60.0% of 100 detections changed (tolerance 10.0%)",
    )


def test_judge_row_lets_one_of_few_detections_change() -> None:
    row = make_row("fp16", detections=tally(num=8, missing=1))
    assert judge_row(row, ParityTolerance()) == ()
    assert judge_row(replace(row, detections=tally(num=8, missing=2)), ParityTolerance())


def make_result(rows: list[ParityRow], unrun: tuple[UnrunCase, ...] = ()) -> ParityResult:
    return ParityResult(
        model="m.pth",
        groups=(ParityGroup((64, 96), 12.5, 0.5, tuple(rows)),),
        unrun=unrun,
        notes=("a note",),
        tolerance=ParityTolerance(),
        num_images=3,
        num_errors=1,
        batch=2,
        threads=4,
        machine="a machine",
    )


def test_result_passes_only_when_every_row_does_and_no_runtime_refused() -> None:
    good, bad = make_row(), make_row(reasons=("too far",))
    absent = UnrunCase("m.onnx tensorrt", "no GPU here")
    assert make_result([good], (absent,)).has_passed
    assert not make_result([good, bad]).has_passed
    assert not make_result([good], (replace(absent, is_fault=True),)).has_passed


def test_result_becomes_plain_json() -> None:
    row = make_row(ap=0.49, ap_reference=0.5, latency_ms=5.0, reasons=("too far",))
    result = make_result([row], (UnrunCase("x", "no GPU"),))
    values = json.loads(json.dumps(result.to_dict()))
    assert values["passed"] is False
    assert values["references"] == [{"canvas": [64, 96], "ap": 0.5, "latency_ms": 12.5}]
    assert values["rows"][0]["name"] == "m.onnx runtime"
    assert values["rows"][0]["reasons"] == ["too far"]
    assert values["rows"][0]["candidates"]["num_reference"] == 100
    assert values["not_run"] == [{"name": "x", "reason": "no GPU", "is_fault": False}]
    assert values["tolerance"]["ap"]["int8"] == 0.01
    assert row.ap_difference == pytest.approx(-0.01)
    assert make_row().ap_difference is None
