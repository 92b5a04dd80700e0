"""README.md of a bundle: for a person with the device in hand and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retinaray.data.label_lines import label_lines
from retinaray.export.edge_bundle.signature import Signature
from retinaray.export.edge_bundle.template_text import fill_template
from retinaray.inference.onnx_contract import INPUT_NAME


def write_readme(signature: Signature, facts: Mapping[str, Any], *, num_samples: int) -> str:
    """The text.

    Args:
        signature: What the network takes and gives.
        facts: As in the bundle's manifest.
        num_samples: Images of the self-test.
    """
    card = signature.card
    height, width = card.canvas
    is_jetson = bool(facts["l4t"])
    most = facts["batch"][2]
    return fill_template(
        "README.md",
        {
            "MODEL": f"Detector {card.run_id}" if card.run_id else "Detector",
            "WHAT": facts["target_description"],
            "HEIGHT": height,
            "WIDTH": width,
            "NUM_CLASSES": len(card.categories),
            "PRECISION": facts["precision"].upper(),
            "VERSION": facts["versions"]["bundled_by"].removeprefix("retinaray "),
            "REQUIREMENTS": _list_requirements(facts, is_jetson=is_jetson),
            "NUM_SAMPLES": num_samples,
            "SYSTEM": "JetPack" if is_jetson else "TensorRT or of the GPU's driver",
            "MEASURE_FIRST": (
                "    sudo nvpmodel -m 0 && sudo jetson_clocks    # all cores, fixed clocks\n"
                if is_jetson
                else ""
            ),
            "TRTEXEC": "/usr/src/tensorrt/bin/trtexec",
            "ENGINE": facts["engine"],
            "SHAPES": (
                "" if signature.fixed_batch else f"--shapes={INPUT_NAME}:{most}x3x{height}x{width} "
            ),
            "BATCH": most,
            "CLASS_TABLE": _list_classes(signature),
            "NMS_IOU": card.nms_iou,
            "NMS_KIND": {"class": "class by class"}.get(card.nms_kind, "not at all"),
            "ONNX": facts["model"]["onnx"],
            "ONNX_SHA256": facts["model"]["sha256"],
            "BATCH_AXIS": signature.fixed_batch or "N",
            "INPUT_TYPE": signature.input_type,
            "NUM_CANDIDATES": signature.num_candidates,
            "RUN_ID": card.run_id or "unknown",
        },
    )


def _list_requirements(facts: Mapping[str, Any], *, is_jetson: bool) -> str:
    linux = f" on Jetson Linux (L4T) {' or '.join(map(str, facts['l4t']))}" if is_jetson else ""
    return (
        f"Needed: TensorRT {' or '.join(facts['tensorrt'])} with trtexec{linux}, python3 for\n"
        f"step 3, DeepStream {facts['deepstream']} for steps 4 and 5, g++ and make for step 4."
    )


def _list_classes(signature: Signature) -> str:
    card = signature.card
    rows = [
        f"| {index} | {line} | {category.id} | {threshold} |"
        for index, (line, category, threshold) in enumerate(
            zip(
                label_lines(card.categories),
                card.categories.categories,
                card.score_thresholds,
                strict=True,
            )
        )
    ]
    return "\n".join(
        ["| index | label | COCO id | threshold |", "| --- | --- | --- | --- |", *rows]
    )
