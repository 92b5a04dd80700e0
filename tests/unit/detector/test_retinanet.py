"""The whole network against torchvision's with the same weights, and its initial state."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms.v2.functional import normalize

from retinaray.detector.anchors import AnchorSpec, count_level_anchors
from retinaray.detector.fpn import FeaturePyramid
from retinaray.detector.heads import PredictionHead, prior_bias
from retinaray.detector.retinanet import RetinaNet

NUM_CLASSES = 3
# The start of a key of ours, and of torchvision's key for the same tensor.
KEY_STARTS = {
    "backbone.body.": "backbone.body.",
    "fpn.lateral.0.": "backbone.fpn.inner_blocks.0.0.",
    "fpn.lateral.1.": "backbone.fpn.inner_blocks.1.0.",
    "fpn.lateral.2.": "backbone.fpn.inner_blocks.2.0.",
    "fpn.smooth.0.": "backbone.fpn.layer_blocks.0.0.",
    "fpn.smooth.1.": "backbone.fpn.layer_blocks.1.0.",
    "fpn.smooth.2.": "backbone.fpn.layer_blocks.2.0.",
    "fpn.p6.": "backbone.fpn.extra_blocks.p6.",
    "fpn.p7.": "backbone.fpn.extra_blocks.p7.",
    # Our towers are flat (convolution, ReLU, ...), theirs have a block per convolution.
    **{f"class_head.tower.{2 * i}.": f"head.classification_head.conv.{i}.0." for i in range(4)},
    **{f"box_head.tower.{2 * i}.": f"head.regression_head.conv.{i}.0." for i in range(4)},
    "class_head.output.": "head.classification_head.cls_logits.",
    "box_head.output.": "head.regression_head.bbox_reg.",
}


def translate_key(key: str) -> str:
    (start,) = (start for start in KEY_STARTS if key.startswith(start))
    return KEY_STARTS[start] + key.removeprefix(start)


@pytest.fixture(scope="module", params=["ResNet18FPN", "ResNet50FPN"])
def same_networks(
    request: pytest.FixtureRequest, randomise: Callable[[nn.Module], None]
) -> tuple[RetinaNet, TorchvisionRetinaNet]:
    """Ours and torchvision's, with the same random weights."""
    ours = RetinaNet(backbone=request.param, num_classes=NUM_CLASSES)
    with torch.device("meta"):  # leaves out the initial weights
        factory = resnet18 if request.param == "ResNet18FPN" else resnet50
        extractor = _resnet_fpn_extractor(
            factory(),
            trainable_layers=5,
            returned_layers=[2, 3, 4],
            extra_blocks=LastLevelP6P7(ours.backbone.out_channels[-1], 256),
        )
    generator = AnchorGenerator(((32, 40, 50),) * 5, ((0.5, 1.0, 2.0),) * 5)
    theirs = TorchvisionRetinaNet(extractor, NUM_CLASSES, anchor_generator=generator)
    theirs.backbone.to_empty(device="cpu")
    randomise(theirs)
    state = theirs.state_dict()
    wanted = {key: state[translate_key(key)] for key in ours.state_dict()}
    assert len(wanted) == len(state), "a tensor of torchvision's has no counterpart"
    ours.load_state_dict(wanted, strict=True)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize(("height", "width"), [(64, 96), (75, 45)])
def test_forward_equals_torchvision_when_weights_are_the_same(
    same_networks: tuple[RetinaNet, TorchvisionRetinaNet], height: int, width: int
) -> None:
    ours, theirs = same_networks
    images = torch.randint(
        0, 256, (1, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        logits, deltas = ours(images)
        normalised = normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        expected = theirs.head(list(theirs.backbone(normalised).values()))
    for made, wanted in ((logits, "cls_logits"), (deltas, "bbox_regression")):
        assert expected[wanted].std() > 0.05
        torch.testing.assert_close(made, expected[wanted], rtol=1e-5, atol=1e-5)


def small_network(**changes: object) -> RetinaNet:
    settings = {"backbone": "ResNet10FPN", "num_classes": 4, "fpn_channels": 16, "head_depth": 1}
    return RetinaNet(**{**settings, **changes})  # type: ignore[arg-type]


def random_pixels(*shape: int) -> Tensor:
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )


def test_initial_class_probability_is_one_percent() -> None:
    torch.manual_seed(0)
    logits, deltas = small_network().eval()(random_pixels(1, 3, 64, 64))
    # -log(0.99 / 0.01) = -4.5951
    assert prior_bias() == pytest.approx(-4.59512, abs=1e-5)
    assert torch.sigmoid(logits).mean().item() == pytest.approx(0.01, rel=0.05)
    assert deltas.abs().mean() < 0.1


def test_initial_weights_have_the_published_spread() -> None:
    torch.manual_seed(0)
    head = PredictionHead(channels=64, depth=2, num_anchors=9, num_outputs=80)
    for layer in (head.tower[0], head.tower[2], head.output):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert (layer.bias == 0).all()
    pyramid = FeaturePyramid([32, 64, 128], channels=64)
    # Kaiming-uniform with a = 1: limit sqrt(3 / fan in), here 3 * 3 * 64 = 576.
    assert pyramid.smooth[0].weight.abs().max().item() == pytest.approx(
        math.sqrt(3 / 576), rel=0.01
    )
    assert (pyramid.p6.bias == 0).all()


def test_weights_are_the_same_when_the_seed_is_the_same() -> None:
    states = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        states.append(small_network().state_dict())
    assert all(value.equal(states[1][key]) for key, value in states[0].items())
    assert not states[0]["fpn.p7.weight"].equal(states[2]["fpn.p7.weight"])


def test_state_has_no_normalisation_constants() -> None:
    # They are no weights: a foreign weights file must not have to carry them.
    assert {"mean", "std"}.isdisjoint(small_network().state_dict())


def test_forward_takes_float_pixels_as_it_takes_bytes() -> None:
    network, pixels = small_network(norm="frozen_bn").eval(), random_pixels(1, 3, 64, 64)
    for from_bytes, from_floats in zip(network(pixels), network(pixels.float()), strict=True):
        assert from_bytes.equal(from_floats)


def test_forward_sees_a_grey_image_of_the_mean_colour_as_zeros() -> None:
    network = small_network(norm="frozen_bn").eval()
    seen: list[Tensor] = []
    network.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    colour = 255 * torch.tensor([0.485, 0.456, 0.406])
    deviation = 255 * torch.tensor([0.229, 0.224, 0.225])
    network((colour + 2 * deviation).reshape(1, 3, 1, 1).expand(1, 3, 32, 32))
    torch.testing.assert_close(seen[0], torch.full((1, 3, 32, 32), 2.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_head_norm", [False, True])
def test_forward_gives_the_same_result_alone_as_in_a_batch(has_head_norm: bool) -> None:
    torch.manual_seed(0)
    network = small_network(norm="gn", has_head_norm=has_head_norm).train()
    pixels = random_pixels(3, 3, 70, 50)
    with torch.no_grad():
        batch, alone = network(pixels), network(pixels[1:2])
    for together, single in zip(batch, alone, strict=True):
        torch.testing.assert_close(together[1:2], single, rtol=1e-4, atol=1e-5)


def test_head_norm_replaces_the_bias_of_the_towers() -> None:
    tower = small_network(has_head_norm=True, fpn_channels=24).class_head.tower
    assert [type(layer) for layer in tower] == [nn.Conv2d, nn.GroupNorm, nn.ReLU]
    assert tower[0].bias is None
    assert tower[1].num_groups == 8  # the largest power of two that divides 24


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_head_orders_values_by_level_row_column_and_anchor(
    memory_format: torch.memory_format,
) -> None:
    head = PredictionHead(channels=2, depth=0, num_anchors=3, num_outputs=2)
    with torch.no_grad():
        head.output.weight.zero_()
        # Channel c answers 100 * c plus the value of its own cell.
        head.output.weight[:, 0, 1, 1] = 1
        head.output.bias.copy_(100 * torch.arange(6.0))
    levels = [torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 1, 2)]
    levels[0][0, 0] = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    levels[1][0, 0] = torch.tensor([[6.0, 7.0]])
    values = head([level.contiguous(memory_format=memory_format) for level in levels])
    # Channel = anchor * 2 + value; eight cells in all.
    expected = [
        [100.0 * (anchor * 2) + cell, 100.0 * (anchor * 2 + 1) + cell]
        for cell in range(8)
        for anchor in range(3)
    ]
    assert values[0].tolist() == expected


def test_head_without_a_tower_uses_the_output_layer_alone() -> None:
    head = PredictionHead(channels=4, depth=0, num_anchors=1, num_outputs=4)
    level = torch.randn(1, 4, 3, 3)
    assert head([level]).equal(head.output(level).permute(0, 2, 3, 1).reshape(1, 9, 4))


def test_network_with_p2_has_one_level_more() -> None:
    spec = AnchorSpec(strides=(4, 8, 16, 32, 64, 128), scales=(4.0,))
    network = small_network(anchors=spec, norm="frozen_bn").eval()
    logits, deltas = network(random_pixels(1, 3, 70, 50))
    # Cells 18x13, 9x7, 5x4, 3x2, 2x1, 1x1 with three anchors each.
    assert count_level_anchors(spec, 70, 50) == (702, 189, 60, 18, 6, 3)
    assert logits.shape == (1, 978, 4)
    assert deltas.shape == (1, 978, 4)


def test_gradients_reach_every_parameter() -> None:
    network = small_network(anchors=AnchorSpec(strides=(4, 8, 16, 32, 64, 128))).train()
    logits, deltas = network(random_pixels(2, 3, 64, 64))
    (logits.sum() + deltas.square().sum()).backward()
    without = [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []


@pytest.mark.parametrize("strides", [(16, 32, 64), (8, 16, 32, 64), (2, 4, 8, 16, 32, 64, 128)])
def test_network_refuses_when_strides_have_no_levels(strides: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"anchor strides=\({strides[0]}, .*expected 8\.\.128"):
        small_network(anchors=AnchorSpec(strides=strides))
