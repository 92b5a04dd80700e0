from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from retinaray.interchange.label_studio import write_label_studio
from retinaray.interchange.labelled_set import LabelledBox, LabelledImage, LabelledSet


def test_write_label_studio_gives_percent_of_the_image(
    make_set: Callable[..., LabelledSet],
) -> None:
    labels = make_set(
        LabelledBox("dog", (10, 10, 20, 20)),
        LabelledBox("car", (90, 40, 20, 20), score=0.5),  # cut to 10 x 10
        LabelledBox("car", (0, 0, 20, 20), is_crowd=True),
    )
    (task,) = json.loads(dict(write_label_studio(labels))["tasks.json"])
    (drawn,) = task["annotations"][0]["result"]
    (found,) = task["predictions"][0]["result"]
    # Of 100 x 50: 10 px are 10 % of the width and 20 % of the height.
    assert drawn["value"] == {
        **{"x": 10, "y": 20, "width": 20, "height": 40, "rotation": 0},
        "rectanglelabels": ["dog"],
    }
    assert found["value"]["x"] == pytest.approx(90)
    assert (found["value"]["width"], found["value"]["height"]) == (10, 20)
    assert found["score"] == task["predictions"][0]["score"] == 0.5
    assert (drawn["original_width"], drawn["original_height"]) == (100, 50)


def test_write_label_studio_quotes_names_and_keeps_ids() -> None:
    labels = LabelledSet((LabelledImage("ä b/c#.png", 5, 5, image_id=7),), ('say "a" & <b>',))
    files = dict(write_label_studio(labels, image_prefix="https://example.org/x/"))
    (task,) = json.loads(files["tasks.json"])
    assert task["data"] == {
        "image": "https://example.org/x/%C3%A4%20b/c%23.png",
        "file_name": "ä b/c#.png",
        "image_id": 7,
    }
    assert "predictions" not in task
    assert """<Label value='say "a" &amp; &lt;b&gt;'/>""" in files["label_config.xml"]
