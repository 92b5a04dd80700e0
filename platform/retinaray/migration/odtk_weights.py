"""ODTK's checkpoints as weights of this package's network, tensor by tensor.

It reads what ODTK 19.04 to 0.2.6 wrote, executes nothing of it, and refuses by name what has no
equal here: rotated boxes, several backbones, networks that do not exist here. Key names, layouts
and generations: as found in ODTK's releases.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from retinaray.artifact import WEIGHTS_FORMAT, Architecture, load_tensors
from retinaray.config.odtk_flags import NEAREST_BACKBONES
from retinaray.detector.anchors import DEFAULT_RATIOS, DEFAULT_SCALES, AnchorSpec, Convention
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import CheckpointError

AnchorChoice = Literal["auto", "odtk", "odtk-legacy"]

SCORE_THRESHOLD = 0.05
NMS_IOU = 0.5
MAX_DETECTIONS = 100
"""ODTK's constants; its files do not hold them."""

BACKBONES = ("ResNet18FPN", "ResNet34FPN", "ResNet50FPN", "ResNet101FPN", "ResNet152FPN")
_KEYS = ("backbone", "classes", "state_dict")
_MAX_LISTED = 3


@dataclass(frozen=True)
class OdtkCheckpoint:
    """What a checkpoint of ODTK's holds, in terms of this package.

    Attributes:
        backbone: One of `BACKBONES`.
        num_classes: K, background not counted.
        anchors: Scales and ratios of the file, strides 8 to 128, and the generation's convention.
        anchors_reason: Why this generation, for people.
        iteration: Training iterations; None when the file does not say.
        state: Tensors by this package's names; float32 where they are floating.
    """

    backbone: str
    num_classes: int
    anchors: AnchorSpec
    anchors_reason: str
    iteration: int | None
    state: Mapping[str, Tensor]

    @property
    def architecture(self) -> Architecture:
        """How `ModelCard.build_model` has to build the network."""
        return Architecture(
            backbone=self.backbone,
            # ODTK's frozen statistics go through torch's own batch norm, as `bn` does outside of
            # training. torchvision's frozen layer rounds otherwise: logits differ by 4e-6.
            norm="bn",
            fpn_channels=256,
            head_depth=4,
            stride_in_1x1=False,
        )


def read_odtk_checkpoint(
    content: bytes, *, source: str, anchors: AnchorChoice = "auto"
) -> OdtkCheckpoint:
    """Read a file that `odtk train` wrote.

    Args:
        content: The file, in torch's zip format or in the older one without.
        source: Its name, for messages.
        anchors: Which generation of ODTK's anchors the weights were trained with; auto = the newer
            one when the file has the key `ratios`, which ODTK writes since 2020-03-27, eleven days
            after its anchors changed.

    Raises:
        CheckpointError: If the file is damaged, foreign, would need code to load, or holds a
            network that does not exist here.
    """
    values = _load(content, source)
    _check_keys(values, source)
    backbone = _read_backbone(values["backbone"], source)
    _refuse_rotated(values, source)
    state = _rename(values["state_dict"], backbone, source)
    spec, reason = _read_anchors(values, anchors, source)
    _check_outputs(state, spec, values["classes"], source)
    iteration = values.get("iteration")
    return OdtkCheckpoint(
        backbone=backbone,
        num_classes=values["classes"],
        anchors=spec,
        anchors_reason=reason,
        iteration=iteration if type(iteration) is int else None,
        state=state,
    )


def load_odtk_state(model: RetinaNet, state: Mapping[str, Tensor], *, source: str) -> None:
    """Copy the tensors of a checkpoint into a network, all or none.

    Args:
        model: A network as `OdtkCheckpoint.architecture` says.
        state: `OdtkCheckpoint.state`.
        source: The file's name, for messages.

    Raises:
        CheckpointError: If a tensor is missing, too many, of another shape or not finite.
    """
    own = model.state_dict()
    # Frozen statistics are not counted: ODTK's files have no such tensors.
    wanted = {key: value for key, value in own.items() if not key.endswith("num_batches_tracked")}
    faults = {
        "missing": [key for key in wanted if key not in state],
        "unknown": [key for key in state if key not in wanted],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in wanted.items()
            if key in state and state[key].shape != value.shape
        ],
        "not finite": [key for key, value in state.items() if not bool(value.isfinite().all())],
    }
    found = [f"{len(keys)} {name} ({_list(keys)})" for name, keys in faults.items() if keys]
    if found:
        raise CheckpointError(
            f"{source}: expected the tensors of ODTK's {model.backbone.name}, but of "
            f"{len(wanted)} are {', '.join(found)}; the training may have diverged, or a changed "
            "ODTK have written the file: take another checkpoint"
        )
    model.load_state_dict({**own, **state})


def _load(content: bytes, source: str) -> dict[str, Any]:
    _refuse_packed(content, source)
    try:
        return load_tensors(content, source=source)
    except CheckpointError as error:
        reason = str(error.__cause__ or "")
        code = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", reason)
        if code is not None or "unrecognized function" in reason:
            name = code[1] if code is not None else "a function"
            raise CheckpointError(
                f"{source}: expected tensors and numbers only, but it names code ({name}), which "
                "was not run and never is; copy the file again, as `odtk train` wrote it, from a "
                "source that you trust"
            ) from error
        raise CheckpointError(
            f"{source}: not a checkpoint that torch can read ({len(content)} bytes): it may be "
            "truncated, or another kind of file; copy it again, or give the .pth that "
            "`odtk train` wrote"
        ) from error


def _refuse_packed(content: bytes, source: str) -> None:
    """Say what to do with a download that is a zip around a checkpoint, as ODTK's releases are."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return
    inner = [name for name in names if name.endswith((".pth", ".torch"))]
    raise CheckpointError(
        f"{source}: expected a checkpoint, found a zip archive that holds "
        f"{_list(inner or names) or 'nothing'}; "
        + (f"unpack it (unzip {source}) and give {inner[0]}" if inner else "give ODTK's .pth")
    )


def _check_keys(values: Mapping[str, Any], source: str) -> None:
    if values.get("format") == WEIGHTS_FORMAT:
        raise CheckpointError(
            f"{source}: is a weights file of retinaray already; use it as it is, or give ODTK's"
        )
    missing = [key for key in _KEYS if key not in values]
    if missing:
        raise CheckpointError(
            f"{source}: expected ODTK's keys {', '.join(_KEYS)}, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing and it has "
            f"{_list(list(map(str, values))) or 'none'}; give the .pth that `odtk train` wrote"
        )
    classes, state = values["classes"], values["state_dict"]
    if type(classes) is not int or classes < 1:
        raise CheckpointError(
            f"{source}: expected a number of classes from 1, found classes={classes!r}"
        )
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{source}: expected tensors in its state_dict, found something else")


def _read_backbone(value: object, source: str) -> str:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise CheckpointError(f"{source}: expected the backbone's name, found backbone={value!r}")
    if len(names) > 1:
        raise CheckpointError(
            f"{source}: has {len(names)} backbones ({', '.join(names)}) with common heads, which "
            f"do not exist here; train a new model with `retinaray train --backbone {names[0]}`"
        )
    if names[0] not in BACKBONES:
        nearest = NEAREST_BACKBONES.get(names[0], "ResNet50FPN")
        raise CheckpointError(
            f"{source}: its backbone {names[0]} does not exist here, expected one of "
            f"{', '.join(BACKBONES)}; train a new model with `retinaray train --backbone {nearest}`"
        )
    return str(names[0])


def _refuse_rotated(values: Mapping[str, Any], source: str) -> None:
    if values.get("angles"):
        raise CheckpointError(
            f"{source}: was trained with --rotated-bbox (angles={values['angles']}): rotated boxes "
            "are not supported; train a new model on upright boxes"
        )


def _rename(state: Mapping[str, Tensor], backbone: str, source: str) -> dict[str, Tensor]:
    """The tensors that count, by this package's names."""
    prefixes = _list_prefixes(backbone)
    unused = f"backbones.{backbone}.features.fc."
    renamed: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if key.startswith(unused) or key.endswith("num_batches_tracked"):
            continue
        if prefix is None:
            unknown.append(key)
            continue
        new = prefixes[prefix] + key.removeprefix(prefix)
        renamed[new] = value.float() if value.is_floating_point() else value
    if unknown:
        raise CheckpointError(
            f"{source}: has {len(unknown)} tensors that ODTK's {backbone} lacks "
            f"({_list(unknown)}); give a .pth that an unchanged `odtk train` wrote"
        )
    return renamed


def _list_prefixes(backbone: str) -> dict[str, str]:
    """ODTK's beginnings of keys, and ours."""
    own = f"backbones.{backbone}."
    prefixes = {f"{own}features.": "backbone.body."}
    for index, level in enumerate((3, 4, 5)):
        prefixes[f"{own}lateral{level}."] = f"fpn.lateral.{index}."
        prefixes[f"{own}smooth{level}."] = f"fpn.smooth.{index}."
    for level in (6, 7):
        prefixes[f"{own}pyramid{level}."] = f"fpn.p{level}."
    for theirs, ours in (("cls_head", "class_head"), ("box_head", "box_head")):
        for layer in (0, 2, 4, 6):
            prefixes[f"{theirs}.{layer}."] = f"{ours}.tower.{layer}."
        prefixes[f"{theirs}.8."] = f"{ours}.output."
    return prefixes


def _read_anchors(
    values: Mapping[str, Any], choice: AnchorChoice, source: str
) -> tuple[AnchorSpec, str]:
    has_ratios = "ratios" in values
    implied: Convention = "odtk" if has_ratios else "odtk-legacy"
    sign = (
        "the file has `ratios`, which ODTK writes since 2020-03-27"
        if has_ratios
        else "the file lacks `ratios`: ODTK wrote it before 2020-03-27"
    )
    reason = sign if choice == "auto" else "as asked for"
    if choice not in ("auto", implied):
        reason = f"as asked for, although {sign}"
    try:
        spec = AnchorSpec(
            scales=tuple(map(float, values.get("scales", DEFAULT_SCALES))),
            ratios=tuple(map(float, values.get("ratios", DEFAULT_RATIOS))),
            convention=implied if choice == "auto" else choice,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: its anchors cannot be used: {error}") from error
    return spec, reason


def _check_outputs(
    state: Mapping[str, Tensor], spec: AnchorSpec, num_classes: int, source: str
) -> None:
    """Hold the heads to the file's own numbers of classes and anchors."""
    per_cell = spec.num_per_cell
    for key, expected, meaning in (
        ("class_head.output.bias", per_cell * num_classes, f"{num_classes} classes"),
        ("box_head.output.bias", per_cell * 4, "4 offsets (rotated boxes have 6)"),
    ):
        bias = state.get(key, torch.empty(0))
        if bias.shape != (expected,):
            raise CheckpointError(
                f"{source}: expected {expected} outputs for {per_cell} anchors with {meaning}, "
                f"found {tuple(bias.shape)} in {key}; the file's numbers contradict its weights"
            )


def _list(names: list[str]) -> str:
    return ", ".join(names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "")
