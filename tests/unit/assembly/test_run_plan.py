"""Settings of a batch inference as what its parts are made of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from retinaray.artifact import ModelCard
from retinaray.assembly.run_plan import (
    detect_part,
    list_truth,
    load_as_used,
    make_choice,
    make_infer_settings,
    make_output,
    make_tiling,
)
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import InferJob
from retinaray.errors import ConfigError, ImageError
from retinaray.inference.pipeline import ImageResult, ImageSource
from retinaray.inference.run_files import RunFiles
from retinaray.inference.stage_times import Stage, StageClock
from retinaray.inference.tiling import MAX_PER_TILE
from retinaray.inference.torch_backend import load_torch_predictor
from retinaray.storage import Storage

MakeJob = Callable[..., InferJob]


@pytest.fixture
def make_job() -> MakeJob:
    def make(**changes: object) -> InferJob:
        tree = {"model": "m.onnx", "images": "photos", "output": "run"}
        return load_from_dict(InferJob, tree, changes)

    return make


def test_make_choice_takes_everything_unless_told_otherwise(make_job: MakeJob) -> None:
    choice = make_choice(make_job().select)
    assert (choice.include, choice.limit, choice.sample) == ((), None, None)
    assert not choice.needs_details


@pytest.mark.parametrize(("given", "sample"), [(100, 100), (1, 1), (0.25, 0.25)])
def test_make_choice_tells_numbers_of_images_from_shares(
    make_job: MakeJob, given: float, sample: float
) -> None:
    choice = make_choice(make_job(select={"sample": given}).select)
    assert choice.sample == sample
    assert type(choice.sample) is type(sample)


def test_make_choice_reads_dates(make_job: MakeJob) -> None:
    choice = make_choice(make_job(select={"modified_after": "2026-05-31"}).select)
    assert choice.modified_after == datetime(2026, 5, 31, tzinfo=UTC)
    with pytest.raises(ConfigError, match="expected a date such as"):
        make_choice(make_job(select={"modified_before": "yesterday"}).select)


@pytest.mark.parametrize(
    ("images", "annotations", "root"),
    [("photos", None, "photos"), ("sets/list.csv", None, "sets"), ("photos", "a.json", "photos")],
)
def test_make_output_names_files_relative_to_their_folder(
    make_job: MakeJob, images: str, annotations: str | None, root: str
) -> None:
    job = make_job(images=images, annotations=annotations, output="found.json.gz")
    output = make_output(job, {"categories": [{"id": 3, "name": "car"}], "has_integer_ids": True})
    assert output.images_root == root
    assert output.merged_compression == "gzip"


def test_make_tiling_lets_many_objects_through(make_job: MakeJob, tiny_card: ModelCard) -> None:
    assert make_tiling(make_job(), tiny_card) is None
    job = make_job(tiling={"tile": [640, 960]})
    tiling = make_tiling(job, tiny_card)
    assert tiling is not None
    assert (tiling.tile_height, tiling.tile_width, tiling.max_detections) == (640, 960, 1000)
    assert make_infer_settings(job, threads=1).max_detections == MAX_PER_TILE
    limited = make_tiling(
        make_job(tiling={"tile": 640}, detection={"max_detections": 5}),
        replace(tiny_card, nms_kind="agnostic"),
    )
    assert limited is not None
    assert (limited.max_detections, limited.is_class_agnostic) == (5, True)


def test_load_as_used_decodes_the_whole_image_for_tiles(make_job: MakeJob) -> None:
    source = ImageSource(1, "a.jpg")
    for job in (make_job(), make_job(tiling={"tile": 64})):
        with pytest.raises(ImageError):
            load_as_used(source, job, (64, 96), lambda _: b"no image")


class _WatchedClock(StageClock):
    """Tells when the engine begins to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.is_starved = threading.Event()

    @contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        if stage == "starved":
            self.is_starved.set()
        with super().measure(stage):
            yield


@pytest.mark.parametrize("tiling", [{}, {"tile": [64, 96]}], ids=["whole", "tiles"])
def test_detect_part_counts_its_stages(
    make_job: MakeJob, tiny_weights: bytes, image_set: Any, tiling: dict[str, object]
) -> None:
    job, clock = make_job(batch=2, tiling=tiling), _WatchedClock()
    predictor = load_torch_predictor(
        tiny_weights, uri="m.pth", settings=make_infer_settings(job, threads=1)
    )
    paths = [image_set.folder / image["file_name"] for image in image_set.coco["images"]]
    sources = [ImageSource(number, str(path)) for number, path in enumerate(paths)]

    def read(uri: str) -> bytes:
        # Threads that are ahead of the engine would leave it nothing to wait for.
        assert clock.is_starved.wait(60.0)
        return bytes(image_set.read(uri))

    results = list(detect_part(predictor, sources, job, read=read, clock=clock))
    assert [result.error for result in results] == [""] * 6
    times = clock.times
    assert times.num_bytes == sum(path.stat().st_size for path in paths)
    assert min(times.fetch_s, times.decode_s, times.engine_s, times.starved_s) > 0
    assert times.commit_s == 0


def test_list_truth_keeps_the_images_that_a_run_has_taken(
    make_job: MakeJob, tmp_path: Path
) -> None:
    files = RunFiles(str(tmp_path), Storage())
    files.commit(
        0,
        [
            ImageResult(ImageSource(1, "a.jpg"), height=4, width=4),
            ImageResult(ImageSource(2, "b.jpg"), error="damaged", exception="ImageError"),
        ],
    )
    truth = {
        "images": [{"id": number} for number in (1, 2, 3)],
        "annotations": [{"image_id": number, "bbox": [0, 0, 1, 1]} for number in (1, 2, 3, 3)],
        "categories": [],
    }
    assert list_truth(make_job(), files, 1, truth) is truth
    taken = list_truth(make_job(select={"limit": 2}), files, 1, truth)
    assert [image["id"] for image in taken["images"]] == [1, 2]
    assert [box["image_id"] for box in taken["annotations"]] == [1, 2]
    assert taken["categories"] == []
