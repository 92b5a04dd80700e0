"""The page of `report` as a reader meets it: opened from disk in a browser without a network."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retinaray.cli import main

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
ALLOWED = ("file:", "data:")
NUM_IMAGES = 60
# What a reader of a page with many images waits at most.
MOST_MS = 2000
# A name that would run if it were taken for HTML.
NASTY = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images of 96 x 64 pixels, each with two objects; image 0 has one. truth.json.

    In found.json each has a hit at 0.9, a false detection at 0.4, and an object that nobody found,
    the only one of image 0; in other.json every object is hit at 0.7.
    """
    folder = tmp_path_factory.mktemp("report")
    stream = io.BytesIO()
    Image.fromarray(np.full((64, 96, 3), 90, np.uint8)).save(stream, "JPEG")
    images, annotations, results, others = [], [], [], []
    for number in range(NUM_IMAGES):
        name = f"{number:02d}.jpg"
        (folder / name).write_bytes(stream.getvalue())
        images.append({"id": number, "file_name": name, "height": 64, "width": 96})
        boxes = [[60, 30, 20, 20]] if number == 0 else [[10, 10, 20, 20], [60, 30, 20, 20]]
        annotations += [
            {"id": len(annotations) + place, "image_id": number, "category_id": 1, "bbox": box}
            for place, box in enumerate(boxes, start=1)
        ]
        found = {"image_id": number, "category_id": 1}
        if number:
            results.append(found | {"bbox": boxes[0], "score": 0.9})
            results.append(found | {"bbox": [30, 40, 10, 10], "score": 0.4})
        others += [found | {"bbox": box, "score": 0.7} for box in boxes]
    for entry in annotations:
        entry |= {"area": 400, "iscrowd": 0}
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": NASTY}],
    }
    (folder / "truth.json").write_text(json.dumps(content))
    (folder / "found.json").write_text(json.dumps(results))
    (folder / "other.json").write_text(json.dumps(others))
    return folder


def run_command(*argv: object) -> str:
    """Run a command that ends well; gives its JSON line."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        assert main([*map(str, argv), "--quiet"]) == 0
    return stream.getvalue()


@pytest.fixture(scope="module")
def page_file(folder: Path) -> Path:
    """The page of found.json, with all images."""
    truth = ("--annotations", folder / "truth.json", "--images", folder, "--gallery", NUM_IMAGES)
    run_command("report", folder / "found.json", *truth, "--output", folder / "page.html")
    return folder / "page.html"


@pytest.fixture(scope="module")
def compared_file(folder: Path) -> Path:
    """The page of found.json, of other.json, and of what `evaluate` says of the first."""
    truth = ("--annotations", folder / "truth.json", "--images", folder)
    (folder / "scores.json").write_text(run_command("evaluate", folder / "found.json", *truth))
    truth = (*truth, "--gallery", NUM_IMAGES)
    runs = [folder / f"{name}.json" for name in ("found", "other", "scores")]
    run_command("report", *runs, *truth, "--output", folder / "compared.html")
    return folder / "compared.html"


@pytest.fixture
def open_page(watch_page: Callable[..., Any], page_file: Path) -> Callable[..., Any]:
    """Open the page: open_page(width=..., color_scheme=...); fails when it said anything."""

    def open_in(*, width: int = 1280, color_scheme: str = "light") -> Any:
        viewport = {"width": width, "height": 800}
        return watch_page(page_file.as_uri(), ALLOWED, viewport=viewport, color_scheme=color_scheme)

    return open_in


@pytest.fixture
def make_large_page(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path, int], Path]]:
    """The page that the benchmark makes: make_large_page(folder, images)."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    make: Callable[[Path, int], Path] = importlib.import_module("report_page").make_page
    yield make
    for name in ("report_page", "run"):
        sys.modules.pop(name)


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_page_fits_and_says_nothing_when_it_is_opened(
    open_page: Callable[..., Any], width: int, color_scheme: str
) -> None:
    page = open_page(width=width, color_scheme=color_scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".card").count() == NUM_IMAGES
    assert page.get_by_role("heading", level=1).inner_text() == "found.json: evaluation"
    bright = page.evaluate("getComputedStyle(document.body).backgroundColor")
    levels = [int(value) for value in re.findall(r"\d+", bright)[:3]]
    assert (min(levels) > 200) == (color_scheme == "light")


def test_page_decodes_images_only_when_they_come_near(open_page: Callable[..., Any]) -> None:
    page = open_page()
    assert page.locator(".card img[src]").count() == 0
    page.locator("#grid").scroll_into_view_if_needed()
    page.locator(".card img[src]").first.wait_for()
    assert 0 < page.locator(".card img[src]").count() < NUM_IMAGES
    page.wait_for_function("document.querySelector('.card img[src]').naturalWidth === 96")


def test_page_redraws_boxes_when_the_threshold_moves(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.locator('[data-group="best"]').click()
    card = page.locator(".card").first
    for threshold, text, kinds in (
        ("0.3", "1 hit, 1 false, 1 missed", ["missed", "false", "hit"]),
        ("0.5", "1 hit, 0 false, 1 missed", ["missed", "hit"]),
        ("0.95", "0 hit, 0 false, 2 missed", ["missed", "missed"]),
    ):
        page.locator("#threshold").fill(threshold)
        card.locator(".counts", has_text=text).wait_for()
        rects = card.locator("rect:not(.halo)")
        assert [rects.nth(n).get_attribute("class") for n in range(rects.count())] == kinds
    page.locator("#own-thresholds").click()
    # The best F1 is above the false detections.
    card.locator(".counts", has_text="1 hit, 0 false, 1 missed").wait_for()


def test_page_can_be_used_with_the_keyboard_alone(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.locator("#own-thresholds").focus()
    page.keyboard.press("Tab")
    focused = "[...document.querySelectorAll('.card')].indexOf(document.activeElement)"
    assert page.evaluate(focused) == 0
    for key, place in (("ArrowRight", 1), ("End", 59), ("Home", 0), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        assert page.evaluate(focused) == place
    page.keyboard.press("ArrowDown")
    below = page.evaluate(focused)
    assert below > 1
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    assert page.locator("#viewer-title").inner_text().startswith(f"{below + 1} of 60: ")
    page.keyboard.press("ArrowRight")
    assert page.locator("#viewer-title").inner_text().startswith(f"{below + 2} of 60: ")
    assert NASTY in page.locator("#viewer svg").text_content()
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
    page.wait_for_function(f"{focused} === {below + 1}")


def test_page_zooms_into_an_image(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.locator(".card").nth(1).click()
    frame, image = page.locator("#viewer .frame"), page.locator("#viewer img")
    whole, inside = image.bounding_box(), frame.bounding_box()
    # A click enlarges four times, and what was under it stays there.
    x, y = whole["x"] + 0.25 * whole["width"], whole["y"] + 0.75 * whole["height"]
    page.mouse.click(x, y)
    large = image.bounding_box()
    assert large["width"] == pytest.approx(4 * whole["width"], abs=2)
    assert large["x"] + 0.25 * large["width"] == pytest.approx(x, abs=2)
    assert large["y"] + 0.75 * large["height"] == pytest.approx(y, abs=2)
    # Boxes lie on the image, and lines and letters stay as they are.
    assert page.locator("#viewer svg").bounding_box() == large
    letters = page.locator("#viewer svg text").first
    assert letters.bounding_box()["height"] < 30
    assert frame.bounding_box() == inside
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        f"document.querySelector('#viewer img').getBoundingClientRect().x < {large['x'] - 50}"
    )
    assert page.locator("#viewer-title").inner_text().startswith("2 of 60: ")
    page.keyboard.press("0")
    assert image.bounding_box() == whole
    page.keyboard.press("+")
    assert page.locator("#zoom").inner_text() == "150 %"
    page.locator("#zoom-out").click()
    assert page.locator("#zoom").inner_text() == "100 %"
    assert page.locator("#zoom-out").get_attribute("aria-disabled") == "true"
    page.mouse.move(x, y)
    page.mouse.wheel(40, 0)
    assert page.locator("#zoom").inner_text() == "100 %"
    page.mouse.wheel(0, -100)
    page.locator("#zoom", has_text="150 %").wait_for()
    page.locator("#next").click()
    assert page.locator("#zoom").inner_text() == "100 %"
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_page_keeps_the_theme_that_a_reader_chose(open_page: Callable[..., Any]) -> None:
    page = open_page(color_scheme="light")
    button = page.locator("#theme")
    assert button.inner_text() == "Theme: auto"
    button.click()
    button.click()
    assert button.inner_text() == "Theme: dark"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(value) for value in re.findall(r"\d+", dark)[:3]) < 60
    page.reload()
    assert page.locator("#theme").inner_text() == "Theme: dark"


def test_page_names_what_can_be_operated(open_page: Callable[..., Any]) -> None:
    page = open_page()
    nameless = page.evaluate(
        """[...document.querySelectorAll('button, select, input, svg[role=img], [role=region]')]
        .filter((item) => !(item.textContent.trim() || item.getAttribute('aria-label')
            || item.labels?.length)).map((item) => item.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    assert page.evaluate("document.querySelectorAll('img:not([alt])').length") == 0


def test_page_shows_the_boxes_of_the_run_that_is_chosen(
    watch_page: Callable[..., Any], compared_file: Path
) -> None:
    page = watch_page(compared_file.as_uri(), ALLOWED, viewport={"width": 1280, "height": 800})
    page.locator("#threshold").fill("0.5")
    run = page.locator("#run")
    assert run.locator("option").all_inner_texts() == ["found.json", "other.json", "scores.json"]
    card = page.locator(".card", has_text="01.jpg")
    card.scroll_into_view_if_needed()
    rects = card.locator("rect:not(.halo)")
    for name, text, kinds in (
        ("found.json", "1 hit, 0 false, 1 missed", ["missed", "hit"]),
        ("other.json", "2 hit, 0 false, 0 missed", ["hit", "hit"]),
        ("scores.json", "1 hit, 0 false, 1 missed", ["missed", "hit"]),
    ):
        run.select_option(label=name)
        card.locator(".counts", has_text=text).wait_for()
        rects.nth(1).wait_for()
        assert [rects.nth(n).get_attribute("class") for n in range(rects.count())] == kinds
        card.click()
        assert page.locator("#viewer-note").inner_text().endswith(f"boxes of {name}")
        assert page.locator("#viewer rect.hit").count() == kinds.count("hit")
        page.keyboard.press("Escape")


def test_page_copies_a_command(watch_page: Callable[..., Any], compared_file: Path) -> None:
    page = watch_page(
        compared_file.as_uri(), ALLOWED, permissions=["clipboard-read", "clipboard-write"]
    )
    # Detections alone do not say how they came about.
    assert page.locator(".copy").count() == 1
    button, text = page.locator(".copy"), page.locator(".command pre").inner_text()
    assert text.startswith("retinaray evaluate ")
    button.click()
    page.locator(".copy", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == text


def test_page_selects_a_command_when_it_may_not_copy(
    watch_page: Callable[..., Any], compared_file: Path
) -> None:
    page = watch_page(compared_file.as_uri(), ALLOWED)
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(Error('no')); }")
    page.locator(".copy").click()
    page.locator(".copy", has_text="Selected").wait_for()
    selected = page.evaluate("getSelection().toString()")
    assert selected.strip() == page.locator(".command pre").inner_text().strip()


@pytest.mark.slow
def test_page_of_many_images_loads_before_a_reader_waits(
    watch_page: Callable[..., Any], make_large_page: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    address = make_large_page(tmp_path, 500).as_uri()
    times_ms = []
    for _ in range(5):
        page = watch_page(address, ALLOWED, viewport={"width": 1280, "height": 800})
        times_ms.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
        assert page.locator(".card").count() == 500
        page.close()
    assert min(times_ms) > 0
    assert statistics.median(times_ms) < MOST_MS, times_ms
