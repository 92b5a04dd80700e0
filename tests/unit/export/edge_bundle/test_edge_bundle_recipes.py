"""Each target's build: the TensorRT and Jetson Linux it accepts, and trtexec's options."""

from __future__ import annotations

import pytest

from retinaray.export.edge_bundle.recipes import make_recipe
from retinaray.export.mixed_precision import list_float32_nodes, to_fp16
from retinaray.export.targets import TARGETS
from retinaray.inference.onnx_contract import Precision

RECORD = ("--profilingVerbosity=detailed", "--exportLayerInfo=layers.json")


@pytest.mark.parametrize(
    ("target", "tensorrt", "l4t"),
    [
        ("jetpack5", ("8.5", "8.6"), (35,)),
        ("jetpack6", ("10.3",), (36,)),
        ("jetpack7", ("10.13", "10.16"), (38, 39)),
        # A server has any TensorRT of that major.
        ("deepstream-dgpu", ("10",), ()),
        ("tensorrt11", ("11",), ()),
    ],
)
def test_make_recipe_accepts_what_belongs_to_the_target(
    float_onnx: bytes, target: str, tensorrt: tuple[str, ...], l4t: tuple[int, ...]
) -> None:
    recipe = make_recipe(TARGETS[target], "fp32", float_onnx)
    assert recipe.tensorrt == tensorrt
    assert recipe.l4t == l4t


@pytest.mark.parametrize(
    ("target", "flags", "fallback"),
    [
        ("jetpack6", ("--stronglyTyped",), True),
        ("deepstream-dgpu", ("--stronglyTyped",), True),
        ("jetpack7", ("--stronglyTyped",), False),
        ("tensorrt11", (), False),
    ],
)
def test_make_recipe_types_strongly_where_it_can(
    float_onnx: bytes, target: str, flags: tuple[str, ...], fallback: bool
) -> None:
    content = to_fp16(float_onnx)
    recipe = make_recipe(TARGETS[target], "fp16", content)
    assert recipe.flags == (*flags, *RECORD)
    assert (recipe.fallback_flags is not None) is fallback
    if recipe.fallback_flags is not None:
        # TensorRT 10.12 and later refuse these together.
        assert "--stronglyTyped" not in recipe.fallback_flags
        assert "--fp16" in recipe.fallback_flags


@pytest.mark.parametrize(
    ("precision", "flags"), [("fp32", ()), ("fp16", ("--fp16",)), ("int8", ("--int8", "--fp16"))]
)
def test_make_recipe_keeps_the_decoding_in_float32_where_the_builder_chooses(
    float_onnx: bytes, precision: Precision, flags: tuple[str, ...]
) -> None:
    recipe = make_recipe(TARGETS["jetpack5"], precision, float_onnx)
    assert recipe.fallback_flags is None
    assert recipe.flags[: len(flags)] == flags
    constraints = recipe.flags[len(flags) : -len(RECORD)]
    if precision == "fp32":
        assert constraints == ()
    else:
        names = list_float32_nodes(float_onnx)
        assert len(names) > 10
        layers = ",".join(f"{name}:fp32" for name in names)
        assert constraints == ("--precisionConstraints=obey", f"--layerPrecisions={layers}")
