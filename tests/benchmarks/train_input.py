"""How many training images a core makes ready per second, with and without the caches.

    python tests/benchmarks/train_input.py [--quick]

One process does what a loader process does, in one thread: read, decode, augment with the defaults
of `train`, place on the canvas. Each round makes other draws of the same images; those of a round
are the same for all competitors, and the caches were filled by the rounds before.

- local, s3: no cache; files on this disk, and objects of a real S3 server over loopback.
- s3_files, s3_pixels, local_pixels: `--cache`, and `--cache --cache-decoded`. The server is asked
  whether an object has changed at each use; "_trusting" leaves that out (`--cache-recheck`).

Limits, of the same draws: "augment_alone" has the decoded pixels in memory, "decode_alone" is
simplejpeg on files in memory at the scale that the draw asks for, "copy_alone" copies these pixels.
"loader" is the whole `DataLoader` with two processes over s3_pixels, in images per second of both,
beside what a training would report of it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import simplejpeg
import torch
from run import Record, make_records, round_to_figures, skip, summarise, time_rounds

from retinaray.assembly.training import make_loader
from retinaray.assembly.training_inputs import TrainingInputs, read_inputs
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import TrainJob
from retinaray.data.batching import TrainingDataset
from retinaray.data.coco import resolve_image_uri
from retinaray.data.image_decoding import DecodedImage, choose_dct_divisor, decode_image
from retinaray.data.input_cost import InputCost
from retinaray.demo.embedded_s3 import EmbeddedS3
from retinaray.storage import Storage

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
BUCKET = "train-input"
NUM_IMAGES = {"bccd": 24, "aerial_cars": 12}
NUM_PROCESSES = 2


class Notebook:
    """Decodes in the place of a `DecodedCache`; notes what was asked, and serves it from memory."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, int]] = []
        self.pixels: dict[tuple[str, int], DecodedImage] = {}

    def decode(self, uri: str, *, height: int, width: int, **fit: int) -> DecodedImage:
        """See `DecodedCache.decode`."""
        data = self.files.setdefault(uri, Path(uri).read_bytes())
        key = (uri, choose_dct_divisor(height, width, fit["fit_height"], fit["fit_width"]))
        self.asked.append(key)
        if key not in self.pixels:
            self.pixels[key] = decode_image(data, **fit)
        return self.pixels[key]


def run(quick: bool = False) -> list[Record]:
    """Measure both data sets; without them, or without the S3 server, a reason is given."""
    if not DATA.is_dir():
        return [skip("train_input", f"needs the real data sets in {DATA}, which is absent")]
    before = torch.get_num_threads()
    # As in a loader process.
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder, serve_objects() as root:
            records = []
            for name, count in NUM_IMAGES.items():
                place = (Path(folder) / name, f"{root}/{name}")
                records += measure(name, 4 if quick else count, *place, quick)
            return [*records, *measure_loader(Path(folder) / "loader", f"{root}/loader", quick)]
    finally:
        torch.set_num_threads(before)


@contextmanager
def serve_objects() -> Iterator[str]:
    """A bucket of a real S3 server on this machine, with the AWS_* variables to reach it."""
    with EmbeddedS3() as server:
        before = dict(os.environ)
        os.environ.update(server.environment())
        server.create_bucket(BUCKET)
        try:
            yield f"s3://{BUCKET}"
        finally:
            os.environ.clear()
            os.environ.update(before)


def make_job(name: str, cache: Path, changes: dict[str, object], *, quick: bool) -> TrainJob:
    """A training with the defaults of the command; `data.cache` stands for a folder of its own."""
    if "data.cache" in changes:
        changes = changes | {"data.cache": str(cache / str(changes["data.cache"]))}
    annotations, images = str(DATA / name / "train.json"), str(DATA / name / "images")
    data: dict[str, object] = {"annotations": annotations, "images": images}
    if quick:
        data |= {"resize": 256, "max_size": 448}
    return load_from_dict(TrainJob, {"output": "m.pth", "data": data}, changes)


def make_dataset(job: TrainJob, inputs: TrainingInputs) -> TrainingDataset:
    """What the loader of a training reads from."""
    loader = make_loader(
        job, inputs, rank=0, world_size=1, first_step=0, num_processes=0, pin_memory=False
    )
    return cast("TrainingDataset", loader.dataset)


def list_settings(root: str) -> dict[str, dict[str, object]]:
    """What each competitor sets, by name."""
    files: dict[str, object] = {"data.cache": "files"}
    pixels: dict[str, object] = {"data.cache": "pixels", "data.cache_decoded": True}
    trusting: dict[str, object] = {"data.cache_recheck_s": 1e6}
    on_s3: dict[str, object] = {"data.images": root}
    return {
        "local": {},
        "s3": on_s3,
        "s3_files": on_s3 | files,
        "s3_files_trusting": on_s3 | files | trusting,
        "s3_pixels": on_s3 | pixels,
        "s3_pixels_trusting": on_s3 | pixels | trusting,
        "local_pixels": pixels,
    }


def measure(name: str, count: int, folder: Path, root: str, quick: bool) -> list[Record]:
    """All competitors over some images of a data set, spread over it."""
    plain = make_job(name, folder, {}, quick=quick)
    inputs = read_inputs(plain)
    step = len(inputs.train) // count
    positions = range(0, step * count, step)
    upload(name, inputs, positions, root)
    jobs = {
        key: make_job(name, folder, value, quick=quick)
        for key, value in list_settings(root).items()
    }
    datasets = {key: make_dataset(job, inputs) for key, job in jobs.items()}
    book = Notebook()
    datasets["augment_alone"] = make_dataset(plain, inputs)
    # Stands for a cache of pixels that costs nothing.
    cast("Any", datasets["augment_alone"])._decoded = book
    num_rounds = 2 if quick else 5

    def read_epoch(key: str, epoch: int) -> list[bytes]:
        return [datasets[key][epoch, position].image.tobytes() for position in positions]

    # Each scale that a round asks for is kept before the clock runs.
    for key in datasets.keys() - {"local", "s3"}:
        for epoch in range(num_rounds + 1):
            read_epoch(key, epoch)
    epochs = {key: iter(range(num_rounds + 1)) for key in datasets}
    competitors: dict[str, Callable[[], object]] = {
        key: lambda key=key: read_epoch(key, next(epochs[key]))  # type: ignore[misc]
        for key in datasets
    }
    competitors |= make_limits(book, book.asked[: len(positions)])
    rounds = time_rounds(competitors, num_rounds=num_rounds)
    for key in datasets:
        assert rounds.outputs[key] == rounds.outputs["local"], key
    config = {"data": name, "num_images": count, "canvas": inputs.canvas, "rounds": num_rounds}
    records = make_records(
        f"train_input/{name}",
        rounds,
        unit="images/s per process",
        convert=lambda seconds: count / seconds,
        baselines={key: ("local", "s3") for key in rounds.wall_s if key not in ("local", "s3")},
        checked="canvases of the last round equal byte for byte with every cache",
        config=config | {"read_bytes": sum(len(book.files[uri]) for uri, _ in book.asked[:count])},
    )
    for record in records:
        # What busy neighbours change little: the same per second of processor time.
        record["images_per_core_s"] = round_to_figures(count / max(record["cpu_s"], 1e-9))
    return records


def upload(name: str, inputs: TrainingInputs, positions: Iterable[int], root: str) -> None:
    """Put images of a data set on the server."""
    for position in positions:
        file_name = inputs.train.images[position].file_name
        content = (DATA / name / "images" / file_name).read_bytes()
        Storage().write_bytes(resolve_image_uri(root, file_name), content)


def make_limits(book: Notebook, asked: list[tuple[str, int]]) -> dict[str, Callable[[], object]]:
    """Decoding and copying alone, of what the first round asks for."""

    def decode_alone() -> int:
        return sum(decode_plainly(book.files[uri], divisor).size for uri, divisor in asked)

    def copy_alone() -> int:
        return sum(book.pixels[key].pixels.copy().size for key in asked)

    assert decode_alone() == copy_alone()
    return {"decode_alone": decode_alone, "copy_alone": copy_alone}


def decode_plainly(data: bytes, divisor: int) -> np.ndarray:
    """The pixels of a JPEG as stored, by simplejpeg."""
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    return cast(
        "np.ndarray",
        simplejpeg.decode_jpeg(
            data, "RGB", min_height=-(-height // divisor), min_width=-(-width // divisor)
        ),
    )


def measure_loader(folder: Path, root: str, quick: bool) -> list[Record]:
    """Two loader processes over S3 with a cache of pixels: what they give, and say they give."""
    batch, steps = 8, 8 if quick else 24
    settings = list_settings(root)["s3_pixels"] | {"run.iters": 2 * steps, "run.batch": batch}
    job = make_job("bccd", folder, settings, quick=quick)
    inputs = read_inputs(job)
    upload("bccd", inputs, range(len(inputs.train)), root)
    loader = make_loader(
        job,
        inputs,
        rank=0,
        world_size=1,
        first_step=0,
        num_processes=NUM_PROCESSES,
        pin_memory=False,
    )
    arrivals_s, cost = [], InputCost()
    for number, arrived in enumerate(loader):
        # The first half starts the processes, and fills what the loader holds ready.
        if number >= steps:
            arrivals_s.append(time.perf_counter())
            cost += arrived.cost
    assert cost.num_images == batch * steps
    assert cost.num_processes == NUM_PROCESSES
    # Every second batch is of the same process.
    pairs = [b - a for a, b in zip(arrivals_s, arrivals_s[2:], strict=False)]
    rates = [2 * batch / max(pair, 1e-9) for pair in pairs]
    overall = batch * (len(arrivals_s) - 1) / (arrivals_s[-1] - arrivals_s[0])
    return [
        {
            "case": "train_input/loader/s3_pixels",
            "unit": f"images/s of {NUM_PROCESSES} processes",
            **summarise(rates),
            "value": round_to_figures(overall),
            "told_images_per_s": round_to_figures(NUM_PROCESSES * (cost.images_per_s or 0)),
            "core_images_per_s": round_to_figures(cost.images_per_core_s or 0),
            "checked": "as many images as were asked for, all from loader processes",
            "config": {"data": "bccd", "batch": batch, "steps": steps, "canvas": inputs.canvas},
        }
    ]


def main() -> None:
    """Print the records of this case alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images, two rounds")
    for record in run(parser.parse_args().quick):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
