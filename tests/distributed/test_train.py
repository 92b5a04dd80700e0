"""Trainings through Ray Train; `undisturbed` is the run that the others must equal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from retinaray.config.schema import TrainJob
from retinaray.demo.scenes import SceneSet
from retinaray.distributed import train
from retinaray.distributed.train import TrainOutcome, run_training
from retinaray.errors import CheckpointError, ConfigError, DatasetError, DivergenceError

pytestmark = [pytest.mark.local_ray, pytest.mark.usefixtures("ray_cluster")]

MakeJob = Callable[..., TrainJob]
ReadTensors = Callable[[Path], dict[str, torch.Tensor]]
ReadEvents = Callable[[Path, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: object, make_train_job: MakeJob, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainJob, TrainOutcome]:
    """One worker, six steps, three validations."""
    job = make_train_job(tmp_path_factory.mktemp("undisturbed") / "model.pth")
    return job, run_training(job)


def _checkpoints(run_folder: Path) -> list[str]:
    return sorted(path.parent.name for path in run_folder.rglob("training.pth"))


def _assert_same_tensors(found: Mapping[str, torch.Tensor], wanted: Mapping[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different


def test_run_training_leaves_the_files_it_promises(
    undisturbed: tuple[TrainJob, TrainOutcome], read_tensors: ReadTensors, read_events: ReadEvents
) -> None:
    job, outcome = undisturbed
    folder = Path(outcome.run_folder)
    assert Path(outcome.model) == Path(job.output)
    assert folder == Path(job.output).parent / "model_run"
    assert outcome.steps == 6
    assert json.loads(outcome.to_json())["model"] == job.output
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["job"]["run"]["batch"] == 4
    assert read_tensors(Path(outcome.model)).keys() == read_tensors(folder / "last.pth").keys()
    assert [event["step"] for event in read_events(folder, "progress")] == [1, 2, 3, 4, 5, 6]
    assert [event["step"] for event in read_events(folder, "validation")] == [2, 4, 6]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))


def test_run_training_keeps_the_best_weights_and_two_checkpoints(
    undisturbed: tuple[TrainJob, TrainOutcome], read_events: ReadEvents
) -> None:
    _, outcome = undisturbed
    validations = read_events(Path(outcome.run_folder), "validation")
    best = max(validations, key=lambda event: event["AP"])
    assert outcome.metrics["AP"] == best["AP"]
    kept = _checkpoints(Path(outcome.run_folder))
    assert len(kept) <= 2
    assert "step_00000006" in kept


def test_run_training_is_the_same_when_two_workers_share_the_batch(
    undisturbed: tuple[TrainJob, TrainOutcome],
    make_train_job: MakeJob,
    tmp_path: Path,
    read_tensors: ReadTensors,
    read_events: ReadEvents,
) -> None:
    outcome = run_training(make_train_job(tmp_path / "model.pth", run__workers=2))
    alone, shared = Path(undisturbed[1].run_folder), Path(outcome.run_folder)
    for kind, names in (
        ("progress", ("class_loss", "box_loss", "gradient_norm", "num_foreground")),
        ("validation", ("AP", "AP50", "AR_100")),
    ):
        wanted, found = read_events(alone, kind), read_events(shared, kind)
        assert [event["step"] for event in found] == [event["step"] for event in wanted]
        for name in names:
            assert [event[name] for event in found] == pytest.approx(
                [event[name] for event in wanted], rel=1e-4, abs=1e-4
            )
    first, second = read_tensors(alone / "last.pth"), read_tensors(shared / "last.pth")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)


def test_run_training_equals_the_undisturbed_run_when_its_worker_was_killed(
    undisturbed: tuple[TrainJob, TrainOutcome],
    make_train_job: MakeJob,
    scenes: SceneSet,
    tmp_path: Path,
    read_tensors: ReadTensors,
    read_events: ReadEvents,
    hold_reader: Callable[..., Any],
    kill_worker: Callable[[str], int],
    wait_until: Callable[[Callable[[], object], str], None],
) -> None:
    job = make_train_job(tmp_path / "model.pth")
    folder = tmp_path / "model_run"
    killed: list[int] = []

    def kill_in_second_epoch(reading: int) -> None:
        # Each epoch reads the image once; the worker waits for it now.
        if reading == 2:
            wait_until(lambda: _is_registered(folder, "step_00000002"), "the first checkpoint")
            killed.append(kill_worker("ray::RayTrainWorker"))

    image = sorted(scenes.images.glob("train*"))[0]
    with hold_reader(image, kill_in_second_epoch) as failures:
        outcome = run_training(job)
    assert not failures
    assert len(killed) == 1
    steps = [event["step"] for event in read_events(folder, "progress")]
    # Step 3 comes twice if the image was not in its batch, once if it was.
    assert steps in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 3, 4, 5, 6])
    wanted = Path(undisturbed[1].run_folder)
    _assert_same_tensors(read_tensors(folder / "last.pth"), read_tensors(wanted / "last.pth"))
    assert outcome.metrics == undisturbed[1].metrics


def _is_registered(folder: Path, checkpoint: str) -> bool:
    """Whether Ray would go on from a checkpoint: it is listed, not only there."""
    return any(checkpoint in path.read_text() for path in folder.rglob("*snapshot.json"))


def test_run_training_returns_at_once_when_the_run_is_complete(
    undisturbed: tuple[TrainJob, TrainOutcome], read_events: ReadEvents
) -> None:
    job, outcome = undisturbed
    model = Path(outcome.model)
    content = model.read_bytes()
    model.unlink()
    again = run_training(job)
    assert model.read_bytes() == content
    assert (again.steps, again.metrics) == (outcome.steps, outcome.metrics)
    assert len(read_events(Path(outcome.run_folder), "progress")) == 6


def test_run_training_refuses_other_settings_in_the_same_folder(
    undisturbed: tuple[TrainJob, TrainOutcome], make_train_job: MakeJob
) -> None:
    job, _ = undisturbed
    other = make_train_job(Path(job.output), optim__peak_lr=0.25, run__seed=7)
    with pytest.raises(
        ConfigError, match=r"optim\.peak_lr: None -> 0\.25; run\.seed: 0 -> 7.*--override"
    ):
        run_training(other)


def test_run_training_refuses_a_folder_that_is_no_run(
    make_train_job: MakeJob, tmp_path: Path
) -> None:
    precious = tmp_path / "model_run" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(ConfigError, match=r"model_run.*no run\.json"):
        run_training(make_train_job(tmp_path / "model.pth"))
    assert precious.exists()


def test_run_training_refuses_to_replace_weights_that_it_did_not_make(
    make_train_job: MakeJob, tmp_path: Path
) -> None:
    precious = tmp_path / "model.pth"
    precious.write_bytes(b"weeks of training")
    with pytest.raises(ConfigError, match=r"model\.pth is there already.*--fine-tune.*import-odtk"):
        run_training(make_train_job(precious))
    assert precious.read_bytes() == b"weeks of training"
    assert not (tmp_path / "model_run").exists()


def test_run_training_starts_over_and_keeps_the_last_weights_without_validation(
    make_train_job: MakeJob, tmp_path: Path, read_tensors: ReadTensors, read_events: ReadEvents
) -> None:
    """Of a run that failed, with other settings, in the same folder."""
    (tmp_path / "model_run").mkdir()
    (tmp_path / "model_run" / "run.json").write_text(
        json.dumps({"run_id": "old", "job": {}, "annotations_sha256": {}})
    )
    outcome = run_training(
        make_train_job(
            tmp_path / "model.pth",
            data__val_annotations=None,
            run__override=True,
            run__epochs=None,
            run__iters=3,
        )
    )
    folder = Path(outcome.run_folder)
    assert json.loads((folder / "run.json").read_text())["run_id"] != "old"
    assert outcome.metrics["AP"] is None
    assert outcome.metrics["step"] == outcome.steps == 3
    _assert_same_tensors(read_tensors(Path(outcome.model)), read_tensors(folder / "last.pth"))
    assert not read_events(folder, "validation")
    assert _checkpoints(folder) == ["step_00000002", "step_00000003"]


def test_run_training_stops_early_when_validation_does_not_improve(
    make_train_job: MakeJob, tmp_path: Path, read_events: ReadEvents
) -> None:
    # So small a rate leaves the AP of the first validation as it is.
    job = make_train_job(tmp_path / "model.pth", optim__peak_lr=1e-12, run__patience=1)
    outcome = run_training(job)
    assert outcome.steps == 4
    validations = read_events(Path(outcome.run_folder), "validation")
    assert [event["step"] for event in validations] == [2, 4]
    assert validations[1]["AP"] <= validations[0]["AP"]
    assert outcome.metrics["step"] == 2
    # The same command again finds that it has ended.
    again = run_training(job)
    assert (again.steps, again.metrics) == (outcome.steps, outcome.metrics)
    assert len(read_events(Path(outcome.run_folder), "progress")) == 4


def test_run_training_gives_up_at_once_when_no_gradient_is_finite(
    make_train_job: MakeJob, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_train_job(
        tmp_path / "model.pth",
        loss__box_weight=1e38,
        optim__max_skipped_steps=2,
        run__max_failures=3,
    )
    with pytest.raises(DivergenceError, match="no finite gradient in 2 steps up to step 2"):
        run_training(job)
    folder = tmp_path / "model_run"
    lines = (folder / "skipped_images.jsonl").read_text(encoding="utf-8").splitlines()
    # Each step once, for another try would have met the same batches; noticed before the checkpoint
    # of the first epoch's end, which would have been of no use.
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert not list(folder.glob("ray_train/step_*"))
    assert all(len(json.loads(line)["image_ids"]) == 4 for line in lines)
    assert "failed or lost" not in caplog.text


@pytest.mark.parametrize("weights", ["absent.pth", "broken.pth"])
def test_run_training_refuses_weights_before_it_takes_a_gpu(
    make_train_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    monkeypatch.setattr(train, "connect", lambda **_: pytest.fail("asked for a cluster"))
    (tmp_path / "broken.pth").write_bytes(b"no weights at all")
    job = make_train_job(tmp_path / "model.pth", model__backbone_weights=str(tmp_path / weights))
    with pytest.raises(CheckpointError, match=weights):
        run_training(job)
    assert not (tmp_path / "model_run").exists()


def test_run_training_names_the_file_when_an_image_is_broken(
    make_train_job: MakeJob,
    scenes: SceneSet,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in scenes.images.iterdir():
        (images / path.name).symlink_to(path)
    broken = sorted(images.glob("train*"))[0]
    broken.unlink()
    broken.write_bytes(b"no image at all")
    job = make_train_job(
        tmp_path / "model.pth",
        data__images=str(images),
        data__val_images=str(images),
        run__max_failures=3,
    )
    with pytest.raises(DatasetError) as caught:
        run_training(job)
    text = str(caught.value)
    assert text.startswith("image ")
    assert str(broken) in text
    events = (tmp_path / "model_run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"recovery"' not in events, "another try would have found the same file"
    assert "Traceback" not in text
    assert len(text.splitlines()) == 1
    assert "failed or lost" not in caplog.text
