"""What DeepStream needs to run the engine: nvinfer's and deepstream-app's settings, labels, parser.

Source of keys and values: nvinfer's property parser and deepstream-app's configuration parser,
DeepStream 6.2 to 9.2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from retinaray.artifact import ModelCard
from retinaray.data.label_lines import label_lines
from retinaray.errors import ExportError
from retinaray.export.edge_bundle.template_text import fill_template, read_template

KITTI_FOLDER = "kitti"
_SAMPLE_VIDEO = "file:///opt/nvidia/deepstream/deepstream/samples/streams/sample_1080p_h264.mp4"
_FIRST_STRONGLY_TYPED = (9, 0)
_NETWORK_MODES = {"fp32": 0, "int8": 1, "fp16": 2}


@dataclass(frozen=True)
class DeepStreamSetting:
    """How the engine is used.

    Attributes:
        target: Short name of the device.
        version: DeepStream's version, `major.minor`.
        precision: `fp32`, `fp16` or `int8`.
        is_strongly_typed: Whether the file's own types are the precision.
        engine_name: Engine file in the bundle.
        onnx_name: ONNX file in the bundle.
        batch: Least and most frames per call.
        frame: Height and width of the frames that come from the source.
    """

    target: str
    version: str
    precision: str
    is_strongly_typed: bool
    engine_name: str
    onnx_name: str
    batch: tuple[int, int]
    frame: tuple[int, int]


def write_deepstream_files(card: ModelCard, setting: DeepStreamSetting) -> dict[str, bytes]:
    """The files by their names in the bundle.

    Raises:
        ExportError: If the model's suppression is none that nvinfer has.
    """
    app = {
        "MUX_BATCH": setting.batch[0],
        "GIE_BATCH": setting.batch[1],
        "FRAME_HEIGHT": setting.frame[0],
        "FRAME_WIDTH": setting.frame[1],
        "TRACKER": 0,
    }
    texts = {
        "config_infer_primary.txt": _write_infer_config(card, setting),
        "deepstream_app.txt": fill_template(
            "deepstream_app.txt",
            {
                **app,
                "FILE": "deepstream_app.txt",
                "PURPOSE": "To watch and to measure frames per second; [sink1] writes a video.",
                "KITTI_LINES": "# Each frame's boxes as a text file: see deepstream_kitti.txt.",
                "URI": _SAMPLE_VIDEO,
                "OSD": 1,
                "FAKE_SINK": 1,
                "FILE_SINK": 0,
            },
        ),
        "deepstream_kitti.txt": fill_template(
            "deepstream_app.txt",
            {
                **app,
                "FILE": "deepstream_kitti.txt",
                "PURPOSE": "To measure AP: writes each frame's boxes, see README.md.",
                # Without this folder deepstream-app writes nothing, and says nothing.
                "KITTI_LINES": f"gie-kitti-output-dir={KITTI_FOLDER}",
                "URI": "file:///path/to/images.avi",
                "OSD": 0,
                "FAKE_SINK": 1,
                "FILE_SINK": 0,
            },
        ),
        "labels.txt": "".join(f"{line}\n" for line in label_lines(card.categories)),
        f"{KITTI_FOLDER}/.keep": "",
        "retinanet_parser.cpp": read_template("retinanet_parser.cpp"),
        "Makefile": read_template("Makefile"),
    }
    return {name: text.encode() for name, text in texts.items()}


def parse_version(version: str) -> tuple[int, int]:
    """`7.1` as (7, 1).

    Raises:
        ExportError: If it is no version.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)*", version)
    if match is None:
        raise ExportError(f"DeepStream version {version!r}: expected one such as 7.1")
    return int(match[1]), int(match[2])


def _write_infer_config(card: ModelCard, setting: DeepStreamSetting) -> str:
    has_flag = parse_version(setting.version) >= _FIRST_STRONGLY_TYPED
    # nvinfer builds as build_engine.sh does only if it can be told to keep the file's types.
    is_flagged = setting.is_strongly_typed and has_flag
    return fill_template(
        "config_infer_primary.txt",
        {
            "MODEL": card.run_id or "a retinaray detector",
            "TARGET": setting.target,
            "DEEPSTREAM": setting.version,
            "ENGINE": setting.engine_name,
            "ONNX_LINES": _onnx_lines(setting, is_flagged=is_flagged),
            "TYPE_LINES": _type_lines(setting, is_flagged=is_flagged),
            "BATCH": setting.batch[1],
            "HEIGHT": card.canvas[0],
            "WIDTH": card.canvas[1],
            "NUM_CLASSES": len(card.categories),
            "CLUSTER_LINES": _cluster_lines(card),
            "TOPK": card.max_detections,
            "CLASS_GROUPS": _class_groups(card),
        },
    )


def _onnx_lines(setting: DeepStreamSetting, *, is_flagged: bool) -> str:
    if is_flagged or setting.precision == "fp32":
        return (
            "# Used when the engine is missing or does not load; nvinfer then builds the same.\n"
            f"onnx-file={setting.onnx_name}"
        )
    return (
        "# No onnx-file: when the engine does not load, nvinfer shall stop. From this file it\n"
        "# would build another engine, with other types of layers, and not say so."
    )


def _type_lines(setting: DeepStreamSetting, *, is_flagged: bool) -> str:
    if is_flagged:
        return (
            "# The types are in the ONNX file (DeepStream 9.0 and later); other modes than 0\n"
            "# would contradict it.\n"
            "network-mode=0\n"
            "strongly-typed=1"
        )
    return (
        "# 0: FP32, 1: INT8, 2: FP16; what the engine was built with.\n"
        f"network-mode={_NETWORK_MODES[setting.precision]}"
    )


def _cluster_lines(card: ModelCard) -> str:
    lines = {
        "class": "# 2: suppress overlaps (NMS), class by class.\ncluster-mode=2",
        "none": "# 4: overlaps stay; the model was evaluated so.\ncluster-mode=4",
    }
    if card.nms_kind not in lines:
        raise ExportError(
            f"nms_kind={card.nms_kind!r}: nvinfer suppresses overlaps class by class or not at "
            "all: choose again with `retinaray thresholds --nms class --output MODEL` and bundle "
            "that one"
        )
    return lines[card.nms_kind]


def _class_groups(card: ModelCard) -> str:
    groups = [_class_group("all", min(card.score_thresholds), card)]
    groups += [
        f"# {line}\n" + _class_group(str(index), threshold, card)
        for index, (line, threshold) in enumerate(
            zip(label_lines(card.categories), card.score_thresholds, strict=True)
        )
    ]
    return "\n".join(groups).rstrip("\n")


def _class_group(name: str, threshold: float, card: ModelCard) -> str:
    lines = [f"[class-attrs-{name}]", f"pre-cluster-threshold={threshold!r}"]
    if card.nms_kind == "class":
        lines.append(f"nms-iou-threshold={card.nms_iou!r}")
    lines.append(f"topk={card.max_detections}")
    return "\n".join(lines) + "\n"
