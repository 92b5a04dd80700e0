"""Checkpoints of a training: validated by all workers, written by rank 0 while training goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray.train

from retinaray.artifact import ModelCard, dump_weights
from retinaray.config.schema import TrainJob
from retinaray.distributed.run_store import RunStore
from retinaray.distributed.train_metrics import TrainMetrics
from retinaray.distributed.validation import Validator, rate
from retinaray.evaluation.candidates import CandidateSet
from retinaray.storage import join_uri
from retinaray.training.checkpoint_files import name_checkpoint, take_snapshot, write_checkpoint
from retinaray.training.loop import CheckpointKind
from retinaray.training.state import CANDIDATES_FILE, STATE_FILE, WEIGHTS_FILE, TrainingState

logger = logging.getLogger(__name__)

# Below what any validation gives: such weights are the best only where no others are.
_UNSCORED = -1e9


def is_scored(metrics: Mapping[str, Any]) -> bool:
    """Whether a report has a score, or is of a checkpoint that was kept in haste."""
    return bool(metrics["score"] > _UNSCORED)


@dataclass
class CheckpointKeeper:
    """Makes the checkpoints of one worker; all workers call it at the same steps.

    Attributes:
        job: The training.
        num_images: In the training set.
        card: Of the model.
        state: Where the training stands.
        board: An `EventBoard`.
        validator: None without a validation set.
        is_trial: Whether raw candidates are kept.
        proof: What a trial reports besides.
        metrics: Of this worker.
        store: Where checkpoints go.
        run_id: Of the run.
        kept_steps: Steps whose weights are kept for good.
        taken: Names of checkpoints that are there; rank 0 writes beside them.
    """

    job: TrainJob
    num_images: int
    card: ModelCard
    state: TrainingState
    board: Any
    validator: Validator | None
    is_trial: bool
    proof: dict[str, str]
    metrics: TrainMetrics
    store: RunStore
    run_id: str
    kept_steps: frozenset[int]
    taken: set[str]
    _is_written: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._is_written.set()

    def keep(self, kind: CheckpointKind) -> bool:
        """Make one checkpoint; returns whether the training should stop early.

        One that is made because the training is stopped is not validated: there may be seconds.
        """
        run, state = self.job.run, self.state
        metrics: dict[str, Any] = {
            "step": state.step,
            "epoch": state.step * run.batch / self.num_images,
        }
        # Without a validation the newest weights are the best.
        score = float(state.step)
        is_stale = False
        candidates = None
        if self.validator is not None and kind == "stop":
            score = _UNSCORED
        elif self.validator is not None:
            device = next(state.model.parameters()).device
            validation = self.validator.validate(state.exported_state(), device)
            metrics |= validation.metrics
            score = rate(metrics, objective=run.objective, latency_price=run.latency_price)
            state.note_validation(score if metrics.get(run.objective) is not None else None)
            is_stale = run.patience > 0 and state.num_stale >= run.patience
            candidates = validation.candidates
        metrics["score"] = score
        if self.is_trial:
            metrics |= self.proof
        if ray.train.get_context().get_world_rank() != 0:
            ray.train.report(metrics)
        else:
            if self.validator is not None and kind != "stop":
                self.metrics.note_map(metrics.get("AP"))
                self.board.post.remote({"kind": "validation", **metrics})
            self._report(metrics, candidates if self.is_trial else None)
        return is_stale and kind != "last"

    def _report(self, metrics: dict[str, Any], candidates: CandidateSet | None) -> None:
        """Copy the state, and let it be written and reported behind the training's back."""
        start_s = time.perf_counter()
        # Two copies at once could be more than the memory holds.
        self._is_written.wait()
        self._is_written.clear()
        snapshot = take_snapshot(self.state)
        name = name_checkpoint(snapshot.step, self.taken)
        self.taken.add(name)
        place = ray.train.get_context().get_storage()
        target = ray.train.Checkpoint(
            place.build_checkpoint_path_from_name(name), place.storage_filesystem
        )
        stood_s = time.perf_counter() - start_s

        def write(_source: Any, _name: str) -> ray.train.Checkpoint:
            try:
                self._write(snapshot, name, metrics, candidates, stood_s)
            finally:
                self._is_written.set()
            return target

        ray.train.report(
            metrics,
            checkpoint=target,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=write,
            delete_local_checkpoint_after_upload=False,
        )
        self.metrics.count_checkpoint(time.perf_counter() - start_s)

    def _write(
        self,
        snapshot: TrainingState,
        name: str,
        metrics: dict[str, Any],
        candidates: CandidateSet | None,
        stood_s: float,
    ) -> None:
        start_s = time.perf_counter()
        files = self.store.files
        folder = join_uri(self.store.checkpoints, name)
        weights = dump_weights(self.card, snapshot.exported_state())
        contents = {STATE_FILE: snapshot.dump, WEIGHTS_FILE: lambda: weights}
        if candidates is not None:
            contents[CANDIDATES_FILE] = candidates.dump
        if snapshot.step in self.kept_steps:
            # Before the checkpoint is whole: a training that goes on from it takes no step again.
            files.write_bytes(join_uri(self.store.kept, f"{name}.pth"), weights)
        write_checkpoint(
            folder, contents, run_id=self.run_id, step=snapshot.step, metrics=metrics, files=files
        )
        seconds = time.perf_counter() - start_s
        logger.info(
            "checkpoint after step %d: training stood %.3f s, written in %.2f s",
            snapshot.step,
            stood_s,
            seconds,
        )
        self.board.post.remote({"kind": "checkpoint", "step": snapshot.step, "folder": folder})
