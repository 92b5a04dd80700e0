"""The scripts in jobs/ as a user starts them: from another folder, with relative paths."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from retinaray.demo.scenes import make_scene_set

REPOSITORY = Path(__file__).parents[2]
# On two busy cores a worker of Ray takes a minute to import torch.
PATIENCE_S = 600.0


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ (eight training, three validation, six test images) and a home/."""
    folder = tmp_path_factory.mktemp("workplace")
    make_scene_set(folder / "data", num_train=8, num_val=3, num_test=6, image_size=(64, 96))
    (folder / "home").mkdir()
    return folder


@pytest.fixture(scope="session")
def start_command(
    workplace: Path, ray_priority: dict[str, str]
) -> Callable[..., subprocess.Popen[str]]:
    """Start a program in the workplace: no Ray and no home but its own."""
    environment = {name: value for name, value in os.environ.items() if "RAY_" not in name}
    environment |= {
        "PYTHONPATH": str(REPOSITORY / "platform"),
        "HOME": str(workplace / "home"),
        **ray_priority,
    }

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=workplace,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def run_script(
    start_command: Callable[..., subprocess.Popen[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run one script of jobs/ to its end."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = start_command(str(REPOSITORY / "jobs" / f"{name}.py"), *arguments)
        try:
            out, err = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], object], str], None]:
    """Wait for a condition; fails with its description when it does not come."""

    def wait(condition: Callable[[], object], description: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        pause = threading.Event()
        while not condition():
            assert time.monotonic() < deadline, f"did not happen in {PATIENCE_S:g} s: {description}"
            pause.wait(0.02)

    return wait
