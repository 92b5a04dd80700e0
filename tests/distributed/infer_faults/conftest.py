"""Thirty-three files in eleven parts, the run over them that nothing disturbed, and its command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import retinaray
from retinaray.config.schema import InferJob
from retinaray.demo.scenes import make_scene_set
from retinaray.distributed.batch_inference import run_inference
from retinaray.storage import Storage

PART_SIZE = 3
# What a run has found; the rest is bookkeeping.
_RESULTS = ("parts/", "errors/", "detections.json", "images.json")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """32 images of 64x96 pixels, and, as the fifth, a file that is none; in the run's order."""
    folder = tmp_path_factory.mktemp("pictures")
    scenes = make_scene_set(folder, num_train=0, num_val=0, num_test=32, image_size=(64, 96))
    fourth = sorted(scenes.images.iterdir())[3]
    fourth.with_name(f"{fourth.stem}~.jpg").write_bytes(b"no picture")
    return sorted(scenes.images.iterdir())


@pytest.fixture(scope="session")
def make_job(make_infer_job: Callable[..., InferJob], pictures: list[Path]) -> Callable[..., Any]:
    """Inference over `pictures`; changes as in `make_infer_job`."""

    def make(output: object, **changes: object) -> InferJob:
        settings = {"images": str(pictures[0].parent), "annotations": None, "part_size": PART_SIZE}
        return make_infer_job(output, **(settings | changes))

    return make


@pytest.fixture(scope="session")
def read_results() -> Callable[[object], dict[str, bytes]]:
    """What a run has found, by name: parts, errors and what was merged from them."""

    def read(root: object) -> dict[str, bytes]:
        storage = Storage()
        names = [uri.removeprefix(f"{root}/") for uri in storage.list_files(str(root))]
        return {
            name: storage.read_bytes(f"{root}/{name}")
            for name in names
            if name.startswith(_RESULTS)
        }

    return read


@pytest.fixture(scope="session")
def undisturbed(
    ray_cluster: object,
    make_job: Callable[..., InferJob],
    read_results: Callable[[object], dict[str, bytes]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, bytes]:
    """What one worker finds when nothing happens."""
    outcome = run_inference(make_job(tmp_path_factory.mktemp("undisturbed") / "run"))
    assert (outcome.totals.num_images, outcome.totals.num_errors) == (32, 1)
    results = read_results(outcome.run)
    # Eleven parts, two merged files, and the errors of the part with the file that is no picture.
    assert len(results) == 11 + 2 + 1
    return results


@pytest.fixture
def start_driver(
    onnx_file: Path, pictures: list[Path], tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start `retinaray infer` over `pictures` as a command; its stderr goes to driver-N.log."""
    with ExitStack() as stack:

        def start(
            output: object, *, workers: int, batch: int, address: str | None = None
        ) -> subprocess.Popen[bytes]:
            number = len(list(tmp_path.glob("driver-*.log")))
            log = stack.enter_context((tmp_path / f"driver-{number}.log").open("wb"))
            environment = {**os.environ, "PYTHONPATH": str(Path(retinaray.__file__).parents[1])}
            if address is not None:
                environment["RAY_ADDRESS"] = address
            command = [sys.executable, "-m", "retinaray", "infer", str(onnx_file)]
            command += ["--images", str(pictures[0].parent), "--output", str(output)]
            command += ["--part-size", str(PART_SIZE), "--score-threshold", "0"]
            command += ["--workers", str(workers), "--batch", str(batch)]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture
def read_log(tmp_path: Path) -> Callable[[int], str]:
    """What the driver of a number, from 0 on, has written."""

    def read(number: int) -> str:
        return (tmp_path / f"driver-{number}.log").read_text(encoding="utf-8")

    return read


@pytest.fixture
def list_parts() -> Callable[[object], dict[str, float]]:
    """The committed parts of a run and when each was written."""

    def find(root: object) -> dict[str, float]:
        entries = Storage().list_entries(f"{root}/parts")
        return {entry.uri: entry.modified_s for entry in entries}

    return find


@pytest.fixture
def spoiled(pictures: list[Path]) -> Callable[[Iterable[str]], Any]:
    """Make the images of some parts unreadable: whoever reads them again gets other results."""

    @contextmanager
    def spoil(parts: Iterable[str]) -> Iterator[None]:
        numbers = [int(uri.rpartition("-")[2].partition(".")[0]) for uri in parts]
        paths = [path for k in numbers for path in pictures[k * PART_SIZE : (k + 1) * PART_SIZE]]
        contents = {path: path.read_bytes() for path in paths}
        assert contents
        try:
            for path in contents:
                path.write_bytes(b"spoiled")
            yield
        finally:
            for path, content in contents.items():
                path.write_bytes(content)

    return spoil


@pytest.fixture
def end_process(
    is_running: Callable[[int], bool],
    wait_until: Callable[[Callable[[], object], str], None],
) -> Callable[..., None]:
    """Signal a driver, and wait until it and the workers of its Ray are gone.

    Workers outlive a killed driver by some seconds in which they may still commit a part. Ray's
    own agents stay for a minute; they do nothing.
    """

    def end(pid: int, number: int = signal.SIGKILL) -> None:
        workers = _find_workers(pid)
        assert workers
        os.kill(pid, number)
        wait_until(lambda: not any(map(is_running, [pid, *workers])), f"the end of {workers}")

    return end


@pytest.fixture
def find_reader(
    wait_until: Callable[[Callable[[], object], str], None],
) -> Callable[[Path], int]:
    """The Ray worker that has a file open, which `hold_reader` has made it wait for."""

    def find(path: Path) -> int:
        found: list[int] = []

        def look() -> bool:
            found[:] = [pid for pid in _find_workers(os.getpid()) if _has_open(pid, path)]
            return bool(found)

        wait_until(look, f"a reader of {path}")
        return found[0]

    return find


@pytest.fixture(scope="session")
def find_ancestors() -> Callable[[int], list[int]]:
    """The processes that a process descends from, its parent first."""

    def find(pid: int) -> list[int]:
        found = []
        while pid := _find_parent(pid):
            found.append(pid)
        return found

    return find


def _find_parent(pid: int) -> int:
    """0 when there is none."""
    fields = _read_process_file(pid, "stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else 0


def _find_workers(root: int) -> list[int]:
    """The processes below one that run an engine."""
    below = _find_descendants(root)
    return [pid for pid in below if _read_process_file(pid, "cmdline").startswith("ray::MapWorker")]


def _find_descendants(root: int) -> list[int]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    parents = {pid: _find_parent(pid) for pid in pids}
    found = [root]
    for pid in found:
        found.extend(child for child, parent in parents.items() if parent == pid)
    return found[1:]


def _read_process_file(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return ""


def _has_open(pid: int, path: Path) -> bool:
    try:
        names = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except FileNotFoundError:  # the process, or one of its files, was closed meanwhile
        return False
    # `hold_reader` has put the pipe of the next reader in its place.
    return any(name.startswith(f"{path} (deleted)") or name == str(path) for name in names)
