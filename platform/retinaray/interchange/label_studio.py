"""Label Studio: JSON tasks to import, one per image, and the labelling set-up that fits them.

Detections become `predictions`, ground truth `annotations`; boxes are percent of the image. Label
Studio's own COCO export leads back, so nothing is read here.

Source: Label Studio documentation, "Import pre-annotated data into Label Studio" and "Raw JSON
format of completed tasks".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from retinaray.interchange.labelled_set import (
    FormatTraits,
    LabelledBox,
    LabelledImage,
    LabelledSet,
    cut_to_image,
)

TRAITS = FormatTraits(
    has_image_ids=True, has_scores=True, attributes=frozenset(), is_relative=True, crowd="left out"
)
LOCAL_FILES = "/data/local-files/?d="
"""How Label Studio addresses files of its own machine, below its document root."""
_CONTROL, _OBJECT = "label", "image"


def write_label_studio(
    labels: LabelledSet, *, image_prefix: str = LOCAL_FILES
) -> Iterator[tuple[str, str]]:
    """Write tasks.json and label_config.xml; crowd regions are left out, boxes cut to their image.

    Args:
        labels: What to write.
        image_prefix: What stands before each file name: an address, or `LOCAL_FILES` and a folder.

    Yields:
        Name and content of each file.
    """
    tasks = [_write_task(image, image_prefix) for image in labels.images]
    yield "tasks.json", json.dumps(tasks, ensure_ascii=False, indent=1) + "\n"
    values = "\n".join(f"    <Label value={quoteattr(name)}/>" for name in labels.names)
    yield (
        "label_config.xml",
        f'<View>\n  <Image name="{_OBJECT}" value="$image"/>\n'
        f'  <RectangleLabels name="{_CONTROL}" toName="{_OBJECT}">\n{values}\n'
        "  </RectangleLabels>\n</View>\n",
    )


def _write_task(image: LabelledImage, image_prefix: str) -> dict[str, Any]:
    boxes = [cut_to_image(box, image) for box in image.boxes if not box.is_crowd]
    found = [box for box in boxes if box.score is not None]
    drawn = [box for box in boxes if box.score is None]
    task: dict[str, Any] = {
        "data": {"image": image_prefix + quote(image.file_name), "file_name": image.file_name}
    }
    if image.image_id is not None:
        task["data"]["image_id"] = image.image_id
    if found:
        result = _write_regions(found, image, "p")
        scores = [region["score"] for region in result]
        task["predictions"] = [
            {"model_version": "retinaray", "score": min(scores), "result": result}
        ]
    if drawn:
        task["annotations"] = [{"result": _write_regions(drawn, image, "a")}]
    return task


def _write_regions(
    boxes: list[LabelledBox], image: LabelledImage, letter: str
) -> list[dict[str, Any]]:
    return [
        _write_region(box, image, f"{letter}{number}") for number, box in enumerate(boxes, start=1)
    ]


def _write_region(box: LabelledBox, image: LabelledImage, region_id: str) -> dict[str, Any]:
    left, top, width, height = box.xywh
    region: dict[str, Any] = {
        "id": region_id,
        "from_name": _CONTROL,
        "to_name": _OBJECT,
        "type": "rectanglelabels",
        "original_width": image.width,
        "original_height": image.height,
        "image_rotation": 0,
        "value": {
            "x": 100 * left / image.width,
            "y": 100 * top / image.height,
            "width": 100 * width / image.width,
            "height": 100 * height / image.height,
            "rotation": 0,
            "rectanglelabels": [box.name],
        },
    }
    return region if box.score is None else region | {"score": float(box.score)}
