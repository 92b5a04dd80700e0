"""`anchors` as a command: what it writes, prints and refuses."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from retinaray.assembly import anchors
from retinaray.assembly.anchors import run_anchors
from retinaray.config.loading import load_from_argv, load_from_dict
from retinaray.config.schema import AnchorsJob, TrainJob
from retinaray.data.coco import load_coco
from retinaray.errors import DatasetError

ROW_KEYS = {"count", "share_iou_0.5", "share_iou_0.4", "mean_best_iou", "only_by_best_anchor"}


@pytest.fixture
def make_job(image_set: Any) -> Callable[..., AnchorsJob]:
    """Jobs on `image_set`, without a picture: make_job(fit=True, ...)."""

    def make(**changes: object) -> AnchorsJob:
        tree = {"annotations": str(image_set.annotations), "resize": 64, "max_size": 96}
        return load_from_dict(AnchorsJob, {**tree, "picture": None, **changes})

    return make


def test_run_anchors_reports_every_group(make_job: Callable[..., AnchorsJob]) -> None:
    outcome = run_anchors(make_job())
    values = json.loads(outcome.to_json())
    assert outcome.exit_code == 0
    assert values["all"].keys() >= ROW_KEYS
    assert values["all"]["count"] == 12
    assert list(values["by_class"]) == ["class 0", "class 1"]
    assert list(values["by_size"]) == ["small", "medium", "large"]
    assert sum(row["count"] for row in values["by_ratio"].values()) == 12
    # Two landscape sizes of 2:3 and one portrait of 4:3; the canvas holds them all.
    assert values["canvas"] == [96, 96]
    assert values["anchors_per_image"] == 9 * (144 + 36 + 9 + 4 + 1)
    # 194 cells of two towers of four 256-wide 3x3 convolutions, and 9 * (2 + 4) outputs.
    gflops = 2e-9 * 9 * 256 * (2 * 4 * 256 + 9 * 6) * 194
    assert values["head_gflops"] == pytest.approx(gflops, abs=0.001)
    assert values["unmatched"] == 0
    assert values["picture"] == ""
    assert "fit" not in values


def test_run_anchors_fits_and_prints_flags_that_train_accepts(
    make_job: Callable[..., AnchorsJob], tmp_path: Path
) -> None:
    picture = tmp_path / "sub" / "map.png"
    outcome = run_anchors(
        make_job(fit=True, picture=str(picture), anchors={"convention": "odtk", "levels": "2-7"})
    )
    fit = json.loads(outcome.to_json())["fit"]
    assert fit["chosen"]["share_iou_0.5"] >= fit["default"]["share_iou_0.5"]
    assert [entry["name"] for entry in fit["candidates"][:3]] == ["default", "halved", "given"]
    argv = ["model.pth", "--annotations", "a.json", *shlex.split(fit["flags"])]
    job = load_from_argv(TrainJob, argv)
    assert list(job.anchors.scales) == fit["chosen"]["scales"]
    assert list(job.anchors.ratios) == fit["chosen"]["ratios"]
    assert (job.anchors.levels, job.anchors.convention) == (fit["chosen"]["levels"], "odtk")
    assert [job.data.resize, job.data.max_size] == [
        fit["chosen"]["resize"],
        fit["chosen"]["max_size"],
    ]
    with Image.open(picture) as image:
        assert image.format == "PNG"
    text = outcome.to_text()
    assert fit["flags"] in text
    assert "<- chosen" in text
    assert str(picture) in text


def test_run_anchors_measures_the_setting_that_its_flags_name(
    make_job: Callable[..., AnchorsJob],
) -> None:
    chosen = json.loads(run_anchors(make_job(fit=True)).to_json())["fit"]["at_this_size"]
    keys = ("scales", "ratios", "levels")
    again = run_anchors(make_job(anchors={key: chosen[key] for key in keys}))
    values = json.loads(again.to_json())
    assert values["all"]["share_iou_0.5"] == chosen["share_iou_0.5"]
    assert values["anchors_per_image"] == chosen["anchors_per_image"]
    assert values["head_gflops"] == chosen["head_gflops"]


def test_run_anchors_names_the_canvas_in_its_flags_when_it_was_given(
    make_job: Callable[..., AnchorsJob],
) -> None:
    outcome = run_anchors(make_job(fit=True, size=[64, 96]))
    fit = json.loads(outcome.to_json())["fit"]
    assert json.loads(outcome.to_json())["canvas"] == [64, 96]
    assert fit["flags"].endswith("--size {} {}".format(*fit["chosen"]["canvas"]))


def test_run_anchors_does_not_match_large_sets(
    make_job: Callable[..., AnchorsJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchors, "MAX_BOXES_TO_MATCH", 11)
    outcome = run_anchors(make_job())
    assert outcome.num_unmatched is None
    assert "more than 11 boxes" in outcome.to_text()


def test_run_anchors_refuses_a_set_without_boxes(
    make_job: Callable[..., AnchorsJob], write_json: Callable[[str, Any], str], image_set: Any
) -> None:
    path = write_json("empty.json", {**image_set.coco, "annotations": []})
    assert len(load_coco(path)) == 6
    with pytest.raises(DatasetError, match=r"empty\.json: expected boxes .* none in 6 images"):
        run_anchors(make_job(annotations=path))
