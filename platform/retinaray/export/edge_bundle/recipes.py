"""From a target to the build script's settings: versions it accepts, options of trtexec."""

from __future__ import annotations

from retinaray.export.edge_bundle.engine_script import EngineRecipe
from retinaray.export.mixed_precision import list_float32_nodes
from retinaray.export.targets import Target
from retinaray.inference.onnx_contract import Precision

# Majors of Jetson Linux; what is not here is no Jetson.
_L4T: dict[str, tuple[int, ...]] = {"jetpack5": (35,), "jetpack6": (36,), "jetpack7": (38, 39)}
# To see afterwards which layer runs in which type.
_RECORD = ("--profilingVerbosity=detailed", "--exportLayerInfo=layers.json")


def make_recipe(target: Target, precision: Precision, content: bytes) -> EngineRecipe:
    """How a target builds an engine.

    Args:
        target: The device.
        precision: What the engine should compute in.
        content: The ONNX file; where the builder chooses the types, its nodes that must stay
            float32 are named.
    """
    l4t = _L4T.get(target.name, ())
    names = list_float32_nodes(content)
    flags = target.trtexec_flags(precision, float32_nodes=names)
    fallback = None
    if "weak" in target.typings[1:]:
        fallback = target.trtexec_flags(precision, typing="weak", float32_nodes=names)
    return EngineRecipe(
        target=target.name,
        description=target.description,
        tensorrt=_accept_versions(target, is_jetson=bool(l4t)),
        l4t=l4t,
        flags=(*flags, *_RECORD),
        fallback_flags=None if fallback is None else (*fallback, *_RECORD),
    )


def _accept_versions(target: Target, *, is_jetson: bool) -> tuple[str, ...]:
    """A JetPack has the versions listed; a server has any of the same major."""
    if is_jetson:
        return target.tensorrt
    return tuple(dict.fromkeys(version.partition(".")[0] for version in target.tensorrt))
