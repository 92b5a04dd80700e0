"""`demo`: the main job on embedded data: train, export, infer from S3 to S3, evaluate."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retinaray.assembly.evaluation import EvaluateOutcome, run_evaluation
from retinaray.assembly.export import run_export
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import DemoJob, EvaluateJob, ExportJob, InferJob, TrainJob
from retinaray.data.image_decoding import decode_image
from retinaray.demo.embedded_s3 import EmbeddedS3
from retinaray.demo.scenes import make_scene_set
from retinaray.distributed.batch_inference import run_inference
from retinaray.distributed.infer_outcome import InferOutcome
from retinaray.distributed.resources import connect
from retinaray.distributed.train import run_training
from retinaray.errors import DatasetError
from retinaray.reporting.overlays import draw_detections, write_contact_sheet
from retinaray.storage import Storage

logger = logging.getLogger(__name__)

_MARKER = ".retinaray-demo"
_BUCKET = "retinaray-demo"
_SCENE_EPOCHS = 9
_USER_EPOCHS = 10
_GALLERY_SIZE = 9
_GALLERY_SCORE = 0.4


@dataclass(frozen=True)
class Station:
    """One step of the demo: what it did, and how long it took."""

    name: str
    result: str
    seconds: float


@dataclass(frozen=True)
class DemoOutcome:
    """What the demo did.

    Attributes:
        folder: Everything that it made.
        stations: Its steps in order.
        scores: Test scores by path: `openvino_s3`, `torch`.
        gallery: Picture to look at.
        seconds: Wall time in all.
        exit_code: 0.
    """

    folder: str
    stations: tuple[Station, ...]
    scores: dict[str, dict[str, float | None]]
    gallery: str
    seconds: float
    exit_code: int = 0

    def to_json(self) -> str:
        """One line for machines."""
        return json.dumps(asdict(self))

    def to_text(self) -> str:
        """A table for people."""
        width = max(len(station.name) for station in self.stations)
        lines = [f"{'step':<{width}}  {'seconds':>7}  result"]
        lines += [f"{s.name:<{width}}  {s.seconds:>7.1f}  {s.result}" for s in self.stations]
        lines.append(f"{'in all':<{width}}  {self.seconds:>7.1f}")
        lines.append(f"look at {self.gallery} and {self.folder}/model_run/loss.png")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Dataset:
    images: Path
    train: Path
    val: Path
    test: Path
    is_scenes: bool


class _Clock:
    """Collects the stations of a demo."""

    def __init__(self) -> None:
        self.stations: list[Station] = []
        self.start = self._last = time.monotonic()

    def note(self, name: str, result: str) -> None:
        now = time.monotonic()
        self.stations.append(Station(name, result, round(now - self._last, 1)))
        logger.info("%s: %s (%.1f s)", name, result, now - self._last)
        self._last = now


def run_demo(job: DemoJob) -> DemoOutcome:
    """Walk through every command on the demo's own data, or on a user's COCO folder.

    Raises:
        DatasetError: If the user's folder lacks a file, or the output holds something else than a
            demo.
        RetinarayError: Whatever a station raises.
    """
    clock = _Clock()
    folder = _prepare_folder(Path(job.output))
    data = _scenes(folder / "data") if job.data is None else _user_data(Path(job.data))
    clock.note("data", _describe(data))
    with EmbeddedS3(folder / "s3") as server, _environment(server.environment()):
        server.create_bucket(_BUCKET)
        prefix = _upload(data, f"s3://{_BUCKET}/images")
        clock.note("S3 server", f"{prefix} on {server.endpoint_url}, test images uploaded")
        with connect(min_cpus=job.workers):
            _train(job, data, folder, clock)
            _export(data, folder, clock)
            inferred = _infer(job, data, folder, prefix, clock)
        detections = json.loads(Storage().read_bytes(inferred.detections))
    (folder / "detections.json").write_text(json.dumps(detections), encoding="utf-8")
    evaluated = _evaluate(data, folder, clock)
    gallery = _draw_gallery(data, detections, folder)
    clock.note("gallery", str(gallery))
    return DemoOutcome(
        folder=str(folder),
        stations=tuple(clock.stations),
        scores={
            "openvino_s3": dict(inferred.scores.summary) if inferred.scores else {},
            "torch": dict(evaluated.scores.summary),
        },
        gallery=str(gallery),
        seconds=round(time.monotonic() - clock.start, 1),
    )


def _prepare_folder(folder: Path) -> Path:
    """An empty folder; an earlier demo in it is replaced, anything else is left alone."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARKER).exists():
            raise DatasetError(
                f"{folder} is not empty and holds no earlier demo: give another --output"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).touch()
    return folder.resolve()


def _scenes(folder: Path) -> _Dataset:
    made = make_scene_set(folder, num_train=300, num_val=40, num_test=60)
    for path in (made.train, made.val, made.test):
        _merge_classes(path)
    return _Dataset(made.images, made.train, made.val, made.test, is_scenes=True)


def _merge_classes(path: Path) -> None:
    """Make one class of the ten: telling digits apart takes longer than a demo may."""
    content = json.loads(path.read_bytes())
    content["categories"] = [{"id": 1, "name": "digit"}]
    for annotation in content["annotations"]:
        annotation["category_id"] = 1
    path.write_text(json.dumps(content), encoding="utf-8")


def _user_data(folder: Path) -> _Dataset:
    missing = [
        name for name in ("train.json", "val.json", "images") if not (folder / name).exists()
    ]
    if missing:
        raise DatasetError(
            f"{folder}: expected train.json, val.json and images/ (test.json if there is one), "
            f"missing: {', '.join(missing)}"
        )
    test = folder / "test.json"
    if not test.exists() or not json.loads(test.read_bytes()).get("images"):
        test = folder / "val.json"
    return _Dataset(
        folder / "images", folder / "train.json", folder / "val.json", test, is_scenes=False
    )


def _describe(data: _Dataset) -> str:
    counts = []
    for name, path in (("train", data.train), ("val", data.val), ("test", data.test)):
        content = json.loads(path.read_bytes())
        counts.append(f"{len(content['images'])} {name}")
    kind = "handwritten digits of 8-160 px on photographs" if data.is_scenes else str(data.images)
    return f"{kind}: {', '.join(counts)} images"


def _upload(data: _Dataset, prefix: str) -> str:
    storage = Storage()
    for record in json.loads(data.test.read_bytes())["images"]:
        name = record["file_name"]
        storage.write_bytes(f"{prefix}/{name}", (data.images / name).read_bytes())
    return prefix


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for this process and its workers, put back afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _train(job: DemoJob, data: _Dataset, folder: Path, clock: _Clock) -> None:
    settings: dict[str, Any] = {
        "output": str(folder / "model.pth"),
        "model": {"backbone": "ResNet10FPN", "fpn_channels": 64, "head_depth": 2},
        "data": {
            "images": str(data.images),
            "annotations": str(data.train),
            "val_annotations": str(data.val),
            "resize": 320,
            "max_size": 320 if data.is_scenes else 512,
        },
        "run": {"workers": job.workers, "batch": 2 * job.workers, "val_every": 3},
    }
    if data.is_scenes:
        # Digits must not be mirrored, and most of them are small.
        settings["augment"] = {"flip": 0.0, "crop": 0.0}
        settings["anchors"] = {"scales": [2.0, 2.52, 3.17], "ratios": [1.0, 1.6]}
        settings["optim"] = {"peak_lr": 1e-3}
    settings["run"]["epochs"] = job.epochs or (_SCENE_EPOCHS if data.is_scenes else _USER_EPOCHS)
    trained = run_training(load_from_dict(TrainJob, settings))
    score = trained.metrics.get("AP")
    text = (
        "" if score is None else f", validation AP {score:.3f}, AP50 {trained.metrics['AP50']:.3f}"
    )
    clock.note("train", f"{job.workers} workers, {trained.steps} steps{text}")


def _export(data: _Dataset, folder: Path, clock: _Clock) -> None:
    settings = {
        "model": str(folder / "model.pth"),
        "output": str(folder / "model.onnx"),
        "gate": {"images": str(data.images)},
    }
    exported = run_export(load_from_dict(ExportJob, settings))
    parity = f"largest box difference from torch {exported.parity.candidates.box_px.max:.3f} px"
    clock.note("export", f"{exported.num_bytes / 1e6:.1f} MB ONNX, {parity}")


def _infer(job: DemoJob, data: _Dataset, folder: Path, prefix: str, clock: _Clock) -> InferOutcome:
    settings = {
        "model": str(folder / "model.onnx"),
        "images": prefix,
        "annotations": str(data.test),
        "output": f"s3://{_BUCKET}/runs/demo",
        "workers": job.workers,
    }
    inferred = run_inference(load_from_dict(InferJob, settings))
    totals = inferred.totals
    clock.note(
        "infer S3 to S3",
        f"{totals.num_images} images, {totals.num_errors} errors, {totals.num_detections} "
        f"detections, {_format_ap(inferred.scores)}",
    )
    return inferred


def _evaluate(data: _Dataset, folder: Path, clock: _Clock) -> EvaluateOutcome:
    settings = {
        "model": str(folder / "model.pth"),
        "images": str(data.images),
        "annotations": str(data.test),
    }
    evaluated = run_evaluation(load_from_dict(EvaluateJob, settings))
    clock.note("evaluate (torch)", _format_ap(evaluated.scores))
    return evaluated


def _format_ap(scores: Any) -> str:
    if scores is None or scores.summary["AP"] is None:
        return "no ground truth"
    return f"test AP {scores.summary['AP']:.3f}, AP50 {scores.summary['AP50']:.3f}"


def _draw_gallery(data: _Dataset, detections: list[dict[str, Any]], folder: Path) -> Path:
    """Detections on test images: one file each, and one sheet of the first few."""
    truth = json.loads(data.test.read_bytes())
    names = {category["id"]: category["name"] for category in truth["categories"]}
    found, expected = defaultdict(list), defaultdict(list)
    for detection in detections:
        if detection["score"] >= _GALLERY_SCORE:
            found[detection["image_id"]].append(detection)
    for annotation in truth["annotations"]:
        expected[annotation["image_id"]].append(annotation)
    gallery = folder / "gallery"
    gallery.mkdir()
    pictures = []
    for record in truth["images"][:_GALLERY_SIZE]:
        identity = record["id"]
        decoded = decode_image((data.images / record["file_name"]).read_bytes())
        pictures.append(
            draw_detections(decoded.pixels, found[identity], expected[identity], names=names)
        )
    sheet = gallery / "gallery.png"
    write_contact_sheet(pictures, sheet)
    return sheet
