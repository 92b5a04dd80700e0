"""The trained detector as one file, and the card that travels with it into every exported form.

A weights file holds tensors and JSON text only; loading it executes no code.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retinaray.data.coco import CategoryTable
from retinaray.detector.anchors import AnchorSpec
from retinaray.detector.postprocess import NMS_KINDS, NmsKind
from retinaray.errors import CheckpointError, DatasetError

if TYPE_CHECKING:
    from retinaray.detector.retinanet import RetinaNet

WEIGHTS_FORMAT = "retinaray-weights-1"
_ODTK_KEYS = frozenset({"backbone", "classes", "state_dict"})
METADATA_PREFIX = "retinaray."
PREPROCESSING = (
    "RGB 0..255; EXIF applied; fit to canvas keeping aspect, floored; antialiased bilinear; "
    "top-left on black; normalisation inside the graph"
)


@dataclass(frozen=True)
class Architecture:
    """What is needed to build the network before its weights are loaded; see `RetinaNet`.

    Older files lack `has_head_norm` and mean False.
    """

    backbone: str
    norm: str
    fpn_channels: int
    head_depth: int
    stride_in_1x1: bool
    has_head_norm: bool = False

    def build_model(self, anchors: AnchorSpec, num_classes: int) -> RetinaNet:
        """Such a network with fresh weights."""
        # Its backbone imports torchvision, which takes seconds; exported files do without.
        from retinaray.detector.retinanet import RetinaNet

        return RetinaNet(
            backbone=self.backbone,
            num_classes=num_classes,
            anchors=anchors,
            norm=self.norm,  # type: ignore[arg-type]
            fpn_channels=self.fpn_channels,
            head_depth=self.head_depth,
            stride_in_1x1=self.stride_in_1x1,
            has_head_norm=self.has_head_norm,
        )


@dataclass(frozen=True)
class ModelCard:
    """Everything about a model except its weights.

    Attributes:
        architecture: How to build the network.
        anchors: Anchor specification.
        categories: Class index to COCO category.
        canvas: Network height and width in pixels that it was trained for.
        score_thresholds: Lowest score per class, K values in [0, 1).
        nms_iou: IoU above which the worse of two boxes that compete goes.
        run_id: Training run that made it.
        versions: Package versions and git commit at training time.
        training: Resolved settings of the training, as plain values.
        preprocessing: How pixels reach the network, in words.
        nms_kind: Which boxes compete; see `suppress_overlaps`. Older files, which lack it, mean
            `class`.
        max_detections: Detections per image at most; older files, which lack it, mean 100.
    """

    architecture: Architecture
    anchors: AnchorSpec
    categories: CategoryTable
    canvas: tuple[int, int]
    score_thresholds: tuple[float, ...]
    nms_iou: float = 0.5
    run_id: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: str = PREPROCESSING
    nms_kind: NmsKind = "class"
    max_detections: int = 100

    def build_model(self) -> RetinaNet:
        """A network of this architecture with fresh weights."""
        return self.architecture.build_model(self.anchors, len(self.categories))

    def to_metadata(self) -> dict[str, str]:
        """Keys and JSON texts for an ONNX file's metadata_props or a weights file."""
        values: dict[str, Any] = {
            "architecture": vars(self.architecture),
            "anchors": self.anchors.to_dict(),
            "categories": self.categories.to_json(),
            "canvas": list(self.canvas),
            "score_thresholds": list(self.score_thresholds),
            "nms_iou": self.nms_iou,
            "run_id": self.run_id,
            "versions": dict(self.versions),
            "training": dict(self.training),
            "preprocessing": self.preprocessing,
            "nms_kind": self.nms_kind,
            "max_detections": self.max_detections,
        }
        return {METADATA_PREFIX + key: json.dumps(value) for key, value in values.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], *, source: str) -> ModelCard:
        """Read a card back.

        Args:
            metadata: As `to_metadata` gives it; other keys are left alone.
            source: File name for messages.

        Raises:
            CheckpointError: If keys are missing or their values cannot be understood.
        """
        missing = [key for key in _CARD_KEYS if METADATA_PREFIX + key not in metadata]
        if missing:
            raise CheckpointError(
                f"{source}: expected a file written by retinaray, but its metadata lack "
                f"{', '.join(METADATA_PREFIX + key for key in missing)}; export it again with "
                "`retinaray export`"
            )
        try:
            values = {
                key: json.loads(metadata[METADATA_PREFIX + key])
                for key in (*_CARD_KEYS, *_NEWER_KEYS)
                if METADATA_PREFIX + key in metadata
            }
            card = cls(
                architecture=Architecture(**values["architecture"]),
                anchors=AnchorSpec.from_dict(values["anchors"]),
                categories=CategoryTable.from_json(values["categories"]),
                canvas=(int(values["canvas"][0]), int(values["canvas"][1])),
                score_thresholds=tuple(float(value) for value in values["score_thresholds"]),
                nms_iou=float(values["nms_iou"]),
                run_id=str(values["run_id"]),
                versions=values["versions"],
                training=values["training"],
                preprocessing=str(values["preprocessing"]),
                nms_kind=values.get("nms_kind", cls.nms_kind),
                max_detections=int(values.get("max_detections", cls.max_detections)),
            )
        except _DAMAGE as error:
            raise CheckpointError(
                f"{source}: its retinaray metadata are damaged: {type(error).__name__}: {error}"
            ) from error
        _check_card(card, source)
        return card


_CARD_KEYS = (
    "architecture",
    "anchors",
    "categories",
    "canvas",
    "score_thresholds",
    "nms_iou",
    "run_id",
    "versions",
    "training",
    "preprocessing",
)
# Files that were written before these existed are read with their defaults.
_NEWER_KEYS = ("nms_kind", "max_detections")
# What values of a wrong type or range raise where they are used.
_DAMAGE = (ValueError, TypeError, KeyError, IndexError, AttributeError, DatasetError)


def _check_card(card: ModelCard, source: str) -> None:
    if len(card.score_thresholds) != len(card.categories):
        raise CheckpointError(
            f"{source}: {len(card.score_thresholds)} score thresholds for "
            f"{len(card.categories)} categories in its metadata"
        )
    if card.nms_kind not in NMS_KINDS or card.max_detections < 1:
        raise CheckpointError(
            f"{source}: its metadata have nms_kind={card.nms_kind!r} and "
            f"max_detections={card.max_detections}, expected one of {', '.join(NMS_KINDS)} and at "
            "least 1: it may come from a newer version of retinaray"
        )


def dump_weights(card: ModelCard, state: Mapping[str, Tensor]) -> bytes:
    """A weights file's content.

    Args:
        card: What the weights are.
        state: The network's state dict, on any device.
    """
    buffer = io.BytesIO()
    torch.save(
        {
            "format": WEIGHTS_FORMAT,
            "card": card.to_metadata(),
            "state": {key: value.detach().cpu() for key, value in state.items()},
        },
        buffer,
    )
    return buffer.getvalue()


def read_weights(content: bytes, *, source: str) -> tuple[ModelCard, RetinaNet]:
    """The card and the network of a weights file.

    Args:
        content: The file.
        source: Its name, for messages.

    Returns:
        The card, and the network in evaluation mode on the CPU.

    Raises:
        CheckpointError: If the file is truncated, not one of ours, or its tensors do not fit its
            card.
    """
    values = load_tensors(content, source=source)
    if values.keys() >= _ODTK_KEYS:
        raise CheckpointError(
            f"{source}: is a checkpoint of ODTK's; make a weights file of it first: "
            f"retinaray import-odtk {source} imported.pth"
        )
    if values.get("format") != WEIGHTS_FORMAT:
        raise CheckpointError(
            f"{source}: expected a retinaray weights file (format {WEIGHTS_FORMAT!r}), "
            f"found format {values.get('format')!r}; give the model.pth that `retinaray train` "
            "wrote"
        )
    if not isinstance(values.get("card"), dict) or not isinstance(values.get("state"), dict):
        raise CheckpointError(f"{source}: is damaged: it lacks its card or its tensors")
    card = ModelCard.from_metadata(values["card"], source=source)
    try:
        model = card.build_model()
        model.load_state_dict(values["state"])
    except (RuntimeError, *_DAMAGE) as error:
        raise CheckpointError(f"{source}: its tensors do not fit its own card: {error}") from error
    return card, model.eval()


def load_tensors(content: bytes, *, source: str) -> dict[str, Any]:
    """Read a dictionary of tensors and plain values without executing code.

    Raises:
        CheckpointError: If it is truncated, not a torch file, or would need code to load.
    """
    try:
        _check_sums(content)
        values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # torch.load reports damage through whatever its zip and pickle layers happen to raise.
    except Exception as error:
        summary = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{source}: not a readable weights file ({len(content)} bytes): {summary}; "
            "it may be truncated, or hold more than tensors"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{source}: expected a dictionary, found {type(values).__name__}")
    return values


def _check_sums(content: bytes) -> None:
    """Hold a zip's members to their checksums: torch writes them, and does not read them."""
    stream = io.BytesIO(content)
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")


def hash_content(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def model_kind(uri: str) -> str:
    """What a model file is by its name: `weights`, `onnx`, or `plan` for a TensorRT engine.

    Raises:
        CheckpointError: If it has another ending.
    """
    suffix = Path(uri).suffix.lower()
    kinds = {".pth": "weights", ".onnx": "onnx", ".plan": "plan", ".engine": "plan"}
    if suffix not in kinds:
        raise CheckpointError(
            f"{uri}: expected a model file that ends in {', '.join(kinds)}, found "
            f"{suffix or 'no ending'}"
        )
    return kinds[suffix]
