from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from retinaray.data.coco import load_coco
from retinaray.evaluation.coco_map import evaluate_detections
from retinaray.evaluation.confusion import count_confusions, tabulate_overlaps
from retinaray.evaluation.detection_matches import index_ground_truth, match_results
from retinaray.evaluation.error_taxonomy import label_errors, summarize_errors
from retinaray.evaluation.gallery_choice import GalleryDetection, GalleryImage, GalleryTruth
from retinaray.evaluation.operating_points import choose_operating_points, parse_rule
from retinaray.evaluation.pr_curves import precision_recall_curves
from retinaray.evaluation.score_calibration import calibrate_scores
from retinaray.evaluation.size_bins import measure_by_size
from retinaray.reporting.report.contents import DetectionAnalysis, ReportedRun
from retinaray.reporting.report.gallery import GalleryPicture, GalleryRun, PageGallery, View

VOID = {"meta", "img", "br", "link", "input"}


class Structure(HTMLParser):
    """Checks that elements close in order; gathers text, attributes and names."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="session")
def read_page() -> Callable[[str], Structure]:
    """Parse HTML: fails where elements do not close; has text, names, ids and links."""
    return Structure


@pytest.fixture(scope="session")
def small_truth() -> dict[str, Any]:
    """Two images of 100 x 200: a cat of 40 px and a dog of 20 px, and a cat of 10 px."""
    boxes = [(1, 1, [10, 10, 40, 40]), (1, 2, [60, 100, 20, 20]), (2, 1, [50, 50, 10, 10])]
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 200, "width": 100} for n in (1, 2)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": label, "bbox": box, "iscrowd": 0}
            | {"area": box[2] * box[3]}
            for i, (image, label, box) in enumerate(boxes, start=1)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


@pytest.fixture(scope="session")
def small_results() -> list[dict[str, Any]]:
    """The cat is hit, the dog is called a cat, the small cat is missed, and a dog is made up."""
    rows = [
        (1, 1, 0.9, [10, 10, 40, 40]),
        (1, 1, 0.6, [60, 100, 20, 20]),
        (2, 2, 0.4, [0, 150, 30, 30]),
    ]
    return [
        {"image_id": image, "category_id": label, "score": score, "bbox": box}
        for image, label, score, box in rows
    ]


@pytest.fixture(scope="session")
def analysis(small_truth: dict[str, Any], small_results: list[dict[str, Any]]) -> DetectionAnalysis:
    """Of these three detections, with the threshold 0.3 for both classes."""
    dataset = load_coco(json.dumps(small_truth).encode(), source="test.json")
    table = tabulate_overlaps(small_results, dataset)
    labels = label_errors(table)
    matched = match_results(small_results, index_ground_truth(small_truth))
    curves = precision_recall_curves(matched)
    return DetectionAnalysis(
        set_name="test.json",
        scores=evaluate_detections(small_truth, small_results),
        sizes=measure_by_size(table, score_thresholds=0.3),
        curves=curves,
        points=choose_operating_points(curves, parse_rule("f1")),
        points_source="thresholds of best F1",
        confusion=count_confusions(table, score_thresholds=0.3),
        errors=summarize_errors(labels),
        calibration=calibrate_scores(labels),
    )


@pytest.fixture(scope="session")
def make_run(analysis: DetectionAnalysis) -> Callable[..., ReportedRun]:
    """Runs with detections and settings: make_run("name", kind="infer", ...)."""

    def make(name: str, **changes: Any) -> ReportedRun:
        values: dict[str, Any] = {
            "kind": "evaluate",
            "source": f"runs/{name}",
            "settings": {"optim.peak_lr": 0.001, "run.batch": 8, "anchors.scales": [4.0, 5.0]},
            "unusual": frozenset({"run.batch"}),
            "command": "retinaray evaluate model.pth",
            "analysis": analysis,
        }
        return ReportedRun(name=name, **(values | changes))

    return make


@pytest.fixture(scope="session")
def gallery_image() -> GalleryImage:
    """An image of 80 x 60 with a hit, a duplicate of it, a missed object and a crowd."""
    return GalleryImage(
        image_id=1,
        file_name="1.jpg",
        height=60,
        width=80,
        groups=("worst", "confused"),
        f1=0.5,
        num_hits=1,
        num_false=1,
        num_missed=1,
        num_confused=2,
        detections=(
            GalleryDetection((1.0, 2.0, 11.0, 22.0), 0, 0.9, "hit"),
            GalleryDetection((2.04, 2.0, 11.0, 22.0), 0, 0.3, "duplicate"),
        ),
        truths=(
            GalleryTruth((1.0, 2.0, 11.0, 22.0), 0, is_ignored=False, hit_score=0.9),
            GalleryTruth((50.0, 30.0, 60.0, 50.0), 1, is_ignored=False, hit_score=None),
            GalleryTruth((0.0, 0.0, 80.0, 60.0), 1, is_ignored=True, hit_score=None),
        ),
    )


@pytest.fixture(scope="session")
def page_gallery(gallery_image: GalleryImage) -> PageGallery:
    """One picture of one run."""
    return PageGallery(
        runs=(GalleryRun("first", ("cat", "dog"), (0.25, 0.5)),),
        pictures=(
            GalleryPicture(
                name="1.jpg",
                height=60,
                width=80,
                webp=b"pixels",
                views=(View(0, gallery_image, ("worst", "confused")),),
            ),
        ),
    )
