"""How long a reader waits for the page of `retinaray report`, in a real browser.

    python tests/benchmarks/report_page.py [--quick]

An evaluation of made-up detections on photographs of 640x480 with ten objects each; the gallery
shows 500 of them. Chromium without a window opens the page from disk. Competitors: `load` until the
browser's load event, `first_image` until an image of the gallery is drawn after it was scrolled to,
`threshold` until the boxes follow a move of the slider, `empty_page` what the browser takes for a
page without content. Skips without playwright and Chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from run import Record, make_records, skip, time_rounds

from retinaray.cli import main as run_command

HEIGHT, WIDTH = 480, 640
BOXES_PER_IMAGE = 10
CLASSES = ("car", "bus", "van")

SLIDER = "#threshold"


def run(quick: bool = False) -> list[Record]:
    """Measure the page; without a browser there is a reason instead."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if importlib.util.find_spec("playwright") is None or program is None:
        return [skip("report_page", "needs playwright and Chromium")]
    num_images, num_rounds = (40, 1) if quick else (500, 9)
    with tempfile.TemporaryDirectory() as name:
        page = make_page(Path(name), num_images)
        size_mib = page.stat().st_size / 2**20
        rounds, seen = measure(program, page, num_rounds=num_rounds)
    assert seen == num_images, (seen, num_images)
    return make_records(
        "report_page",
        rounds,
        unit="ms",
        convert=lambda seconds: 1000 * seconds,
        baselines={"load": ["empty_page"]},
        checked="the gallery has a card for every image, and nothing was fetched",
        config={"images": num_images, "page_mib": round(size_mib, 1)},
    )


def make_page(folder: Path, num_images: int) -> Path:
    """The page of an evaluation whose gallery shows every image."""
    rng = np.random.default_rng(0)
    images, annotations, results = [], [], []
    for number in range(num_images):
        name = f"{number:04d}.jpg"
        (folder / name).write_bytes(make_photograph(rng))
        images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
        for _ in range(BOXES_PER_IMAGE):
            box = [*rng.uniform(0, 400, 2).round(1), *rng.uniform(20, 80, 2).round(1)]
            entry = {"image_id": number, "category_id": int(rng.integers(1, 1 + len(CLASSES)))}
            annotations.append(
                {**entry, "id": len(annotations) + 1, "bbox": box, "area": box[2] * box[3]}
                | {"iscrowd": 0}
            )
            moved = [value + float(rng.normal(0, 3)) for value in box]
            results.append({**entry, "bbox": moved, "score": float(rng.beta(2, 2))})
    categories = [{"id": place, "name": name} for place, name in enumerate(CLASSES, start=1)]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "found.json").write_text(json.dumps(results))
    argv = ["report", str(folder / "found.json"), "--annotations", str(folder / "truth.json")]
    argv += ["--images", str(folder), "--gallery", str(min(1000, num_images))]
    with contextlib.redirect_stdout(io.StringIO()):
        code = run_command([*argv, "--output", str(folder / "page.html"), "--quiet"])
    assert code == 0, f"retinaray report ended with {code}"
    return folder / "page.html"


def make_photograph(rng: np.random.Generator) -> bytes:
    """A JPEG as large as a photograph's: blurred noise, about 60 kB."""
    coarse = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (HEIGHT, WIDTH, 1))
    stream = io.BytesIO()
    pixels = (np.asarray(image) + grain).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG", quality=85)
    return stream.getvalue()


def measure(program: str, page_file: Path, *, num_rounds: int) -> tuple[Any, int]:
    """Times of all competitors, and the cards that the gallery has."""
    from playwright.sync_api import sync_playwright

    empty = page_file.with_name("empty.html")
    empty.write_text("<!doctype html><title>empty</title>")
    fetched: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        # The page forbids the evaluation of text, by which the driver asks it things.
        tab = browser.new_page(viewport={"width": 1280, "height": 800}, bypass_csp=True)
        tab.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file:", "data:")) else fetched.append(request.url)
            ),
        )

        def open_file(file: Path) -> Callable[[], object]:
            return lambda: tab.goto(file.as_uri(), wait_until="load")

        def show_image() -> None:
            tab.locator("#grid").scroll_into_view_if_needed()
            tab.wait_for_function("document.querySelector('.card img[src]')?.naturalWidth > 0")

        def move_slider() -> None:
            tab.locator(SLIDER).first.evaluate(
                "slider => { slider.value = slider.value === '0.9' ? '0.5' : '0.9';"
                "slider.dispatchEvent(new Event('input', {bubbles: true})); }"
            )
            # Two frames: the script's own, and one in which its boxes were drawn.
            tab.evaluate(
                "() => new Promise(f => requestAnimationFrame(() => requestAnimationFrame(f)))"
            )

        rounds = time_rounds(
            {
                "empty_page": open_file(empty),
                "load": open_file(page_file),
                "first_image": show_image,
                "threshold": move_slider,
            },
            num_rounds=num_rounds,
        )
        seen = int(tab.locator(".card").count())
        browser.close()
    assert fetched == [], fetched
    return rounds, seen


def main() -> None:
    """Print the records of this case alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images, one round")
    for record in run(parser.parse_args().quick):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
