"""What the files around a batch inference cost: listing and cutting before it, merging after it.

    python tests/benchmarks/batch_files.py [--quick]

A million invented keys are listed, chosen and cut; the headers of a tar are read; parts with ten
detections per image are committed and merged in every format. No network, no pixel: the floor that
storage and engines stand on. "names_alone" draws the keys and does nothing else.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from run import Record, make_records, summarise, time_rounds

from retinaray.inference.manifest import cut_parts, list_sources
from retinaray.inference.output_formats import OutputFormat, OutputSettings
from retinaray.inference.part_codec import Compression
from retinaray.inference.part_table import write_parts
from retinaray.inference.pipeline import ImageResult, ImageSource
from retinaray.inference.run_files import RunFiles
from retinaray.inference.source_filters import SourceChoice
from retinaray.storage import FileEntry, Storage

BOXES_PER_IMAGE = 10
IMAGES_PER_PART = 1000
CATEGORIES = ({"id": 1, "name": "car"},)
FORMATS: tuple[OutputFormat, ...] = ("coco-results", "coco-dataset", "odtk", "jsonl", "parquet")


@dataclass(frozen=True)
class Setting:
    """Size of the measurement.

    Attributes:
        num_keys: Keys that are listed.
        num_members: Images in the tar.
        num_parts: Parts that are merged, of 1000 images each.
        num_rounds: Rounds that count.
    """

    num_keys: int
    num_members: int
    num_parts: int
    num_rounds: int


class InventedKeys(Storage):
    """Lists keys as a bucket of photographs has them; writes go where they are told."""

    def list_files(self, uri: str) -> Iterator[str]:
        """A million names."""
        return (f"{uri}/day={n // 10_000:04}/image-{n:09}.jpg" for n in range(_COUNT[0]))

    def list_entries(self, uri: str) -> Iterator[FileEntry]:
        """The same with lengths."""
        return (FileEntry(name, 1000 + len(name) % 7, 1e9) for name in self.list_files(uri))


_COUNT = [0]


def run(quick: bool = False) -> list[Record]:
    """All three, one after another."""
    setting = Setting(20_000, 2000, 2, 2) if quick else Setting(1_000_000, 50_000, 20, 5)
    with tempfile.TemporaryDirectory(prefix="retinaray-files-") as folder:
        return [
            *measure_listing(setting, Path(folder)),
            *measure_tar(setting, Path(folder)),
            *measure_merge(setting, Path(folder)),
        ]


def count_images(**settings: object) -> int:
    """Images in all parts of a listing."""
    choice = SourceChoice(**settings)  # type: ignore[arg-type]
    sources = list_sources("s3://bucket/photos", None, InventedKeys(), choice=choice)
    return sum(len(part.sources) for part in cut_parts(sources))


def measure_listing(setting: Setting, folder: Path) -> list[Record]:
    """Keys per second, and the memory that listing and cutting take at their highest."""
    _COUNT[0] = setting.num_keys

    def write() -> int:
        sources = list_sources("s3://bucket/photos", None, InventedKeys())
        return write_parts(cut_parts(sources), str(folder / "manifest"), Storage()).num_images

    rounds = time_rounds(
        {
            "names_alone": lambda: sum(1 for _ in InventedKeys().list_files("s3://bucket/photos")),
            "list_and_cut": count_images,
            "patterns_and_sizes": partial(
                count_images, include=("*.jpg",), exclude=("day=0003/**",), min_bytes=1
            ),
            "sample_of_10000": partial(count_images, sample=10_000),
            "write_manifest": write,
        },
        num_rounds=setting.num_rounds,
    )
    assert rounds.outputs["list_and_cut"] == rounds.outputs["write_manifest"] == setting.num_keys
    assert rounds.outputs["sample_of_10000"] == 10_000
    config = {"keys": setting.num_keys, "rounds": setting.num_rounds}
    speeds = make_records(
        "batch_files/listing",
        rounds,
        unit="keys/s",
        convert=lambda seconds: setting.num_keys / seconds,
        baselines={"list_and_cut": ["names_alone"]},
        checked="every key is in one part",
        config=config,
    )
    peaks = [_measure_peak(count_images) for _ in range(2)]
    return [*speeds, _memory_record("batch_files/listing/peak_memory", peaks, config)]


def measure_tar(setting: Setting, folder: Path) -> list[Record]:
    """Members per second of a local tar whose images have 20 kB."""
    path = folder / "photos.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(setting.num_members):
            info = tarfile.TarInfo(f"{number:09}.jpg")
            info.size = 20_000
            tar.addfile(info, io.BytesIO(bytes(info.size)))

    def read_with_tarfile() -> int:
        with tarfile.open(path) as tar:
            return sum(1 for _ in tar)

    rounds = time_rounds(
        {
            "tarfile": read_with_tarfile,
            "list_sources": lambda: sum(1 for _ in list_sources(str(path), None, Storage())),
        },
        num_rounds=setting.num_rounds,
    )
    path.unlink()
    assert set(rounds.outputs.values()) == {setting.num_members}
    return make_records(
        "batch_files/tar",
        rounds,
        unit="members/s",
        convert=lambda seconds: setting.num_members / seconds,
        baselines={"list_sources": ["tarfile"]},
        checked="every member is found",
        config={"members": setting.num_members, "bytes_each": 20_000, "rounds": setting.num_rounds},
    )


def make_results(part: int) -> Iterator[ImageResult]:
    """A thousand images with ten detections each."""
    for number in range(part * IMAGES_PER_PART, (part + 1) * IMAGES_PER_PART):
        found = tuple(
            {"category_id": 1, "bbox": [number % 97 + 0.25, k, 31.5, 17.75], "score": 0.9 - k / 100}
            for k in range(BOXES_PER_IMAGE)
        )
        yield ImageResult(ImageSource(number, f"s3://bucket/{number:09}.jpg"), 480, 640, found)


def measure_merge(setting: Setting, folder: Path) -> list[Record]:
    """Megabytes of plain parts per second, committed and merged, in every format."""
    runs: dict[str, RunFiles] = {}
    kinds: list[tuple[OutputFormat, Compression]] = [(name, "none") for name in FORMATS]
    kinds += [("coco-results", "gzip"), ("coco-results", "zstd")]
    for output_format, compression in kinds:
        name: str = output_format if compression == "none" else compression
        output = OutputSettings(
            format=output_format,
            compression=compression,
            categories=CATEGORIES,
            images_root="s3://bucket",
        )
        runs[name] = RunFiles(str(folder / name), Storage(), output)
        for part in range(setting.num_parts):
            runs[name].commit(part, make_results(part))
    plain = Path(runs["coco-results"].root, "parts")
    num_bytes = sum(path.stat().st_size for path in plain.iterdir())
    rounds = time_rounds(
        {f"merge_{name}": partial(files.merge, setting.num_parts) for name, files in runs.items()}
        | {"parse_json": partial(parse_parts, plain)},
        num_rounds=setting.num_rounds,
    )
    num_images = setting.num_parts * IMAGES_PER_PART
    for name in runs:
        totals = rounds.outputs[f"merge_{name}"]
        assert (totals.num_images, totals.num_detections) == (num_images, num_images * 10)
    config = {
        "parts": setting.num_parts,
        "images": num_images,
        "detections_per_image": BOXES_PER_IMAGE,
        "bytes_of_plain_parts": num_bytes,
        "rounds": setting.num_rounds,
    }
    speeds = make_records(
        "batch_files/merge",
        rounds,
        unit="MB/s",
        convert=lambda seconds: num_bytes / 1e6 / seconds,
        baselines={"merge_coco-results": ["parse_json"]},
        checked="every image and detection is counted",
        config=config,
    )
    merge = partial(runs["coco-results"].merge, setting.num_parts)
    return [
        *speeds,
        _memory_record("batch_files/merge/peak_memory", [_measure_peak(merge)], config),
    ]


def parse_parts(folder: Path) -> int:
    """Read and parse all parts, and do nothing else."""
    return sum(
        len(json.loads(line)["detections"])
        for path in sorted(folder.iterdir())
        for line in path.read_bytes().splitlines()
    )


def _measure_peak(work: Callable[[], object]) -> float:
    """Megabytes of Python objects at their highest."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def _memory_record(case: str, peaks: list[float], config: dict[str, int]) -> Record:
    checked = "the work is the one whose speed is measured"
    return {"case": case, "unit": "MB", **summarise(peaks), "checked": checked, "config": config}


def main() -> None:
    """Print the records of this case alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 keys, two rounds")
    for record in run(parser.parse_args().quick):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
