"""How long a training waits after its processes were killed, and whether its result is the same.

    python tests/benchmarks/recovery.py [--quick]

The command `retinaray train` with two workers, on drawn scenes, in a process of its own. In the
middle of an epoch one worker, both, or the driver get SIGKILL; a killed driver's command is started
again at once, as a supervisor would. The clock runs from the signal to the first step after it.
The scores of the finished training are compared with those of an undisturbed one.

The peer is Ray Train alone, with a loop that has nothing to set up or to lose: two workers, a layer
of eight weights, a checkpoint of a few bytes. What it needs is what Ray needs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from batch_scale import list_descendants
from run import Record, skip, summarise

from retinaray.demo.scenes import SceneSet, make_scene_set
from retinaray.machine import count_cores

NUM_WORKERS = 2
_PATIENCE_S = 600.0
_POLL_S = 0.05
_BARE_RAY = """
import sys, tempfile, time
from pathlib import Path

def loop(config):
    import ray.train, torch
    network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 1))
    first, step = ray.train.get_context().get_world_rank() == 0, 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            step = int((Path(folder) / "step").read_text())
    while step < 60:
        network(torch.ones(1, 8)).sum().backward()
        time.sleep(0.2)
        step += 1
        if first:
            with Path(config["lines"]).open("a") as lines:
                lines.write('{"kind": "progress", "step": %d}\\n' % step)
        if step % 5 == 0:
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "step").write_text(str(step))
                kept = ray.train.Checkpoint.from_directory(folder) if first else None
                ray.train.report({}, checkpoint=kept)

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
TorchTrainer(
    loop,
    train_loop_config={"lines": sys.argv[1]},
    scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
    run_config=RunConfig(storage_path=sys.argv[2], failure_config=FailureConfig(max_failures=3)),
).fit()
"""


@dataclass(frozen=True)
class Setting:
    """One training.

    Attributes:
        num_images: Scenes to train on.
        epochs: Times over these; validated, and kept, after each.
        batch: Images of a step, of both workers together.
        side_px: Height and width.
        num_rounds: How often each way to be killed is tried.
    """

    num_images: int = 64
    epochs: int = 10
    batch: int = 4
    side_px: int = 256
    num_rounds: int = 1

    @property
    def kill_step(self) -> int:
        """The middle of the third epoch."""
        return (5 * self.num_images) // (2 * self.batch)


@dataclass(frozen=True)
class Recovery:
    """What became of one training that was killed.

    Attributes:
        seconds: From the signal to the first step after it.
        lost_steps: Steps that were taken again.
        scores: AP and AP50 at the end.
    """

    seconds: float
    lost_steps: int
    scores: dict[str, float]


def run(quick: bool = False) -> list[Record]:
    """Kill trainings; nothing where there are fewer than two cores."""
    if count_cores() < NUM_WORKERS:
        return [skip("recovery", f"needs {NUM_WORKERS} cores, there is {count_cores()}")]
    setting = Setting(16, 3, 4, 96, 1) if quick else Setting()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = (setting.side_px, setting.side_px)
        counts = {"num_train": setting.num_images, "num_val": 24, "num_test": 0}
        scenes = make_scene_set(folder / "scenes", image_size=size, **counts)
        calm = train(setting, scenes, folder / "calm", kill=None)
        ours: dict[str, list[Recovery]] = {"one_worker": [], "all_workers": [], "driver": []}
        bare: dict[str, list[float]] = {"one_worker": [], "all_workers": []}
        for number in range(setting.num_rounds):
            for kill, recoveries in ours.items():
                place = folder / f"{kill}-{number}"
                recoveries.append(train(setting, scenes, place, kill=kill))
            for kill, seconds in bare.items():
                seconds.append(kill_bare_ray(folder / f"bare-{kill}-{number}", kill))
    return describe(setting, calm, ours, bare)


def train(setting: Setting, scenes: SceneSet, place: Path, *, kill: str | None) -> Recovery:
    """A training by the command, from the first step to the scores."""
    place.mkdir()
    # fmt: off
    command = [
        sys.executable, "-m", "retinaray", "train", str(place / "model.pth"), "--json",
        "--images", str(scenes.images), "--annotations", str(scenes.train),
        "--val-annotations", str(scenes.val), "--backbone", "ResNet10FPN", "--fpn-channels", "32",
        "--size", str(setting.side_px), str(setting.side_px), "--batch", str(setting.batch),
        "--epochs", str(setting.epochs), "--val-every", "1", "--workers", str(NUM_WORKERS),
        "run.log_every=1",
    ]
    # fmt: on
    lines = place / "model_run" / "metrics.jsonl"
    with start(command, place / "log") as driver:
        seconds = 0.0
        if kill:
            wait_until(lambda: last_step(lines) >= setting.kill_step, driver, place / "log")
            before = len(read_steps(lines))
            begin = time.monotonic()
            kill_processes(driver, kill)
            if kill == "driver":
                driver.wait(_PATIENCE_S)
                with start(command, place / "log") as again:
                    wait_until(lambda: len(read_steps(lines)) > before, again, place / "log")
                    seconds = time.monotonic() - begin
                    finish(again, place / "log")
            else:
                # Steps that were on their way when the signal came are not the first after it.
                wait_until(lambda: bool(read(lines, "recovery")), driver, place / "log")
                seconds = time.monotonic() - begin
        if kill != "driver":
            finish(driver, place / "log")
    scores = read(lines, "validation")[-1]
    recoveries = read(lines, "recovery")
    assert len(recoveries) == bool(kill), recoveries
    steps = {int(event["step"]) for event in read(lines, "progress")}
    total = setting.epochs * setting.num_images // setting.batch
    assert steps == set(range(1, total + 1))
    lost = int(recoveries[0]["lost_steps"]) if recoveries else 0
    return Recovery(seconds, lost, {name: float(scores[name]) for name in ("AP", "AP50")})


def kill_bare_ray(place: Path, kill: str) -> float:
    """Seconds that Ray Train alone takes from the signal to the first step."""
    place.mkdir()
    lines = place / "lines.jsonl"
    command = [sys.executable, "-c", _BARE_RAY, str(lines), str(place / "ray")]
    with start(command, place / "log") as driver:
        wait_until(lambda: last_step(lines) >= 13, driver, place / "log")
        begin = time.monotonic()
        kill_processes(driver, kill)
        # The other worker hears of it within a step; the checkpoint is that of step 10.
        wait_until(lambda: 11 in read_steps(lines)[12:], driver, place / "log")
        seconds = time.monotonic() - begin
        finish(driver, place / "log")
    return seconds


@contextmanager
def start(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose output goes to the end of a file; killed at the end of the block."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the end, which must be a good one."""
    assert process.wait(_PATIENCE_S) == 0, log.read_text()[-3000:]


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Look again and again while the process runs."""
    deadline = time.monotonic() + _PATIENCE_S
    while not is_so():
        assert process.poll() is None, f"it ended: {log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"it hangs: {log.read_text()[-3000:]}"
        time.sleep(_POLL_S)


def kill_processes(driver: subprocess.Popen[bytes], kill: str) -> None:
    """SIGKILL to the driver, or to one or all of its workers."""
    if kill == "driver":
        driver.kill()
        return
    workers = list_descendants(driver.pid, b"ray::RayTrainWorker")
    assert len(workers) == NUM_WORKERS, workers
    for pid in workers if kill == "all_workers" else workers[-1:]:
        os.kill(pid, signal.SIGKILL)


def read(lines: Path, kind: str) -> list[dict[str, Any]]:
    """The whole lines of a file of events, of one kind; none before it is there."""
    if not lines.exists():
        return []
    whole = lines.read_text().split("\n")[:-1]
    return [event for event in map(json.loads, whole) if event["kind"] == kind]


def read_steps(lines: Path) -> list[int]:
    """The steps as they were told."""
    return [int(event["step"]) for event in read(lines, "progress")]


def last_step(lines: Path) -> int:
    """The latest step; 0 before the first."""
    return (read_steps(lines) or [0])[-1]


def describe(
    setting: Setting,
    calm: Recovery,
    ours: dict[str, list[Recovery]],
    bare: dict[str, list[float]],
) -> list[Record]:
    """A record for each way to be killed, and for Ray alone."""
    checked = "every step was taken; scores stand beside those of the undisturbed training"
    config = {**asdict(setting), "kill_step": setting.kill_step, "workers": NUM_WORKERS}
    records = []
    for kill, recoveries in ours.items():
        seconds = [entry.seconds for entry in recoveries]
        record: Record = {"case": f"recovery/{kill}", "unit": "s", **summarise(seconds)}
        record["lost_steps"] = [entry.lost_steps for entry in recoveries]
        record["scores"] = [entry.scores for entry in recoveries]
        record["undisturbed"] = calm.scores
        if kill in bare:
            pairs = zip(bare[kill], seconds, strict=True)
            ratios = summarise([theirs / own for theirs, own in pairs])
            record["times_as_fast_as_bare_ray"] = ratios["median"]
        records.append({**record, "checked": checked, "config": config})
    for kill, seconds in bare.items():
        record = {"case": f"recovery/bare_ray/{kill}", "unit": "s", **summarise(seconds)}
        records.append({**record, "checked": "it went on from its checkpoint", "config": config})
    return records


def main() -> None:
    """Print the records of this case alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small training, once")
    for record in run(parser.parse_args().quick):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
