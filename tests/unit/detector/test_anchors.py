"""Anchors against hand-computed corners and ODTK's two published formulas."""

from __future__ import annotations

import hashlib
import math
import struct

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator

from retinaray.detector.anchors import (
    DEFAULT_RATIOS,
    DEFAULT_SCALES,
    DEFAULT_STRIDES,
    AnchorSpec,
    Convention,
    count_cells,
    count_level_anchors,
    hash_anchors,
    make_anchors,
    make_cell_anchors,
)


def sides_of(corners: Tensor) -> Tensor:
    return corners[:, 2:] - corners[:, :2]


def odtk_inclusive_corners(stride: int, *, is_legacy: bool) -> Tensor:
    """ODTK's formulas, evaluated as it does: tensors in float32, corners inclusive."""
    scales = torch.tensor(DEFAULT_SCALES).repeat_interleave(3)[:, None]
    ratios = torch.tensor(DEFAULT_RATIOS * 3)
    widths = torch.sqrt(stride * stride / ratios)
    widths = torch.round(widths) if is_legacy else widths
    heights = torch.round(widths * ratios) if is_legacy else widths * ratios
    sides = torch.stack((widths, heights), dim=1) * scales
    last = 1.0 if is_legacy else 0.0
    return torch.cat((0.5 * (stride - sides), 0.5 * (stride + sides) - last), dim=1)


def test_make_cell_anchors_centres_exact_sides_when_convention_is_centered() -> None:
    spec = AnchorSpec(scales=(4.0, 8.0), ratios=(1.0, 4.0, 0.25))
    # Stride 8: centre (4, 4). Scale 4, ratio 1: 32x32 -> 4 -+ 16. Ratio 4 = h/w: sqrt(64/4) = 4
    # wide, 16 high, times 4: 16x64 -> x 4 -+ 8, y 4 -+ 32. Scale 8 doubles all sides.
    expected = [
        [-12.0, -12.0, 20.0, 20.0],
        [-4.0, -28.0, 12.0, 36.0],
        [-28.0, -4.0, 36.0, 12.0],
        [-28.0, -28.0, 36.0, 36.0],
        [-12.0, -60.0, 20.0, 68.0],
        [-60.0, -12.0, 68.0, 20.0],
    ]
    torch.testing.assert_close(make_cell_anchors(spec, 8), torch.tensor(expected))


def test_make_cell_anchors_goes_through_ratios_before_scales() -> None:
    anchors = make_cell_anchors(AnchorSpec(), 8)
    widths, heights = sides_of(anchors).unbind(1)
    ratios = torch.tensor(DEFAULT_RATIOS * 3)
    scales = torch.tensor(DEFAULT_SCALES).repeat_interleave(3)
    torch.testing.assert_close(heights / widths, ratios)
    torch.testing.assert_close((heights * widths).sqrt() / 8, scales)


@pytest.mark.parametrize("stride", [8, 128])
@pytest.mark.parametrize("convention", ["odtk", "odtk-legacy"])
def test_make_cell_anchors_equals_odtk_formula_when_convention_is_odtk(
    stride: int, convention: Convention
) -> None:
    inclusive = odtk_inclusive_corners(stride, is_legacy=convention == "odtk-legacy")
    continuous = inclusive + torch.tensor([0.0, 0.0, 1.0, 1.0])
    made = make_cell_anchors(AnchorSpec(convention=convention), stride)
    torch.testing.assert_close(made, continuous, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        # sqrt(64/2) = 5.657 wide, 11.314 high, times 4 = 22.63 x 45.25; every side one pixel more.
        ("odtk", [(33.0, 33.0), (23.63, 46.25), (46.25, 23.63)]),
        # Rounded first: ratio 2: 6 x 12, times 4 = 24 x 48; ratio 0.5: 11 x round(5.5)=6 (to even).
        ("odtk-legacy", [(32.0, 32.0), (24.0, 48.0), (44.0, 24.0)]),
        ("centered", [(32.0, 32.0), (22.63, 45.25), (45.25, 22.63)]),
    ],
)
def test_make_cell_anchors_has_published_sides_when_stride_is_8(
    convention: Convention, expected: list[tuple[float, float]]
) -> None:
    sides = sides_of(make_cell_anchors(AnchorSpec(convention=convention), 8))[:3]
    torch.testing.assert_close(sides, torch.tensor(expected), rtol=0, atol=0.006)


def test_make_cell_anchors_has_published_sides_when_stride_is_128() -> None:
    legacy = sides_of(make_cell_anchors(AnchorSpec(convention="odtk-legacy"), 128))
    # sqrt(16384/2) = 90.51 -> 91 x 182; ratio 0.5: 181.02 -> 181 x round(90.5) = 90 (to even).
    expected = torch.tensor([(128.0, 128.0), (91.0, 182.0), (181.0, 90.0)]) * 4
    torch.testing.assert_close(legacy[:3], expected)
    modern = sides_of(make_cell_anchors(AnchorSpec(convention="odtk"), 128))
    # 128 * 4 + 1 = 513; 90.5097 * 4 + 1 = 363.04; 181.0193 * 4 + 1 = 725.08.
    expected = torch.tensor([(513.0, 513.0), (363.04, 725.08), (725.08, 363.04)])
    torch.testing.assert_close(modern[:3], expected, rtol=0, atol=0.006)


def test_make_cell_anchors_has_torchvision_sides_up_to_its_rounding() -> None:
    sizes = tuple(8 * scale for scale in DEFAULT_SCALES)
    generator = AnchorGenerator((sizes,), (DEFAULT_RATIOS,))
    # Torchvision goes through scales before ratios and rounds the corners of anchors centred at 0.
    ratio_major = generator.cell_anchors[0].reshape(3, 3, 4)
    theirs = sides_of(ratio_major.transpose(0, 1).reshape(9, 4))
    ours = sides_of(make_cell_anchors(AnchorSpec(), 8))
    assert (ours - theirs).abs().max() <= 1.0
    assert ours[0].equal(theirs[0])


@pytest.mark.parametrize("spec", [AnchorSpec(), AnchorSpec(strides=(4, 8, 16, 32, 64, 128))])
@pytest.mark.parametrize(
    ("height", "width"), [(480, 600), (1, 1), (607, 129)], ids=["even", "1 px", "odd"]
)
def test_make_anchors_centres_stand_in_the_middle_of_cells(
    spec: AnchorSpec, height: int, width: int
) -> None:
    anchors = make_anchors(spec, height, width)
    expected = [
        ((column + 0.5) * stride, (row + 0.5) * stride)
        for stride in spec.strides
        for row in range(math.ceil(height / stride))
        for column in range(math.ceil(width / stride))
        for _ in range(9)
    ]
    centres = 0.5 * (anchors[:, :2] + anchors[:, 2:])
    torch.testing.assert_close(centres, torch.tensor(expected), rtol=0, atol=1e-3)


def test_count_level_anchors_sums_to_the_anchors_made() -> None:
    spec = AnchorSpec(scales=(4.0,), ratios=(1.0, 2.0))
    # 800x1080 over 8..128, rounded up, two anchors per cell.
    expected = (100 * 135 * 2, 50 * 68 * 2, 25 * 34 * 2, 13 * 17 * 2, 7 * 9 * 2)
    assert count_level_anchors(spec, 800, 1080) == expected
    assert make_anchors(spec, 800, 1080).shape == (sum(expected), 4)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 540, 608, 1333])
@pytest.mark.parametrize("stride", DEFAULT_STRIDES)
def test_count_cells_equals_repeated_halving_with_rounding_up(size: int, stride: int) -> None:
    halved = size
    for _ in range(stride.bit_length() - 1):
        halved = (halved + 1) // 2
    assert count_cells(size, stride) == halved


def test_hash_anchors_is_the_digest_of_little_endian_floats() -> None:
    # Two anchors: eight float32 in order, nothing else.
    anchors = torch.tensor([[0.0, 1.0, 2.5, 4.0], [-1.0, 0.5, 8.0, 16.0]])
    content = struct.pack("<8f", 0.0, 1.0, 2.5, 4.0, -1.0, 0.5, 8.0, 16.0)
    assert hash_anchors(anchors) == hashlib.sha256(content).hexdigest()


def test_hash_anchors_does_not_depend_on_memory_or_gradient() -> None:
    anchors = make_anchors(AnchorSpec(), 64, 96)
    columns = anchors.T.contiguous().T
    assert not columns.is_contiguous()
    assert hash_anchors(columns) == hash_anchors(anchors)
    assert hash_anchors(anchors.clone().requires_grad_()) == hash_anchors(anchors)


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        (AnchorSpec(scales=(4.0, 5.0, 6.0)), (64, 96)),
        (AnchorSpec(ratios=(2.0, 1.0, 0.5)), (64, 96)),
        (AnchorSpec(strides=(4, 8, 16, 32, 64, 128)), (64, 96)),
        (AnchorSpec(convention="odtk"), (64, 96)),
        (AnchorSpec(), (96, 64)),
    ],
    ids=["scales", "order of ratios", "levels", "convention", "canvas"],
)
def test_hash_anchors_differs_when_anchors_differ(spec: AnchorSpec, size: tuple[int, int]) -> None:
    default = hash_anchors(make_anchors(AnchorSpec(), 64, 96))
    assert hash_anchors(make_anchors(spec, *size)) != default
    assert hash_anchors(make_anchors(spec, *size)) == hash_anchors(make_anchors(spec, *size))


@pytest.mark.parametrize(
    "spec",
    [AnchorSpec(), AnchorSpec((2.0, 3.5), (0.3,), (4, 8, 16, 32, 64, 128), "odtk-legacy")],
)
def test_from_dict_gives_back_what_to_dict_took(spec: AnchorSpec) -> None:
    assert AnchorSpec.from_dict(spec.to_dict()) == spec


def test_from_dict_refuses_when_a_key_is_missing() -> None:
    values = AnchorSpec().to_dict()
    del values["ratios"]
    with pytest.raises(KeyError, match="ratios"):
        AnchorSpec.from_dict(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": ()}, r"anchor scales=\(\): expected at least one"),
        ({"scales": (4.0, 0.0)}, r"anchor scales=\(4.0, 0.0\)"),
        ({"ratios": (float("nan"),)}, r"anchor ratios=\(nan,\)"),
        ({"ratios": (float("inf"),)}, r"anchor ratios=\(inf,\)"),
        ({"strides": ()}, r"anchor strides=\(\)"),
        ({"strides": (8, 16, 64)}, r"anchor strides=\(8, 16, 64\)"),
        ({"strides": (0, 0)}, r"anchor strides=\(0, 0\)"),
        ({"strides": (3, 6, 12)}, r"anchor strides=\(3, 6, 12\)"),
        ({"strides": (-8, -16)}, r"anchor strides=\(-8, -16\)"),
        ({"convention": "torchvision"}, "anchor convention='torchvision'"),
    ],
)
def test_anchor_spec_refuses_when_a_value_is_out_of_range(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AnchorSpec(**changes)  # type: ignore[arg-type]
