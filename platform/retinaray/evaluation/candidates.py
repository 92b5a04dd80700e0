"""What a network proposes before any threshold that one may want to change, kept for replay.

One pass of the network gives a `CandidateSet`; every score threshold above its floor, every NMS and
every cap on detections is then a replay on the processor, by the very functions that fresh
inference uses. Knows no model and no file. N images, D candidates of all images together, K
classes; boxes are in network pixels.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from retinaray.data.coco import CategoryTable
from retinaray.data.coco_results import coco_results
from retinaray.data.transforms import Placement
from retinaray.detector.postprocess import Detections, NmsKind, suppress_overlaps
from retinaray.errors import CheckpointError

DEFAULT_FLOOR = 0.01
_FORMAT = "retinaray-candidates-1"
_DAMAGE = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OSError,
    EOFError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class DetectionSetting:
    """Everything between a network's candidates and its detections; see `suppress_overlaps`.

    Attributes:
        score_thresholds: K values: a candidate must score above its class's.
        nms_iou: IoU above which the worse of two boxes that compete goes.
        nms_kind: Which boxes compete.
        max_detections: Detections per image at most.
    """

    score_thresholds: tuple[float, ...]
    nms_iou: float = 0.5
    nms_kind: NmsKind = "class"
    max_detections: int = 100


@dataclass(frozen=True, eq=False)
class CandidateSet:
    """Candidates of many images, grouped by image and by falling score in each.

    Attributes:
        image_ids: N different ids, as the ground truth has them.
        placements: N places on the canvas.
        boxes_xyxy: float32 [D, 4].
        scores: float32 [D], each above `floor`.
        labels: int64 [D], class indices of the model.
        offsets: int64 [N + 1]; image i owns rows `offsets[i]` to `offsets[i + 1]`.
        floor: Candidates at or below this score were not kept: no lower threshold can be replayed.
    """

    image_ids: tuple[int | str, ...]
    placements: tuple[Placement, ...]
    boxes_xyxy: Float[np.ndarray, "D 4"]
    scores: Float[np.ndarray, " D"]
    labels: Int[np.ndarray, " D"]
    offsets: Int[np.ndarray, " N+1"]
    floor: float = DEFAULT_FLOOR

    def __post_init__(self) -> None:
        fault = _find_fault(self)
        if fault:
            raise ValueError(f"candidates: {fault}")

    def __len__(self) -> int:
        return len(self.image_ids)

    def detections(self, position: int) -> Detections:
        """Candidates of `image_ids[position]`, a view; empty where nothing passed the floor."""
        rows = slice(int(self.offsets[position]), int(self.offsets[position + 1]))
        return Detections(
            boxes_xyxy=torch.from_numpy(self.boxes_xyxy[rows]),
            scores=torch.from_numpy(self.scores[rows]),
            labels=torch.from_numpy(self.labels[rows]),
        )

    def dump(self) -> bytes:
        """An .npz file: arrays, and ids as JSON; the same candidates give the same bytes."""
        header = {"format": _FORMAT, "image_ids": self.image_ids, "floor": self.floor}
        sizes = [
            (place.height, place.width, place.content_height, place.content_width)
            for place in self.placements
        ]
        stream = io.BytesIO()
        np.savez(
            stream,
            header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
            placements=np.array(sizes, dtype=np.int64).reshape(-1, 4),
            boxes_xyxy=self.boxes_xyxy,
            scores=self.scores,
            labels=self.labels,
            offsets=self.offsets,
        )
        return stream.getvalue()

    @classmethod
    def load(cls, content: bytes, *, source: str) -> CandidateSet:
        """The candidates that `dump` wrote.

        Args:
            content: The file.
            source: Its name, for messages.

        Raises:
            CheckpointError: If it is truncated, damaged or another kind of file.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                values: dict[str, Any] = {name: arrays[name] for name in arrays.files}
            header = json.loads(values["header"].tobytes())
            if header["format"] != _FORMAT:
                raise ValueError(f"expected format {_FORMAT!r}, found {header['format']!r}")
            return cls(
                image_ids=tuple(header["image_ids"]),
                placements=tuple(Placement(*sizes) for sizes in values["placements"].tolist()),
                boxes_xyxy=values["boxes_xyxy"],
                scores=values["scores"],
                labels=values["labels"],
                offsets=values["offsets"],
                floor=float(header["floor"]),
            )
        except _DAMAGE as error:
            raise CheckpointError(
                f"{source}: not a readable candidates file ({len(content)} bytes): "
                f"{type(error).__name__}: {error}; collect the candidates again"
            ) from error


def _find_fault(candidates: CandidateSet) -> str:
    """Why the parts do not fit together; empty when they do."""
    num_images, num_rows = len(candidates.image_ids), len(candidates.scores)
    offsets = candidates.offsets
    types = {
        "boxes_xyxy": (candidates.boxes_xyxy, np.float32, (num_rows, 4)),
        "scores": (candidates.scores, np.float32, (num_rows,)),
        "labels": (candidates.labels, np.int64, (num_rows,)),
        "offsets": (offsets, np.int64, (num_images + 1,)),
    }
    for name, (array, dtype, shape) in types.items():
        if array.dtype != dtype or array.shape != shape:
            return (
                f"{name}: expected {np.dtype(dtype)} {shape}, got {array.dtype} {array.shape} "
                f"for {num_images} images"
            )
    if len(candidates.placements) != num_images:
        return f"{len(candidates.placements)} placements for {num_images} images"
    if offsets[0] != 0 or offsets[-1] != num_rows or (np.diff(offsets) < 0).any():
        return f"offsets do not cut {num_rows} rows into {num_images} images"
    if len(set(candidates.image_ids)) != num_images:
        return "an image occurs twice"
    return ""


def join_detections(
    items: Iterable[tuple[int | str, Placement, Detections]], *, floor: float
) -> CandidateSet:
    """Put images together.

    Args:
        items: Id, placement and candidates of each image, by falling score, on the CPU; may be
            none.
        floor: The threshold that they were found with.

    Raises:
        ValueError: If an image occurs twice.
    """
    taken = list(items)
    counts = [len(found) for _, _, found in taken]
    empty = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    parts = [empty, *(found for _, _, found in taken)]
    return CandidateSet(
        image_ids=tuple(identity for identity, _, _ in taken),
        placements=tuple(placement for _, placement, _ in taken),
        boxes_xyxy=torch.cat([part.boxes_xyxy.float() for part in parts]).numpy(),
        scores=torch.cat([part.scores.float() for part in parts]).numpy(),
        labels=torch.cat([part.labels.long() for part in parts]).numpy(),
        offsets=np.append(0, np.cumsum(counts)).astype(np.int64),
        floor=floor,
    )


def merge(sets: Sequence[CandidateSet], order: Sequence[int | str]) -> CandidateSet:
    """Put the shares of several workers together.

    Args:
        sets: Shares of one model, with one floor; no image is in two of them.
        order: Ids of all images that there are; the result has this order, whoever found what. Ids
            that are in no share (images that could not be read) are left out.

    Raises:
        ValueError: If there is no share, floors differ, an image is in two shares, or a share has
            an image that is not in `order`.
    """
    floors = {share.floor for share in sets}
    if len(floors) != 1:
        raise ValueError(f"expected shares with one floor, got {len(sets)} with {sorted(floors)}")
    places: dict[int | str, tuple[CandidateSet, int]] = {}
    for share in sets:
        for position, identity in enumerate(share.image_ids):
            if identity in places:
                raise ValueError(f"image {identity!r} is in two shares: give each worker its own")
            places[identity] = share, position
    unknown = places.keys() - set(order)
    if unknown:
        raise ValueError(f"image {min(unknown, key=str)!r} of a share is not in the order")
    return join_detections(
        (
            (identity, share.placements[position], share.detections(position))
            for identity in order
            if identity in places
            for share, position in [places[identity]]
        ),
        floor=floors.pop(),
    )


def suppress_candidates(
    candidates: CandidateSet, setting: DetectionSetting
) -> Iterator[tuple[int | str, Placement, Detections]]:
    """Replay thresholds, suppression and cap.

    Args:
        candidates: Of all images.
        setting: What to apply.

    Yields:
        Id, placement and detections in network pixels of each image, in their order: what fresh
        inference with this setting gives for the same network outputs.

    Raises:
        ValueError: If a threshold is below the floor: what lay between was not kept.
    """
    if min(setting.score_thresholds) < candidates.floor:
        raise ValueError(
            f"score thresholds {setting.score_thresholds[:5]} go below {candidates.floor}, the "
            "floor of these candidates: raise them, or collect candidates with a lower floor"
        )
    thresholds = torch.tensor(setting.score_thresholds, dtype=torch.float32)
    for position, identity in enumerate(candidates.image_ids):
        found = candidates.detections(position)
        (kept,) = suppress_overlaps(
            found.boxes_xyxy[None],
            found.scores[None],
            found.labels[None],
            score_thresholds=thresholds,
            nms_iou=setting.nms_iou,
            max_detections=setting.max_detections,
            nms_kind=setting.nms_kind,
        )
        yield identity, candidates.placements[position], kept


def apply_setting(
    candidates: CandidateSet, setting: DetectionSetting, categories: CategoryTable
) -> list[dict[str, object]]:
    """COCO results of all images under one setting.

    Args:
        candidates: Of all images.
        setting: What to apply; one threshold per class of `categories`.
        categories: The model's classes.

    Returns:
        What fresh inference with this setting writes: image_id, category_id, bbox xywh in original
        pixels, score.

    Raises:
        ValueError: If a threshold is below the floor, or there are not K of them.
    """
    if len(setting.score_thresholds) != len(categories):
        raise ValueError(
            f"{len(setting.score_thresholds)} score thresholds for {len(categories)} classes"
        )
    return [
        {"image_id": identity, **found}
        for identity, placement, kept in suppress_candidates(candidates, setting)
        for found in coco_results(kept, placement, categories)
    ]
