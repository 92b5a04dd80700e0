"""How long the coverage report, the fit and the count of unmatched boxes take.

    python tests/benchmarks/anchors.py [--quick]

Synthetic boxes on photographs of 1920x1080, seven per image, sides from 6 to 300 pixels. "all_ious"
is what the coverage would cost with every anchor's IoU (`box_iou` over `make_anchors`), on a part
of the boxes and scaled to the whole. One thread, as in the command.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

import numpy as np
import torch
from run import Record, make_records, time_rounds
from torchvision.ops import box_iou

from retinaray.anchoring.coverage import (
    CoverageReport,
    best_iou_of,
    count_unmatched,
    measure_coverage,
    select_boxes,
)
from retinaray.anchoring.fitting import AnchorFit, fit_anchors, plan_sizes
from retinaray.data.coco import Category, CategoryTable, CocoDataset, ImageRecord
from retinaray.detector.anchors import AnchorSpec, make_anchors

HEIGHT, WIDTH = 1080, 1920
BOXES_PER_IMAGE = 7
NUM_CLASSES = 5


@dataclass(frozen=True)
class Setting:
    """Size of the measurement.

    Attributes:
        num_boxes: Boxes of the set; a multiple of seven.
        num_boxes_matched: Boxes of the smaller set whose anchors are matched.
        num_boxes_brute: Boxes that are compared with every anchor.
        num_rounds: Rounds that count.
        resize: Short side after resize.
        max_size: Long side at most.
    """

    num_boxes: int
    num_boxes_matched: int
    num_boxes_brute: int
    num_rounds: int
    resize: int = 800
    max_size: int = 1333


def run(quick: bool = False) -> list[Record]:
    """Make the data sets and measure."""
    torch.set_num_threads(1)
    setting = Setting(7_000, 350, 16, 1) if quick else Setting(100_100, 7_000, 140, 3)
    dataset = make_dataset(setting.num_boxes)
    small = make_dataset(setting.num_boxes_matched)
    sizes = plan_sizes(dataset, resize=setting.resize, max_size=setting.max_size)
    canvas = sizes[0].canvas
    boxes = select_boxes(dataset, canvas)
    part = boxes.boxes_xyxy[:: len(boxes) // setting.num_boxes_brute][: setting.num_boxes_brute]

    def compare_with_all() -> np.ndarray:
        anchors = make_anchors(AnchorSpec(), *canvas)
        chunks = torch.from_numpy(part).split(16)
        return torch.cat([box_iou(chunk, anchors).amax(dim=1) for chunk in chunks]).numpy()

    rounds = time_rounds(
        {
            "coverage": lambda: measure_coverage(select_boxes(dataset, canvas), AnchorSpec()),
            "all_ious": compare_with_all,
            "fit": lambda: fit_anchors(dataset, sizes),
            "unmatched": lambda: count_unmatched(small, AnchorSpec(), canvas),
        },
        num_rounds=setting.num_rounds,
    )
    check(rounds.outputs["coverage"], rounds.outputs["fit"], setting)
    exact = best_iou_of(part, AnchorSpec(), canvas)
    np.testing.assert_allclose(exact, rounds.outputs["all_ious"], atol=1e-4)
    assert rounds.outputs["unmatched"] < setting.num_boxes_matched
    factor = setting.num_boxes / setting.num_boxes_brute
    for times in (rounds.wall_s, rounds.cpu_s):
        times["all_ious"] = [factor * seconds for seconds in times["all_ious"]]
    return make_records(
        "anchors",
        rounds,
        unit="s",
        convert=lambda seconds: seconds,
        baselines={"coverage": ["all_ious"]},
        checked="best IoU equals that over all anchors; the fit reaches no less than the default",
        config={**asdict(setting), "canvas": canvas, "input_sizes": len(sizes), "threads": 1},
    )


def make_dataset(num_boxes: int) -> CocoDataset:
    """Boxes at random places, sides evenly spread in their logarithm."""
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(np.log(6), np.log(300), (num_boxes, 2)))
    low = rng.uniform(0, 1, (num_boxes, 2)) * (np.array([WIDTH, HEIGHT]) - sides)
    num_images = num_boxes // BOXES_PER_IMAGE
    return CocoDataset(
        images=tuple(ImageRecord(i, f"{i}.jpg", HEIGHT, WIDTH) for i in range(num_images)),
        categories=CategoryTable(tuple(Category(i + 1, str(i)) for i in range(NUM_CLASSES))),
        boxes_xyxy=np.concatenate([low, low + sides], axis=1).astype(np.float32),
        class_indices=np.arange(num_boxes) % NUM_CLASSES,
        is_crowd=np.zeros(num_boxes, np.bool_),
        area=sides.prod(axis=1).astype(np.float32),
        offsets=np.arange(num_images + 1) * BOXES_PER_IMAGE,
        num_dropped_boxes={},
        source="synthetic",
    )


def check(report: CoverageReport, fit: AnchorFit, setting: Setting) -> None:
    """The report counts every box, and the fit is worth its name."""
    assert report.all.count == setting.num_boxes
    assert fit.default.report.all == report.all
    assert fit.chosen.share_iou_50 >= fit.default.share_iou_50


def main() -> None:
    """Print the records of this case alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="7,000 boxes, one round")
    for record in run(parser.parse_args().quick):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
