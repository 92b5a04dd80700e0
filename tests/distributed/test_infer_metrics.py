"""Series of a worker as Prometheus scrapes them, and the warning about spilled objects."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import ray

from retinaray.assembly.job_plan_workers import ClusterSize
from retinaray.distributed import spilling
from retinaray.distributed.infer_metrics import InferMetrics
from retinaray.distributed.spilling import SpillWatch, read_spilled_bytes
from retinaray.errors import ClusterError
from retinaray.inference.run_pace import PartReport
from retinaray.inference.stage_times import StageTimes

WaitUntil = Callable[[Callable[[], object], str], None]
GIB = 1024**3

# A cluster of its own, because the store of the shared one is not small; told apart by its process.
SPILLING_SCRIPT = """
import numpy, ray
from retinaray.distributed.spilling import SpillWatch, read_spilled_bytes
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80_000_000,
         logging_level="error", log_to_driver=False)
watch = SpillWatch()
print("start", read_spilled_bytes(), watch.check(now=True))
kept = [ray.put(numpy.ones(20_000_000, numpy.uint8)) for _ in range(10)]
print("end", read_spilled_bytes(), watch.check(now=True))
"""


class _Worker:
    """Counts two parts in a process of its own, as a worker does."""

    def __init__(self, run_id: str) -> None:
        self._metrics = InferMetrics(run_id, "onnxruntime")

    def work(self) -> None:
        times = StageTimes(fetch_s=1.5, decode_s=2.0, engine_s=3.0, commit_s=0.25, num_bytes=1000)
        self._metrics.count(PartReport("a:1", 100.0, 104.0, 30, 2, 90, times))
        # It began while the first was being written: 16 images within 8 s after that.
        self._metrics.count(PartReport("a:1", 103.0, 112.0, 16, 0, 0, StageTimes(engine_s=1.0)))


def _scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


def _find_series(text: str, run_id: str) -> dict[str, float]:
    """Values of a run by series name, with the stage or bucket where there is one."""
    found = {}
    for name, labels, value in re.findall(r"^(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        tags: Mapping[str, str] = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if tags.get("run_id") == run_id:
            assert tags["backend"] == "onnxruntime"
            more = tags.get("stage") or tags.get("le")
            found[f"{name}[{more}]" if more else name] = float(value)
    return found


@pytest.mark.local_ray
def test_infer_metrics_are_exported_by_the_agent_of_the_node(
    ray_cluster: ClusterSize, wait_until: WaitUntil
) -> None:
    worker: Any = ray.remote(num_cpus=0)(_Worker).remote("run-7")
    ray.get(worker.work.remote())
    port = ray.nodes()[0]["MetricsExportPort"]
    prefix = "ray_retinaray_infer_"
    series: dict[str, float] = {}

    def is_exported() -> bool:
        series.update(_find_series(_scrape(port), "run-7"))
        return series.get(f"{prefix}part_seconds_count") == 2

    wait_until(is_exported, "the series of the worker at the node's metrics port")
    # Ray sums up middles of buckets, not what was observed.
    assert series.pop(f"{prefix}part_seconds_sum") > 0
    assert {name: series[name] for name in series if "bucket" not in name} == {
        f"{prefix}images_total": 46.0,  # 30 + 16
        f"{prefix}errors_total": 2.0,
        f"{prefix}detections_total": 90.0,
        f"{prefix}bytes_total": 1000.0,
        f"{prefix}stage_seconds_total[fetch]": 1.5,
        f"{prefix}stage_seconds_total[decode]": 2.0,
        f"{prefix}stage_seconds_total[engine]": 4.0,  # 3 + 1
        f"{prefix}stage_seconds_total[commit]": 0.25,
        f"{prefix}part_seconds_count": 2.0,
        f"{prefix}images_per_s": 2.0,  # 16 in the 8 s after the first part
    }
    buckets = {name: series[name] for name in series if "bucket" in name}
    # One part of 4 s, and one of 9 s.
    assert buckets[f"{prefix}part_seconds_bucket[2.0]"] == 0.0
    assert buckets[f"{prefix}part_seconds_bucket[5.0]"] == 1.0
    assert buckets[f"{prefix}part_seconds_bucket[10.0]"] == 2.0
    assert buckets[f"{prefix}part_seconds_bucket[+Inf]"] == 2.0


@pytest.mark.local_ray
def test_read_spilled_bytes_counts_what_does_not_fit_into_the_store() -> None:
    environment = {name: os.environ[name] for name in os.environ if name != "RAY_ADDRESS"}
    answer = subprocess.run(
        [sys.executable, "-c", SPILLING_SCRIPT],
        env=environment | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert answer.returncode == 0, answer.stderr
    start, end = (line.split() for line in answer.stdout.splitlines()[-2:])
    assert start == ["start", "0", "0"]
    # 200 MB that are all kept, and room for 80.
    assert 110e6 < int(end[1]) <= 201e6
    assert int(end[2]) >= int(end[1])
    assert len(re.findall("object store spilled 0.1", answer.stderr)) == 1


@pytest.mark.local_ray
def test_read_spilled_bytes_raises_what_the_driver_catches_when_nobody_answers(
    ray_cluster: ClusterSize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spilling, "_TIMEOUT_S", 1e-6)
    with pytest.raises(ClusterError, match=r"memory statistics of Ray within 1e-06 s"):
        read_spilled_bytes()


def test_spill_watch_warns_once_and_counts_from_its_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answers = iter([GIB, GIB, 2 * GIB, 4 * GIB])
    now = [0.0]
    with caplog.at_level(logging.WARNING):
        watch = SpillWatch(lambda: next(answers), lambda: now[0])
        spilled = []
        for now[0] in (10.0, 30.0, 60.0, 70.0, 90.0):
            spilled.append(watch.check())
    # Asked at 0, 30, 60 and 90 s only.
    assert spilled == [0, 0, GIB, GIB, 3 * GIB]
    assert [text.partition(":")[0] for text in caplog.messages] == ["object store spilled 1 GiB"]


def test_spill_watch_asks_at_once_when_told_to() -> None:
    answers = iter([0, 5])
    watch = SpillWatch(lambda: next(answers), lambda: 0.0)
    assert watch.check() == 0
    assert watch.check(now=True) == 5


def test_spill_watch_goes_on_when_the_cluster_does_not_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answers: list[int | ClusterError] = [0, 7, ClusterError("no answer"), 3]

    def read() -> int:
        answer = answers.pop(0)
        if isinstance(answer, ClusterError):
            raise answer
        return answer

    watch = SpillWatch(read, lambda: 0.0)
    with caplog.at_level(logging.INFO, "retinaray"):
        spilled = [watch.check(now=True) for _ in range(3)]
    # A node that was lost takes its count along: 3 after 7.
    assert spilled == [7, 7, 7]
    assert "spilling is not known: no answer" in caplog.messages
