"""How long the doctor takes over a large data set, with and without a look at the image files.

    python tests/benchmarks/doctor.py [--quick]

A synthetic COCO file of 100,000 images and 700,000 annotations with a few planted faults; the
images are hard links to one small JPEG. "parse_json" reads and parses the file and does nothing
else: the floor below which no examination can fall.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from run import Record, make_records, time_rounds

from retinaray.data.dataset_doctor import DoctorReport, examine_dataset

SIDE_PX = 64
BOXES_PER_IMAGE = 7
# File systems limit the links of one file: ext4 to 65,000.
LINKS_PER_FILE = 30_000
FILES_PER_FOLDER = 10_000
NUM_FLAT_BOXES = 11
NUM_LOST_FILES = 5


@dataclass(frozen=True)
class Setting:
    """Size of the measurement.

    Attributes:
        num_images: Images, each with seven boxes.
        num_rounds: Rounds that count.
        num_threads: Files read at once.
    """

    num_images: int
    num_rounds: int
    num_threads: int = 8


def run(quick: bool = False) -> list[Record]:
    """Write the data set, examine it, take it away."""
    setting = Setting(5_000, 2) if quick else Setting(100_000, 3)
    with tempfile.TemporaryDirectory(prefix="retinaray-doctor-") as folder:
        annotations, images = Path(folder, "instances.json"), Path(folder, "images")
        names = [f"{index // FILES_PER_FOLDER}/{index}.jpg" for index in range(setting.num_images)]
        annotations.write_text(json.dumps(make_dataset(names)), "utf-8")
        link_images(images, names[NUM_LOST_FILES:])
        return measure(annotations, images, setting)


def make_dataset(names: list[str]) -> dict[str, Any]:
    """A sound data set but for some boxes without area, spread evenly."""
    draw = random.Random(0)
    entries: list[dict[str, Any]] = [
        {
            "id": 1 + index,
            "image_id": index // BOXES_PER_IMAGE,
            "category_id": 1 + index % 3,
            # Distinct by their corner, so that none is a duplicate of another.
            "bbox": [index % BOXES_PER_IMAGE, draw.randint(0, 30), draw.randint(2, 30), 20],
            "iscrowd": 0,
        }
        for index in range(BOXES_PER_IMAGE * len(names))
    ]
    for entry in entries:
        entry["area"] = entry["bbox"][2] * entry["bbox"][3]
    for entry in entries[:: len(entries) // NUM_FLAT_BOXES][:NUM_FLAT_BOXES]:
        entry["bbox"][2] = entry["area"] = 0
    return {
        "images": [
            {"id": index, "file_name": name, "height": SIDE_PX, "width": SIDE_PX}
            for index, name in enumerate(names)
        ],
        "annotations": entries,
        "categories": [{"id": id_, "name": str(id_)} for id_ in (1, 2, 3)],
    }


def link_images(folder: Path, names: list[str]) -> None:
    """One small JPEG under all these names."""
    for index, name in enumerate(names):
        target = folder / name
        if index % FILES_PER_FOLDER == 0 or not target.parent.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
        if index % LINKS_PER_FILE == 0:
            Image.new("RGB", (SIDE_PX, SIDE_PX), (90, 60, 30)).save(target)
            source = target
        else:
            os.link(source, target)


def measure(annotations: Path, images: Path, setting: Setting) -> list[Record]:
    """Both examinations and the floor, in seconds."""

    def examine(*, check_files: bool) -> DoctorReport:
        return examine_dataset(
            annotations, images, check_files=check_files, num_threads=setting.num_threads
        )

    rounds = time_rounds(
        {
            "parse_json": lambda: len(json.loads(annotations.read_bytes())["annotations"]),
            "json_alone": lambda: examine(check_files=False),
            "with_files": lambda: examine(check_files=True),
        },
        num_rounds=setting.num_rounds,
    )
    flat = {"zero_size_box": NUM_FLAT_BOXES}
    check_report(rounds.outputs["json_alone"], setting, flat)
    check_report(rounds.outputs["with_files"], setting, flat | {"missing_file": NUM_LOST_FILES})
    return make_records(
        "doctor",
        rounds,
        unit="s",
        convert=lambda seconds: seconds,
        baselines={"json_alone": ["parse_json"], "with_files": ["parse_json", "json_alone"]},
        checked="finds exactly the planted faults: boxes without area, files that are missing",
        config={**asdict(setting), "json_bytes": annotations.stat().st_size},
    )


def check_report(report: DoctorReport, setting: Setting, planted: dict[str, int]) -> None:
    """The report counts every entry and names the planted faults and no other error."""
    assert report.num_images == setting.num_images
    assert report.num_annotations == BOXES_PER_IMAGE * setting.num_images
    errors = {fault.code: fault.count for fault in report.faults if fault.severity == "error"}
    assert errors == planted, (errors, planted)


def main() -> None:
    """Print the records of this case alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5,000 images, two rounds")
    for record in run(parser.parse_args().quick):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
