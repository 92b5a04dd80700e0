"""What a file that is no COCO probably is, and which command or step makes COCO of it.

It looks at content that is already in memory, and only to word a refusal: it never accepts a file.
"""

import re
from collections.abc import Mapping, Sequence

_HEAD_BYTES = 4096
_MOST_KEYS = 6
_IMAGE = "an image; give the folder of images as --images, and COCO JSON here"
_VIDEO = "a video; cut it into images first (ffmpeg -i FILE frames/%06d.jpg), and label those"
_ARCHIVE = "an archive; unpack it first"
_WEIGHTS = "a weights file; it is the model, and the annotations are COCO JSON"
_SIGNATURES: Sequence[tuple[int, bytes, str]] = (
    (0, b"\x1f\x8b", "gzip; unpack it first (gunzip)"),
    (0, b"BZh", _ARCHIVE),
    (0, b"\xfd7zXZ\0", _ARCHIVE),
    (0, b"7z\xbc\xaf", _ARCHIVE),
    (0, b"Rar!", _ARCHIVE),
    (0, b"\x28\xb5\x2f\xfd", _ARCHIVE),
    (257, b"ustar", _ARCHIVE),
    (0, b"\xff\xd8\xff", _IMAGE),
    (0, b"\x89PNG", _IMAGE),
    (0, b"GIF8", _IMAGE),
    (0, b"II*\0", _IMAGE),
    (0, b"MM\0*", _IMAGE),
    (8, b"WEBP", _IMAGE),
    (4, b"ftyp", _VIDEO),
    (8, b"AVI ", _VIDEO),
    (0, b"\x1aE\xdf\xa3", _VIDEO),
    (0, b"PAR1", "Parquet; write its rows as COCO JSON"),
    (0, b"%PDF", "a PDF"),
    (0, b"\x80\x02", _WEIGHTS),
    (0, b"version https://git-lfs", "a pointer of Git LFS; fetch the file (git lfs pull)"),
)
_YOLO_LINE = re.compile(r"\d+(\s+[01]?\.\d+(e-?\d+)?|\s+[01]){4,}\s*")
_KITTI_LINE = re.compile(r"\S+(\s+-?[\d.]+){14,15}\s*")
_YOLO_KEYS = re.compile(r"^(names|nc|train|val)\s*:", re.MULTILINE)
_YAML_KEYS = re.compile(r"[A-Za-z_][\w.-]*:(\s|$)")
_CONVERT = "`retinaray convert {} train.json --from {}` makes COCO of it"


def name_foreign_content(data: bytes, source: str) -> str:
    """Say what the bytes of a file are that holds no JSON.

    Args:
        data: The file.
        source: Its name, for the command to propose.

    Returns:
        What it is and what to do, to go after "found"; empty when it is none of what is known.
    """
    if data[:4] == b"PK\x03\x04":
        is_weights = any(mark in data[:_HEAD_BYTES] for mark in (b"data.pkl", b"/byteorder"))
        return _WEIGHTS if is_weights else "a zip; unpack it first (unzip)"
    for offset, mark, text in _SIGNATURES:
        if data[offset : offset + len(mark)] == mark:
            return text
    if data[:1] == b"\x08" and data[2:3] == b"\x12":
        return "an ONNX file; it is the model, and the annotations are COCO JSON"
    if data[7:9] == b"\0{":
        return _WEIGHTS
    return _name_text(data[:_HEAD_BYTES].decode("utf-8", "replace"), source)


def _name_text(head: str, source: str) -> str:
    text = head.lstrip("\ufeff \t\r\n")
    first = text.partition("\n")[0]
    if text.startswith("<"):
        return _name_markup(text.lower())
    if _YOLO_LINE.fullmatch(first):
        return f"a label file of YOLO; {_propose('LABELS', 'yolo')}"
    if _KITTI_LINE.fullmatch(first):
        return f"a label file of KITTI; {_propose('LABELS', 'kitti')}"
    if first.startswith("ImageID,") and "LabelName" in first:
        return f"a table of Open Images; {_propose(source, 'open-images')}"
    if first.count(",") >= 3 and not first.startswith(("{", "[")):
        return "a table (CSV); write its rows as COCO JSON"
    if len(set(_YOLO_KEYS.findall(text))) > 1:
        return f"a data set description of YOLO; {_propose('LABELS', 'yolo')}"
    if _YAML_KEYS.match(first) and not first.startswith(("{", "[")):
        return "YAML; settings are given with --config"
    return ""


def _name_markup(text: str) -> str:
    if "<html" in text or text.startswith("<!doctype html"):
        return "a web page, as a download gives that was refused; get the file again"
    if "<annotations" in text:
        return "XML of CVAT; export it there as COCO"
    if "<annotation" in text:
        return f"an annotation of Pascal VOC; {_propose('FOLDER', 'voc')}"
    return "XML; the annotations are COCO JSON"


def name_foreign_document(document: object, source: str) -> str:
    """Say what parsed JSON is that is not shaped like COCO.

    Args:
        document: The JSON value.
        source: Name of its file, for the command to propose.

    Returns:
        What it is and what to do; empty when it is none of what is known.
    """
    if isinstance(document, list):
        first = document[0] if document else None
        return _name_list(first, source) if isinstance(first, dict) else ""
    if not isinstance(document, dict):
        return ""
    keys = document.keys()
    if {"shapes", "imagePath"} <= keys:
        return f"the labels of one image by LabelMe; {_propose('FOLDER', 'labelme')}"
    if "_via_img_metadata" in keys or _is_via(document):
        return "a project of the VGG Image Annotator; export it there as COCO"
    if document.get("type") == "FeatureCollection":
        return "GeoJSON; its coordinates are no pixels"
    if {"images", "categories"} <= keys and document.get("annotations") is None:
        return "a list of images without labels, as of a public test set"
    if {"job", "run_id"} <= keys:
        return "the record of a run of retinaray"
    return ""


def _name_list(first: Mapping[str, object], source: str) -> str:
    if {"image_id", "score"} <= first.keys():
        return (
            "a COCO results file is no data set; score it with "
            f"`retinaray evaluate {source} --annotations test.json`"
        )
    if "image_id" in first:
        return "a COCO results file is no data set"
    if {"data", "annotations"} <= first.keys():
        return "tasks of Label Studio; export them there as COCO"
    return ""


def _is_via(document: Mapping[str, object]) -> bool:
    first = next(iter(document.values()), None)
    return isinstance(first, dict) and {"filename", "regions"} <= first.keys()


def list_keys(document: Mapping[str, object]) -> str:
    """The first keys of an object, to show what came instead; `no keys` when it is empty."""
    names = [str(key)[:30] for key in list(document)[:_MOST_KEYS]]
    more = ", ..." if len(document) > _MOST_KEYS else ""
    return f"{', '.join(names)}{more}" if names else "no keys"


def is_json_lines(data: bytes) -> bool:
    """Whether each line is a JSON object of its own, as far as the first two lines tell."""
    lines = [line.strip() for line in data[: 1 << 20].splitlines()[:2]]
    return len(lines) == 2 and all(line[:1] == b"{" and line[-1:] == b"}" for line in lines)


def _propose(source: str, source_format: str) -> str:
    return _CONVERT.format(source, source_format)
