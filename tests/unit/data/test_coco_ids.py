from __future__ import annotations

import pytest

from retinaray.data.coco_ids import IdKind, id_kinds, id_target, positions_of, unify_id


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (0, IdKind.INT),
        (-(2**70), IdKind.INT),
        ("7", IdKind.STRING),
        ("cat-3", IdKind.STRING),
        (3.0, IdKind.WHOLE_FLOAT),
        (3.5, IdKind.INVALID),
        (float("nan"), IdKind.INVALID),
        (float("inf"), IdKind.INVALID),
        (True, IdKind.INVALID),
        ("", IdKind.INVALID),
        (None, IdKind.INVALID),
        ([3], IdKind.INVALID),
    ],
)
def test_id_kinds_tells_json_types_apart(value: object, kind: IdKind) -> None:
    assert id_kinds([value, 1]).tolist() == [kind, IdKind.INT]


@pytest.mark.parametrize(
    ("ids", "target"),
    [
        ([], IdKind.INT),
        ([1, 2], IdKind.INT),
        ([1.0, None], IdKind.INT),
        (["1", "2"], IdKind.STRING),
        (["a", None], IdKind.STRING),
        ([1, "2"], IdKind.INT),
        ([1, "02"], IdKind.STRING),
        ([1, "cat"], IdKind.STRING),
    ],
)
def test_id_target_keeps_the_type_of_the_table(ids: list[object], target: IdKind) -> None:
    assert id_target(ids) is target


@pytest.mark.parametrize(
    ("value", "target", "unified"),
    [
        (3, IdKind.INT, 3),
        (3.0, IdKind.INT, 3),
        ("3", IdKind.INT, 3),
        ("-3", IdKind.INT, -3),
        (str(2**70), IdKind.INT, 2**70),
        ("03", IdKind.INT, "03"),
        ("+3", IdKind.INT, "+3"),
        ("-0", IdKind.INT, "-0"),
        ("٣", IdKind.INT, "٣"),
        ("9" * 5000, IdKind.INT, "9" * 5000),
        (3, IdKind.STRING, "3"),
        (3.0, IdKind.STRING, "3"),
        ("03", IdKind.STRING, "03"),
        (None, IdKind.INT, None),
        (True, IdKind.STRING, None),
    ],
)
def test_unify_id_changes_only_what_can_be_changed_back(
    value: object, target: IdKind, unified: object
) -> None:
    result = unify_id(value, target)
    assert result == unified
    assert type(result) is type(unified)


@pytest.mark.parametrize(
    ("references", "ids", "positions"),
    [
        ([5, 3, 4, 3], [3, 5], [1, 0, -1, 0]),
        (["5", 5.0, "05", None, [5], True], [1, 5], [1, 1, -1, -1, -1, -1]),
        ([3, "3", "03"], ["03", "3"], [1, 1, 0]),
        ([1, "1"], [], [-1, -1]),
        ([], [1], []),
        ([7], [7, 7], [0]),
        ([None], [None], [-1]),
    ],
)
def test_positions_of_finds_the_first_id_a_reference_can_mean(
    references: list[object], ids: list[object], positions: list[int]
) -> None:
    assert positions_of(references, ids).tolist() == positions
