from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from retinaray.data.coco_columns import (
    BoxFormat,
    BoxVerdict,
    CrowdFormat,
    annotation_columns,
    judge_boxes,
    numbers,
    parse_boxes,
    parse_crowd_flags,
    read_coco_tables,
    without_sizes,
)
from retinaray.errors import DatasetError

VALID = {
    "images": [{"id": 1, "file_name": "a.jpg", "height": 50, "width": 100}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [90, 40, 20, 30]}],
    "categories": [{"id": 3, "name": "car"}],
}
VALID_BYTES = json.dumps(VALID).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "found an empty file", id="empty"),
        pytest.param(VALID_BYTES[:-40], "ends in the middle", id="cut between values"),
        pytest.param(VALID_BYTES[:20], "ends in the middle", id="cut in a string"),
        pytest.param(b"{broken}", r"parse it: .*line 1 column 2 \(char 1\)$", id="broken"),
        pytest.param(b'{"a": "\xff\xfe"}', "cannot parse it: 'utf-8' codec", id="not UTF-8"),
        pytest.param(b"[" * 100_000, "cannot parse it", id="too deep"),
        pytest.param(b'{"id": ' + b"1" * 5000 + b"}", "cannot parse it", id="endless integer"),
        pytest.param(gzip.compress(VALID_BYTES), "found gzip; unpack it", id="gzip"),
        pytest.param(b"3", "not COCO: .*found a number", id="number"),
        pytest.param(b'[{"image_id": 1}]', r"found a list \(a COCO results file", id="results"),
        pytest.param(
            b"{}",
            "`images` is missing; `annotations` is missing; `categories` is missing",
            id="no tables",
        ),
        pytest.param(
            json.dumps({**VALID, "images": {}}).encode(),
            "`images` is an object, expected a list",
            id="no list",
        ),
        pytest.param(
            json.dumps({**VALID, "annotations": [{}, 3]}).encode(),
            r"annotations\[1\] is a number",
            id="no object",
        ),
    ],
)
def test_read_coco_tables_refuses_what_is_no_coco_file(data: bytes, message: str) -> None:
    with pytest.raises(DatasetError, match=f"^train.json: .*{message}"):
        read_coco_tables(data, source="train.json")


@pytest.mark.parametrize("name", ["none.json", "", "nul\0.json"])
def test_read_coco_tables_names_the_path_when_it_cannot_be_opened(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(DatasetError, match="cannot read the annotation file"):
        read_coco_tables(f"{tmp_path}/{name}")


def test_read_coco_tables_reads_a_path_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(b"\xef\xbb\xbf" + VALID_BYTES)
    tables = read_coco_tables(str(path))
    assert tables.document == VALID
    assert tables.source == str(path)


@pytest.mark.parametrize("extra", [[], ["4"]], ids=["numbers only", "one string among them"])
def test_numbers_is_nan_for_whatever_is_no_number(extra: list[object]) -> None:
    values = [1, 2.5, 10**400, -3, *extra]
    expected = [1, 2.5, np.inf, -3, *[np.nan for _ in extra]]
    np.testing.assert_array_equal(numbers(values), expected)


@pytest.mark.parametrize(
    ("value", "box", "kind"),
    [
        ([1, 2.5, 3, 4], [1, 2.5, 3, 4], BoxFormat.NUMBERS),
        ([1, 2, 3, 10**400], [1, 2, 3, np.inf], BoxFormat.NUMBERS),
        (["1", 2, "3.5", "4e1"], [1, 2, 3.5, 40], BoxFormat.NUMERIC_STRINGS),
        (["1", 2, 3, 10**400], None, BoxFormat.UNUSABLE),
        (None, None, BoxFormat.ABSENT),
        ([1, 2, 3], None, BoxFormat.UNUSABLE),
        ([1, 2, 3, 4, 5], None, BoxFormat.UNUSABLE),
        ([1, 2, 3, None], None, BoxFormat.UNUSABLE),
        ([1, 2, 3, True], None, BoxFormat.UNUSABLE),
        ([1, 2, 3, "wide"], None, BoxFormat.UNUSABLE),
        ([[1], [2], [3], [4]], None, BoxFormat.UNUSABLE),
        ({"x": 1}, None, BoxFormat.UNUSABLE),
        ("1234", None, BoxFormat.UNUSABLE),
    ],
)
def test_parse_boxes_tells_how_a_box_is_written(
    value: object, box: list[float] | None, kind: BoxFormat
) -> None:
    xywh, formats = parse_boxes([[5, 6, 7, 8], value])
    np.testing.assert_array_equal(xywh, [[5, 6, 7, 8], box or [np.nan] * 4])
    assert formats.tolist() == [BoxFormat.NUMBERS, kind]


def test_parse_boxes_keeps_its_shape_when_there_are_none() -> None:
    xywh, formats = parse_boxes([])
    assert xywh.shape == (0, 4)
    assert formats.shape == (0,)


@pytest.mark.parametrize(
    ("value", "flag", "kind"),
    [
        (0, False, CrowdFormat.INTEGER),
        (1, True, CrowdFormat.INTEGER),
        (2, False, CrowdFormat.UNUSABLE),
        (-1, False, CrowdFormat.UNUSABLE),
        (None, False, CrowdFormat.ABSENT),
        (True, True, CrowdFormat.OTHER_SPELLING),
        (0.0, False, CrowdFormat.OTHER_SPELLING),
        ("1", True, CrowdFormat.OTHER_SPELLING),
        ("yes", False, CrowdFormat.UNUSABLE),
        ([1], False, CrowdFormat.UNUSABLE),
    ],
)
def test_parse_crowd_flags_tells_how_a_flag_is_written(
    value: object, flag: bool, kind: CrowdFormat
) -> None:
    for values in ([value], [value, 1], [value, "0"]):
        flags, formats = parse_crowd_flags(values)
        assert (flags[0], formats[0]) == (flag, kind)


def test_judge_boxes_gives_the_first_reason_that_holds() -> None:
    boxes = np.array(
        [
            [10, 5, 20, 30],
            [np.nan, 5, -1, 0],
            [10, 5, -1, 0],
            [200, 5, 0, 3],
            [100, 5, 3, 3],
            [10, 50, 3, 3],
            [-3, 5, 3, 3],
            [99, 49, 3, 3],
        ]
    )
    verdicts, clipped = judge_boxes(boxes, np.full(8, 50.0), np.full(8, 100.0))
    assert [BoxVerdict(value).name for value in verdicts] == [
        "GOOD", "NON_FINITE", "NEGATIVE", "ZERO", "OUTSIDE", "OUTSIDE", "OUTSIDE", "GOOD",
    ]  # fmt: skip
    np.testing.assert_array_equal(clipped[[0, 7]], [[10, 5, 30, 35], [99, 49, 100, 50]])
    assert clipped.dtype == np.float32


def test_judge_boxes_cuts_nothing_at_an_unknown_edge() -> None:
    unknown = np.array([np.nan])
    verdicts, clipped = judge_boxes(np.array([[-5.0, 1e6, 10, 10]]), unknown, unknown)
    assert verdicts.tolist() == [BoxVerdict.GOOD]
    np.testing.assert_array_equal(clipped, [[0, 1e6, 5, 1e6 + 10]])


def test_without_sizes_judges_anew_only_the_disputed_images() -> None:
    document = {
        **VALID,
        "images": [*VALID["images"], {"id": 2, "file_name": "b", "height": 50, "width": 100}],
        "annotations": [
            {"image_id": image_id, "category_id": 3, "bbox": [90, 40, 20, 30]}
            for image_id in (2, 1, 99)
        ],
    }
    columns = annotation_columns(read_coco_tables(json.dumps(document).encode()))
    assert columns.image_positions.tolist() == [1, 0, -1]
    # Cut to 100 x 50, except where the image is unknown.
    expected = [[90, 40, 100, 50], [90, 40, 100, 50], [90, 40, 110, 70]]
    np.testing.assert_array_equal(columns.clipped_xyxy, expected)
    disputed = without_sizes(columns, np.array([False, True]))
    expected[0] = [90, 40, 110, 70]
    np.testing.assert_array_equal(disputed.clipped_xyxy, expected)
