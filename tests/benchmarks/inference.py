"""From files to detections against the engine alone: what reading and decoding cost on top.

    python tests/benchmarks/inference.py [--quick]

ResNet18FPN with random weights, exported on the fly, over real images. Of each data set:

- end_to_end: `detect_images` with OpenVINO, from files to COCO results.
- openvino, onnxruntime, torch: `predict` on canvases that are ready in memory, NMS included.

nms_tail is thresholds and NMS alone, on the network's candidates: "typical" lets 100 of the 1000
candidates of an image pass, "all" lets all pass. Random weights find nothing above the usual
threshold, so the score threshold is set to let 100 pass everywhere.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from run import Record, make_records, skip, time_rounds
from torch import Tensor

from retinaray.artifact import Architecture, ModelCard, dump_weights
from retinaray.data.coco import Category, CategoryTable
from retinaray.detector.anchors import AnchorSpec
from retinaray.export.onnx_graph import ExportSettings, export_onnx
from retinaray.inference.onnxruntime_backend import OnnxRuntimePredictor
from retinaray.inference.pipeline import ImageSource, ReadSettings, detect_images, load_canvas
from retinaray.inference.predictor import (
    Predictor,
    PredictorSettings,
    Suppressor,
    load_predictor,
)
from retinaray.storage import Storage

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
DATA_SETS = {"bccd": "test", "coco128": "val"}
THREADS = 2
BATCH = 8
NUM_PASSING = 100
LOGIT_SPREAD = 100.0
# bf16 moves candidates over the threshold in both directions.
COUNT_TOLERANCE = 0.1

# Exported file and weights file of one network, and its card.
Model = tuple[bytes, bytes, ModelCard]


@dataclass(frozen=True)
class Setting:
    """Size of the measurement.

    Attributes:
        side_px: Height and width of the network.
        num_images: Images per data set and round, a multiple of the batch.
        num_rounds: Rounds that count.
    """

    side_px: int
    num_images: int
    num_rounds: int


def run(quick: bool = False) -> list[Record]:
    """Measure all backends on each data set; without the data sets there is a reason instead."""
    if not DATA.is_dir():
        return [skip("inference", f"needs the real data sets in {DATA}, which is absent")]
    setting = Setting(256, BATCH, 1) if quick else Setting(512, 4 * BATCH, 5)
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        model = make_model(setting)
        records = []
        for name, split in DATA_SETS.items():
            records += measure_images(name, list_images(name, split, setting), model, setting)
        return records
    finally:
        torch.set_num_threads(threads)


def make_model(setting: Setting) -> Model:
    """A network with random weights, in both file formats."""
    card = ModelCard(
        architecture=Architecture(
            backbone="ResNet18FPN",
            norm="frozen_bn",
            fpn_channels=256,
            head_depth=4,
            stride_in_1x1=False,
        ),
        anchors=AnchorSpec(),
        categories=CategoryTable(tuple(Category(id=id_, name=str(id_)) for id_ in (1, 2, 3))),
        canvas=(setting.side_px, setting.side_px),
        score_thresholds=(0.05,) * 3,
    )
    torch.manual_seed(0)
    model = card.build_model().eval()
    with torch.no_grad():
        # Initial scores differ so little that bf16 cannot tell them apart.
        model.class_head.output.weight.mul_(LOGIT_SPREAD)
    exported = export_onnx(model, card, ExportSettings(canvas=card.canvas))
    return exported, dump_weights(card, model.state_dict()), card


def list_images(name: str, split: str, setting: Setting) -> list[ImageSource]:
    """Images spread evenly over a split; small splits come round again."""
    folder = DATA / name
    entries = json.loads((folder / f"{split}.json").read_text("utf-8"))["images"]
    picked = np.linspace(0, len(entries) - 1, setting.num_images).round().astype(int)
    return [
        ImageSource(image_id=number, uri=str(folder / "images" / entries[index]["file_name"]))
        for number, index in enumerate(picked.tolist())
    ]


def measure_images(
    name: str, sources: list[ImageSource], model: Model, setting: Setting
) -> list[Record]:
    """All competitors on one data set, in images per second, and the tail on its candidates."""
    exported, weights, card = model
    read, reading = Storage().read_bytes, ReadSettings(threads=THREADS)
    canvases = [load_canvas(source, card.canvas, read, reading)[0] for source in sources]
    batches = torch.split(torch.from_numpy(np.stack(canvases)).permute(0, 3, 1, 2), BATCH)
    settings = PredictorSettings(batch=BATCH, threads=THREADS)
    candidates = OnnxRuntimePredictor(exported, uri="m.onnx", settings=settings).run(batches[0])
    settings = replace(settings, score_threshold=choose_threshold(candidates[1]))
    predictors = {
        "openvino": load_predictor(exported, uri="m.onnx", backend="openvino", settings=settings)[
            0
        ],
        "onnxruntime": OnnxRuntimePredictor(exported, uri="m.onnx", settings=settings),
        "torch": load_predictor(weights, uri="m.pth", backend="torch", settings=settings)[0],
    }

    def find_end_to_end() -> list[int]:
        openvino = predictors["openvino"]
        found = list(detect_images(openvino, sources, read=read, batch=BATCH, settings=reading))
        assert [result.source for result in found] == sources
        assert not any(result.error for result in found)
        return [len(result.detections) for result in found]

    engines = {
        backend: partial(count_detections, predictor, batches)
        for backend, predictor in predictors.items()
    }
    rounds = time_rounds({"end_to_end": find_end_to_end, **engines}, num_rounds=setting.num_rounds)
    check_counts(rounds.outputs, len(sources))
    config = {**asdict(setting), "threads": THREADS, "batch": BATCH, "data": name}
    config |= {"architecture": asdict(card.architecture), "read": asdict(reading)}
    records = make_records(
        f"inference/{name}",
        rounds,
        unit="images/s",
        convert=lambda seconds: len(sources) / seconds,
        baselines={"end_to_end": ["openvino"], "openvino": ["onnxruntime", "torch"]},
        checked="one result per image, in order, no error; the same number of boxes within 10 %",
        config={**config, "score_threshold": settings.score_threshold},
    )
    return [*records, *measure_tail(name, candidates, card, settings, config, setting)]


def measure_tail(
    name: str,
    candidates: tuple[Tensor, Tensor, Tensor],
    card: ModelCard,
    settings: PredictorSettings,
    config: dict[str, object],
    setting: Setting,
) -> list[Record]:
    """Thresholds and NMS over one batch of candidates, in milliseconds per image."""
    typical = Suppressor(card, settings)
    everything = Suppressor(card, replace(settings, score_threshold=0.0))
    rounds = time_rounds(
        {"typical": lambda: typical(*candidates), "all": lambda: everything(*candidates)},
        num_rounds=10 * setting.num_rounds,
    )
    for found in rounds.outputs.values():
        assert len(found) == BATCH
        assert all(0 < len(item) <= card.max_detections for item in found)
    return make_records(
        f"inference/nms_tail/{name}",
        rounds,
        unit="ms/image",
        convert=lambda seconds: 1000 * seconds / BATCH,
        baselines={},
        checked="1 to max_detections boxes in every image",
        config={**config, "num_candidates": candidates[1].shape[1]},
    )


def choose_threshold(scores: Tensor) -> float:
    """The score that NUM_PASSING candidates of the median image exceed; scores fall in each row."""
    return float(scores[:, NUM_PASSING].median())


def count_detections(predictor: Predictor, batches: Iterable[Tensor]) -> list[int]:
    """Boxes of each image."""
    return [len(found) for batch in batches for found in predictor.predict(batch)]


def check_counts(outputs: dict[str, list[int]], num_images: int) -> None:
    """Every competitor answers for every image; the backends find about as many boxes."""
    for name, counts in outputs.items():
        assert len(counts) == num_images, (name, len(counts), num_images)
    totals = {name: sum(counts) for name, counts in outputs.items()}
    # Of the engine's boxes those that lie in the padding are dropped.
    assert 0 < totals["end_to_end"] <= totals["openvino"], totals
    expected = totals["onnxruntime"]
    for name in ("openvino", "torch"):
        assert abs(totals[name] - expected) <= COUNT_TOLERANCE * expected, totals


def main() -> None:
    """Print the records of this case alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small network, few images")
    for record in run(parser.parse_args().quick):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
