"""The bundle's settings, read as DeepStream reads them, give the boxes that our predictor gives.

nvinfer is emulated from its documents and source (9.1): the scaling of a frame, cluster-mode 2, the
way back to the frame. The network runs in ONNX Runtime; the parser is the bundle's own, compiled.
"""

from __future__ import annotations

import configparser
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch.nn import functional

from retinaray.artifact import ModelCard
from retinaray.data.augmentation import AugmentSettings
from retinaray.data.batching import TrainingDataset, collate_samples
from retinaray.data.coco import load_coco
from retinaray.data.transforms import fit_size
from retinaray.detector.anchors import AnchorSpec
from retinaray.detector.retinanet import RetinaNet
from retinaray.evaluation.coco_map import evaluate_detections
from retinaray.evaluation.kitti_dump import read_kitti_dump
from retinaray.export.edge_bundle.deepstream_files import DeepStreamSetting, write_deepstream_files
from retinaray.export.onnx_graph import ExportSettings, export_onnx
from retinaray.inference.onnxruntime_backend import OnnxRuntimePredictor
from retinaray.inference.pipeline import (
    ImageSource,
    ReadSettings,
    detect_images,
    load_canvas,
)
from retinaray.inference.predictor import PredictorSettings
from retinaray.training.step import LossSettings, compute_loss_sums

CANVAS = (72, 96)
NUM_CANDIDATES = 300
SCALINGS = ("nearest", "bilinear", "area", "antialiased")

Pixels = np.ndarray
Row = list[float]


@dataclass(frozen=True)
class Placed:
    """A frame on the network's canvas, and the scale that leads back."""

    canvas: Pixels
    ratio_x: float
    ratio_y: float


class EmulatedDeepStream:
    """nvinfer with one settings file.

    Args:
        config: Content of config_infer_primary.txt.
        onnx: The network.
        parser: The compiled parser.
        make_layers: Fixture of that name.
        scaling: How pixels are scaled: `bilinear` is scaling-filter=1, `nearest` nvinfer's default,
            `area` the nearest to 3 on a GPU; `antialiased` is retinaray's own.
    """

    def __init__(
        self, config: str, onnx: bytes, parser: Any, make_layers: Any, scaling: str
    ) -> None:
        self._config = configparser.ConfigParser(interpolation=None)
        self._config.optionxform = str  # type: ignore[assignment]
        self._config.read_string(config)
        self.properties = self._config["property"]
        self._onnx = onnx
        self._parser, self._make_layers, self._scaling = parser, make_layers, scaling
        _, self._height, self._width = map(int, self.properties["infer-dims"].split(";"))

    @functools.cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(self._onnx, options)

    def detect(self, frame: Pixels, placed: Placed | None = None) -> list[tuple[int, Row]]:
        """Class and left, top, width, height, score of each object, in pixels of the frame."""
        placed = self.place(frame) if placed is None else placed
        tensor = self._normalise(placed.canvas)
        names = self.properties["output-blob-names"].split(";")
        outputs = [output[0] for output in self._session.run(names, {"images": tensor})]
        groups = self._class_groups()
        objects = self._parser.parse(
            self._make_layers(*outputs),
            network=(self._height, self._width),
            thresholds=[group.getfloat("pre-cluster-threshold") for group in groups],
        )
        assert objects is not None
        kept: list[tuple[int, Row]] = []
        for index, group in enumerate(groups):
            rows = [row[1:6] for row in objects if row[0] == index]
            kept += [(index, row) for row in self._cluster(rows, group)]
        height, width = frame.shape[:2]
        back = [(index, self._to_frame(row, placed, height, width)) for index, row in kept]
        return [(index, row) for index, row in back if row]

    def place(self, frame: Pixels) -> Placed:
        """`get_converted_buffer`: even source sizes, sizes cut to whole pixels, black beside."""
        assert self.properties["maintain-aspect-ratio"] == "1"
        assert self.properties["symmetric-padding"] == "0"
        height, width = (side - side % 2 for side in frame.shape[:2])
        fitting_height = self._width * height / width
        if fitting_height <= self._height:
            dest = int(fitting_height), self._width
        else:
            dest = self._height, int(self._height * width / height)
        canvas = np.zeros((self._height, self._width, 3), np.uint8)
        canvas[: dest[0], : dest[1]] = scale_pixels(frame[:height, :width], dest, self._scaling)
        return Placed(canvas, dest[1] / width, dest[0] / height)

    def _normalise(self, canvas: Pixels) -> Pixels:
        assert self.properties["model-color-format"] == "0"  # RGB
        assert "offsets" not in self.properties
        factor = np.float32(self.properties["net-scale-factor"])
        return factor * canvas.astype(np.float32).transpose(2, 0, 1)[None]

    def _class_groups(self) -> list[configparser.SectionProxy]:
        names = [f"class-attrs-{k}" for k in range(int(self.properties["num-detected-classes"]))]
        return [self._config[name] for name in names]

    def _cluster(self, rows: list[Row], group: configparser.SectionProxy) -> list[Row]:
        """`preClusteringThreshold`, `clusterAndFillDetectionOutputNMS`, `filterTopKOutputs`."""
        assert self.properties["cluster-mode"] == "2"
        lowest = np.float32(group["pre-cluster-threshold"])
        limit = np.float32(group["nms-iou-threshold"])
        rows = sorted((row for row in rows if row[4] >= lowest), key=lambda row: -row[4])
        kept: list[Row] = []
        for row in rows:
            if all(float_iou(row, other) <= limit for other in kept):
                kept.append(row)
        return kept[: int(group["topk"])]

    def _to_frame(self, row: Row, placed: Placed, height: int, width: int) -> Row:
        """`attach_metadata_detector`, in its single precision; empty where it drops the object."""
        left, box_width = np.float32(row[0] / placed.ratio_x), np.float32(row[2] / placed.ratio_x)
        top, box_height = np.float32(row[1] / placed.ratio_y), np.float32(row[3] / placed.ratio_y)
        if self.properties.get("crop-objects-to-roi-boundary") == "1":
            if left + box_width >= width:
                box_width = np.float32(width) - left
            if top + box_height > height:
                box_height = np.float32(height) - top
        elif top + box_height > height:
            return []
        return [float(value) for value in (left, top, box_width, box_height, row[4])]


def scale_pixels(pixels: Pixels, size: tuple[int, int], scaling: str) -> Pixels:
    """Pixels of another size, as each of the filters makes them."""
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float()
    if scaling == "nearest":
        scaled = functional.interpolate(image, size, mode="nearest-exact")
    elif scaling == "area":
        scaled = functional.interpolate(image, size, mode="area")
    else:
        smooth = scaling == "antialiased"
        scaled = functional.interpolate(image, size, mode="bilinear", antialias=smooth)
    return scaled[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()


def float_iou(row: Row, other: Row) -> np.float32:
    """`computeIoU` in single precision."""
    a, b = np.float32(row[:4]), np.float32(other[:4])
    sides = np.maximum(0, np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2]))
    overlap = sides[0] * sides[1]
    union = a[2] * a[3] + b[2] * b[3] - overlap
    return np.float32(0) if union == 0 else np.float32(overlap / union)


def write_kitti(found: Sequence[tuple[int, Row]], labels: Sequence[str]) -> bytes:
    """`write_kitti_output` of deepstream-app."""
    lines = [
        f"{labels[index]} 0.0 0 0.0 {row[0]:f} {row[1]:f} {row[0] + row[2]:f} {row[1] + row[3]:f} "
        f"0.0 0.0 0.0 0.0 0.0 0.0 0.0 {row[4]:f}\n"
        for index, row in found
    ]
    return "".join(lines).encode()


def make_config(card: ModelCard) -> tuple[str, list[str]]:
    """The bundle's settings for nvinfer, and its labels."""
    setting = DeepStreamSetting(
        target="jetpack6",
        version="7.1",
        precision="fp32",
        is_strongly_typed=True,
        engine_name="model.engine",
        onnx_name="model.onnx",
        batch=(1, 1),
        frame=(1080, 1920),
    )
    files = write_deepstream_files(card, setting)
    return files["config_infer_primary.txt"].decode(), files["labels.txt"].decode().splitlines()


@dataclass(frozen=True)
class Trained:
    """A network that finds something in some photographs, exported for DeepStream."""

    onnx: bytes
    card: ModelCard
    coco: dict[str, Any]
    folder: Path

    def sources(self) -> list[ImageSource]:
        return [
            ImageSource(i["id"], str(self.folder / i["file_name"])) for i in self.coco["images"]
        ]

    def detect(self) -> list[dict[str, object]]:
        """What our own predictor finds."""
        predictor = OnnxRuntimePredictor(
            self.onnx, uri="model.onnx", settings=PredictorSettings(batch=1)
        )
        results = detect_images(
            predictor,
            self.sources(),
            read=lambda uri: Path(uri).read_bytes(),
            batch=1,
            settings=ReadSettings(threads=1),
        )
        return [row for result in results for row in result.coco_results]


def learn(card: ModelCard, dataset: TrainingDataset, *, steps: int) -> RetinaNet:
    """A network that has seen one batch of images `steps` times."""
    torch.manual_seed(0)
    model = card.build_model().train()
    batch = collate_samples([dataset[0, index] for index in range(len(dataset))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(steps):
        logits, deltas = model(batch.images)
        sums = compute_loss_sums(
            logits, deltas, model.anchors_for(batch.images), batch, LossSettings()
        )
        optimizer.zero_grad()
        ((sums.class_sum + sums.box_sum) / sums.num_foreground).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained(shared_data: Path, make_tiny_card: Callable[..., ModelCard]) -> Trained:
    """Three photographs learnt by heart."""
    root = shared_data / "bccd"
    coco = json.loads((root / "test.json").read_bytes())
    images = sorted(coco["images"], key=lambda image: image["file_name"])[:3]
    ids = {image["id"] for image in images}
    boxes = [entry for entry in coco["annotations"] if entry["image_id"] in ids]
    coco = coco | {"images": images, "annotations": boxes}
    loaded = load_coco(json.dumps(coco).encode(), source="test.json")
    dataset = TrainingDataset(
        dataset=loaded,
        images_root=str(root / "images"),
        read=lambda uri: Path(uri).read_bytes(),
        canvas=CANVAS,
        augment=AugmentSettings(),
        seed=0,
        max_pixels=10**7,
        allow_truncated=False,
    )
    anchors = AnchorSpec(scales=(1.5, 2.4), ratios=(1.0,))
    card = replace(
        make_tiny_card(head_depth=0, canvas=CANVAS, anchors=anchors),
        categories=loaded.categories,
        score_thresholds=(0.05, 0.1, 0.02),
        # As many as candidates: DeepStream's limit is one per class, ours one per image.
        max_detections=NUM_CANDIDATES,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = learn(card, dataset, steps=50)
    torch.set_num_threads(threads)
    settings = ExportSettings(canvas=CANVAS, input_type="float32", top_k=NUM_CANDIDATES)
    return Trained(export_onnx(model, card, settings), card, coco, root / "images")


def emulate(
    trained: Trained, parser: Any, make_layers: Any, scaling: str, *, same_pixels: bool = False
) -> list[dict[str, object]]:
    """The images as frames of a device, up to the KITTI dump and back.

    `same_pixels` gives it the canvases of our own reader in place of scaled frames.
    """
    config, labels = make_config(trained.card)
    device = EmulatedDeepStream(config, trained.onnx, parser, make_layers, scaling)
    dump = {}
    for number, source in enumerate(trained.sources()):
        with Image.open(source.uri) as image:
            frame = np.asarray(image.convert("RGB"))
        placed = None
        if same_pixels:
            canvas, placement = load_canvas(
                source, trained.card.canvas, lambda uri: Path(uri).read_bytes(), ReadSettings()
            )
            placed = Placed(
                canvas,
                placement.content_width / placement.width,
                placement.content_height / placement.height,
            )
        dump[f"00_000_{number:06d}.txt"] = write_kitti(device.detect(frame, placed), labels)
    return read_kitti_dump(dump, trained.card.categories, trained.coco["images"])


def score(trained: Trained, detections: list[dict[str, object]]) -> float:
    found = evaluate_detections(trained.coco, detections).summary["AP"]
    assert found is not None
    return found


def test_deepstream_finds_the_same_boxes_in_the_same_pixels(
    trained: Trained, parser: Any, make_layers: Any
) -> None:
    ours = trained.detect()
    theirs = emulate(trained, parser, make_layers, "antialiased", same_pixels=True)
    assert len(ours) > 100
    assert len(theirs) == len(ours)
    keys = [
        sorted(rows, key=lambda row: (row["image_id"], -row["score"], row["bbox"]))  # type: ignore[operator]
        for rows in (ours, theirs)
    ]
    for mine, other in zip(*keys, strict=True):
        assert (mine["image_id"], mine["category_id"]) == (other["image_id"], other["category_id"])
        assert mine["score"] == pytest.approx(other["score"], abs=2e-6)
        assert mine["bbox"] == pytest.approx(other["bbox"], abs=0.02)
    assert score(trained, theirs) == pytest.approx(score(trained, ours), abs=1e-4)


def test_deepstream_scores_the_same_when_it_scales_smoothly(
    trained: Trained, parser: Any, make_layers: Any
) -> None:
    ours = score(trained, trained.detect())
    theirs = score(trained, emulate(trained, parser, make_layers, "antialiased"))
    assert ours > 0.2
    assert theirs == pytest.approx(ours, abs=0.002)


def test_deepstream_would_drop_boxes_at_the_lower_edge_without_the_setting(
    trained: Trained, parser: Any, make_layers: Any
) -> None:
    config, _ = make_config(trained.card)
    key = "crop-objects-to-roi-boundary=1"
    assert config.count(key) == 1
    counts = []
    for text in (config, config.replace(key, "")):
        device = EmulatedDeepStream(text, trained.onnx, parser, make_layers, "bilinear")
        # Wider than the canvas, so that boxes reach into the black below them.
        frames = [np.asarray(Image.open(source.uri))[:250] for source in trained.sources()]
        counts.append(sum(len(device.detect(frame)) for frame in frames))
    assert 0 < counts[1] < counts[0]


@pytest.mark.parametrize("seed", range(4))
def test_deepstream_places_frames_where_we_place_images(tiny_card: ModelCard, seed: int) -> None:
    rng = np.random.default_rng(seed)
    config, _ = make_config(tiny_card)
    device = EmulatedDeepStream(config, b"", None, None, "nearest")
    for height, width in rng.integers(10, 300, (60, 2)) * 2:
        frame = np.full((height, width, 3), 255, np.uint8)
        placed = device.place(frame)
        content_height, content_width = fit_size(height, width, *tiny_card.canvas)
        expected = np.zeros((*tiny_card.canvas, 3), np.uint8)
        expected[:content_height, :content_width] = 255
        np.testing.assert_array_equal(placed.canvas, expected)
        assert placed.ratio_x == content_width / width
        assert placed.ratio_y == content_height / height
