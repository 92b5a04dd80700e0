"""Checkpoints as folders that are never taken for whole when they are not.

A folder holds files and, written last, a manifest with the length and the SHA-256 of each: without
it the folder is a write that was cut off. Knows no Ray and no store: whoever calls hands in what
reads and writes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from retinaray.errors import CheckpointError
from retinaray.training.state import TrainingState

MANIFEST_FILE = "checkpoint.json"
CHECKPOINT_FORMAT = "retinaray-checkpoint-1"
# A step that is taken again after its checkpoint was found damaged gets a second folder.
_NAME = re.compile(r"step_(\d{8,})(?:_(\d+))?")


class Files(Protocol):
    """What reads and writes whole files by URI; `storage.Storage` does."""

    def read_bytes(self, uri: str) -> bytes:
        """Read a file."""

    def write_bytes(self, uri: str, data: bytes) -> bool:
        """Write a file, whole or not at all."""

    def list_files(self, uri: str) -> Iterator[str]:
        """Walk all files below a folder."""

    def exists(self, uri: str) -> bool:
        """Say whether a file is there."""

    def delete(self, uri: str) -> None:
        """Remove a file; a missing one is fine."""


@dataclass(frozen=True)
class FileDigest:
    """What a file must be.

    Attributes:
        num_bytes: Its length.
        sha256: In hexadecimal.
    """

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointManifest:
    """What a complete checkpoint says of itself.

    Attributes:
        run_id: The run that wrote it.
        step: Steps taken.
        metrics: As they were reported with it.
        files: Digest by name.
    """

    run_id: str
    step: int
    metrics: Mapping[str, Any]
    files: Mapping[str, FileDigest]


@dataclass(frozen=True)
class _Held:
    """Stands for a network, an optimizer, an average or a scaler: its values, held still."""

    values: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """The values."""
        return self.values


def take_snapshot(state: TrainingState) -> TrainingState:
    """The state as it is now, in memory of its own on the CPU, for `dump` and `exported_state`.

    The training may go on while the snapshot is written. Tensors of a GPU are copied side by side
    into pinned memory, which PyTorch keeps for the next snapshot.
    """
    held = replace(
        state,
        model=cast("Any", _Held(_copy(state.model.state_dict()))),
        optimizer=cast("Any", _Held(_copy(state.optimizer.state_dict()))),
        average=cast("Any", _Held(_copy(state.average.values))) if state.average else None,
        scaler=cast("Any", _Held(_copy(state.scaler.state_dict()))) if state.scaler else None,
    )
    if any(value.is_cuda for value in state.model.state_dict().values()):
        torch.cuda.current_stream().synchronize()
    return held


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not value.is_cuda:
            return value.detach().clone()
        pinned = torch.empty_like(value, device="cpu", pin_memory=True)
        return pinned.copy_(value.detach(), non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _copy(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_copy(entry) for entry in value]
    return value


def write_checkpoint(
    folder: str,
    contents: Mapping[str, Callable[[], bytes]],
    *,
    run_id: str,
    step: int,
    metrics: Mapping[str, Any],
    files: Files,
) -> CheckpointManifest:
    """Write the files of a checkpoint, one after the other, and then its manifest.

    Args:
        folder: URI; what an earlier attempt left there is replaced.
        contents: Makes the content of each file when its turn comes.
        run_id: Of the run.
        step: Steps taken.
        metrics: Plain values.
        files: Writes.

    Raises:
        StorageError: If a file cannot be written.
    """
    # An older manifest must not vouch for a mixture of old and new files.
    files.delete(f"{folder}/{MANIFEST_FILE}")
    digests = {}
    for name, make in contents.items():
        content = make()
        files.write_bytes(f"{folder}/{name}", content)
        digests[name] = FileDigest(len(content), hashlib.sha256(content).hexdigest())
    manifest = CheckpointManifest(run_id=run_id, step=step, metrics=metrics, files=digests)
    text = json.dumps({"format": CHECKPOINT_FORMAT, **asdict(manifest)}, indent=1)
    files.write_bytes(f"{folder}/{MANIFEST_FILE}", text.encode())
    return manifest


def read_manifest(folder: str, *, run_id: str, files: Files) -> CheckpointManifest:
    """What a checkpoint says of itself.

    Args:
        folder: URI.
        run_id: Of the run that wants to use it.
        files: Reads.

    Raises:
        CheckpointError: If it was not written to its end, is damaged, or belongs to another run.
        StorageError: If it cannot be read.
    """
    uri = f"{folder}/{MANIFEST_FILE}"
    if not files.exists(uri):
        raise CheckpointError(f"{folder} has no {MANIFEST_FILE}: it was not written to its end")
    try:
        values = json.loads(files.read_bytes(uri))
        if values["format"] != CHECKPOINT_FORMAT:
            raise CheckpointError(
                f"{uri}: expected format {CHECKPOINT_FORMAT!r}, found {values['format']!r}"
            )
        manifest = CheckpointManifest(
            run_id=str(values["run_id"]),
            step=int(values["step"]),
            metrics=dict(values["metrics"]),
            files={name: FileDigest(**entry) for name, entry in values["files"].items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{uri} is damaged: {type(error).__name__}: {error}") from error
    if manifest.run_id != run_id:
        raise CheckpointError(f"{folder} belongs to run {manifest.run_id!r}, this is {run_id!r}")
    return manifest


def read_verified(folder: str, name: str, *, manifest: CheckpointManifest, files: Files) -> bytes:
    """One file of a checkpoint, if it is what was written.

    Raises:
        CheckpointError: If it is missing, or its length or content is another.
        StorageError: If it cannot be read.
    """
    uri = f"{folder}/{name}"
    wanted = manifest.files.get(name)
    if wanted is None or not files.exists(uri):
        raise CheckpointError(f"{uri} is missing")
    content = files.read_bytes(uri)
    if len(content) != wanted.num_bytes:
        raise CheckpointError(
            f"{uri} is truncated or foreign: expected {wanted.num_bytes} bytes, found "
            f"{len(content)}"
        )
    found = hashlib.sha256(content).hexdigest()
    if found != wanted.sha256:
        raise CheckpointError(
            f"{uri} was changed after it was written: expected SHA-256 {wanted.sha256[:12]}..., "
            f"found {found[:12]}..."
        )
    return content


def find_checkpoints(root: str, files: Files) -> list[str]:
    """Names of the checkpoint folders below a folder, complete or not, the newest first."""
    names = {uri.removeprefix(root).strip("/").partition("/")[0] for uri in files.list_files(root)}
    return sorted((name for name in names if _NAME.fullmatch(name)), key=_order, reverse=True)


def parse_step(name: str) -> int:
    """The step in a checkpoint folder's name.

    Raises:
        ValueError: If it is no such name.
    """
    return _order(name)[0]


def name_checkpoint(step: int, taken: Collection[str]) -> str:
    """A name for the checkpoint after a step that no other one has.

    Args:
        step: Steps taken.
        taken: Names that are in use.
    """
    name = f"step_{step:08d}"
    number = 1
    while name in taken:
        number += 1
        name = f"step_{step:08d}_{number}"
    return name


def remove_checkpoint(folder: str, files: Files) -> None:
    """Remove a checkpoint's files, the manifest first: what is left is never taken for whole."""
    files.delete(f"{folder}/{MANIFEST_FILE}")
    for uri in list(files.list_files(folder)):
        files.delete(uri)


def _order(name: str) -> tuple[int, int]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"expected step_00000012 or step_00000012_2, got {name!r}")
    return int(match[1]), int(match[2] or 1)
