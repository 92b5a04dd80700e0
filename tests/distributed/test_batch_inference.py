"""Runs over sixteen images in four parts; `alone` is the run that the others must equal."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retinaray.config.schema import InferJob
from retinaray.demo.embedded_s3 import EmbeddedS3
from retinaray.demo.scenes import SceneSet
from retinaray.distributed import batch_inference
from retinaray.distributed.batch_inference import InferOutcome, run_inference
from retinaray.errors import (
    CheckpointError,
    ClusterError,
    ConfigError,
    DatasetError,
    InferenceError,
    StorageError,
)
from retinaray.inference import run_lock
from retinaray.local_listing import walk_names
from retinaray.storage import Storage

pytestmark = pytest.mark.local_ray

MakeJob = Callable[..., InferJob]
MERGED = ("detections.json", "images.json")


@pytest.fixture(scope="module")
def alone(
    ray_cluster: object, make_infer_job: MakeJob, tmp_path_factory: pytest.TempPathFactory
) -> InferOutcome:
    """One worker, local files, nothing happens."""
    return run_inference(make_infer_job(tmp_path_factory.mktemp("alone") / "run"))


@pytest.fixture
def finished(alone: InferOutcome, tmp_path: Path) -> Path:
    """A copy of the run `alone`, to be damaged."""
    return Path(shutil.copytree(alone.run, tmp_path / "run"))


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reaching for Ray ends the test: the fault must be found before."""

    def refuse(**_: object) -> None:
        pytest.fail("Ray was started for a job that cannot run")

    monkeypatch.setattr(batch_inference, "connect", refuse)


@pytest.fixture
def s3_data(
    s3_bucket: str, s3_server: EmbeddedS3, scenes: SceneSet, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str]:
    """The scenes' images below a prefix, and the server's address, which no variable tells."""
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    storage = Storage(endpoint_url=s3_server.endpoint_url)
    for path in sorted(scenes.images.glob("test*")):
        storage.write_bytes(f"{s3_bucket}/images/{path.name}", path.read_bytes())
    return s3_bucket, s3_server.endpoint_url


def _read_rows(run: Path, folder: str) -> list[dict[str, Any]]:
    paths = sorted((run / folder).glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def _assert_same_bytes(run: Path, wanted: str | Path) -> None:
    for name in MERGED:
        assert (run / name).read_bytes() == (Path(wanted) / name).read_bytes()


def test_run_inference_accounts_for_every_image_once(alone: InferOutcome, scenes: SceneSet) -> None:
    run = Path(alone.run)
    truth = json.loads(scenes.test.read_bytes())
    rows = _read_rows(run, "parts")
    assert [row["image_id"] for row in rows] == [image["id"] for image in truth["images"]]
    assert len(list((run / "parts").iterdir())) == 4
    assert (alone.totals.num_images, alone.totals.num_errors) == (16, 0)
    assert json.loads((run / "images.json").read_bytes()) == [
        {
            "image_id": image["id"],
            "uri": str(scenes.images / image["file_name"]),
            "height": 64,
            "width": 96,
        }
        for image in truth["images"]
    ]
    assert (run / "_SUCCESS").exists()
    record = json.loads((run / "run.json").read_bytes())
    assert (record["num_inputs"], record["num_parts"]) == (16, 4)


def test_run_inference_prints_the_scores_of_its_file(alone: InferOutcome, scenes: SceneSet) -> None:
    assert alone.scores is not None
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(scenes.test))
        judge = COCOeval(truth, truth.loadRes(alone.detections), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    # pycocotools writes -1 where there is no ground truth.
    wanted = [None if value == -1 else value for value in judge.stats.tolist()]
    assert list(alone.scores.summary.values()) == wanted
    assert wanted[8] > 0  # AR_100: the boxes do meet something.
    assert json.loads(alone.to_json())["scores"]["AP"] == wanted[0]


def test_run_inference_gives_the_same_bytes_when_two_workers_share_the_parts(
    alone: InferOutcome, make_infer_job: MakeJob, tmp_path: Path
) -> None:
    run_inference(make_infer_job(tmp_path / "run", workers=2))
    _assert_same_bytes(tmp_path / "run", alone.run)


@pytest.mark.usefixtures("ray_cluster")
def test_run_inference_gives_rows_or_errors_when_images_are_odd(
    make_infer_job: MakeJob,
    model_file: Path,
    scenes: SceneSet,
    shared_data: Path,
    tmp_path: Path,
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    odd = sorted((shared_data / "odd_images" / "images").iterdir())
    for path in [*odd, *sorted(scenes.images.glob("test*"))[:4]]:
        (images / path.name).symlink_to(path)
    outcome = run_inference(
        make_infer_job(
            tmp_path / "run",
            model=str(model_file),
            images=str(images),
            annotations=None,
            part_size=11,
            workers=2,
        )
    )
    rows, errors = _read_rows(tmp_path / "run", "parts"), _read_rows(tmp_path / "run", "errors")
    assert sorted(row["uri"] for row in rows + errors) == sorted(map(str, images.iterdir()))
    assert (outcome.totals.num_images, outcome.totals.num_errors) == (len(rows), len(errors))
    assert all(error["reason"] and error["exception"] for error in errors)
    failed = {Path(error["uri"]).name for error in errors}
    assert {"empty.jpg", "text.jpg", "huge_30000x30000.png", "broken.png"} <= failed
    found = {Path(row["uri"]).name for row in rows}
    assert {"Landscape_6.jpg", "one_pixel.png", "photo_cmyk.jpg", "hopper.webp"} <= found
    assert len(outcome.errors) == 5
    assert str(outcome.errors[0]["uri"]) in outcome.to_text()


def test_run_inference_completes_only_what_is_missing_when_it_was_interrupted(
    alone: InferOutcome, make_infer_job: MakeJob, finished: Path, tmp_path: Path
) -> None:
    parts = sorted((finished / "parts").iterdir())
    for path in (*parts[1:3], finished / "_SUCCESS", *(finished / name for name in MERGED)):
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in (parts[0], parts[3])}
    outcome = run_inference(make_infer_job(finished, workers=2))
    _assert_same_bytes(finished, alone.run)
    assert (finished / "_SUCCESS").exists()
    assert outcome.totals == alone.totals
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.slow
def test_run_inference_gives_the_same_bytes_when_its_worker_was_killed(
    alone: InferOutcome,
    make_infer_job: MakeJob,
    scenes: SceneSet,
    tmp_path: Path,
    hold_reader: Callable[..., Any],
    kill_worker: Callable[[str], int],
    wait_until: Callable[[Callable[[], object], str], None],
) -> None:
    parts = tmp_path / "run" / "parts"
    readings: list[int] = []

    def kill_at_first_reading(reading: int) -> None:
        readings.append(reading)
        if reading == 1:
            wait_until(lambda: list(parts.glob("part-*2.jsonl")), "the parts before it")
            kill_worker("ray::MapWorker")

    # The last image of the last part.
    with hold_reader(sorted(scenes.images.glob("test*"))[-1], kill_at_first_reading) as failures:
        outcome = run_inference(make_infer_job(tmp_path / "run"))
    assert not failures
    assert readings == [1, 2]
    assert outcome.totals == alone.totals
    _assert_same_bytes(tmp_path / "run", alone.run)


def test_run_inference_leaves_out_the_image_that_kills_its_worker_each_time(
    alone: InferOutcome,
    make_infer_job: MakeJob,
    scenes: SceneSet,
    tmp_path: Path,
    hold_reader: Callable[..., Any],
    kill_worker: Callable[[str], int],
) -> None:
    def kill(reading: int) -> None:
        kill_worker("ray::MapWorker")

    poison = sorted(scenes.images.glob("test*"))[4]
    with hold_reader(poison, kill) as failures:
        outcome = run_inference(make_infer_job(tmp_path / "run"))
    assert not failures
    assert (outcome.totals.num_images, outcome.totals.num_errors) == (15, 1)
    (error,) = _read_rows(tmp_path / "run", "errors")
    assert error["uri"] == str(poison)
    assert "2 worker processes ended while they read this file" in error["reason"]
    kept = [row for row in _read_rows(Path(alone.run), "parts") if row["uri"] != str(poison)]
    assert _read_rows(tmp_path / "run", "parts") == kept
    assert list(walk_names(tmp_path / "run" / "attempts")) == []


def test_run_inference_reads_tars_and_writes_what_was_asked_for(
    alone: InferOutcome, make_infer_job: MakeJob, scenes: SceneSet, tmp_path: Path
) -> None:
    paths = sorted(scenes.images.glob("test*"))
    (tmp_path / "tars").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / "tars" / f"shard-{number}.tar", "w") as shard:
            for path in paths[number * 8 : number * 8 + 8]:
                shard.add(path, path.name)
    outcome = run_inference(
        make_infer_job(
            tmp_path / "found.jsonl.gz",
            images=str(tmp_path / "tars"),
            annotations=None,
            select__limit=12,
            write={"format": "jsonl", "compression": "zstd", "draw": 3, "crops": True},
        )
    )
    assert (outcome.totals.num_images, outcome.totals.num_errors) == (12, 0)
    run = Path(outcome.run)
    assert len(list((run / "parts").glob("part-*.jsonl.zst"))) == 3
    content = gzip.decompress((tmp_path / "found.jsonl.gz").read_bytes())
    rows = [json.loads(line) for line in content.splitlines()]
    assert [row["uri"].rpartition("/")[2] for row in rows] == [path.name for path in paths[:12]]
    wanted = {
        Path(row["uri"]).name: row["detections"] for row in _read_rows(Path(alone.run), "parts")
    }
    assert {Path(row["uri"]).name: row["detections"] for row in rows} == {
        path.name: wanted[path.name] for path in paths[:12]
    }
    assert len(list((run / "overlays").iterdir())) == 3
    assert any((run / "crops").iterdir())


def test_run_inference_gives_the_same_bytes_when_others_decode(
    alone: InferOutcome, make_infer_job: MakeJob, tmp_path: Path
) -> None:
    outcome = run_inference(make_infer_job(tmp_path / "run", decoding__num_cpus=1))
    _assert_same_bytes(tmp_path / "run", alone.run)
    # What the worker itself would have counted.
    assert outcome.summary["stage_s"]["decode"] == 0
    assert alone.summary["stage_s"]["decode"] > 0


@pytest.mark.slow
def test_run_inference_gives_the_same_bytes_when_images_are_one_tile_each(
    alone: InferOutcome, make_infer_job: MakeJob, tmp_path: Path
) -> None:
    job = make_infer_job(
        tmp_path / "run",
        tiling={"tile": [64, 96], "full": False},
        detection__max_detections=100,
        workers=2,
    )
    run_inference(job)
    _assert_same_bytes(tmp_path / "run", alone.run)


def test_run_inference_refuses_a_second_driver_on_the_same_output(
    make_infer_job: MakeJob, tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    with (
        run_lock.RunLock(str(tmp_path / "run"), Storage()).held(),
        pytest.raises(ConfigError, match="another driver is at work on this run"),
    ):
        run_inference(make_infer_job(tmp_path / "run"))


def test_run_inference_says_why_when_a_part_cannot_be_written(
    alone: InferOutcome, make_infer_job: MakeJob, tmp_path: Path
) -> None:
    obstacle = tmp_path / "run" / "parts" / "part-000000002.jsonl"
    obstacle.mkdir(parents=True)
    with pytest.raises(
        ClusterError, match=r"1 of 4 parts .* first \[2\]: cannot write .*part-000000002\.jsonl"
    ):
        run_inference(make_infer_job(tmp_path / "run"))
    obstacle.rmdir()
    run_inference(make_infer_job(tmp_path / "run"))
    _assert_same_bytes(tmp_path / "run", alone.run)


def test_run_inference_goes_from_s3_to_s3_when_only_the_job_knows_the_server(
    alone: InferOutcome, make_infer_job: MakeJob, onnx_file: Path, s3_data: tuple[str, str]
) -> None:
    prefix, endpoint_url = s3_data
    storage = Storage(endpoint_url=endpoint_url)
    storage.write_bytes(f"{prefix}/tiny.onnx", onnx_file.read_bytes())
    job = make_infer_job(
        f"{prefix}/run",
        model=f"{prefix}/tiny.onnx",
        images=f"{prefix}/images",
        reading__endpoint_url=endpoint_url,
        workers=2,
    )
    outcome = run_inference(job)
    assert outcome.detections == f"{prefix}/run/detections.json"
    wanted = (Path(alone.run) / "detections.json").read_bytes()
    assert storage.read_bytes(outcome.detections) == wanted
    assert outcome.scores == alone.scores
    assert storage.exists(f"{prefix}/run/_SUCCESS")

    storage.delete(f"{prefix}/run/parts/part-000000001.jsonl")
    storage.delete(outcome.detections)
    assert run_inference(job).totals == alone.totals
    assert storage.read_bytes(outcome.detections) == wanted


@pytest.mark.usefixtures("no_ray")
def test_run_inference_says_so_when_the_credentials_are_wrong(
    make_infer_job: MakeJob, s3_data: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, endpoint_url = s3_data
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    job = make_infer_job(
        f"{prefix}/run", images=f"{prefix}/images", reading__endpoint_url=endpoint_url
    )
    with pytest.raises(StorageError, match=r"s3://.*AWS_SECRET_ACCESS_KEY"):
        run_inference(job)


@pytest.mark.usefixtures("no_ray")
def test_run_inference_refuses_other_settings_on_the_same_output(
    make_infer_job: MakeJob, finished: Path
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"settings: detection\.score_threshold: 0\.0 -> 0\.25\..*--overwrite",
    ):
        run_inference(make_infer_job(finished, batch=5, detection__score_threshold=0.25))


@pytest.mark.usefixtures("no_ray")
def test_run_inference_refuses_another_model_on_the_same_output(
    make_infer_job: MakeJob, onnx_file: Path, finished: Path, tmp_path: Path
) -> None:
    record = json.loads((finished / "run.json").read_bytes())
    record["model_sha256"] = "0123456789abcdef"
    (finished / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"model: 0123456789ab -> \w{12} \(SHA-256\)"):
        run_inference(make_infer_job(finished))


@pytest.mark.slow
def test_run_inference_starts_over_when_overwriting(
    alone: InferOutcome, make_infer_job: MakeJob, finished: Path
) -> None:
    outcome = run_inference(
        make_infer_job(finished, overwrite=True, part_size=8, detection__max_detections=3)
    )
    assert outcome.totals.num_parts == 2
    assert outcome.totals.num_detections == 16 * 3
    assert len(list((finished / "parts").iterdir())) == 2
    assert alone.totals.num_detections > 16 * 3


def test_run_inference_writes_the_json_that_was_asked_for(
    alone: InferOutcome, make_infer_job: MakeJob, finished: Path, tmp_path: Path
) -> None:
    """The run of NAME.json lies beside it; this one has nothing left to do."""
    finished.rename(tmp_path / "found_run")
    outcome = run_inference(make_infer_job(tmp_path / "found.json"))
    assert outcome.detections == str(tmp_path / "found.json")
    assert outcome.images_per_s == 0
    assert (tmp_path / "found.json").read_bytes() == Path(alone.detections).read_bytes()


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        pytest.param(
            {"images": "EMPTY", "annotations": None},
            DatasetError,
            "EMPTY: no images found",
            id="empty folder",
        ),
        pytest.param(
            {"annotations": "EMPTY/truth.json"},
            StorageError,
            r"cannot read .*EMPTY/truth\.json: no such file",
            id="no annotations file",
        ),
        pytest.param(
            {"model": "EMPTY/model.onnx"},
            StorageError,
            r"cannot read .*EMPTY/model\.onnx: no such file",
            id="no model file",
        ),
        pytest.param(
            {"model": "EMPTY/model.tflite"},
            (CheckpointError, StorageError),
            r"EMPTY/model\.tflite",
            id="unknown kind of model",
        ),
        pytest.param(
            {"backend": "torch"}, InferenceError, "cannot run onnx files", id="wrong backend"
        ),
        pytest.param(
            {"detection__size": [128, 128]},
            InferenceError,
            "was exported for 64x96",
            id="another canvas",
        ),
    ],
)
def test_run_inference_refuses_before_ray_starts(
    changes: dict[str, Any],
    kind: type[Exception],
    message: str,
    make_infer_job: MakeJob,
    tmp_path: Path,
) -> None:
    (tmp_path / "EMPTY").mkdir()
    given = {
        key: str(tmp_path / value) if str(value).startswith("EMPTY") else value
        for key, value in changes.items()
    }
    with pytest.raises(kind, match=message):
        run_inference(make_infer_job(tmp_path / "run", **given))
