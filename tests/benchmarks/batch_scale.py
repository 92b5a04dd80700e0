"""Whether the cost of a batch inference grows with the number of its images, and its memory not.

    python tests/benchmarks/batch_scale.py [--quick]

The command `retinaray infer`, in a process of its own for each size, over small JPEG files of a
local folder, with a network that computes nothing: what is left is the platform itself. Memory is
the resident set as the kernel reports it, its peak over the run, of the driver and of the largest
worker.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from run import Record, round_to_figures

from retinaray.artifact import Architecture, ModelCard
from retinaray.data.coco import Category, CategoryTable
from retinaray.detector.anchors import AnchorSpec

empty_network = importlib.import_module("empty_network")
SIDE_PX = 64
NUM_CONTENTS = 64
_SAMPLE_EVERY_S = 0.25


@dataclass(frozen=True)
class Sizes:
    """Numbers of images, ascending."""

    num_images: tuple[int, ...]


def run(quick: bool = False) -> list[Record]:
    """Measure each size, and compare with the smallest one."""
    sizes = Sizes((500, 1000) if quick else (2_000, 20_000, 200_000))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "nothing.onnx"
        model.write_bytes(empty_network.make(make_card()))
        measured = []
        for count in sizes.num_images:
            images = folder / f"images-{count}"
            write_images(images, count)
            measured.append(measure(folder, model, images, count))
    return describe(sizes, measured)


def make_card() -> ModelCard:
    """What an exported file has to say of itself."""
    return ModelCard(
        architecture=Architecture(
            backbone="ResNet10FPN",
            norm="frozen_bn",
            fpn_channels=16,
            head_depth=0,
            stride_in_1x1=False,
        ),
        anchors=AnchorSpec(),
        categories=CategoryTable((Category(id=1, name="thing"),)),
        canvas=(SIDE_PX, SIDE_PX),
        score_thresholds=(0.05,),
    )


def write_images(folder: Path, count: int) -> None:
    """Small files of noise, a thousand per folder."""
    random = np.random.default_rng(0)
    contents = []
    for _ in range(NUM_CONTENTS):
        pixels = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((SIDE_PX, SIDE_PX))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG")
        contents.append(buffer.getvalue())
    for number in range(count):
        path = folder / f"{number // 1000:04}" / f"{number:07}.jpg"
        if number % 1000 == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(contents[number % NUM_CONTENTS])


def measure(folder: Path, model: Path, images: Path, count: int) -> dict[str, Any]:
    """One run of the command, watched from outside."""
    output = folder / f"run-{count}"
    # fmt: off
    command = [
        sys.executable, "-m", "retinaray", "infer", str(model), "--images", str(images),
        "--output", str(output), "--workers", "1",
    ]
    # fmt: on
    driver_kib = worker_kib = 0
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            driver_kib = max(driver_kib, read_rss_kib(process.pid))
            workers = list_descendants(process.pid, b"ray::MapWorker")
            worker_kib = max([worker_kib, *map(read_rss_kib, workers)])
            time.sleep(_SAMPLE_EVERY_S)
        log.seek(0)
        assert process.returncode == 0, log.read().decode()[-2000:]
    seconds = time.monotonic() - start
    record = json.loads((output / "run.json").read_bytes())
    assert record["totals"]["num_images"] == count
    assert len(json.loads((output / "images.json").read_bytes())) == count
    return {
        "images_per_s": record["summary"]["steady_images_per_s"],
        "seconds": seconds,
        "driver_mib": driver_kib / 1024,
        "worker_mib": worker_kib / 1024,
    }


def read_rss_kib(pid: int) -> int:
    """Resident memory of a process; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(lines[0].split()[1]) if lines else 0


def list_descendants(root: int, title: bytes) -> list[int]:
    """Processes below one whose title begins so, in the order of their numbers."""
    parents: dict[int, int] = {}
    names: dict[int, bytes] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            stat = (entry / "stat").read_text()
            names[int(entry.name)] = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found = [pid for pid, name in names.items() if name.startswith(title)]
    return sorted(pid for pid in found if descends(pid, root, parents))


def descends(pid: int, root: int, parents: dict[int, int]) -> bool:
    """Whether a process comes from another one."""
    while pid in parents:
        if pid == root:
            return True
        pid = parents[pid]
    return False


def describe(sizes: Sizes, measured: list[dict[str, Any]]) -> list[Record]:
    """A record per size and quantity; ratios are to the size before."""
    records = []
    units = {"images_per_s": "img/s", "driver_mib": "MiB", "worker_mib": "MiB", "seconds": "s"}
    for position, (count, values) in enumerate(zip(sizes.num_images, measured, strict=True)):
        for name, unit in units.items():
            value = round_to_figures(values[name])
            record: Record = {
                "case": f"batch_scale/{count}/{name}",
                "unit": unit,
                "value": value,
                "n": 1,
                "median": value,
                "p10": value,
                "p90": value,
                "checked": "every image came out, exactly once",
                "config": {**asdict(sizes), "side_px": SIDE_PX, "workers": 1},
            }
            if position:
                before = measured[position - 1][name]
                record["ratio_to_size_before"] = round_to_figures(values[name] / before)
            records.append(record)
    return records


def main() -> None:
    """Print the records of this case alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images")
    for record in run(parser.parse_args().quick):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
