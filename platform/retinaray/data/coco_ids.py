"""Image and category ids of COCO files: integers or strings of any size, never changed on the way.

A table of ids and the annotations that refer to it form one id space. Files in the wild spell one
id as 3, "3" and 3.0; the functions here find what such a reference means without ever equating
ids that the table keeps apart.
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Id = int | str

# Python refuses to parse integers of thousands of digits; ids of this length exist only in attacks.
_LONGEST_INTEGER = 30


class IdKind(IntEnum):
    """What JSON type an id has; only INT and STRING are legal."""

    INT = 0
    STRING = 1
    WHOLE_FLOAT = 2
    INVALID = 3


def id_kinds(ids: Sequence[object]) -> NDArray[np.int8]:
    """`IdKind` of every id: int8 [len(ids)]. Booleans, null and the empty string are INVALID."""
    if set(map(type, ids)) == {int}:
        return np.zeros(len(ids), np.int8)
    return np.fromiter((_id_kind(value) for value in ids), np.int8, count=len(ids))


def _id_kind(value: object) -> IdKind:
    if type(value) is int:
        return IdKind.INT
    if isinstance(value, str) and value:
        return IdKind.STRING
    if isinstance(value, float) and value.is_integer():
        return IdKind.WHOLE_FLOAT
    return IdKind.INVALID


def id_target(ids: Sequence[object]) -> IdKind:
    """The kind a table's ids are meant to have: INT or STRING.

    The table's own when it has one; of a mixed table INT if every id can be written as an integer
    and back, else STRING. INT for an empty table.
    """
    kinds = set(id_kinds(ids).tolist())
    if IdKind.STRING not in kinds:
        return IdKind.INT
    if kinds <= {IdKind.STRING, IdKind.INVALID}:
        return IdKind.STRING
    whole = all(_as_integer(value) is not None for value in ids if isinstance(value, str))
    return IdKind.INT if whole else IdKind.STRING


def unify_id(value: object, target: IdKind) -> Id | None:
    """An id in its table's kind; as it is when it cannot be in that kind, None if INVALID."""
    kind = _id_kind(value)
    if kind is IdKind.INVALID:
        return None
    plain: Any = int(value) if kind is IdKind.WHOLE_FLOAT else value  # type: ignore[call-overload]
    if target is IdKind.STRING:
        return str(plain)
    if isinstance(plain, str):
        whole = _as_integer(plain)
        return plain if whole is None else whole
    return int(plain)


def _as_integer(text: str) -> int | None:
    """The integer a string spells, None if writing it back would change it ("03", "+3", "cat")."""
    digits = text.removeprefix("-")
    if len(text) > _LONGEST_INTEGER or not (digits.isascii() and digits.isdigit()):
        return None
    return int(text) if str(int(text)) == text else None


def positions_of(references: Sequence[object], ids: Sequence[object]) -> NDArray[np.int64]:
    """Where each reference stands in `ids`: int64 [len(references)], first position, or -1.

    A reference in the wrong JSON type is found if the table has no other id it could mean.
    """
    target = id_target(ids)
    lookup: dict[Id, int] = {}
    for position, value in enumerate(_unify_all(ids, target)):
        if value is not None:
            lookup.setdefault(value, position)
    found = (
        -1 if value is None else lookup.get(value, -1) for value in _unify_all(references, target)
    )
    return np.fromiter(found, np.int64, count=len(references))


def _unify_all(ids: Sequence[Any], target: IdKind) -> Iterable[Id | None]:
    if set(map(type, ids)) == {int} and target is IdKind.INT:
        return ids
    return (unify_id(value, target) for value in ids)
