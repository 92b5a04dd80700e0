"""What the clusters of the rehearsal work on: tiny scenes on S3, and the commands over them."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machines import RehearsalError, read_tail

from retinaray.artifact import dump_weights, read_weights
from retinaray.assembly.training import make_card, read_inputs
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import TrainJob
from retinaray.demo.scenes import SceneSet, make_scene_set
from retinaray.storage import Storage

BUCKET = "rehearsal"
IMAGES = f"/{BUCKET}/images/"
"""Where all images lie on the server, as a path; see `doors.Door`."""
NUM_TRAIN, NUM_TEST, PART_SIZE = 16, 60, 3
BATCH, EPOCHS = 4, 3
NUM_STEPS = EPOCHS * NUM_TRAIN // BATCH
NUM_PARTS = NUM_TEST // PART_SIZE
_HEIGHT, _WIDTH = 64, 96
_TRAIN_URI = f"s3:/{IMAGES}train"
_TEST_URI = f"s3:/{IMAGES}test"
_MODEL_URI = f"s3://{BUCKET}/tiny.pth"
_PAUSE_S = 0.1
# What a run has found; the rest is bookkeeping.
_RESULTS = ("parts/", "errors/", "detections.json", "images.json")

Results = dict[str, bytes]


@dataclass
class Command:
    """A command that runs; `log` has its stdout, and beside it `*.err` its stderr."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait_until(
        self, condition: Callable[[], bool], description: str, *, timeout_s: float
    ) -> float:
        """Wait for something while the command runs; returns how long that took, in seconds.

        Raises:
            RehearsalError: If it does not come in time, or the command ends before.
        """
        start = time.monotonic()
        while not condition():
            if self.process.poll() is not None:
                raise RehearsalError(
                    f"expected {description}; the command ended before, with exit code "
                    f"{self.process.returncode}: {self.explain()}"
                )
            if time.monotonic() - start > timeout_s:
                raise RehearsalError(
                    f"expected within {timeout_s:g} s: {description}; it did not come: "
                    f"{self.explain()}"
                )
            time.sleep(_PAUSE_S)
        return time.monotonic() - start

    def finish(self, *, timeout_s: float) -> dict[str, Any]:
        """Wait for its end; returns the JSON of its last line.

        Raises:
            RehearsalError: If it does not end in time, or fails.
        """
        self.expect_success(timeout_s=timeout_s)
        return find_json(self.log.read_text(encoding="utf-8"))

    def expect_success(self, *, timeout_s: float) -> None:
        """Wait for its end.

        Raises:
            RehearsalError: If it does not end in time, or fails.
        """
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise RehearsalError(
                f"expected the command to end within {timeout_s:g} s, it runs on: {self.explain()}"
            ) from None
        if code:
            raise RehearsalError(f"expected exit code 0, got {code}: {self.explain()}")

    def end(self) -> None:
        """Kill it when it still runs."""
        self.process.kill()
        self.process.wait()

    def explain(self) -> str:
        """The end of what it wrote."""
        return read_tail(self.log.with_suffix(".err"), 3) or read_tail(self.log, 3)


class Workload:
    """Images on S3 and annotations beside them on the shared disk.

    Args:
        folder: On the disk that all machines share; made.
        storage: Where the bucket is there already.
    """

    def __init__(self, folder: Path, storage: Storage) -> None:
        self._folder = folder
        self._storage = storage
        self.scenes: SceneSet = make_scene_set(
            folder / "scenes",
            num_train=NUM_TRAIN,
            num_val=0,
            num_test=NUM_TEST,
            image_size=(_HEIGHT, _WIDTH),
        )
        for path in sorted(self.scenes.images.iterdir()):
            target = _TRAIN_URI if path.name.startswith("train") else _TEST_URI
            storage.write_bytes(f"{target}/{path.name}", path.read_bytes())
        storage.write_bytes(_MODEL_URI, self._make_model())

    def _make_model(self) -> bytes:
        """Weights as they are before the first step: enough to find boxes at a threshold of 0."""
        values = {
            "output": str(self._folder / "untrained.pth"),
            "model": {"backbone": "ResNet10FPN", "fpn_channels": 16, "head_depth": 0},
            "data": {
                "images": str(self.scenes.images),
                "annotations": str(self.scenes.train),
                "size": [_HEIGHT, _WIDTH],
            },
        }
        job = load_from_dict(TrainJob, values)
        card, model = make_card(job, read_inputs(job), run_id="untrained")
        return dump_weights(card, model.state_dict())

    def find_weights(self, name: str) -> Path:
        """Where the training of a name leaves its weights."""
        return self._folder / f"{name}.pth"

    def make_training(self, name: str) -> list[str]:
        """Arguments of `train` on two workers: `NUM_STEPS` steps, a checkpoint per epoch."""
        return [
            *(str(self.find_weights(name)), "--images", _TRAIN_URI),
            *("--annotations", str(self.scenes.train), "--size", str(_HEIGHT), str(_WIDTH)),
            *("--backbone", "ResNet10FPN", "--fpn-channels", "16", "--head-depth", "0"),
            *("--batch", str(BATCH), "--epochs", str(EPOCHS), "--precision", "fp32"),
            *("--log-every", "1", "--workers", "2"),
        ]

    def make_inference(self, name: str, *, workers: int) -> list[str]:
        """Arguments of `infer` over the test images in `NUM_PARTS` parts."""
        return [
            *(_MODEL_URI, "--images", f"{_TEST_URI}/", "--output", self.find_run(name)),
            *("--workers", str(workers), "--batch", "2", "--part-size", str(PART_SIZE)),
            *("--score-threshold", "0"),
        ]

    def find_run(self, name: str) -> str:
        """Where the inference of a name leaves its files."""
        return f"s3://{BUCKET}/runs/{name}"

    def count_parts(self, name: str) -> int:
        """Parts that an inference has committed."""
        return len(self.list_parts(name))

    def list_parts(self, name: str) -> dict[int, float]:
        """When each committed part of an inference was written, in seconds of the epoch."""
        entries = self._storage.list_entries(f"{self.find_run(name)}/parts")
        return {
            int(entry.uri.rpartition("part-")[2].partition(".")[0]): entry.modified_s
            for entry in entries
        }

    def read_results(self, name: str) -> Results:
        """What an inference found, by name below its output."""
        root = self.find_run(name)
        names = [uri.removeprefix(f"{root}/") for uri in self._storage.list_files(root)]
        return {
            name: self._storage.read_bytes(f"{root}/{name}")
            for name in names
            if name.startswith(_RESULTS)
        }

    def find_parts(self, paths: Sequence[str]) -> set[int]:
        """The parts to which images belong, from the paths of requests for them."""
        return {(int(Path(path).stem.rpartition("-")[2]) - 1) // PART_SIZE for path in paths}

    def read_checkpoint(self, name: str) -> int:
        """Step of the newest checkpoint that Ray would go on from; 0 when there is none."""
        folder = self.find_weights(name).with_suffix("")
        path = folder.with_name(folder.name + "_run") / "ray_train/checkpoint_manager_snapshot.json"
        if not path.exists():
            return 0
        return find_last_step(path.read_text(encoding="utf-8"))

    def read_steps(self, name: str) -> list[int]:
        """Steps that a training has reported, in the order of the reports."""
        folder = self.find_weights(name).with_suffix("")
        path = folder.with_name(folder.name + "_run") / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event["step"] for event in events if event["kind"] == "progress"]

    def read_tensors(self, name: str) -> dict[str, Any]:
        """The weights that a training has left."""
        path = self.find_weights(name)
        return dict(read_weights(path.read_bytes(), source=str(path))[1].state_dict())


def find_json(text: str) -> dict[str, Any]:
    """The last line of a text that is a JSON object.

    Raises:
        RehearsalError: If there is none.
    """
    for line in reversed(text.splitlines()):
        if line.startswith("{") and line.endswith("}"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise RehearsalError(f"expected a JSON object as the last line, got: {text[-200:]!r}")


def find_last_step(snapshot: str) -> int:
    """The largest step among the checkpoints that a snapshot of Ray Train names; 0 without any."""
    steps = [piece[:8] for piece in snapshot.split("step_")[1:]]
    return max((int(step) for step in steps if step.isdecimal()), default=0)
