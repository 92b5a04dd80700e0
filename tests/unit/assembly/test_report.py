"""`report` on folders and files as the other commands leave them, and on what is none of them."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from retinaray.assembly.report import ReportOutcome, name_runs, run_report
from retinaray.config.loading import load_from_argv, load_from_dict, to_dict
from retinaray.config.report_schema import ReportJob
from retinaray.config.schema import InferJob, TrainJob, TuneJob
from retinaray.data.transforms import Placement
from retinaray.detector.postprocess import Detections
from retinaray.errors import ConfigError, DatasetError, MissingFileError
from retinaray.evaluation.candidates import join_detections
from retinaray.reporting.trial_table import write_trials

RunReport = Callable[..., tuple[ReportOutcome, str]]
PARITY = {
    **{"rows": [], "references": [], "tolerance": {}, "model": "m.pth"},
    **{"num_images": 3, "machine": "a CPU"},
}


@pytest.fixture
def write_report(tmp_path: Path) -> RunReport:
    """Run the command; gives its outcome and the page."""

    def run(*argv: object) -> tuple[ReportOutcome, str]:
        output = tmp_path / "page.html"
        outcome = run_report(load_from_argv(ReportJob, [*map(str, argv), f"--output={output}"]))
        return outcome, output.read_text("utf-8")

    return run


@pytest.fixture
def detections(image_set: Any, tmp_path: Path) -> Path:
    """Every second box of the image set, exactly, with score 0.9."""
    results = [
        {key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for entry in image_set.coco["annotations"][::2]
    ]
    path = tmp_path / "found" / "detections.json"
    path.parent.mkdir()
    path.write_text(json.dumps(results))
    return path


def make_training(folder: Path, image_set: Any) -> Path:
    """A run folder with a record and metrics, as `train` leaves it."""
    settings = {
        "output": str(folder / "m.pth"),
        "data": {
            "images": str(image_set.folder),
            "annotations": str(image_set.annotations),
            "size": [64, 96],
        },
    }
    run = folder / "m_run"
    run.mkdir(parents=True)
    job = load_from_dict(TrainJob, settings)
    record = {"run_id": "r1", "job": to_dict(job), "versions": {"torch": "2"}}
    (run / "run.json").write_text(json.dumps(record))
    progress = {"epoch": 1.0, "class_loss": 0.5, "box_loss": 0.5, "learning_rate": 0.1}
    progress |= {"total_steps": 10, "images_per_s": 3.0, "wait_share": 0.0}
    lines = [json.dumps({"kind": "progress", "step": step, **progress}) for step in (1, 2)]
    lines.append(json.dumps({"kind": "validation", "step": 2, "epoch": 1.0, "AP": 0.25}))
    (run / "metrics.jsonl").write_text("\n".join(lines))
    return run


def make_sweep(folder: Path, image_set: Any, weights: bytes) -> Path:
    """A sweep's folder, as `tune` leaves it: its best trial found the first box."""
    checkpoint = folder / "trials" / "best" / "ray_train" / "step_2"
    checkpoint.mkdir(parents=True)
    first, image = image_set.coco["annotations"][0], image_set.coco["images"][0]
    left, top, width, height = first["bbox"]
    found = Detections(
        torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32),
        torch.tensor([0.9]),
        torch.tensor([0]),
    )
    placement = Placement(image["height"], image["width"], image["height"], image["width"])
    candidates = join_detections([(image["id"], placement, found)], floor=0.01)
    (checkpoint / "candidates.npz").write_bytes(candidates.dump())
    (folder / "best.pth").write_bytes(weights)
    rows = [
        {"trial": "worse", "status": "done", "score": 0.1, "checkpoint": "elsewhere"},
        # As it was before the folder was moved.
        {"trial": "best", "status": "done", "score": 0.2, "checkpoint": "gone/step_2"},
        {"trial": "failed", "status": "failed", "score": None, "checkpoint": None},
    ]
    write_trials([row | {"error": ""} for row in rows], folder)
    data = {name: str(image_set.annotations) for name in ("annotations", "val_annotations")}
    job = load_from_dict(
        TuneJob,
        {
            "output": str(folder),
            "data": {"images": str(image_set.folder), **data},
            "space": {"optim.peak_lr": [0.1, 0.2]},
        },
    )
    (folder / "sweep.json").write_text(json.dumps({"settings": to_dict(job)}))
    return folder


def make_inference(folder: Path, image_set: Any, weights: bytes) -> Path:
    """A batch inference's folder, as `infer` leaves it: the first box, found at 0.9 and at 0.2."""
    (folder / "parts").mkdir(parents=True)
    model = folder.with_name("m.pth")
    model.write_bytes(weights)
    settings = {
        "model": str(model),
        "images": str(image_set.folder),
        "annotations": str(image_set.annotations),
        "output": str(folder),
    }
    rows = [
        {"image_id": image["id"], "uri": str(image_set.folder / image["file_name"])}
        | {"height": image["height"], "width": image["width"], "detections": []}
        for image in image_set.coco["images"]
    ]
    first = image_set.coco["annotations"][0]
    for score in (0.9, 0.2):
        found = {"category_id": first["category_id"], "bbox": first["bbox"], "score": score}
        rows[0]["detections"].append(found)
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "parts" / "part-000000000.jsonl").write_text(lines)
    record = {
        "run_id": "r1",
        "job": to_dict(load_from_dict(InferJob, settings)),
        "num_parts": 1,
        "categories": image_set.coco["categories"],
        "has_integer_ids": True,
        "totals": {"num_parts": 1, "num_images": 6, "num_errors": 0, "num_detections": 2},
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_run_report_shows_images_with_boxes_when_there_are_detections(
    write_report: RunReport, detections: Path, image_set: Any
) -> None:
    outcome, page = write_report(
        detections,
        "--annotations",
        image_set.annotations,
        "--images",
        image_set.folder,
        "--picture-side",
        64,
    )
    assert (outcome.num_pictures, outcome.left_out, outcome.exit_code) == (6, (), 0)
    assert outcome.num_bytes == len(page.encode())
    found = re.search(r'id="gallery-data">(.*?)</script>', page)
    assert found is not None
    data = json.loads(found[1])
    truth = {image["file_name"]: [] for image in image_set.coco["images"]}
    for entry in image_set.coco["annotations"]:
        truth[f"{entry['image_id']}.png"].append(entry["bbox"])
    for picture in data["pictures"]:
        view = picture["views"]["0"]
        assert sorted(box[:4] for box in view["truth"]) == sorted(truth[picture["name"]])
        assert {box[6] for box in view["found"]} <= {0}
    texts = re.findall(r'<script type="text/plain" id="picture-\d+">(.*?)</script>', page)
    sizes = {Image.open(io.BytesIO(base64.b64decode(text))).size for text in texts}
    # 64 x 96, 80 x 60 and 96 x 144 pixels (height x width) fitted into 64.
    assert sizes == {(64, 43), (48, 64)}


def test_run_report_shows_what_each_run_has_in_the_same_images(
    write_report: RunReport, detections: Path, image_set: Any
) -> None:
    nothing = detections.with_name("nothing.json")
    nothing.write_text("[]")
    _, page = write_report(
        detections,
        nothing,
        "--annotations",
        image_set.annotations,
        "--images",
        image_set.folder,
        "--gallery",
        1,
    )
    found = re.search(r'id="gallery-data">(.*?)</script>', page)
    assert found is not None
    data = json.loads(found[1])
    assert [run["name"] for run in data["runs"]] == ["detections.json", "nothing.json"]
    for picture in data["pictures"]:
        assert set(picture["views"]) == {"0", "1"}
        first, second = picture["views"]["0"], picture["views"]["1"]
        assert [box[:4] for box in first["truth"]] == [box[:4] for box in second["truth"]]
        assert second["found"] == []
        assert first["groups"] or second["groups"]


def test_run_report_tells_of_a_training_and_says_what_it_lacks(
    write_report: RunReport, tmp_path: Path, image_set: Any
) -> None:
    run = make_training(tmp_path, image_set)
    outcome, page = write_report(run)
    assert outcome.runs == {"m_run": "training"}
    assert len(outcome.left_out) == 1
    assert "--detect runs its weights" in outcome.left_out[0]
    sections = re.findall(r'<section id="(\w+)"', page)
    assert sections == ["training", "anchors", "speed", "setup", "gaps"]
    assert "retinaray train" in page
    # The weights' name stands for their run.
    assert write_report(tmp_path / "m.pth")[0].runs == {"m.pth": "training"}


def test_run_report_leaves_anchors_out_when_the_training_set_is_gone(
    write_report: RunReport, tmp_path: Path, image_set: Any
) -> None:
    run = make_training(tmp_path, image_set)
    record = json.loads((run / "run.json").read_text())
    record["job"]["data"]["annotations"] = str(tmp_path / "gone.json")
    (run / "run.json").write_text(json.dumps(record))
    outcome, page = write_report(run)
    assert 'id="anchors"' not in page
    assert any("anchors: " in gap and "gone.json" in gap for gap in outcome.left_out)


def test_run_report_names_runs_by_what_tells_them_apart(
    write_report: RunReport, tmp_path: Path, image_set: Any
) -> None:
    runs = [make_training(tmp_path / name, image_set) for name in ("a", "b")]
    outcome, page = write_report(*runs)
    assert list(outcome.runs) == ["a/m_run", "b/m_run"]
    assert "Settings that differ" in page


def test_run_report_tells_of_an_inference_that_has_not_ended(
    write_report: RunReport, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    settings = {"model": "m.onnx", "images": "images", "output": str(folder)}
    job = to_dict(load_from_dict(InferJob, settings))
    record = {"run_id": "r1", "job": job, "num_parts": 3, "categories": [{"id": 1, "name": "a"}]}
    (folder / "run.json").write_text(json.dumps(record))
    outcome, page = write_report(folder)
    assert outcome.runs == {"run": "batch inference"}
    assert "the run has not ended" in outcome.left_out[0]
    assert "retinaray infer" in page


def test_run_report_analyses_an_inference_with_its_own_images(
    write_report: RunReport, tmp_path: Path, image_set: Any, tiny_weights: bytes
) -> None:
    outcome, page = write_report(make_inference(tmp_path / "run", image_set, tiny_weights))
    assert (outcome.num_pictures, outcome.left_out) == (6, ())
    # The card's thresholds are 0.3: of the two detections one counts.
    assert "with the thresholds stored in the model" in page
    found_text = re.search(r'id="gallery-data">(.*?)</script>', page)
    assert found_text is not None
    assert json.loads(found_text[1])["runs"][0]["thresholds"] == [0.3, 0.3]


def test_run_report_replays_the_best_trial_of_a_sweep(
    write_report: RunReport, tmp_path: Path, image_set: Any, tiny_weights: bytes
) -> None:
    folder = make_sweep(tmp_path / "sweep", image_set, tiny_weights)
    first = image_set.coco["annotations"][0]
    left, top, width, height = first["bbox"]
    outcome, page = write_report(folder)
    assert outcome.runs == {"sweep": "sweep"}
    assert (outcome.num_pictures, outcome.left_out) == (6, ())
    text = re.search(r'id="gallery-data">(.*?)</script>', page)
    assert text is not None
    boxes = {p["name"]: p["views"]["0"]["found"] for p in json.loads(text[1])["pictures"]}
    # left, top, width, height, score, class, hit
    assert boxes.pop("1.png") == [[left, top, width, height, 0.9, 0, 0]]
    assert set(map(len, boxes.values())) == {0}
    assert "retinaray tune --config tune.yaml" in page


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"AP": 0.5, "classes": [], "model": "m.pth", "images_per_s": 4.0}, "evaluation"),
        (PARITY, "parity check"),
    ],
)
def test_run_report_tells_of_files_of_evaluate_and_parity(
    write_report: RunReport, tmp_path: Path, content: dict[str, Any], kind: str
) -> None:
    path = tmp_path / "numbers.json"
    path.write_text(json.dumps(content))
    assert write_report(path)[0].runs == {"numbers.json": kind}


@pytest.mark.parametrize("kind", ["training", "compared", "sweep", "infer", "parity"])
def test_pages_of_all_runs_open_without_a_complaint(
    write_report: RunReport,
    watch_page: Callable[..., Any],
    detections: Path,
    image_set: Any,
    tiny_weights: bytes,
    tmp_path: Path,
    kind: str,
) -> None:
    truth = ["--annotations", image_set.annotations, "--images", image_set.folder]
    if kind == "training":
        write_report(make_training(tmp_path / "a", image_set))
    elif kind == "compared":
        runs = [make_training(tmp_path / name, image_set) for name in ("a", "b")]
        write_report(*runs, detections, *truth)
    elif kind == "sweep":
        write_report(make_sweep(tmp_path / "sweep", image_set, tiny_weights))
    elif kind == "infer":
        write_report(make_inference(tmp_path / "run", image_set, tiny_weights))
    else:
        path = tmp_path / "numbers.json"
        path.write_text(json.dumps(PARITY))
        write_report(path)
    for width, color_scheme in ((360, "dark"), (1280, "light")):
        page = watch_page(
            (tmp_path / "page.html").as_uri(),
            ("file:", "data:"),
            viewport={"width": width, "height": 800},
            color_scheme=color_scheme,
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("section").count() >= (1 if kind == "parity" else 3)
        links = page.locator("nav a").evaluate_all("all => all.map((a) => a.getAttribute('href'))")
        assert all(page.locator(link).count() == 1 for link in links)


def test_run_report_refuses_what_is_no_run(write_report: RunReport, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected what train, tune or infer left"):
        write_report(tmp_path)
    (tmp_path / "above" / "model_run").mkdir(parents=True)
    (tmp_path / "above" / "model_run" / "run.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"name the run's folder; it holds .*above/model_run$"):
        write_report(tmp_path / "above")
    for number in range(4):
        (tmp_path / "above" / f"sweep{number}").mkdir()
        (tmp_path / "above" / f"sweep{number}" / "sweep.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"model_run, .*sweep0, .*sweep1 and 2 more$"):
        write_report(tmp_path / "above")
    other = tmp_path / "other.json"
    other.write_text('{"a": 1}')
    with pytest.raises(DatasetError, match="found other JSON"):
        write_report(other)
    with pytest.raises(MissingFileError, match=r"absent\.json"):
        write_report(tmp_path / "absent.json")


def test_run_report_refuses_detections_that_it_cannot_judge(
    write_report: RunReport, detections: Path, image_set: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="give --annotations"):
        write_report(detections)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(image_set.coco | {"images": [], "annotations": []}))
    with pytest.raises(DatasetError, match="which the ground truth does not have"):
        write_report(detections, "--annotations", other)
    with pytest.raises(DatasetError, match=f"{detections.name}: not COCO: .*found a list"):
        write_report(detections, "--annotations", detections)
    other.write_text(json.dumps([{"image_id": 1, "category_id": 7, "score": 1}]))
    with pytest.raises(DatasetError, match=r"other\.json: detection 1: lacks bbox"):
        write_report(other, "--annotations", image_set.annotations)


def test_run_report_refuses_a_folder_without_the_images(
    write_report: RunReport, detections: Path, image_set: Any, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match=f"none of 6 images could be read.*{tmp_path}"):
        write_report(
            detections, "--annotations", image_set.annotations, "--images", tmp_path / "no"
        )


def test_run_report_says_which_images_are_missing_when_some_are(
    write_report: RunReport, detections: Path, image_set: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(1, 6):
        (folder / f"{number}.png").write_bytes((image_set.folder / f"{number}.png").read_bytes())
    (folder / "5.png").write_bytes(b"no image")
    outcome, _ = write_report(
        detections, "--annotations", image_set.annotations, "--images", folder
    )
    assert outcome.num_pictures == 4
    assert len(outcome.left_out) == 1
    assert "images: 2 could not be read" in outcome.left_out[0]
    assert "5.png" in outcome.left_out[0]
    assert "6.png" in outcome.left_out[0]


def test_run_report_leaves_the_gallery_out_when_nobody_says_where_images_are(
    write_report: RunReport, detections: Path, image_set: Any
) -> None:
    outcome, page = write_report(detections, "--annotations", image_set.annotations)
    assert outcome.num_pictures == 0
    assert outcome.left_out == (
        "detections.json: images: nobody says where they are; give --images",
    )
    assert 'id="confusion"' in page


@pytest.mark.parametrize(
    ("uris", "names"),
    [
        (["a/b/run"], ["run"]),
        (["a/run/", "b/run"], ["a/run", "b/run"]),
        (["s3://x/a/c/run", "s3://x/b/c/run", "run"], ["a/c/run", "b/c/run", "run"]),
        (["run", "run/"], ["run", "run/"]),
    ],
)
def test_name_runs_takes_as_few_parts_as_tell_them_apart(uris: list[str], names: list[str]) -> None:
    assert name_runs(uris) == names
