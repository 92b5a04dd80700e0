"""A whole trained model as the start of another training: what fits is taken, and it is said what.

The network of the new training has to be the file's; its classes and anchors may differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from retinaray.artifact import ModelCard, read_weights
from retinaray.data.coco import CategoryTable
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import CheckpointError

# They hold the same tensors, and differ in what training does to them.
_BATCH_NORMS = ("bn", "frozen_bn")
_CLASS_OUTPUT = "class_head.output."
_BY_LEVEL = ("fpn.lateral.", "fpn.smooth.")


@dataclass(frozen=True)
class Start:
    """A model to start from.

    Attributes:
        source: Its file, for messages.
        card: What it is.
        state: Its tensors.
    """

    source: str
    card: ModelCard
    state: Mapping[str, Tensor]


@dataclass(frozen=True)
class FineTuning:
    """What a training took from the model it started from.

    Attributes:
        source: The file.
        num_taken: Tensors that were taken.
        fresh: Tensors that start at random.
        class_head: What became of the class head's last layer, for people.
        anchors: How the anchors differ from the file's, for people; empty when they do not.
    """

    source: str
    num_taken: int
    fresh: tuple[str, ...]
    class_head: str
    anchors: str = ""

    def to_text(self) -> str:
        """One line for people."""
        total = self.num_taken + len(self.fresh)
        lines = [f"{self.source}: {self.num_taken} of {total} tensors taken", self.class_head]
        return "; ".join([*lines, *filter(None, [self.anchors])])


def read_start(content: bytes, *, source: str) -> Start:
    """Read a weights file to start from.

    Raises:
        CheckpointError: If it is truncated or not one of ours.
    """
    card, model = read_weights(content, source=source)
    return Start(source=source, card=card, state=model.state_dict())


def adopt_start(
    card: ModelCard, start: Start, *, norm: str, stride_in_1x1: bool | None
) -> ModelCard:
    """The card of a training that goes on from a model.

    Args:
        card: The card as the settings say.
        start: The model.
        norm: The setting: `auto` = frozen_bn when the model has batch norms, else its own.
        stride_in_1x1: The setting; None = as in the model.

    Returns:
        The card with the model's norm and stride.

    Raises:
        CheckpointError: If the settings describe another network than the model's.
    """
    wanted, found = card.architecture, start.card.architecture
    stride = found.stride_in_1x1 if stride_in_1x1 is None else stride_in_1x1
    if norm == "auto":
        norm = "frozen_bn" if found.norm in _BATCH_NORMS else found.norm
    # What several workers do with its statistics is no part of the network.
    norm = "bn" if norm == "sync_bn" else norm
    is_same_kind = norm == found.norm or {norm, found.norm} <= set(_BATCH_NORMS)
    head_norms = ["gn" if one.has_head_norm else "none" for one in (found, wanted)]
    faults = [
        f"it has {name} {theirs}, the settings {ours}: give {flag} {theirs}"
        for name, flag, theirs, ours in (
            ("backbone", "--backbone", found.backbone, wanted.backbone),
            ("fpn_channels", "--fpn-channels", found.fpn_channels, wanted.fpn_channels),
            ("head_depth", "--head-depth", found.head_depth, wanted.head_depth),
            ("head_norm", "--head-norm", *head_norms),
            ("norm", "--norm", found.norm, found.norm if is_same_kind else norm),
            ("stride_in_1x1", "--model.stride_in_1x1", found.stride_in_1x1, stride),
        )
        if theirs != ours
    ]
    if faults:
        raise CheckpointError(
            f"{start.source}: cannot start this training: {'; '.join(faults)}, or leave "
            "--fine-tune out"
        )
    architecture = dataclasses.replace(wanted, norm=norm, stride_in_1x1=stride)
    return dataclasses.replace(card, architecture=architecture)


def load_start(model: RetinaNet, card: ModelCard, start: Start) -> FineTuning:
    """Copy all that fits into a fresh network.

    The last layer of the class head is kept when both have the same classes (ids and names, in any
    order) and stays as it is otherwise. A pyramid with one level more or less keeps its common
    levels.

    Args:
        model: A network of `card`, with its initial weights.
        card: As `adopt_start` gives it.
        start: The model to start from.

    Returns:
        What was taken; nothing is logged, so that one of many workers can say it.
    """
    own = model.state_dict()
    state = _align_levels(start.state, len(model.fpn.lateral))
    order = _match_classes(card.categories, start.card.categories)
    if order is None:
        state = {key: value for key, value in state.items() if not key.startswith(_CLASS_OUTPUT)}
    else:
        state |= {
            key: _reorder_classes(value, order)
            for key, value in state.items()
            if key.startswith(_CLASS_OUTPUT)
        }
    taken = {key: value for key, value in state.items() if _fits(key, value, own)}
    model.load_state_dict({**own, **taken})
    counted = [key for key in own if not key.endswith("num_batches_tracked")]
    return FineTuning(
        source=start.source,
        num_taken=sum(key in taken for key in counted),
        fresh=tuple(key for key in counted if key not in taken),
        class_head=_describe_head(card, start.card, is_same=order is not None, taken=taken),
        anchors=_describe_anchors(card, start.card),
    )


def _fits(key: str, value: Tensor, own: Mapping[str, Tensor]) -> bool:
    return key in own and own[key].shape == value.shape


def _align_levels(state: Mapping[str, Tensor], num_levels: int) -> dict[str, Tensor]:
    """Number the pyramid's levels from C5 downwards: the finest one is what may be missing."""
    num_theirs = sum(key.startswith("fpn.lateral.") and key.endswith(".weight") for key in state)
    shift = num_levels - num_theirs
    aligned = {}
    for key, value in state.items():
        prefix = next((prefix for prefix in _BY_LEVEL if key.startswith(prefix)), None)
        if prefix is None:
            aligned[key] = value
            continue
        level, _, rest = key.removeprefix(prefix).partition(".")
        if int(level) + shift >= 0:
            aligned[f"{prefix}{int(level) + shift}.{rest}"] = value
    return aligned


def _match_classes(wanted: CategoryTable, found: CategoryTable) -> list[int] | None:
    """Index in the file of each wanted class; None when the classes are not the same."""
    if set(wanted.categories) != set(found.categories):
        return None
    return [found.index_of(category.id) for category in wanted.categories]


def _reorder_classes(output: Tensor, order: list[int]) -> Tensor:
    """The output layer's weight or bias (anchor-major, class-minor) with its classes in order."""
    by_anchor = output.reshape(-1, len(order), *output.shape[1:])
    return by_anchor[:, torch.tensor(order)].reshape(output.shape)


def _describe_head(
    card: ModelCard, found: ModelCard, *, is_same: bool, taken: Mapping[str, Tensor]
) -> str:
    if not is_same:
        return (
            f"class head starts anew: its classes were {_list(found.categories)}, now "
            f"{_list(card.categories)}"
        )
    if f"{_CLASS_OUTPUT}weight" not in taken:
        return (
            f"class head starts anew: the file has {found.anchors.num_per_cell} anchors per cell, "
            f"the settings {card.anchors.num_per_cell}"
        )
    return f"class head kept: the same {len(card.categories)} classes"


def _describe_anchors(card: ModelCard, found: ModelCard) -> str:
    if card.anchors == found.anchors:
        return ""
    scales = " ".join(f"{scale:.4g}" for scale in found.anchors.scales)
    ratios = " ".join(f"{ratio:.4g}" for ratio in found.anchors.ratios)
    levels = "2-7" if found.anchors.strides[0] == 4 else "3-7"
    return (
        f"its heads were trained for other anchors, which --anchors {found.anchors.convention} "
        f"--anchor-scales {scales} --anchor-ratios {ratios} --levels {levels} would keep"
    )


def _list(categories: CategoryTable) -> str:
    return ", ".join(categories.names[:5]) + (", ..." if len(categories) > 5 else "")
