from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from retinaray.artifact import ModelCard, dump_weights
from retinaray.data.coco import Category, CategoryTable
from retinaray.detector.anchors import AnchorSpec
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import CheckpointError
from retinaray.training.fine_tuning import Start, adopt_start, load_start, read_start

MakeCard = Callable[..., ModelCard]
P2 = AnchorSpec(scales=(1.5, 2.5), strides=(4, 8, 16, 32, 64, 128))


@pytest.fixture(scope="module")
def start(make_tiny_card: MakeCard, make_lively_model: Callable[[ModelCard], RetinaNet]) -> Start:
    """A trained model with three classes (ids 7, 17, 27) and batch norms."""
    card = make_tiny_card(norm="bn")
    state = make_lively_model(card).state_dict()
    return read_start(dump_weights(card, state), source="a.pth")


def make_network(card: ModelCard) -> RetinaNet:
    torch.manual_seed(99)
    return card.build_model().eval()


def test_load_start_continues_with_the_same_network(start: Start, make_tiny_card: MakeCard) -> None:
    card = adopt_start(make_tiny_card(norm="gn"), start, norm="auto", stride_in_1x1=None)
    assert card.architecture.norm == "frozen_bn"
    model = make_network(card)
    done = load_start(model, card, start)
    assert done.fresh == ()
    assert done.to_text() == (
        f"a.pth: {done.num_taken} of {done.num_taken} tensors taken; "
        "class head kept: the same 3 classes"
    )
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    original = start.card.build_model().eval()
    original.load_state_dict(start.state)
    with torch.no_grad():
        for ours, theirs in zip(model(images), original(images), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)


def test_load_start_reorders_the_class_head_when_the_classes_come_in_another_order(
    start: Start, make_tiny_card: MakeCard
) -> None:
    card = adopt_start(make_tiny_card(), start, norm="auto", stride_in_1x1=None)
    backwards = CategoryTable(tuple(reversed(card.categories.categories)))
    model, swapped = make_network(card), make_network(card)
    load_start(model, card, start)
    done = load_start(swapped, dataclasses.replace(card, categories=backwards), start)
    assert done.fresh == ()
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(swapped(images)[0], model(images)[0].flip(-1), atol=1e-5)
        assert torch.equal(swapped(images)[1], model(images)[1])


@pytest.mark.parametrize(
    "categories",
    [
        [(7, "class 0"), (17, "class 1")],
        [(7, "class 0"), (17, "class 1"), (27, "renamed")],
        [(7, "class 0"), (17, "class 1"), (28, "class 2")],
    ],
    ids=["fewer", "another name", "another id"],
)
def test_load_start_begins_the_class_head_anew_when_the_classes_differ(
    start: Start, make_tiny_card: MakeCard, categories: list[tuple[int, str]]
) -> None:
    table = CategoryTable(tuple(Category(*entry) for entry in categories))
    card = dataclasses.replace(make_tiny_card(norm="bn"), categories=table)
    model = make_network(card)
    before = model.class_head.output.weight.detach().clone()
    done = load_start(model, card, start)
    assert done.fresh == ("class_head.output.weight", "class_head.output.bias")
    assert done.class_head == (
        "class head starts anew: its classes were class 0, class 1, class 2, now "
        + ", ".join(table.names)
    )
    assert torch.equal(model.class_head.output.weight, before)
    assert torch.equal(model.box_head.output.weight, start.state["box_head.output.weight"])


def test_load_start_begins_both_heads_anew_when_a_cell_has_more_anchors(
    start: Start, make_tiny_card: MakeCard
) -> None:
    card = make_tiny_card(norm="bn", anchors=AnchorSpec(scales=(1.5, 2.0, 2.5), convention="odtk"))
    done = load_start(make_network(card), card, start)
    assert set(done.fresh) == {
        f"{head}.output.{kind}"
        for head in ("class_head", "box_head")
        for kind in ("weight", "bias")
    }
    assert done.class_head == (
        "class head starts anew: the file has 6 anchors per cell, the settings 9"
    )
    assert done.anchors == (
        "its heads were trained for other anchors, which --anchors centered --anchor-scales "
        "1.5 2.5 --anchor-ratios 1 2 0.5 --levels 3-7 would keep"
    )


@pytest.mark.parametrize("is_finer", [True, False])
def test_load_start_keeps_common_levels_when_the_finest_comes_or_goes(
    start: Start,
    make_tiny_card: MakeCard,
    make_lively_model: Callable[[ModelCard], RetinaNet],
    is_finer: bool,
) -> None:
    card = make_tiny_card(norm="bn", anchors=P2 if is_finer else None)
    if not is_finer:
        finer = make_tiny_card(norm="bn", anchors=P2)
        start = Start("a.pth", finer, make_lively_model(finer).state_dict())
    model = make_network(card)
    done = load_start(model, card, start)
    fresh = {
        f"fpn.{part}.0.{kind}" for part in ("lateral", "smooth") for kind in ("weight", "bias")
    }
    assert set(done.fresh) == (fresh if is_finer else set())
    # C5's level is the last one, however many there are.
    last = 2 if is_finer else 3
    assert torch.equal(model.fpn.lateral[-1].weight, start.state[f"fpn.lateral.{last}.weight"])
    assert torch.equal(model.fpn.smooth[-3].weight, start.state[f"fpn.smooth.{last - 2}.weight"])


def test_adopt_start_names_each_flag_when_the_network_is_another(
    start: Start, make_tiny_card: MakeCard
) -> None:
    card = make_tiny_card(backbone="ResNet18FPN", head_depth=3, has_head_norm=True)
    with pytest.raises(CheckpointError) as caught:
        adopt_start(card, start, norm="gn", stride_in_1x1=True)
    text = str(caught.value)
    for words in (
        "a.pth: cannot start this training",
        "it has backbone ResNet10FPN, the settings ResNet18FPN: give --backbone ResNet10FPN",
        "it has head_depth 1, the settings 3: give --head-depth 1",
        "it has head_norm none, the settings gn: give --head-norm none",
        "it has norm bn, the settings gn: give --norm bn",
        "it has stride_in_1x1 False, the settings True: give --model.stride_in_1x1 False",
    ):
        assert words in text
    assert "fpn_channels" not in text


@pytest.mark.parametrize(
    ("found", "setting", "expected"),
    [
        ("bn", "auto", "frozen_bn"),
        ("frozen_bn", "auto", "frozen_bn"),
        ("gn", "auto", "gn"),
        ("bn", "bn", "bn"),
        ("frozen_bn", "bn", "bn"),
        ("frozen_bn", "sync_bn", "bn"),
        ("gn", "gn", "gn"),
    ],
)
def test_adopt_start_chooses_the_norm(
    make_tiny_card: MakeCard, found: str, setting: str, expected: str
) -> None:
    start = Start("a.pth", make_tiny_card(norm=found), {})
    card = adopt_start(make_tiny_card(), start, norm=setting, stride_in_1x1=None)
    assert card.architecture.norm == expected


def test_read_start_refuses_what_is_no_weights_file() -> None:
    with pytest.raises(CheckpointError, match=r"b\.pth: not a readable weights file"):
        read_start(b"nothing", source="b.pth")
