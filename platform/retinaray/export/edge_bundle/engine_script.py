"""build_engine.sh: the trtexec call that is right for one device, and for no other."""

from __future__ import annotations

from dataclasses import dataclass

from retinaray.export.edge_bundle.template_text import fill_template, quote_shell
from retinaray.inference.onnx_contract import INPUT_NAME


@dataclass(frozen=True)
class EngineRecipe:
    """How trtexec builds on one kind of device.

    Attributes:
        target: Short name of the device.
        description: What it is, in words.
        tensorrt: Versions that may build, `major.minor` or `major` for all of it.
        l4t: Majors of Jetson Linux that it runs; empty = it is no Jetson.
        flags: Options of trtexec that settle the types of the layers, and more.
        fallback_flags: Tried when these fail; none = nothing else would be right.
    """

    target: str
    description: str
    tensorrt: tuple[str, ...]
    l4t: tuple[int, ...]
    flags: tuple[str, ...]
    fallback_flags: tuple[str, ...] | None = None


def write_engine_script(
    recipe: EngineRecipe,
    *,
    onnx_name: str,
    onnx_sha256: str,
    engine_name: str,
    canvas: tuple[int, int],
    batch: tuple[int, int, int],
    fixed_batch: int | None,
) -> str:
    """The script as text.

    Args:
        recipe: The device.
        onnx_name: File beside the script.
        onnx_sha256: Its hash.
        engine_name: File to write.
        canvas: Network height and width.
        batch: Least, usual and most images per call.
        fixed_batch: Of a file that takes no other batch: it must be given no shapes.
    """
    height, width = canvas
    shapes = [
        f"--{which}Shapes={INPUT_NAME}:{count}x3x{height}x{width}"
        for which, count in zip(("min", "opt", "max"), batch, strict=True)
    ]
    return fill_template(
        "build_engine.sh",
        {
            "WHAT": recipe.description,
            "TARGET": recipe.target,
            "ONNX": onnx_name,
            "ONNX_SHA256": onnx_sha256,
            "ENGINE": engine_name,
            "TENSORRT": " ".join(recipe.tensorrt),
            "L4T": " ".join(map(str, recipe.l4t)),
            "SHAPES": "" if fixed_batch else _join_words(shapes),
            "FLAGS": _join_words(recipe.flags),
            "HAS_FALLBACK": "no" if recipe.fallback_flags is None else "yes",
            "FALLBACK_FLAGS": _join_words(recipe.fallback_flags or ()),
        },
    )


def _join_words(words: tuple[str, ...] | list[str]) -> str:
    return " ".join(map(quote_shell, words))
