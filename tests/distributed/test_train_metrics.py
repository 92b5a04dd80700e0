"""What Prometheus and the log collector see of a real training whose worker was killed."""

from __future__ import annotations

import json
import logging
import re
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from retinaray.config.schema import TrainJob
from retinaray.demo.scenes import SceneSet
from retinaray.distributed.train import run_training
from retinaray.distributed.train_metrics import TrainMetrics
from retinaray.log_format import make_json_handler
from retinaray.training.loop import Progress

pytestmark = [pytest.mark.local_ray, pytest.mark.usefixtures("ray_cluster")]

PREFIX = "ray_retinaray_train_"
WaitUntil = Callable[[Callable[[], object], str], None]
Series = dict[str, dict[str, float]]


@pytest.fixture
def json_log() -> Iterator[None]:
    """The driver writes JSON lines, as after --log-format json."""
    root, own = logging.getLogger(), logging.getLogger("retinaray")
    level = own.level
    handler = make_json_handler({"verb": "train"})
    root.addHandler(handler)
    own.setLevel(logging.INFO)
    yield
    root.removeHandler(handler)
    own.setLevel(level)


def _scrape(run_id: str) -> Series:
    """Values of a run by process and series, buckets with their limit."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: Series = {}
    for name, labels, value in re.findall(r"^(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if tags.get("run_id") == run_id:
            series = found.setdefault(tags["WorkerId"], {})
            series[f"{name}[{tags['le']}]" if "le" in tags else name] = float(value)
    return found


def _read_worker_lines(message: str) -> list[dict[str, Any]]:
    """JSON lines of all workers of this session whose message begins so, oldest first."""
    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    lines = [
        line
        for path in folder.glob("worker-*.err")
        for line in path.read_text(errors="replace").splitlines()
    ]
    entries = [json.loads(line) for line in lines if line.startswith('{"time"')]
    found = [entry for entry in entries if entry["message"].startswith(message)]
    return sorted(found, key=lambda entry: str(entry["time"]))


def _is_registered(folder: Path, checkpoint: str) -> bool:
    return any(checkpoint in path.read_text() for path in folder.rglob("*snapshot.json"))


@pytest.mark.slow
def test_a_training_is_seen_by_prometheus_and_in_json_lines(
    json_log: None,
    make_train_job: Callable[..., TrainJob],
    scenes: SceneSet,
    tmp_path: Path,
    read_events: Callable[[Path, str], list[dict[str, Any]]],
    hold_reader: Callable[..., Any],
    kill_worker: Callable[[str], int],
    wait_until: WaitUntil,
) -> None:
    folder = tmp_path / "model_run"
    seen: Series = {}

    def follow(reading: int) -> None:
        # Each epoch reads the image once: it is killed in the second, which comes again.
        if reading == 2:
            wait_until(lambda: _is_registered(folder, "step_00000002"), "the first checkpoint")
            kill_worker("ray::RayTrainWorker")
        if reading == 4:
            run_id = json.loads((folder / "run.json").read_text())["run_id"]

            def is_exported() -> bool:
                seen.update(_scrape(run_id))
                names = {name for series in seen.values() for name in series}
                # The first worker's series of a checkpoint died with it, if it was exported.
                finished = (s for s in seen.values() if f"{PREFIX}map" in s)
                has_both = any(f"{PREFIX}checkpoint_seconds_count" in s for s in finished)
                return has_both and f"{PREFIX}errors_total" in names

            wait_until(is_exported, "the series of the training at the node's metrics port")

    with hold_reader(sorted(scenes.images.glob("train*"))[0], follow) as failures:
        run_training(make_train_job(tmp_path / "model.pth"))
    assert not failures

    # One failure, counted by the controller and not by a worker.
    errors = [series for series in seen.values() if f"{PREFIX}errors_total" in series]
    assert errors == [{f"{PREFIX}errors_total": 1.0}]
    (validation,) = (e for e in read_events(folder, "validation") if e["step"] == 4)
    (second,) = (s for s in seen.values() if s.get(f"{PREFIX}map") == validation["AP"])
    # It went on after step 2, and waits in step 5 or 6; step 4 ended an epoch.
    assert second[f"{PREFIX}step_seconds_count"] in (2.0, 3.0)
    assert second[f"{PREFIX}checkpoint_seconds_count"] == 1.0
    assert second[f"{PREFIX}checkpoint_seconds_bucket[+Inf]"] == 1.0
    progress = [e for e in read_events(folder, "progress") if e["step"] in (3, 4, 5)]
    assert second[f"{PREFIX}images_per_second"] in {event["images_per_s"] for event in progress}
    # No gradient was infinite, and a counter without counts is not there.
    assert not any("skipped" in name for series in seen.values() for name in series)

    run_id = json.loads((folder / "run.json").read_text())["run_id"]
    starts = [e for e in _read_worker_lines("worker 0 of 1 trains on cpu") if e["run_id"] == run_id]
    assert [entry["message"][-6:] for entry in starts] == ["step 0", "step 2"]
    assert {(e["rank"], e["verb"], e["logger"], e["level"]) for e in starts} == {
        (0, "train", "retinaray.distributed.train_worker", "INFO")
    }
    checkpoints = [e for e in _read_worker_lines("checkpoint after") if e["run_id"] == run_id]
    assert len(checkpoints) == 3


class _Worker:
    """Counts as a worker of two does, in a process of its own."""

    def __init__(self, run_id: str, rank: int) -> None:
        self._metrics = TrainMetrics(run_id, rank=rank, batch=8, first_step=10)

    def work(self) -> None:
        values = dict.fromkeys(Progress.__dataclass_fields__, 0.0)
        for step, num_skipped, images_per_s in ((14, 0, 16.0), (15, 1, 4.0)):
            report = {"step": step, "num_skipped": num_skipped, "images_per_s": images_per_s}
            self._metrics.count_progress(Progress(**{**values, **report}))  # type: ignore[arg-type]
        self._metrics.note_map(0.25)
        self._metrics.note_map(None)


def test_train_metrics_count_steps_on_all_workers_and_the_rest_on_the_first(
    wait_until: WaitUntil,
) -> None:
    workers: list[Any] = [ray.remote(num_cpus=0)(_Worker).remote("run-8", rank) for rank in (0, 1)]
    ray.get([worker.work.remote() for worker in workers])
    seen: Series = {}

    def is_exported() -> bool:
        seen.update(_scrape("run-8"))
        counts = [series.get(f"{PREFIX}step_seconds_count") for series in seen.values()]
        return counts == [5.0, 5.0]

    wait_until(is_exported, "the series of both workers at the node's metrics port")
    first, other = sorted(seen.values(), key=len, reverse=True)
    plain = {name: first[name] for name in first if "_bucket" not in name and "_sum" not in name}
    assert plain == {
        f"{PREFIX}step_seconds_count": 5.0,
        f"{PREFIX}images_per_second": 4.0,
        f"{PREFIX}map": 0.25,
        f"{PREFIX}skipped_steps_total": 1.0,
    }
    assert not any("step_seconds" not in name for name in other)
    # Four steps of 8 / 16 s, one of 8 / 4 s.
    assert first[f"{PREFIX}step_seconds_bucket[0.2]"] == 0.0
    assert first[f"{PREFIX}step_seconds_bucket[0.5]"] == 4.0
    assert first[f"{PREFIX}step_seconds_bucket[1.0]"] == 4.0
    assert first[f"{PREFIX}step_seconds_bucket[2.0]"] == 5.0
