"""Which box of one runtime is which box of another, in one image, and how far they lie apart.

Letters: D boxes of one side, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from retinaray.detector.postprocess import Detections

# Scores may differ by this much for rounding alone, so that a box this close to its threshold may
# fall on either side of it.
SCORE_MARGIN = 0.02
_SAME_BOX_IOU = 0.5


@dataclass(frozen=True, eq=False)
class ImageDifferences:
    """How one image's boxes differ; all numbers are places in the two lists that were compared.

    Attributes:
        num_reference: Boxes of the reference above their threshold, which the candidate should
            have.
        pairs: [P, 2] of one class: such a box of the reference, and its partner.
        box_px: [P] largest corner difference.
        scores: [P] difference of score.
        missing: Clear boxes of the reference that the candidate lacks.
        extra: Clear boxes of the candidate that the reference lacks.
        flips: Clear boxes of the reference, and the candidate's box of another class in that place.
    """

    num_reference: int
    pairs: Int[np.ndarray, "P 2"]
    box_px: Float[np.ndarray, " P"]
    scores: Float[np.ndarray, " P"]
    missing: tuple[int, ...]
    extra: tuple[int, ...]
    flips: tuple[tuple[int, int], ...]

    @property
    def num_changed(self) -> int:
        """Boxes that came, went or changed their class."""
        return len(self.missing) + len(self.extra) + len(self.flips)

    @property
    def shifts(self) -> Float[np.ndarray, " P"]:
        """[P] how much a pair would strike an eye: pixels, or score in steps of the margin."""
        shifts: Float[np.ndarray, " P"] = np.maximum(self.box_px, self.scores / SCORE_MARGIN)
        return shifts


def match_detections(
    reference: Detections,
    candidate: Detections,
    *,
    score_thresholds: Float[Tensor, " K"],
    margin: float = SCORE_MARGIN,
    reference_cap: int | None = None,
    candidate_cap: int | None = None,
) -> ImageDifferences:
    """Pair the boxes of two runtimes, one to one, and name those that only one of them has.

    Of all pairs of one class that overlap by half, the one with the largest IoU less its difference
    of score is taken first: boxes in one place, as clipped ones are, are told apart by score. Boxes
    down to half their threshold may be partners, and a box counts as missing or extra only when
    it is clear of its threshold, so that rounding at a threshold raises no alarm.

    Args:
        reference: Defines what is right; may be empty.
        candidate: Is compared with it; may be empty.
        score_thresholds: Per class.
        margin: A box is clear when it scores this much above its threshold.
        reference_cap: A reference of so many boxes may have been cut: of the candidate only boxes
            that score clearly more than its last one are looked for in it. None: never cut.
        candidate_cap: The same for the candidate, and for the boxes of the reference.

    Returns:
        Pairs, differences, and boxes without a partner.
    """
    kept = [
        torch.nonzero(side.scores > score_thresholds[side.labels] / 2)[:, 0]
        for side in (reference, candidate)
    ]
    rows, columns = _pair(reference, candidate, *kept)
    limits = [score_thresholds[side.labels] for side in (reference, candidate)]
    reaches = [
        side.scores > _find_cut(other, cap, margin)
        for side, other, cap in (
            (reference, candidate, candidate_cap),
            (candidate, reference, reference_cap),
        )
    ]
    missing = _list_single((reference.scores > limits[0] + margin) & reaches[0], rows)
    extra = _list_single((candidate.scores > limits[1] + margin) & reaches[1], columns)
    flips = _find_flips(reference, candidate, missing, extra)
    is_judged = (reference.scores > limits[0]) & reaches[0]
    rows, columns = rows[is_judged[rows]], columns[is_judged[rows]]
    moved = (reference.boxes_xyxy[rows] - candidate.boxes_xyxy[columns]).abs()
    return ImageDifferences(
        num_reference=int(is_judged.sum()),
        pairs=torch.stack([rows, columns], dim=1).numpy(),
        box_px=moved.amax(dim=1).numpy() if len(rows) else np.zeros(0, dtype=np.float32),
        scores=(reference.scores[rows] - candidate.scores[columns]).abs().numpy(),
        missing=tuple(place for place in missing if place not in {one for one, _ in flips}),
        extra=tuple(place for place in extra if place not in {other for _, other in flips}),
        flips=flips,
    )


def measure_iou(
    boxes_xyxy: Float[Tensor, "D 4"], others_xyxy: Float[Tensor, "E 4"]
) -> Float[Tensor, "D E"]:
    """Intersection over union of each box with each other one, in [0, 1]; 0 for two empty boxes."""
    corner = torch.maximum(boxes_xyxy[:, None, :2], others_xyxy[None, :, :2])
    opposite = torch.minimum(boxes_xyxy[:, None, 2:], others_xyxy[None, :, 2:])
    common = (opposite - corner).clamp(min=0).prod(dim=2)
    areas, other_areas = (
        (side[:, 2:] - side[:, :2]).clamp(min=0).prod(dim=1) for side in (boxes_xyxy, others_xyxy)
    )
    return common / (areas[:, None] + other_areas - common).clamp(min=1e-12)


def _pair(
    reference: Detections, candidate: Detections, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Places of the partners in the whole lists, best pair first."""
    overlaps = measure_iou(reference.boxes_xyxy[rows], candidate.boxes_xyxy[columns])
    overlaps[reference.labels[rows][:, None] != candidate.labels[columns]] = 0
    gains = overlaps - (reference.scores[rows][:, None] - candidate.scores[columns]).abs()
    taken = _take_best(gains, overlaps >= _SAME_BOX_IOU)
    return rows[taken[:, 0]], columns[taken[:, 1]]


def _take_best(gains: Float[Tensor, "D E"], allowed: Tensor) -> Int[Tensor, "P 2"]:
    """Greedy one-to-one choice: the best pair, the best of what it leaves, and so on."""
    places = torch.nonzero(allowed)
    order = gains[allowed].argsort(descending=True, stable=True)
    seen_rows: set[int] = set()
    seen_columns: set[int] = set()
    taken = []
    for row, column in places[order].tolist():
        if row not in seen_rows and column not in seen_columns:
            seen_rows.add(row)
            seen_columns.add(column)
            taken.append((row, column))
    return torch.tensor(taken, dtype=torch.int64).reshape(-1, 2)


def _find_cut(side: Detections, cap: int | None, margin: float) -> float:
    """Score that a box of the other side must exceed to be looked for in a list that was cut."""
    is_cut = cap is not None and 0 < cap <= len(side)
    return float(side.scores.min()) + margin if is_cut else -1.0


def _list_single(is_clear: Tensor, paired: Tensor) -> list[int]:
    is_single = is_clear.clone()
    is_single[paired] = False
    return [int(place) for place in is_single.nonzero()[:, 0]]


def _find_flips(
    reference: Detections, candidate: Detections, missing: list[int], extra: list[int]
) -> tuple[tuple[int, int], ...]:
    overlaps = measure_iou(reference.boxes_xyxy[missing], candidate.boxes_xyxy[extra])
    taken = _take_best(overlaps, overlaps >= _SAME_BOX_IOU)
    return tuple((missing[row], extra[column]) for row, column in taken.tolist())
