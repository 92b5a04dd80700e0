from __future__ import annotations

import json

import pytest

from retinaray.data.coco import Category, CategoryTable
from retinaray.errors import DatasetError


def test_category_table_survives_json_in_its_own_order() -> None:
    table = CategoryTable((Category("7", "é"), Category(7, "seven"), Category(2**60, "")))
    again = CategoryTable.from_json(json.loads(json.dumps(table.to_json())))
    assert again == table
    assert again.index_of(7) == 1
    assert again.index_of("7") == 0


def test_category_table_names_the_ids_when_one_is_unknown() -> None:
    table = CategoryTable((Category(3, "car"), Category(7, "plate")))
    with pytest.raises(DatasetError, match=r"category_id '3' is none of \[3, 7\]"):
        table.index_of("3")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "at least one category"),
        (
            [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}],
            r"distinct category ids, found \[1, 1\]",
        ),
        ({"id": 1}, "expected a list of categories, found dict"),
        ([{"id": 1.0, "name": "a"}], "expected a category"),
        ([{"id": True, "name": "a"}], "expected a category"),
        ([{"id": 1}], "expected a category"),
        (["car"], "found 'car'"),
    ],
)
def test_category_table_from_json_refuses_anything_else(entries: object, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        CategoryTable.from_json(entries)
