from __future__ import annotations

from retinaray.distributed.run_settings import compare_settings

OLD = {"batch": 4, "model": {"depth": 2, "name": "ResNet10FPN"}, "anchors": {"scales": [2, 3]}}


def test_compare_settings_gives_nothing_when_nothing_differs() -> None:
    # A tuple comes back from JSON as a list.
    assert compare_settings(OLD, {**OLD, "anchors": {"scales": (2, 3)}}, free=()) == []


def test_compare_settings_names_each_difference_by_its_path() -> None:
    new = {"batch": 8, "model": {"depth": 2, "name": "ResNet18FPN", "norm": "gn"}}
    assert compare_settings(OLD, new, free=()) == [
        "anchors: {'scales': [2, 3]} -> None",
        "batch: 4 -> 8",
        "model.name: ResNet10FPN -> ResNet18FPN",
        "model.norm: None -> gn",
    ]


def test_compare_settings_leaves_free_settings_out() -> None:
    new = {**OLD, "batch": 8, "model": {"depth": 3, "name": "ResNet10FPN"}}
    assert compare_settings(OLD, new, free={"model.depth"}) == ["batch: 4 -> 8"]
    # Only whole paths are free.
    assert compare_settings(OLD, new, free={"depth", "batch"}) == ["model.depth: 2 -> 3"]
