"""What a sweep may draw, and how a drawn point becomes settings."""

from __future__ import annotations

import math
from typing import Any

import pytest

from retinaray.config.loading import load_from_dict, to_dict
from retinaray.config.schema import TrainJob
from retinaray.config.search_space import (
    BASE_SCALE,
    NUM_SCALES,
    Domain,
    decode_point,
    encode_choice,
    find_space_faults,
    make_changes,
    parse_space,
)
from retinaray.errors import ConfigError

CHOICES = Domain("anchors.ratios", "choice", ([1, 2, 0.5], [1.0, 3.0], None, "a"))
UNIFORM = Domain("augment.flip", "uniform", (0.25, 0.5))
LOG = Domain("optim.peak_lr", "loguniform", (0.001, 0.1))
STEPS = Domain("loss.focal_gamma", "quniform", (0.1, 0.7, 0.1))
WHOLE = Domain("run.batch", "quniform", (4, 16, 4), is_integer=True)
WHOLE_UNIFORM = Domain("run.iters", "uniform", (3, 6), is_integer=True)
WHOLE_LOG = Domain("run.iters", "loguniform", (10, 1000), is_integer=True)


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    """Settings of a training with three scales from 4 on, and two workers."""
    minimal = {"output": "m.pth", "data": {"annotations": "a"}, "run": {"batch": 6, "workers": 2}}
    return to_dict(load_from_dict(TrainJob, minimal))


def test_parse_space_reads_every_kind_in_the_order_of_the_file() -> None:
    space = {
        "optim.peak_lr": {"loguniform": [1e-4, 0.01]},
        NUM_SCALES: {"uniform": [1, 4]},
        BASE_SCALE: {"quniform": [1, 4, 0.5]},
        "anchors.levels": ["3-7", "2-7"],
        "run.batch": {"quniform": [2, 16, 2]},
        "augment.jitter": [None, [300, 500]],
    }
    assert parse_space(space, TrainJob) == (
        Domain("optim.peak_lr", "loguniform", (1e-4, 0.01)),
        Domain(NUM_SCALES, "uniform", (1, 4), is_integer=True),
        Domain(BASE_SCALE, "quniform", (1, 4, 0.5)),
        Domain("anchors.levels", "choice", ("3-7", "2-7")),
        Domain("run.batch", "quniform", (2, 16, 2), is_integer=True),
        Domain("augment.jitter", "choice", (None, [300, 500])),
    )


def test_parse_space_names_all_faults_at_once() -> None:
    syntax = (
        "expected a list of choices, {uniform: [low, high]}, {loguniform: [low, high]} or "
        "{quniform: [low, high, step]}"
    )
    space = {
        "optim.peak_rl": {"loguniform": [0.1, 0.2]},
        "anchors.base_scal": [1.0, 2.0],
        "zzzz": [1],
        "optim.peak_lr": {"loguniform": [0.1, 0.01]},
        "optim.gamma": {"uniform": [0.5, 0.5]},
        "augment.hue": {"loguniform": [0, 0.1]},
        "loss.focal_gamma": 5,
        "loss.focal_alpha": {"normal": [0, 1]},
        "loss.box_beta": {"uniform": [0.1, True]},
        "augment.crop": {"uniform": [0.1]},
        "augment.contrast": {"uniform": [0.1, 0.2], "loguniform": [0.1, 0.2]},
        "augment.flip": [],
        "augment.mosaic": {"quniform": [0.0, 0.5, 0.7]},
        "loss.box_weight": {"quniform": [0.5, 1.25, 0.5]},
        "run.seed": {"uniform": [0, 1.5]},
        "model.backbone": {"uniform": [18, 50]},
        "output": ["a", "b"],
        "run.objective": ["AP", "AP50"],
        "anchors.scales": [[2.0, 3.0]],
        BASE_SCALE: ["big", 2.0],
        NUM_SCALES: {"uniform": [2, 10]},
    }
    with pytest.raises(ConfigError) as caught:
        parse_space(space, TrainJob)
    cannot = "cannot be searched: it must be the same for all trials"
    assert str(caught.value).splitlines() == [
        "space.optim.peak_rl={loguniform}: no such key; nearest: optim.peak_lr (--lr)",
        "space.anchors.base_scal=[1.0, 2.0]: no such key; nearest: anchors.base_scale",
        "space.zzzz=[1]: no such key; remove it, or see --help for all keys",
        "space.optim.peak_lr={loguniform}: expected low < high, got 0.1 and 0.01",
        "space.optim.gamma={uniform}: expected low < high, got 0.5 and 0.5",
        "space.augment.hue={loguniform}: loguniform needs low > 0, got 0",
        f"space.loss.focal_gamma=5: {syntax}",
        f"space.loss.focal_alpha={{normal}}: {syntax}",
        f"space.loss.box_beta={{uniform}}: {syntax}",
        f"space.augment.crop={{uniform}}: {syntax}",
        f"space.augment.contrast={{uniform, loguniform}}: {syntax}",
        "space.augment.flip=[]: expected at least one choice",
        "space.augment.mosaic={quniform}: expected a step in (0, high - low], got 0.7",
        "space.loss.box_weight={quniform}: expected low and high to be multiples of the step 0.5, "
        "got 0.5 and 1.25",
        "space.run.seed={uniform}: expected whole numbers: this setting takes no others",
        "space.model.backbone={uniform}: expected a list of choices: this setting is not a single "
        "number",
        f"space.output: {cannot}",
        f"space.run.objective: {cannot}",
        "space.anchors.base_scale=[big, 2.0]: expected numbers > 0, in strides",
        "space.anchors.num_scales={uniform}: expected whole numbers from 1 to 9",
        "space.anchors.scales and space.anchors.base_scale or anchors.num_scales are both given: "
        "the latter make the scales; keep one",
    ]


@pytest.mark.parametrize("key", [BASE_SCALE, NUM_SCALES])
def test_parse_space_refuses_scales_beside_either_key_that_makes_them(key: str) -> None:
    with pytest.raises(ConfigError, match=r"^space\.anchors\.scales and .* are both given"):
        parse_space({"anchors.scales": [[2.0, 3.0]], key: [2, 3]}, TrainJob)


@pytest.mark.parametrize(
    ("domain", "value", "is_held"),
    [
        (CHOICES, [1.0, 2.0, 0.5], True),
        (CHOICES, (1, 3), True),
        (CHOICES, [1, 2], False),
        (CHOICES, [1, 2, 0.4], False),
        (CHOICES, None, True),
        (CHOICES, "a", True),
        (CHOICES, "b", False),
        (UNIFORM, 0.25, True),
        (UNIFORM, 0.5, True),
        (UNIFORM, 0.2499, False),
        (UNIFORM, 0.51, False),
        (UNIFORM, "0.3", False),
        (UNIFORM, None, False),
        (UNIFORM, math.nan, False),
        (Domain("k", "uniform", (0, 1)), True, False),
        (LOG, 0.05, True),
        (LOG, 0.0009, False),
        (STEPS, 3 * 0.1, True),  # 0.30000000000000004
        (STEPS, 0.7000000000000001, True),
        (STEPS, 0.35, False),
        (STEPS, 0.8, False),
        (STEPS, math.inf, False),
        (WHOLE, 8, True),
        (WHOLE, 8.0, True),
        (WHOLE, 6, False),
        (WHOLE, 20, False),
        (WHOLE_UNIFORM, 6, True),
        (WHOLE_UNIFORM, 4.5, False),
    ],
)
def test_holds_is_true_for_what_the_domain_can_give(
    domain: Domain, value: object, is_held: bool
) -> None:
    assert domain.holds(value) is is_held


def test_adopt_gives_the_value_in_the_writing_of_the_domain() -> None:
    assert repr(CHOICES.adopt([1.0, 2.0, 0.5])) == "[1, 2, 0.5]"
    assert repr(CHOICES.adopt((1, 3))) == "[1.0, 3.0]"
    assert UNIFORM.adopt(0.3) == 0.3


def test_adopt_refuses_what_the_domain_does_not_hold() -> None:
    with pytest.raises(ValueError, match=r"anchors\.ratios=\[1\.0\]: not in choice"):
        CHOICES.adopt([1.0])


@pytest.mark.parametrize(
    ("domain", "middle"),
    [
        (UNIFORM, 0.375),
        (LOG, 0.01),  # sqrt(0.001 * 0.1)
        (STEPS, 0.4),
        (WHOLE_LOG, 100),
        (Domain("k", "choice", (1, 2, 3)), 2),
    ],
)
def test_middle_is_halfway(domain: Domain, middle: float) -> None:
    assert domain.middle == pytest.approx(middle, rel=1e-12)


@pytest.mark.parametrize(
    "domain", [CHOICES, UNIFORM, LOG, STEPS, WHOLE, WHOLE_UNIFORM, WHOLE_LOG], ids=lambda d: d.kind
)
def test_middle_is_in_the_domain(domain: Domain) -> None:
    assert domain.holds(domain.middle)
    assert isinstance(domain.middle, int) or not domain.is_integer


def test_make_changes_makes_scales_of_one_octave(tree: dict[str, Any]) -> None:
    changes = make_changes({BASE_SCALE: 2, NUM_SCALES: 3, "optim.peak_lr": 0.1}, tree)
    assert changes == {
        "optim.peak_lr": 0.1,
        "anchors.scales": [2.0, 2 * 2 ** (1 / 3), 2 * 2 ** (2 / 3)],
    }
    assert changes["anchors.scales"] == pytest.approx([2.0, 2.52, 3.17], abs=0.005)


@pytest.mark.parametrize(
    ("point", "scales"),
    [
        ({BASE_SCALE: 3.0}, [3.0, 3 * 2 ** (1 / 3), 3 * 2 ** (2 / 3)]),
        ({NUM_SCALES: 2}, [4.0, 4 * 2**0.5]),
        ({NUM_SCALES: 1}, [4.0]),
        ({BASE_SCALE: 1.5, NUM_SCALES: 1}, [1.5]),
    ],
)
def test_make_changes_takes_what_the_point_leaves_open_from_the_training(
    tree: dict[str, Any], point: dict[str, object], scales: list[float]
) -> None:
    assert make_changes(point, tree) == {"anchors.scales": scales}


def test_make_changes_leaves_scales_alone_when_neither_key_is_searched(
    tree: dict[str, Any],
) -> None:
    point = {"anchors.scales": [2.0], "run.seed": 3}
    assert make_changes(point, tree) == point


def test_find_space_faults_is_empty_when_all_values_are_valid(tree: dict[str, Any]) -> None:
    space = {
        BASE_SCALE: {"loguniform": [1.0, 8.0]},
        NUM_SCALES: {"quniform": [1, 9, 1]},
        "anchors.ratios": [[1.0], [0.5, 1, 2]],
        "model.backbone": ["ResNet10FPN", "ResNet18FPN"],
        "model.backbone_weights": [None, "DEFAULT"],
        "run.batch": {"quniform": [2, 16, 2]},
        "optim.peak_lr": {"loguniform": [1e-4, 1e-2]},
    }
    assert find_space_faults(space, TrainJob, tree) == []


def test_find_space_faults_tries_each_choice_and_both_ends(tree: dict[str, Any]) -> None:
    space = {
        "optim.gamma": {"uniform": [0.1, 2.0]},
        "model.backbone": ["ResNet18FPN", "resnet50"],
        "anchors.ratios": [[1.0, 0], [1.0], "1 2"],
        "augment.hue": {"quniform": [-0.1, 0.5, 0.1]},
    }
    assert find_space_faults(space, TrainJob, tree) == [
        "space.optim.gamma: optim.gamma=2.0 (--gamma): expected a number > 0 and < 1",
        "space.model.backbone: model.backbone=resnet50 (--backbone): expected one of ResNet10FPN, "
        "ResNet18FPN, ResNet34FPN, ResNet50FPN, ResNet101FPN, ResNet152FPN, MobileNetV3LargeFPN; "
        "nearest: ResNet50FPN",
        "space.anchors.ratios: anchors.ratios[1]=0 (--anchor-ratios): expected a number > 0",
        "space.anchors.ratios: anchors.ratios=1 2 (--anchor-ratios): expected 1 to 9 numbers > 0",
        "space.augment.hue: augment.hue=-0.1 (--augment-hue): expected a number from 0 to 0.5",
    ]


@pytest.mark.parametrize(
    ("space", "fault"),
    [
        # Both ends divide among two workers; 3 does not.
        ({"run.batch": {"uniform": [2, 16]}}, "run.batch=3 does not divide among run.workers=2"),
        ({"run.batch": {"quniform": [2, 14, 3]}}, "expected low and high to be multiples of"),
        ({"model.fpn_channels": {"loguniform": [64, 256]}}, "model.fpn_channels=65"),
    ],
)
def test_find_space_faults_sees_what_both_ends_hide(
    tree: dict[str, Any], space: dict[str, object], fault: str
) -> None:
    (line,) = find_space_faults(space, TrainJob, tree)
    assert fault in line


def test_find_space_faults_tries_values_of_two_keys_together(tree: dict[str, Any]) -> None:
    space = {"data.resize": [640, 1200], "run.seed": [1, 2], "data.max_size": [1000, 1333]}
    assert find_space_faults(space, TrainJob, tree) == [
        "space.data.resize with space.data.max_size: data.max_size=1000 is below "
        "data.resize=1200: the long side cannot be shorter than the short side; raise --max-size "
        "or lower --resize"
    ]


def test_find_space_faults_gives_what_cannot_be_read_before_it_tries_anything(
    tree: dict[str, Any],
) -> None:
    space = {"run.seed": 5, "optim.gamma": [7.0]}
    (fault,) = find_space_faults(space, TrainJob, tree)
    assert fault.startswith("space.run.seed=5: expected a list of choices")


@pytest.mark.parametrize("value", [[1.0, 0.5], (2, 3), None, "2-7", 0.3, 4, True, []])
def test_decode_point_gives_back_what_encode_choice_took(value: object) -> None:
    encoded = encode_choice(value)
    assert isinstance(encoded, (str, float, int, bool, type(None)))
    expected = list(value) if isinstance(value, tuple) else value
    assert decode_point({"key": encoded}) == {"key": expected}
