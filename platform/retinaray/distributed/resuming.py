"""With which checkpoint a group of workers begins; rank 0 looks, all follow.

Ray knows the checkpoints that its controller heard of. What was written whole and not heard of,
because the driver was killed first, is handed to Ray again; what is damaged is left alone, and the
one before is used.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import ray.train
import torch.distributed

from retinaray.errors import CheckpointError
from retinaray.storage import Storage, join_uri
from retinaray.training.checkpoint_files import (
    MANIFEST_FILE,
    CheckpointManifest,
    find_checkpoints,
    parse_step,
    read_manifest,
    read_verified,
    remove_checkpoint,
)
from retinaray.training.state import STATE_FILE

logger = logging.getLogger(__name__)

_ANSWER_S = 60.0


@dataclass(frozen=True)
class Beginning:
    """How a group of workers begins.

    Attributes:
        name: Checkpoint folder to go on from; None = from the first step.
        unheard: Checkpoints that Ray does not know yet, oldest first: name and metrics.
        refused: Why newer ones are not used.
        is_stopping: Whether nothing shall begin, because the run is being stopped.
    """

    name: str | None
    unheard: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    refused: tuple[str, ...] = ()
    is_stopping: bool = False


def choose_beginning(
    root: str, *, run_id: str, known: Collection[str], files: Storage
) -> Beginning:
    """Find the newest checkpoint that is whole, and clear away what was cut off.

    Args:
        root: Folder of the checkpoints.
        run_id: Of the run.
        known: Names that Ray knows; these are not removed.
        files: Reads.

    Raises:
        CheckpointError: If there are checkpoints, and none can be used.
        StorageError: If they cannot be read.
    """
    refused: list[str] = []
    whole: list[tuple[str, CheckpointManifest]] = []
    for name in find_checkpoints(root, files):
        folder = join_uri(root, name)
        if name not in known and not files.exists(join_uri(folder, MANIFEST_FILE)):
            remove_checkpoint(folder, files)
            continue
        try:
            manifest = read_manifest(folder, run_id=run_id, files=files)
            if not whole:
                # Only the one to go on from is worth reading through.
                read_verified(folder, STATE_FILE, manifest=manifest, files=files)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        whole.append((name, manifest))
    if refused and not whole:
        raise CheckpointError(
            f"no checkpoint in {root} can be used: {'; '.join(refused)}. Put an undamaged copy "
            "back, or start over (--override)"
        )
    newest_known = max((parse_step(name) for name, _ in whole if name in known), default=-1)
    unheard = [
        (name, manifest.metrics)
        for name, manifest in reversed(whole)
        if name not in known and manifest.step > newest_known
    ]
    return Beginning(whole[0][0] if whole else None, tuple(unheard), tuple(refused))


def read_state(root: str, name: str, *, run_id: str, files: Storage) -> bytes:
    """The training state in a checkpoint, verified.

    Raises:
        CheckpointError: If it is not what was written.
        StorageError: If it cannot be read.
    """
    folder = join_uri(root, name)
    manifest = read_manifest(folder, run_id=run_id, files=files)
    return read_verified(folder, STATE_FILE, manifest=manifest, files=files)


def agree_on_beginning(root: str, *, run_id: str, board: Any, files: Storage) -> Beginning:
    """What rank 0 found, on all workers, which come here together.

    Raises:
        CheckpointError: On rank 0; see `choose_beginning`.
        StorageError: On rank 0, if the checkpoints cannot be read.
    """
    context = ray.train.get_context()
    box: list[Any] = [None]
    if context.get_world_rank() == 0:
        if ray.get(board.read_orders.remote()).is_stopping:
            box = [Beginning(None, is_stopping=True)]
        else:
            box = [choose_beginning(root, run_id=run_id, known=_list_known(), files=files)]
    if context.get_world_size() > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    beginning: Beginning = box[0]
    for name, metrics in beginning.unheard:
        _tell_ray(name, metrics)
    return beginning


def _list_known() -> set[str]:
    reported = ray.train.get_all_reported_checkpoints(
        ray.train.CheckpointConsistencyMode.COMMITTED, timeout_s=_ANSWER_S
    )
    return {PurePosixPath(entry.checkpoint.path).name for entry in reported}


def _tell_ray(name: str, metrics: Mapping[str, Any]) -> None:
    """Report a checkpoint that lies where Ray would have put it; all workers do."""
    logger.info("checkpoint %s was written before an interruption and is used", name)
    context = ray.train.get_context()
    if context.get_world_rank() != 0:
        ray.train.report(dict(metrics))
        return
    place = context.get_storage()
    ray.train.report(
        dict(metrics),
        checkpoint=ray.train.Checkpoint(
            place.build_checkpoint_path_from_name(name), place.storage_filesystem
        ),
        checkpoint_dir_name=name,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
    )
