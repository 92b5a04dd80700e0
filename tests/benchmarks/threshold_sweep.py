"""Hundreds of detection settings from cached candidates against one pass of the network.

    python tests/benchmarks/threshold_sweep.py [--quick]

ResNet18FPN with random weights over a real validation set, two processor threads:

- torch, openvino: `collect_candidates`, the one pass that the cache costs; files to candidates.
- sweep: `sweep_thresholds` over the default grid, on these candidates.
- replay: one setting of that grid by `apply_setting` and pycocotools, as it would be done without
  the sweep.

Random weights give every image its thousand candidates and, after suppression, more detections
than a trained network does: the sweep is slower here than on a model that is worth tuning.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from run import Record, make_records, skip, time_rounds

from retinaray.artifact import Architecture, ModelCard, dump_weights
from retinaray.data.coco import CategoryTable, load_coco
from retinaray.detector.anchors import AnchorSpec
from retinaray.evaluation.candidates import CandidateSet, DetectionSetting, apply_setting
from retinaray.evaluation.coco_map import CocoScores, evaluate_detections
from retinaray.evaluation.threshold_sweep import (
    SweepGrid,
    SweepRow,
    default_grid,
    sweep_thresholds,
)
from retinaray.export.onnx_graph import ExportSettings, export_onnx
from retinaray.inference.candidate_collection import collect_candidates, make_candidate_settings
from retinaray.inference.pipeline import ImageSource, ReadSettings
from retinaray.inference.predictor import Predictor, PredictorSettings, load_predictor
from retinaray.storage import Storage

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
DATA_SET, SPLIT = "bccd", "val"
THREADS = 2
BATCH = 8
# Initial scores differ so little that bf16 cannot tell them apart.
LOGIT_SPREAD = 100.0


@dataclass(frozen=True)
class Setting:
    """Size of the measurement.

    Attributes:
        side_px: Height and width of the network.
        num_images: Images at most.
        num_rounds: Rounds that count.
        is_whole_grid: All settings of the default grid, or one suppression of it.
    """

    side_px: int
    num_images: int
    num_rounds: int
    is_whole_grid: bool


def run(quick: bool = False) -> list[Record]:
    """Measure passes, sweep and replay; without the data set there is a reason instead."""
    folder = DATA / DATA_SET
    if not folder.is_dir():
        return [skip("threshold_sweep", f"needs the data set in {folder}, which is absent")]
    setting = Setting(128, 8, 1, False) if quick else Setting(512, 1000, 3, True)
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return measure(folder, setting)
    finally:
        torch.set_num_threads(threads)


def measure(folder: Path, setting: Setting) -> list[Record]:
    """All competitors on the images of the split."""
    content = (folder / f"{SPLIT}.json").read_bytes()
    categories = load_coco(content).categories
    truth = take_images(json.loads(content), setting.num_images)
    sources = [
        ImageSource(image["id"], str(folder / "images" / image["file_name"]))
        for image in truth["images"]
    ]
    predictors = load_predictors(categories, setting)
    candidates = collect(predictors["torch"], sources)
    grid = default_grid(len(categories))
    if not setting.is_whole_grid:
        grid = SweepGrid(grid.nms[:1], grid.max_detections, grid.score_thresholds)
    passes = {name: partial(collect, model, sources) for name, model in predictors.items()}
    rounds = time_rounds(
        {
            **passes,
            "sweep": partial(sweep_thresholds, candidates, truth, categories, grid),
            "replay": partial(replay, candidates, truth, categories, grid),
        },
        num_rounds=setting.num_rounds,
    )
    check(rounds.outputs["sweep"].rows, rounds.outputs["replay"], grid)
    for name in passes:
        assert rounds.outputs[name].image_ids == candidates.image_ids
    return make_records(
        f"threshold_sweep/{DATA_SET}",
        rounds,
        unit="s",
        convert=lambda seconds: seconds,
        baselines={"sweep": ["torch", "openvino", "replay"]},
        checked="every image once; AP of one row equals pycocotools on that setting to 1e-12",
        config={
            **asdict(setting),
            "threads": THREADS,
            "batch": BATCH,
            "num_settings": len(grid),
            "num_sources": len(sources),
            "num_candidates": len(candidates.scores),
        },
    )


def take_images(truth: dict[str, Any], count: int) -> dict[str, Any]:
    """The first images of a COCO file with their boxes."""
    images = truth["images"][:count]
    ids = {image["id"] for image in images}
    boxes = [entry for entry in truth["annotations"] if entry["image_id"] in ids]
    return truth | {"images": images, "annotations": boxes}


def load_predictors(categories: CategoryTable, setting: Setting) -> dict[str, Predictor]:
    """A network with random weights that gives raw candidates, in two runtimes."""
    card = ModelCard(
        architecture=Architecture(
            backbone="ResNet18FPN",
            norm="frozen_bn",
            fpn_channels=256,
            head_depth=4,
            stride_in_1x1=False,
        ),
        anchors=AnchorSpec(),
        categories=categories,
        canvas=(setting.side_px, setting.side_px),
        score_thresholds=(0.05,) * len(categories),
    )
    torch.manual_seed(0)
    model = card.build_model().eval()
    with torch.no_grad():
        model.class_head.output.weight.mul_(LOGIT_SPREAD)
        # Untrained scores lie about 0.01, where the cache begins.
        model.class_head.output.bias.add_(2.0)
    files = {
        "torch": (dump_weights(card, model.state_dict()), "m.pth"),
        "openvino": (export_onnx(model, card, ExportSettings(canvas=card.canvas)), "m.onnx"),
    }
    settings = make_candidate_settings(PredictorSettings(batch=BATCH, threads=THREADS))
    return {
        backend: load_predictor(content, uri=uri, backend=backend, settings=settings)[0]
        for backend, (content, uri) in files.items()
    }


def collect(predictor: Predictor, sources: list[ImageSource]) -> CandidateSet:
    """One pass over the images."""
    candidates, failed = collect_candidates(
        predictor,
        sources,
        read=Storage().read_bytes,
        batch=BATCH,
        settings=ReadSettings(threads=THREADS),
    )
    assert not failed, failed[0].error
    return candidates


def replay(
    candidates: CandidateSet, truth: dict[str, Any], categories: CategoryTable, grid: SweepGrid
) -> CocoScores:
    """The first setting of the grid, the long way."""
    nms_kind, nms_iou = grid.nms[0]
    setting = DetectionSetting(
        score_thresholds=(grid.score_thresholds[0],) * len(categories),
        nms_iou=nms_iou,
        nms_kind=nms_kind,
        max_detections=grid.max_detections[0],
    )
    return evaluate_detections(truth, apply_setting(candidates, setting, categories))


def check(rows: tuple[SweepRow, ...], expected: CocoScores, grid: SweepGrid) -> None:
    """One row per setting; the first is what pycocotools says."""
    assert len(rows) == len(grid), (len(rows), len(grid))
    ours, theirs = rows[0].AP, expected.summary["AP"]
    assert ours is not None
    assert theirs is not None
    assert abs(ours - theirs) < 1e-12, (ours, theirs)
    assert rows[0].num_detections == expected.num_detections > 0


def main() -> None:
    """Print the records of this case alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small network, few images")
    for record in run(parser.parse_args().quick):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
