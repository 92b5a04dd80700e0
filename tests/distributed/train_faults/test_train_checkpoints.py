"""Checkpoints as files, the choice among them, and the places they lie in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pyarrow.fs
import pytest
import ray.train
import torch

from retinaray.assembly.training import make_card, make_state, read_inputs
from retinaray.config.schema import TrainJob
from retinaray.distributed.checkpoint_keeping import CheckpointKeeper
from retinaray.distributed.resuming import choose_beginning
from retinaray.distributed.run_store import RunStore
from retinaray.errors import CheckpointError, ConfigError, StorageError
from retinaray.storage import Storage
from retinaray.training.checkpoint_files import (
    Files,
    find_checkpoints,
    name_checkpoint,
    parse_step,
    read_manifest,
    read_verified,
    remove_checkpoint,
    take_snapshot,
    write_checkpoint,
)
from retinaray.training.state import TrainingState


@dataclass
class _FailingFiles:
    """A store that writes so many files and then is full."""

    num_writes: int
    storage: Storage = field(default_factory=Storage)

    def read_bytes(self, uri: str) -> bytes:
        return self.storage.read_bytes(uri)

    def write_bytes(self, uri: str, data: bytes) -> bool:
        if self.num_writes == 0:
            raise StorageError(f"cannot write {uri}: full")
        self.num_writes -= 1
        return self.storage.write_bytes(uri, data)

    def list_files(self, uri: str) -> Iterator[str]:
        return self.storage.list_files(uri)

    def exists(self, uri: str) -> bool:
        return self.storage.exists(uri)

    def delete(self, uri: str) -> None:
        self.storage.delete(uri)


def _write(root: Path, step: int, *, run_id: str = "run-1", name: str = "") -> Path:
    folder = root / (name or f"step_{step:08d}")
    contents = {"training.pth": lambda: b"state" * step, "weights.pth": lambda: b"weights"}
    write_checkpoint(
        str(folder), contents, run_id=run_id, step=step, metrics={"AP": 0.5}, files=Storage()
    )
    return folder


def _choose(root: Path, *known: str) -> Any:
    return choose_beginning(str(root), run_id="run-1", known=known, files=Storage())


@pytest.fixture
def job(make_train_job: Callable[..., TrainJob], tmp_path: Path) -> TrainJob:
    return make_train_job(tmp_path / "model.pth")


@pytest.fixture
def state(job: TrainJob) -> TrainingState:
    """A training with moments, before its first step."""
    _, model = make_card(job, read_inputs(job), run_id="run-1")
    made = make_state(job, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.optimizer.step()
    return made


def test_take_snapshot_holds_the_state_while_the_training_goes_on(state: TrainingState) -> None:
    wanted = state.dump()
    weights = {name: value.clone() for name, value in state.exported_state().items()}
    held = take_snapshot(state)
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    state.optimizer.step()
    assert state.average is not None
    for value in state.average.values.values():
        value.zero_()
    state.step, state.best_ap = 9, 0.75
    assert state.dump() != wanted
    # Loaded back, it is the state of before.
    state.load(held.dump(), source="snapshot")
    assert (state.step, state.best_ap) == (0, None)
    assert all(torch.equal(state.exported_state()[name], weights[name]) for name in weights)
    assert all(torch.equal(held.exported_state()[name], weights[name]) for name in weights)


def test_write_checkpoint_tells_length_and_sha256_of_each_file(tmp_path: Path) -> None:
    folder = _write(tmp_path, 1)
    manifest = read_manifest(str(folder), run_id="run-1", files=Storage())
    assert (manifest.step, manifest.metrics) == (1, {"AP": 0.5})
    # As `printf state | sha256sum` tells.
    assert manifest.files["training.pth"].num_bytes == 5
    assert manifest.files["training.pth"].sha256 == (
        "4ba69735ca53765ed6a709edb56c6ea236b7193a3b29a6b390c346f0f4340e4e"
    )
    content = read_verified(str(folder), "weights.pth", manifest=manifest, files=Storage())
    assert content == b"weights"


@pytest.mark.parametrize("num_writes", [0, 1, 2])
def test_write_checkpoint_is_never_taken_for_whole_when_it_was_cut_off(
    tmp_path: Path, num_writes: int
) -> None:
    folder = _write(tmp_path, 2)
    contents = {"training.pth": lambda: b"new", "weights.pth": lambda: b"new"}
    with pytest.raises(StorageError, match="full"):
        write_checkpoint(
            str(folder),
            contents,
            run_id="run-1",
            step=2,
            metrics={},
            files=_FailingFiles(num_writes),
        )
    with pytest.raises(CheckpointError, match="was not written to its end"):
        read_manifest(str(folder), run_id="run-1", files=Storage())


def _truncate(folder: Path) -> None:
    (folder / "training.pth").write_bytes(b"stat")


def _tamper(folder: Path) -> None:
    path = folder / "training.pth"
    path.write_bytes(b"S" + path.read_bytes()[1:])


def _remove(folder: Path) -> None:
    (folder / "training.pth").unlink()


def _spoil_manifest(folder: Path) -> None:
    (folder / "checkpoint.json").write_text('{"format": "retinaray-che')


def _claim_other_run(folder: Path) -> None:
    path = folder / "checkpoint.json"
    path.write_text(path.read_text().replace("run-1", "run-9"))


def _claim_other_format(folder: Path) -> None:
    path = folder / "checkpoint.json"
    path.write_text(path.read_text().replace("retinaray-checkpoint-1", "other-7"))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(_truncate, "truncated or foreign: expected 20 bytes, found 4", id="truncated"),
        pytest.param(_tamper, "changed after it was written: expected SHA-256", id="tampered"),
        pytest.param(_remove, r"training\.pth is missing", id="missing"),
        pytest.param(_spoil_manifest, "damaged: JSONDecodeError", id="half a manifest"),
        pytest.param(_claim_other_run, "belongs to run 'run-9', this is 'run-1'", id="foreign"),
        pytest.param(_claim_other_format, "expected format .* found 'other-7'", id="format"),
    ],
)
def test_choose_beginning_uses_the_one_before_when_the_newest_is_spoilt(
    tmp_path: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    _write(tmp_path, 2)
    newest = _write(tmp_path, 4)
    spoil(newest)
    beginning = _choose(tmp_path, "step_00000002", "step_00000004")
    assert beginning.name == "step_00000002"
    assert beginning.unheard == ()
    (refused,) = beginning.refused
    assert re.search(reason, refused)


def test_choose_beginning_refuses_when_no_checkpoint_is_whole(tmp_path: Path) -> None:
    _truncate(_write(tmp_path, 2))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: .*truncated"):
        _choose(tmp_path, "step_00000002")


def test_choose_beginning_starts_at_the_first_step_when_there_is_none(tmp_path: Path) -> None:
    beginning = _choose(tmp_path)
    assert (beginning.name, beginning.unheard, beginning.refused) == (None, (), ())


def test_choose_beginning_hands_over_what_ray_has_not_heard_of(tmp_path: Path) -> None:
    _write(tmp_path, 2)
    _write(tmp_path, 4)
    _write(tmp_path, 5)
    cut_off = _write(tmp_path, 7)
    (cut_off / "checkpoint.json").unlink()
    beginning = _choose(tmp_path, "step_00000002")
    assert beginning.name == "step_00000005"
    assert [name for name, _ in beginning.unheard] == ["step_00000004", "step_00000005"]
    assert beginning.unheard[0][1] == {"AP": 0.5}
    # What was cut off and nobody knows is cleared away.
    assert find_checkpoints(str(tmp_path), Storage()) == [
        "step_00000005",
        "step_00000004",
        "step_00000002",
    ]


@pytest.fixture
def make_keeper(
    state: TrainingState, job: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Files], CheckpointKeeper]:
    """The only worker's keeper, after the first step, whose weights are kept for good.

    What Ray would call in a thread of its own is called at once.
    """
    context = MagicMock()
    context.get_world_rank.return_value = 0
    place = context.get_storage.return_value
    place.build_checkpoint_path_from_name = lambda name: str(tmp_path / "ray_train" / name)
    place.storage_filesystem = pyarrow.fs.LocalFileSystem()

    def report(*_: Any, checkpoint_upload_fn: Callable[..., Any], **options: Any) -> None:
        checkpoint_upload_fn(options["checkpoint"], options["checkpoint_dir_name"])

    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "report", report)
    state.step = 1
    card, _ = make_card(job, read_inputs(job), run_id="run-1")

    def make(files: Files) -> CheckpointKeeper:
        places = RunStore(str(tmp_path))
        store: Any = SimpleNamespace(checkpoints=places.checkpoints, kept=places.kept, files=files)
        return CheckpointKeeper(
            job=job,
            num_images=4,
            card=card,
            state=state,
            board=MagicMock(),
            validator=None,
            is_trial=False,
            proof={},
            metrics=MagicMock(),
            store=store,
            run_id="run-1",
            kept_steps=frozenset({1}),
            taken=set(),
        )

    return make


@pytest.mark.parametrize("num_writes", range(4))
def test_keep_leaves_no_whole_checkpoint_without_the_weights_that_are_kept_for_good(
    make_keeper: Callable[[Files], CheckpointKeeper], tmp_path: Path, num_writes: int
) -> None:
    with pytest.raises(StorageError, match="full"):
        make_keeper(_FailingFiles(num_writes)).keep("planned")
    # A training that goes on takes the step again, and makes up for what is missing.
    assert _choose(tmp_path / "ray_train").name is None
    make_keeper(_FailingFiles(4)).keep("planned")
    assert _choose(tmp_path / "ray_train").name == "step_00000001"
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.name == "step_00000001.pth"
    weights = tmp_path / "ray_train" / "step_00000001" / "weights.pth"
    assert kept.read_bytes() == weights.read_bytes()


def test_name_checkpoint_gives_a_step_that_is_taken_again_another_name(tmp_path: Path) -> None:
    assert name_checkpoint(12, set()) == "step_00000012"
    taken = {"step_00000012", "step_00000012_2"}
    assert name_checkpoint(12, taken) == "step_00000012_3"
    assert parse_step("step_00000012_3") == 12
    _write(tmp_path, 12)
    _write(tmp_path, 12, name="step_00000012_2")
    _write(tmp_path, 3)
    newest_first = ["step_00000012_2", "step_00000012", "step_00000003"]
    assert find_checkpoints(str(tmp_path), Storage()) == newest_first
    with pytest.raises(ValueError, match="got 'best'"):
        parse_step("best")


def test_remove_checkpoint_leaves_no_file(tmp_path: Path) -> None:
    folder = _write(tmp_path, 1)
    remove_checkpoint(str(folder), Storage())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_run_store_keeps_a_record_and_clears_only_its_own(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    assert store.read_record() is None
    record = {"run_id": "run-1", "job": {}, "annotations_sha256": {}}
    store.write_record(record)
    assert store.read_record() == record
    _write(tmp_path / "ray_train", 3)
    other = tmp_path / "thesis.tex"
    other.write_text("years of work")
    store.clear()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [other]
    (tmp_path / "run.json").write_text('["no record"]')
    with pytest.raises(ConfigError, match=r"run\.json is no training's record: .*--override"):
        store.read_record()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param('{"checkpoint_results": [{"checkpo', id="half of it"),
        pytest.param('{"checkpoint_results": [{"checkpoint_dir_name": "x"}]}', id="missing folder"),
    ],
)
def test_run_store_sets_a_damaged_list_of_rays_aside(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "ray_train"
    folder.mkdir()
    path = folder / "checkpoint_manager_snapshot.json"
    path.write_text(content)
    RunStore(str(tmp_path)).set_damaged_snapshot_aside()
    assert not path.exists()
    assert path.with_name(f"{path.name}.damaged").read_text() == content
    path.write_text('{"checkpoint_results": []}')
    RunStore(str(tmp_path)).set_damaged_snapshot_aside()
    assert path.exists()


def test_run_store_hands_ray_the_address_but_no_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://10.0.0.1:9000")
    path, files = RunStore("s3://bucket/runs/7").locate_for_ray()
    assert path == "bucket/runs/7"
    assert files.type_name == "s3"
    _, arguments = files.__reduce__()
    assert arguments[0]["endpoint_override"] == "10.0.0.1:9000"
    assert (arguments[0]["scheme"], arguments[0]["secret_key"]) == ("http", None)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    assert RunStore("s3://bucket/runs/7").locate_for_ray() == ("s3://bucket/runs/7", None)
    assert RunStore("/runs/7").locate_for_ray() == ("/runs/7", None)
