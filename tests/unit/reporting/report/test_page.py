"""The page: one file that fetches nothing, with every number in its place."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from retinaray.reporting.report.contents import ReportedRun
from retinaray.reporting.report.gallery import PageGallery
from retinaray.reporting.report.page import list_scores, render_page

MakeRun = Callable[..., ReportedRun]


def test_render_page_is_one_document_that_fetches_nothing(
    make_run: MakeRun, page_gallery: PageGallery, read_page: Callable[[str], Any]
) -> None:
    page = render_page([make_run("first")], page_gallery)
    found = read_page(page)
    assert page.startswith("<!doctype html>\n<html lang")
    assert [link for link in found.links if not link.startswith(("data:", "#"))] == []
    assert not re.search(r"@import|url\(\s*['\"]?(?!data:|#)", page)
    assert "default-src &#x27;none&#x27;" in page
    assert len(found.ids) == len(set(found.ids)), "an id is there twice"


def test_render_page_shows_what_there_is_and_says_what_is_not(
    make_run: MakeRun, read_page: Callable[[str], Any]
) -> None:
    run = make_run("first", analysis=None, gaps=("curves are left out: <none>",))
    page = render_page([run], PageGallery())
    sections = re.findall(r'<section id="(\w+)"', page)
    assert sections == ["setup", "gaps"]
    assert re.findall(r'<a href="#(\w+)">', page) == ["setup"]
    assert "first: curves are left out: <none>" in read_page(page).text
    assert "<dialog" not in page


def test_render_page_has_a_section_for_everything_that_detections_tell(
    make_run: MakeRun, page_gallery: PageGallery
) -> None:
    page = render_page([make_run("first")], page_gallery)
    sections = re.findall(r'<section id="(\w+)" aria-labelledby="(\w+)-title"', page)
    assert [first for first, _ in sections] == [second for _, second in sections]
    assert {first for first, _ in sections} == {
        *("classes", "curves", "sizes", "confusion", "errors", "scores", "gallery", "setup")
    }
    assert 'id="gaps"' not in page


def test_render_page_names_all_runs_when_there_are_several(
    make_run: MakeRun, read_page: Callable[[str], Any]
) -> None:
    runs = [make_run("first"), make_run("<b>second</b>", kind="infer")]
    found = read_page(render_page(runs, PageGallery()))
    assert "2 runs compared: first, <b>second</b>" in found.text
    assert "Settings that differ" not in found.text
    assert "All settings are the same." in found.text


def test_list_scores_takes_detections_before_records_before_validations(
    make_run: MakeRun,
) -> None:
    validations = [
        {"kind": "validation", "step": step, "epoch": step, "AP": ap, "AP50": ap}
        for step, ap in ((1, 0.2), (2, 0.4), (3, 0.3))
    ]
    events = [*validations, {"kind": "validation", "step": 4, "epoch": 4, "AP": None}]
    trained = make_run("a", kind="train", analysis=None, events=events)
    assert list_scores(trained) == {"AP": 0.4, "AP50": 0.4}
    recorded = make_run("a", analysis=None, events=events, scores={"AP": 0.1, "classes": []})
    assert list_scores(recorded) == {"AP": 0.1}
    analysed = make_run("a", scores={"AP": 0.1})
    assert analysed.analysis is not None
    assert list_scores(analysed) == analysed.analysis.scores.summary
    assert list_scores(make_run("a", analysis=None)) == {}
