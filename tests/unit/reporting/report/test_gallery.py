"""The gallery's data: boxes as its script expects them, and names that cannot break the page."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from typing import Any

import pytest

from retinaray.evaluation.error_taxonomy import Verdict
from retinaray.evaluation.gallery_choice import GROUPS
from retinaray.reporting.report.gallery import (
    GROUP_NAMES,
    VERDICTS,
    GalleryRun,
    PageGallery,
    View,
    render_data,
    render_gallery,
)


def read_data(text: str) -> dict[str, Any]:
    found = re.search(r'id="gallery-data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_render_data_gives_boxes_by_rising_score_in_original_pixels(
    page_gallery: PageGallery,
) -> None:
    data = read_data(render_data(page_gallery))
    view = data["pictures"][0]["views"]["0"]
    # left, top, width, height, score, class, number of the verdict in VERDICTS
    assert view["found"] == [[2.0, 2.0, 9.0, 20.0, 0.3, 0, 4], [1.0, 2.0, 10.0, 20.0, 0.9, 0, 0]]
    # ..., score of the hit or -1, class; the crowd is not there
    assert view["truth"] == [[1.0, 2.0, 10.0, 20.0, 0.9, 0], [50.0, 30.0, 10.0, 20.0, -1, 1]]
    assert view["groups"] == {"worst": "F1 0.50", "confused": "2 taken for another class"}
    assert data["runs"] == [{"name": "first", "classes": ["cat", "dog"], "thresholds": [0.25, 0.5]}]


def test_render_data_holds_each_image_as_text_of_an_element(page_gallery: PageGallery) -> None:
    found = re.search(
        r'<script type="text/plain" id="picture-0">(.*?)</script>', render_data(page_gallery)
    )
    assert found is not None
    assert base64.b64decode(found[1]) == b"pixels"
    assert page_gallery.num_image_bytes == len(b"pixels")


@pytest.mark.parametrize("name", ["</script><script>alert(1)</script>", "<!--", '"; a', "ü 漢"])
def test_render_data_keeps_any_name_inside_its_element(
    page_gallery: PageGallery, read_page: Callable[[str], Any], name: str
) -> None:
    picture = replace(page_gallery.pictures[0], name=name)
    gallery = PageGallery((GalleryRun(name, (name,), (0.5,)),), (picture,))
    text = render_data(gallery)
    assert read_page(text).names == ["script", "script"]
    data = read_data(text)
    assert data["pictures"][0]["name"] == data["runs"][0]["name"] == name


def test_render_gallery_offers_only_groups_that_have_images(page_gallery: PageGallery) -> None:
    body = render_gallery(page_gallery).body
    assert re.findall(r'data-group="(\w+)"', body) == ["all", "worst", "confused"]
    assert "<label hidden>Boxes of" in body


def test_render_gallery_lets_runs_be_chosen_when_there_are_several(
    page_gallery: PageGallery,
) -> None:
    second = GalleryRun("<second>", ("cat", "dog"), (0.5, 0.5))
    image = page_gallery.pictures[0].views[0].image
    picture = replace(
        page_gallery.pictures[0],
        views=(*page_gallery.pictures[0].views, View(1, image, ("best",))),
    )
    gallery = PageGallery((*page_gallery.runs, second), (picture,))
    body = render_gallery(gallery).body
    assert "<label>Boxes of" in body
    assert '<option value="1">&lt;second&gt;</option>' in body
    assert re.findall(r'data-group="(\w+)"', body) == ["all", "best", "worst", "confused"]


def test_render_gallery_gives_nothing_when_there_is_no_picture() -> None:
    assert render_gallery(PageGallery()).body == ""
    assert render_data(PageGallery()) == ""


def test_groups_and_verdicts_are_those_of_the_evaluation_and_of_the_script() -> None:
    assert tuple(GROUP_NAMES) == GROUPS
    assert set(VERDICTS) == {verdict.name.lower() for verdict in Verdict}
    script = resources.files("retinaray.reporting.report").joinpath("page.js").read_text("utf-8")
    for name in ("KINDS", "WORDS"):
        found = re.search(rf"const {name} = (\[.*?\]);", script)
        assert found is not None
        assert len(json.loads(found[1])) == len(VERDICTS)
