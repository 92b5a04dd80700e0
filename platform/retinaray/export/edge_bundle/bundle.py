"""A bundle: everything that a device needs to run a model, and to prove that it runs it right."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retinaray import __version__
from retinaray.artifact import hash_content
from retinaray.errors import ExportError
from retinaray.export.edge_bundle.deepstream_files import DeepStreamSetting, write_deepstream_files
from retinaray.export.edge_bundle.engine_script import EngineRecipe, write_engine_script
from retinaray.export.edge_bundle.manifest import MANIFEST_NAME, add_manifest
from retinaray.export.edge_bundle.readme import write_readme
from retinaray.export.edge_bundle.recipes import make_recipe
from retinaray.export.edge_bundle.self_test import Sample, count_clear, write_self_test
from retinaray.export.edge_bundle.signature import Signature, read_signature
from retinaray.export.edge_bundle.template_text import read_template
from retinaray.export.targets import Target, check_file, read_file_kind
from retinaray.inference.onnx_contract import Precision

logger = logging.getLogger(__name__)

ONNX_NAME = "model.onnx"


@dataclass(frozen=True)
class BundleSettings:
    """For what a bundle is written.

    Attributes:
        target: The device and its software.
        precision: Type of the engine's convolutions.
        batch: Least, usual and most images per call.
        deepstream: DeepStream's version on the device, one of the target's; none = its newest.
        frame: Height and width of the frames that the device's source gives.
    """

    target: Target
    precision: Precision
    batch: tuple[int, int, int] = (1, 1, 1)
    deepstream: str | None = None
    frame: tuple[int, int] = (1080, 1920)


def build_bundle(
    content: bytes, settings: BundleSettings, samples: Sequence[Sample]
) -> dict[str, bytes]:
    """Write a bundle for a device with DeepStream.

    Args:
        content: The ONNX file for this target and precision, with float32 input: nvinfer feeds
            nothing else.
        settings: The device.
        samples: Images of the self-test with what `content` proposes in them.

    Returns:
        Name in the bundle to content, by rising name; the same inputs give the same bytes.

    Raises:
        CheckpointError: If `content` is no exported file.
        ExportError: If it does not fit the device, or the samples do not fit it.
    """
    signature = read_signature(content, uri=ONNX_NAME)
    deepstream = _choose_deepstream(settings)
    _check_fit(content, signature, settings)
    recipe = make_recipe(settings.target, settings.precision, content)
    engine_name = _name_engine(content, settings)
    if count_clear(samples, signature, settings.precision) == 0:
        logger.warning(
            "the model found nothing in %d self-test images, so the self-test will compare "
            "nothing: give images that show its classes (--images)",
            len(samples),
        )
    setting = DeepStreamSetting(
        target=settings.target.name,
        version=deepstream,
        precision=settings.precision,
        is_strongly_typed=settings.target.typings[0] == "strong",
        engine_name=engine_name,
        onnx_name=ONNX_NAME,
        batch=(settings.batch[0], settings.batch[2]),
        frame=settings.frame,
    )
    script = write_engine_script(
        recipe,
        onnx_name=ONNX_NAME,
        onnx_sha256=hash_content(content),
        engine_name=engine_name,
        canvas=signature.card.canvas,
        batch=settings.batch,
        fixed_batch=signature.fixed_batch,
    )
    files = {
        ONNX_NAME: content,
        "build_engine.sh": script.encode(),
        "LICENSE": read_template("LICENSE").encode(),
        **write_self_test(
            samples, signature, engine_name=engine_name, precision=settings.precision
        ),
        **write_deepstream_files(signature.card, setting),
    }
    facts = _list_facts(content, signature, settings, recipe)
    facts |= {"deepstream": deepstream, "engine": engine_name}
    files["README.md"] = write_readme(signature, facts, num_samples=len(samples)).encode()
    return add_manifest(files, facts)


def write_bundle(files: Mapping[str, bytes], folder: Path) -> None:
    """Write a bundle to a local folder, the manifest last.

    Raises:
        ExportError: If the folder holds something else than an earlier bundle.
    """
    if folder.exists() and not (folder / MANIFEST_NAME).is_file() and any(folder.iterdir()):
        raise ExportError(f"{folder}: expected no such folder, or an earlier bundle in it")
    for name in sorted(files, key=lambda name: name == MANIFEST_NAME):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[name])


def _name_engine(content: bytes, settings: BundleSettings) -> str:
    """A name that no engine of another model has: a folder may hold an earlier bundle's."""
    digest = hash_content(content)[:8]
    return f"model_{digest}_b{settings.batch[2]}_{settings.precision}.engine"


def _choose_deepstream(settings: BundleSettings) -> str:
    target = settings.target
    if not target.deepstream:
        raise ExportError(
            f"target {target.name} ({target.description}) has no DeepStream, and a bundle is for "
            "DeepStream: use `retinaray export`, or the target triton"
        )
    chosen = settings.deepstream or target.deepstream[-1]
    if chosen not in target.deepstream:
        raise ExportError(
            f"target {target.name} has DeepStream {', '.join(target.deepstream)}, asked for "
            f"{chosen}"
        )
    return chosen


def _check_fit(content: bytes, signature: Signature, settings: BundleSettings) -> None:
    target = settings.target
    if signature.input_type != "float32":
        raise ExportError(
            f"target {target.name}: expected an ONNX file with float32 input, got "
            f"{signature.input_type}; nvinfer feeds float32 only: export with --input float32"
        )
    check_file(content, target)
    expected, kind = target.file_for(settings.precision), read_file_kind(content)
    if kind != expected:
        raise ExportError(
            f"target {target.name}: {settings.precision} is built there from a file of kind "
            f"{expected}, got {kind}"
        )
    least, usual, most = settings.batch
    if not 1 <= least <= usual <= most:
        raise ExportError(f"batch {settings.batch}: expected 1 <= least <= usual <= most")
    fixed = signature.fixed_batch
    if fixed is not None and settings.batch != (fixed, fixed, fixed):
        raise ExportError(
            f"batch {settings.batch}: the ONNX file takes batches of {fixed} only; export it "
            f"without a fixed batch, or bundle with --batch {fixed}"
        )


def _list_facts(
    content: bytes, signature: Signature, settings: BundleSettings, recipe: EngineRecipe
) -> dict[str, Any]:
    card = signature.card
    return {
        "target": recipe.target,
        "target_description": recipe.description,
        "tensorrt": list(recipe.tensorrt),
        "l4t": list(recipe.l4t),
        "precision": settings.precision,
        "batch": list(settings.batch),
        "model": {
            "onnx": ONNX_NAME,
            "sha256": hash_content(content),
            "run_id": card.run_id,
            "canvas": list(card.canvas),
            "input_type": signature.input_type,
            "num_candidates": signature.num_candidates,
            "classes": [
                {"id": category.id, "name": category.name, "score_threshold": threshold}
                for category, threshold in zip(
                    card.categories.categories, card.score_thresholds, strict=True
                )
            ],
            "nms_iou": card.nms_iou,
            "nms_kind": card.nms_kind,
            "max_detections": card.max_detections,
        },
        "versions": {**card.versions, "bundled_by": f"retinaray {__version__}"},
    }
