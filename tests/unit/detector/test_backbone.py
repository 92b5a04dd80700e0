"""Backbones: maps of every network, the three normalisations, and loading of ImageNet weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from retinaray.detector.backbone import (
    BACKBONE_NAMES,
    Backbone,
    NormKind,
    count_groups,
    load_backbone_state,
)

CHANNELS = {
    "ResNet10FPN": (64, 128, 256, 512),
    "ResNet18FPN": (64, 128, 256, 512),
    "ResNet34FPN": (64, 128, 256, 512),
    "ResNet50FPN": (256, 512, 1024, 2048),
    "ResNet101FPN": (256, 512, 1024, 2048),
    "ResNet152FPN": (256, 512, 1024, 2048),
    "MobileNetV3LargeFPN": (24, 40, 112, 960),
}


NORMS: list[NormKind] = ["bn", "frozen_bn"]


def random_images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def resnet10() -> Backbone:
    torch.manual_seed(0)
    return Backbone("ResNet10FPN", norm="bn")


def test_backbone_names_are_all_tested() -> None:
    assert set(BACKBONE_NAMES) == set(CHANNELS)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        *((name, "frozen_bn") for name in BACKBONE_NAMES),
        *((name, norm) for name in ("ResNet10FPN", "MobileNetV3LargeFPN") for norm in ("bn", "gn")),
    ],
)
def test_backbone_gives_its_channels_at_strides_4_to_32_when_sides_are_odd(
    name: str, norm: NormKind
) -> None:
    with torch.device("meta"):
        backbone = Backbone(name, norm=norm)
        features = backbone(torch.zeros(2, 3, 67, 101))
    assert backbone.out_channels == CHANNELS[name]
    # Ceilings of 67/4, 67/8, 67/16, 67/32 and of 101 likewise.
    sides = [(17, 26), (9, 13), (5, 7), (3, 4)]
    expected = [(2, c, *side) for c, side in zip(CHANNELS[name], sides, strict=True)]
    assert [tuple(feature.shape) for feature in features] == expected


def test_backbone_keeps_its_maps_when_the_stride_moves_to_the_first_convolution() -> None:
    with torch.device("meta"):
        features = Backbone("ResNet50FPN", stride_in_1x1=True)(torch.zeros(1, 3, 67, 101))
    assert [tuple(f.shape[2:]) for f in features] == [(17, 26), (9, 13), (5, 7), (3, 4)]


@pytest.mark.parametrize(
    ("name", "factory"),
    [
        ("ResNet18FPN", torchvision.models.resnet18),
        ("ResNet34FPN", torchvision.models.resnet34),
        ("ResNet50FPN", torchvision.models.resnet50),
        ("ResNet101FPN", torchvision.models.resnet101),
        ("MobileNetV3LargeFPN", torchvision.models.mobilenet_v3_large),
    ],
)
def test_backbone_has_torchvision_parameters_without_the_classifier(
    name: str, factory: type[nn.Module]
) -> None:
    with torch.device("meta"):
        theirs = factory().state_dict()
        ours = Backbone(name).body.state_dict()
    kept = {k: v.shape for k, v in theirs.items() if not k.startswith(("fc.", "classifier."))}
    assert {key: value.shape for key, value in ours.items()} == kept


def test_backbone_equals_torchvision_when_network_is_mobilenet(
    randomise: Callable[[nn.Module], None],
) -> None:
    theirs = torchvision.models.mobilenet_v3_large()
    randomise(theirs)
    backbone = Backbone("MobileNetV3LargeFPN")
    load_backbone_state(backbone, theirs.state_dict())
    images = random_images(1, 3, 70, 45)
    with torch.no_grad():
        features = backbone.eval()(images)
        value = images
        maps = [value := block(value) for block in theirs.features.eval()]
    assert maps[-1].std() > 0.05
    # The last map of each size: after blocks 3, 6, 12 and the final convolution, the 17th.
    for feature, expected in zip(features, (maps[3], maps[6], maps[12], maps[16]), strict=True):
        torch.testing.assert_close(feature, expected, rtol=1e-5, atol=1e-5)


def test_backbone_has_no_trainable_norm_when_frozen() -> None:
    torch.manual_seed(0)
    backbone = Backbone("ResNet10FPN", norm="frozen_bn").train()
    norms = [module for module in backbone.modules() if isinstance(module, FrozenBatchNorm2d)]
    # The stem, two per block of four, and one in each of three downsampling branches.
    assert len(norms) == 1 + 4 * 2 + 3
    assert not [parameter for norm in norms for parameter in norm.parameters()]
    assert all(parameter.ndim == 4 for parameter in backbone.parameters())
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone(random_images(2, 3, 64, 64))
    assert all(value.equal(before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("norm", ["frozen_bn", "gn"])
@pytest.mark.parametrize("name", ["ResNet10FPN", "MobileNetV3LargeFPN"])
def test_backbone_sees_each_image_alone_when_norm_does_not_use_the_batch(
    name: str, norm: NormKind
) -> None:
    torch.manual_seed(0)
    backbone = Backbone(name, norm=norm).train()
    images = random_images(3, 3, 64, 64)
    with torch.no_grad():
        if norm == "gn":
            # Dropout does not occur in the features; only the norm could mix images.
            images[1] *= 50
        together = backbone(images)[-1][0]
        torch.testing.assert_close(together, backbone(images[:1])[-1][0], rtol=1e-4, atol=1e-5)


def test_backbone_updates_its_statistics_when_norm_is_bn(resnet10: Backbone) -> None:
    images = random_images(4, 3, 64, 64)
    resnet10.train()(images)
    stem = resnet10.body.bn1
    values = resnet10.body.conv1(images)
    # Momentum 0.1 from 0, as torch defines it.
    torch.testing.assert_close(stem.running_mean, 0.1 * values.mean((0, 2, 3)))
    assert stem.num_batches_tracked.item() == 1
    assert stem.weight.requires_grad


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(256, 32), (64, 32), (40, 8), (24, 8), (3, 1), (1, 1), (32, 16), (16, 8)],
)
def test_count_groups_divides_the_channels(channels: int, groups: int) -> None:
    assert count_groups(channels) == groups


def test_load_backbone_state_equals_torchvision_when_weights_are_imagenet(
    shared_data: Path,
) -> None:
    state = load_file(shared_data / "weights" / "resnet50_imagenet_msra.safetensors")
    with torch.device("meta"):  # leaves out the random initial weights
        theirs = torchvision.models.resnet50()
        backbones = {norm: Backbone("ResNet50FPN", norm=norm, stride_in_1x1=True) for norm in NORMS}
    missing, unexpected = theirs.load_state_dict(
        {key: value.float() for key, value in state.items()}, strict=False, assign=True
    )
    assert not unexpected
    assert all(key.startswith("fc.") or key.endswith("num_batches_tracked") for key in missing)
    for stage in (theirs.layer2, theirs.layer3, theirs.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    images = random_images(1, 3, 65, 96)
    with torch.no_grad():
        expected = nn.Sequential(*list(theirs.eval().children())[:-2])(images)
        assert expected.abs().max() > 0.1
        for norm, backbone in backbones.items():
            backbone.to_empty(device="cpu").eval()
            load_backbone_state(backbone, state)
            # A frozen norm multiplies by its folded factor: another rounding in each of 53 layers.
            tolerance = 1e-5 if norm == "bn" else 1e-4
            c5 = backbone(images)[-1]
            torch.testing.assert_close(c5, expected, rtol=tolerance, atol=tolerance)


def test_load_backbone_state_casts_to_the_network_type(resnet10: Backbone) -> None:
    state = {
        key: torch.ones_like(value).half() for key, value in resnet10.body.state_dict().items()
    }
    load_backbone_state(resnet10, state)
    assert resnet10.body.conv1.weight.dtype == torch.float32
    assert (resnet10.body.layer4[0].bn2.running_var == 1).all()


def test_load_backbone_state_refuses_when_keys_are_missing(resnet10: Backbone) -> None:
    state = resnet10.body.state_dict()
    kept = {key: value for key, value in state.items() if not key.startswith("layer4.")}
    num_missing = sum(
        key.startswith("layer4.") and not key.endswith("num_batches_tracked") for key in state
    )
    before = resnet10.body.conv1.weight.clone()
    kept["conv1.weight"] = torch.zeros(64, 3, 7, 7)
    with pytest.raises(
        ValueError,
        match=rf"do not fit ResNet10FPN: {num_missing} keys missing \['layer4.0.conv1.weight'",
    ):
        load_backbone_state(resnet10, kept)
    assert resnet10.body.conv1.weight.equal(before), "nothing may be loaded by half"


def test_load_backbone_state_refuses_when_shapes_differ(resnet10: Backbone) -> None:
    state = dict(resnet10.body.state_dict())
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    with pytest.raises(
        ValueError,
        match=r"0 keys missing \[\], 1 of another shape "
        r"\['conv1.weight \(64, 1, 7, 7\) instead of \(64, 3, 7, 7\)'\]; use weights of this",
    ):
        load_backbone_state(resnet10, state)


def test_backbone_refuses_when_the_name_is_unknown() -> None:
    with pytest.raises(ValueError, match="backbone='ResNet20FPN': expected one of ResNet10FPN"):
        Backbone("ResNet20FPN")


@pytest.mark.parametrize("name", ["ResNet18FPN", "MobileNetV3LargeFPN"])
def test_backbone_refuses_to_move_a_stride_when_it_has_no_bottlenecks(name: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="stride_in_1x1: only ResNet50FPN"):
        Backbone(name, stride_in_1x1=True)


@pytest.mark.parametrize("name", ["ResNet18FPN", "ResNet50FPN", "MobileNetV3LargeFPN"])
def test_backbone_folds_frozen_norms_into_convolutions_when_training(name: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone(name, norm="frozen_bn")
    randomise_norms(backbone)
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    outputs = []
    for is_training in (True, False):
        backbone.train(is_training)
        backbone.zero_grad()
        maps = backbone(images)
        torch.autograd.backward([value.square().mean() for value in maps])
        outputs.append(maps)
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters()]))
    for folded, plain in zip(*outputs, strict=True):
        torch.testing.assert_close(folded, plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-2, atol=1e-4)


def randomise_norms(backbone: Backbone) -> None:
    """Statistics and affine as trained weights have them: none is 0 or 1."""
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.uniform_(0.5, 1.0)
            module.bias.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)


def test_backbone_keeps_maps_in_bfloat16_when_norms_are_folded_under_autocast() -> None:
    backbone = Backbone("ResNet10FPN", norm="frozen_bn").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = backbone(torch.randn(1, 3, 64, 64))
    assert {value.dtype for value in maps} == {torch.bfloat16}


def test_backbone_folds_the_norms_of_its_copy_when_it_is_copied() -> None:
    backbone = Backbone("ResNet10FPN", norm="frozen_bn").train()
    copied = copy.deepcopy(backbone)
    randomise_norms(copied)
    images = torch.randn(1, 3, 64, 64)
    folded = copied(images)[-1]
    torch.testing.assert_close(folded, copied.eval()(images)[-1], rtol=1e-3, atol=1e-4)
    assert not torch.equal(folded, backbone(images)[-1])
