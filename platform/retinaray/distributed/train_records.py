"""The record of a training: whether a command begins a run or goes on with one."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from retinaray.assembly.provenance import describe_making, make_run_id
from retinaray.assembly.reading import make_reader
from retinaray.config.loading import to_dict
from retinaray.config.schema import TrainJob
from retinaray.config.training_schema import TrackingConfig
from retinaray.distributed.run_settings import (
    CACHE_SETTINGS,
    CLUSTER_SETTINGS,
    compare_settings,
)
from retinaray.distributed.run_store import RunStore
from retinaray.errors import ConfigError
from retinaray.storage import Storage
from retinaray.training.checkpoint_files import find_checkpoints

logger = logging.getLogger(__name__)

# Settings that may change when a training is resumed: they do not change what is computed.
FREE_SETTINGS = (
    "run.override",
    "run.workers",
    "run.min_workers",
    "run.keep_every",
    "run.checkpoint_minutes",
    "run.max_failures",
    "run.log_every",
    "run.strict_anchors",
    "data.loader_processes",
    *CACHE_SETTINGS,
    "reading.threads",
    # As a whole, because the records of older runs do not have it.
    "tracking",
    *CLUSTER_SETTINGS,
    *(f"tracking.{name}" for name in TrackingConfig.model_fields),
)


def open_run(job: TrainJob, folder: Path, store: RunStore) -> dict[str, Any]:
    """The run's record: a new one, or that of the interrupted run in this folder or store.

    Raises:
        ConfigError: If the folder holds a run with other settings or data, or a new run would
            replace a file, and --override is not given.
        CheckpointError: If the run has checkpoints, and none can be used.
    """
    read = make_reader(job.reading)
    annotations = {
        uri: hashlib.sha256(read(uri)).hexdigest()
        for uri in (job.data.annotations, job.data.val_annotations)
        if uri is not None
    }
    path = folder / "run.json"
    found = None if job.run.override else _find_record(path, store)
    if found is not None:
        differences = compare_settings(found["job"], to_dict(job), free=FREE_SETTINGS)
        if found["annotations_sha256"] != annotations:
            differences.append("the annotation files have changed")
        if differences:
            raise ConfigError(
                f"{folder} holds a run with other settings: {'; '.join(differences)}. "
                "Give another model path, or --override to start over (its checkpoints are removed)"
            )
        logger.info("resuming run %s in %s", found["run_id"], folder)
        _check_checkpoints(found["run_id"], store)
    else:
        found = {
            "run_id": make_run_id(),
            "annotations_sha256": annotations,
            **describe_making(job),
        }
        _refuse_others_weights(job, folder)
        if _is_apart(store, folder):
            _clear_store(store, is_asked_for=job.run.override)
    if not path.exists() or job.run.override:
        _clear(folder, is_asked_for=job.run.override)
    # Whole or not at all: half a record would stop the next command in this folder.
    Storage().write_bytes(str(path), json.dumps(found, indent=1).encode())
    if _is_apart(store, folder):
        store.write_record(found)
    return found


def _refuse_others_weights(job: TrainJob, folder: Path) -> None:
    """A new run writes over no file that it did not make, such as a checkpoint to start from.

    Raises:
        ConfigError: If there is one, and nobody said that it may go.
    """
    if Path(job.output).exists() and not job.run.override:
        raise ConfigError(
            f"{job.output} is there already, and {folder} holds no run to resume: give "
            "another model path, or --override to replace it. To start from its weights: "
            f"--fine-tune {job.output} and another model path (a checkpoint of ODTK's goes through "
            "`retinaray import-odtk` first)"
        )


def _is_apart(store: RunStore, folder: Path) -> bool:
    """Whether checkpoints lie elsewhere than in the run folder."""
    return store.root != str(folder)


def _clear_store(store: RunStore, *, is_asked_for: bool) -> None:
    """Make room for a new run's checkpoints.

    Raises:
        ConfigError: If there are some of no known run, and nobody said that they may go.
    """
    if not is_asked_for and next(store.files.list_files(store.checkpoints), None) is not None:
        raise ConfigError(
            f"{store.checkpoints} has files, but {store.root} has no run.json of a run to resume: "
            "give another --checkpoints, or --override to remove them"
        )
    store.clear()


def _find_record(path: Path, store: RunStore) -> dict[str, Any] | None:
    """The record in the folder, or that of a run whose folder was on a machine that has gone.

    Raises:
        ConfigError: If the two are of different runs.
    """
    kept = store.read_record() if _is_apart(store, path.parent) else None
    if not path.exists():
        return kept
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if kept is not None and kept["run_id"] != found["run_id"]:
        raise ConfigError(
            f"{path} is of run {found['run_id']}, {store.root} holds checkpoints of run "
            f"{kept['run_id']}: give another --checkpoints or model path, or --override to start "
            "over (both are replaced)"
        )
    return found


def _check_checkpoints(run_id: str, store: RunStore) -> None:
    """Refuse now what each worker would refuse later, and say which checkpoint is left out.

    Raises:
        CheckpointError: If there are checkpoints, and none can be used.
    """
    from retinaray.distributed.resuming import choose_beginning

    store.set_damaged_snapshot_aside()
    known = find_checkpoints(store.checkpoints, store.files)
    beginning = choose_beginning(store.checkpoints, run_id=run_id, known=known, files=store.files)
    for reason in beginning.refused:
        logger.warning("a checkpoint is not used, the one before it is: %s", reason)


def _clear(folder: Path, *, is_asked_for: bool) -> None:
    """Make an empty folder; what is no training's is removed only on --override.

    Raises:
        ConfigError: If there is something else, and nobody said that it may go.
    """
    if folder.exists():
        is_run = folder.is_dir() and (not any(folder.iterdir()) or (folder / "run.json").exists())
        if not (is_run or (folder.is_dir() and is_asked_for)):
            raise ConfigError(
                f"{folder} is needed for the run, but it is there with no run.json in it: give "
                "another model path, move it away, or --override to remove it"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
