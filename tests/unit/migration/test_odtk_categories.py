from __future__ import annotations

import json

import pytest

from retinaray.errors import DatasetError
from retinaray.migration.odtk_categories import make_class_numbers, read_odtk_categories

CATS = [{"id": 9, "name": "person"}, {"id": 2, "name": "dog", "supercategory": "animal"}]


def test_make_class_numbers_counts_from_zero() -> None:
    table = make_class_numbers(3)
    assert table.names == ("class-0", "class-1", "class-2")
    assert table.ids == (0, 1, 2)


@pytest.mark.parametrize("value", [{"images": [], "categories": CATS}, CATS])
def test_read_odtk_categories_keeps_the_order_of_the_file(value: object) -> None:
    # Class 0 of ODTK's is the first of the JSON, whatever its id.
    table = read_odtk_categories(json.dumps(value).encode(), num_classes=2, source="c.json")
    assert table.names == ("person", "dog")
    assert table.ids == (9, 2)


def test_read_odtk_categories_numbers_a_list_of_names() -> None:
    table = read_odtk_categories(b'["person", "dog"]', num_classes=2, source="c.json")
    assert table.to_json() == [{"id": 0, "name": "person"}, {"id": 1, "name": "dog"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'["a", "b", "c"]', r"expected 2 categories.*found 3 \(a, b, c\)"),
        (json.dumps({"categories": CATS[:1]}).encode(), r"found 1 \(person\)"),
        (b"[]", r"found 0 \(none\)"),
        (b"{", "expected JSON"),
        (b"\xff\xfe\x00", "expected JSON"),
        (b"{}", "expected a COCO file with a list `categories`, or a list of names; found dict"),
        (b'{"categories": 5}', "or a list of names; found int"),
        (b"7", "or a list of names; found int"),
        (b'["a", 5]', "expected a category"),
        (b'[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]', "expected distinct category ids"),
    ],
)
def test_read_odtk_categories_refuses_what_does_not_name_the_classes(
    content: bytes, words: str
) -> None:
    with pytest.raises(DatasetError, match=f"^c.json: .*{words}"):
        read_odtk_categories(content, num_classes=2, source="c.json")
