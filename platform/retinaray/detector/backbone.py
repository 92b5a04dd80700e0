"""Torchvision's networks as feature extractors: C2 to C5, with a choice of normalisation.

Reads no files: weights come in as state dicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, Self

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import mobilenet_v3_large
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

NormKind = Literal["frozen_bn", "bn", "sync_bn", "gn"]

_RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "ResNet10FPN": (BasicBlock, [1, 1, 1, 1]),
    "ResNet18FPN": (BasicBlock, [2, 2, 2, 2]),
    "ResNet34FPN": (BasicBlock, [3, 4, 6, 3]),
    "ResNet50FPN": (Bottleneck, [3, 4, 6, 3]),
    "ResNet101FPN": (Bottleneck, [3, 4, 23, 3]),
    "ResNet152FPN": (Bottleneck, [3, 8, 36, 3]),
}
_MOBILENET = "MobileNetV3LargeFPN"
# Last block of strides 4, 8, 16 and 32 in torchvision's MobileNetV3-Large.
_MOBILENET_STAGES = (3, 6, 12, 16)
BACKBONE_NAMES = (*_RESNETS, _MOBILENET)


class Backbone(nn.Module):
    """Feature maps of strides 4, 8, 16 and 32.

    Args:
        name: One of BACKBONE_NAMES.
        norm: `frozen_bn` (statistics and affine fixed), `bn`, `sync_bn` (the same network; see
            `share_statistics`), or `gn` (independent of the batch).
        stride_in_1x1: Bottlenecks stride in their first 1x1 convolution, as Caffe's weights need;
            else in the 3x3.

    Attributes:
        out_channels: Channels of C2, C3, C4 and C5.

    Raises:
        ValueError: If the name is unknown, or no bottleneck is there whose stride could move.
    """

    def __init__(self, name: str, *, norm: NormKind = "bn", stride_in_1x1: bool = False) -> None:
        super().__init__()
        if name not in BACKBONE_NAMES:
            raise ValueError(f"backbone={name!r}: expected one of {', '.join(BACKBONE_NAMES)}")
        self.name = name
        self.body: Any = _build_mobilenet(norm) if name == _MOBILENET else _build_resnet(name, norm)
        if stride_in_1x1:
            _move_stride(self.body)
        self.out_channels = _count_channels(self.body)
        self._num_frozen = 0

    def forward(self, images: Float[Tensor, "N 3 H W"]) -> list[Float[Tensor, "N _ _ _"]]:
        """C2 to C5, each side the ceiling of the image's over 4, 8, 16 and 32."""
        if self.name == _MOBILENET:
            return self._forward_mobilenet(images)
        body = self.body
        value = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        features = []
        for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
            value = stage(value)
            features.append(value)
        return features

    def _forward_mobilenet(self, value: Tensor) -> list[Tensor]:
        features = []
        for index, block in enumerate(self.body.features):
            value = block(value)
            if index in _MOBILENET_STAGES:
                features.append(value)
        return features

    def freeze(self, num_stages: int) -> None:
        """Keep the stem and the first stages as they are: no gradient, norms in evaluation.

        Args:
            num_stages: Stages whose maps are C2, C3, ..., in [0, 4]; 0 = nothing is frozen.

        Raises:
            ValueError: If there are not so many stages.
        """
        if not 0 <= num_stages <= len(self.out_channels):
            raise ValueError(
                f"num_stages={num_stages}: expected 0 to {len(self.out_channels)}, the stages of "
                f"{self.name}"
            )
        self._num_frozen = num_stages
        for module in self._list_frozen():
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation; what is frozen stays in evaluation."""
        super().train(mode)
        for module in self._list_frozen():
            module.eval()
        return self

    def _list_frozen(self) -> list[nn.Module]:
        # Looked up each time: `share_statistics` replaces modules.
        if self._num_frozen == 0:
            return []
        if self.name == _MOBILENET:
            return list(self.body.features[: _MOBILENET_STAGES[self._num_frozen - 1] + 1])
        stages = [self.body.layer1, self.body.layer2, self.body.layer3, self.body.layer4]
        return [self.body.conv1, self.body.bn1, *stages[: self._num_frozen]]


def share_statistics(backbone: Backbone) -> None:
    """Let batch norms that are trained take mean and variance over the batches of all workers.

    Keys, weights and what is frozen stay as they are. CUDA alone has such norms, for the workers of
    torch.distributed's default group.
    """
    nn.SyncBatchNorm.convert_sync_batchnorm(backbone)  # type: ignore[no-untyped-call]
    # A new module starts in training mode.
    backbone.train(backbone.training)


def load_backbone_state(backbone: Backbone, state: Mapping[str, Tensor]) -> None:
    """Copy ImageNet weights of the same architecture into a backbone.

    Args:
        backbone: Receives them, cast to its own type.
        state: Torchvision's key names; the classifier and `num_batches_tracked` are not needed.

    Raises:
        ValueError: If keys are missing or shapes differ; the text names the first few.
    """
    wanted = {
        key: value
        for key, value in backbone.body.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    missing = [key for key in wanted if key not in state]
    differing = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if missing or differing:
        raise ValueError(
            f"weights do not fit {backbone.name}: {len(missing)} keys missing {missing[:3]}, "
            f"{len(differing)} of another shape {differing[:3]}; use weights of this network"
        )
    backbone.body.load_state_dict(
        {key: state[key].to(value.dtype) for key, value in wanted.items()}, strict=False
    )


def make_norm(kind: NormKind, eps: float = 1e-5) -> Callable[[int], nn.Module]:
    """The normalisation layer for a number of channels."""
    if kind == "frozen_bn":
        return partial(_FrozenNorm, eps=eps)
    if kind in ("bn", "sync_bn"):
        return partial(nn.BatchNorm2d, eps=eps)
    return _group_norm


class _FrozenNorm(FrozenBatchNorm2d):  # type: ignore[misc]
    """Fixed statistics and affine; in training the convolution before it does its work."""

    def find_factors(self) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
        """What each channel is multiplied by, and what is added then."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        if self.training:
            return x
        normed: Tensor = super().forward(x)
        return normed


class _NormedConv2d(nn.Conv2d):
    """A convolution that takes over the frozen norm behind it, in training.

    It scales its weights where the norm would scale its output: two passes over each feature map
    less, and maps of half the size under autocast, where the norm's product with float32 factors
    is float32.
    """

    norm: tuple[_FrozenNorm]

    def forward(self, input: Float[Tensor, "N C H W"]) -> Float[Tensor, "N _ _ _"]:
        (norm,) = self.norm
        if not norm.training:
            return super().forward(input)
        scale, shift = norm.find_factors()
        return functional.conv2d(
            input,
            self.weight * scale[:, None, None, None],
            shift,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )


def _fold_norms(body: nn.Module) -> None:
    """Make every convolution with a frozen norm behind it, which has no bias, take it over."""
    conv: nn.Module | None = None
    for module in body.modules():
        if isinstance(module, _FrozenNorm) and isinstance(conv, nn.Conv2d):
            # In place: a module of its own would draw its initial weights once more.
            conv.__class__ = _NormedConv2d
            # Not as a child of the convolution: the norm keeps its place and its keys.
            conv.__dict__["norm"] = (module,)
            conv = None
        elif isinstance(module, nn.Conv2d):
            conv = module


def count_groups(channels: int) -> int:
    """GroupNorm groups: 32, or the largest power of two below it that divides the channels.

    Two channels or more each: a group of one channel has nothing to compare on a map of one cell.
    """
    groups = math.gcd(32, channels)
    return groups // 2 if groups == channels > 1 else groups


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(count_groups(channels), channels)


def _build_resnet(name: str, norm: NormKind) -> ResNet:
    block, depths = _RESNETS[name]
    body = ResNet(block, depths, norm_layer=make_norm(norm))
    del body.fc, body.avgpool
    _fold_norms(body)
    return body


def _build_mobilenet(norm: NormKind) -> nn.Module:
    # eps 0.001 is what the published MobileNetV3 weights were trained with.
    body: nn.Module = mobilenet_v3_large(norm_layer=make_norm(norm, eps=0.001))
    del body.classifier, body.avgpool
    _fold_norms(body)
    return body


def _move_stride(body: nn.Module) -> None:
    if not isinstance(body, ResNet) or not isinstance(body.layer2[0], Bottleneck):
        raise ValueError(
            "stride_in_1x1: only ResNet50FPN, 101 and 152 have bottlenecks; leave it out"
        )
    for stage in (body.layer2, body.layer3, body.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)


def _count_channels(body: nn.Module) -> tuple[int, ...]:
    if isinstance(body, ResNet):
        last = [stage[-1] for stage in (body.layer1, body.layer2, body.layer3, body.layer4)]
        return tuple((b.conv3 if isinstance(b, Bottleneck) else b.conv2).out_channels for b in last)
    return (24, 40, 112, 960)
