"""A batch inference from S3 to S3 against its engine alone, and against Ray's own way of doing it.

    python tests/benchmarks/batch_inference.py [--quick]

JPEG files on a real S3 server over loopback, JSON parts on the same server; the server, Ray and all
competitors share the processors. ResNet18FPN with 256 channels and random weights.

- speed: `engine` is `predict` on canvases that are ready in memory, `ours` a whole `run_inference`
  with the same threads, in bf16 and INT8, from the first image that is asked for to the last part
  that is written. `ray_data_torchvision` is the straightforward way: `ray.data.read_images`, then
  `map_batches` with torchvision's RetinaNet of the same backbone and size in fp32, then
  `write_json`; its time begins when its model is loaded, and it has both processors.
- overhead: the same with a network that computes nothing, against a bare thread pool that fetches
  and decodes the same files.
- start_up: what a whole run takes beside the time from its first image to its last part, Ray being
  there already: reading the model, listing, cutting, starting the worker, merging.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import RATIO, Record, percentile, round_to_figures, skip, summarise

from retinaray.assembly.export import run_export
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import ExportJob, InferJob
from retinaray.demo.embedded_s3 import EmbeddedS3
from retinaray.distributed.batch_inference import run_inference
from retinaray.distributed.resources import connect
from retinaray.inference.onnxruntime_backend import OnnxRuntimePredictor
from retinaray.inference.pipeline import ImageSource, ReadSettings, load_canvas
from retinaray.inference.predictor import PredictorSettings, load_predictor
from retinaray.storage import Storage

inference = importlib.import_module("inference")
torchvision_peer = importlib.import_module("torchvision_peer")
empty_network = importlib.import_module("empty_network")
# What a competitor says of each round: seconds, and whatever else it knows.
Rounds = dict[str, list[dict[str, float]]]
THREADS = 2
BATCH = 8
BUCKET = "benchmark"
# As many as a worker has by default.
READ_THREADS = 8


@dataclass(frozen=True)
class Setting:
    """Size of the measurement.

    Attributes:
        side_px: Height and width of the network.
        num_images: Images per competitor and round.
        num_fast_images: Images where nothing is computed.
        num_rounds: Rounds that count.
    """

    side_px: int
    num_images: int
    num_fast_images: int
    num_rounds: int


@dataclass(frozen=True)
class Place:
    """What all competitors read.

    Attributes:
        root: S3 prefix.
        images: Prefixes of the images, by the number that lie there.
        bf16: Exported file in floating point.
        int8: The same in INT8.
        nothing: A file of which the network computes nothing.
        score_threshold: Lets a hundred candidates per image pass.
        canvases: The images, ready for the network.
    """

    root: str
    images: dict[int, str]
    bf16: bytes
    int8: bytes
    nothing: bytes
    score_threshold: float
    canvases: torch.Tensor


def run(quick: bool = False) -> list[Record]:
    """Measure speed, overhead and start-up; without the data sets there is a reason instead."""
    if not inference.DATA.is_dir():
        return [skip("batch_inference", f"needs the data sets in {inference.DATA}, absent here")]
    setting = Setting(256, 16, 64, 1) if quick else Setting(512, 64, 8000, 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with EmbeddedS3() as server, _environment(server), connect(min_cpus=THREADS):
            server.create_bucket(BUCKET)
            place = prepare(setting)
            return [*measure_speed(place, setting), *measure_overhead(place, setting)]
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _environment(server: EmbeddedS3) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(server.environment())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def prepare(setting: Setting) -> Place:
    """Put models and images on the server."""
    root, storage = f"s3://{BUCKET}/{time.time_ns()}", Storage()
    exported, weights, card = inference.make_model(
        inference.Setting(setting.side_px, BATCH, setting.num_rounds)
    )
    sources = inference.list_images("coco128", "val", inference.Setting(0, BATCH * 4, 0))
    contents = [Path(source.uri).read_bytes() for source in sources]
    images = {}
    for count in (setting.num_images, setting.num_fast_images):
        images[count] = f"{root}/images-{count}/"
        put = partial(_put, storage, images[count], contents)
        with ThreadPoolExecutor(READ_THREADS) as pool:
            list(pool.map(put, range(count)))
    with tempfile.TemporaryDirectory() as folder:
        int8 = quantize(Path(folder), weights, sources)
    place_models = {
        "bf16": exported,
        "int8": int8,
        "nothing": empty_network.make(card),
    }
    for name, content in place_models.items():
        storage.write_bytes(f"{root}/{name}.onnx", content)
    reading = ReadSettings(threads=THREADS)
    canvases = torch.from_numpy(
        np.stack(
            [load_canvas(source, card.canvas, storage.read_bytes, reading)[0] for source in sources]
        )
    ).permute(0, 3, 1, 2)
    settings = PredictorSettings(batch=BATCH, threads=THREADS)
    candidates = OnnxRuntimePredictor(exported, uri="m.onnx", settings=settings).run(
        canvases[:BATCH]
    )
    return Place(
        root=root,
        images=images,
        **place_models,
        score_threshold=inference.choose_threshold(candidates[1]),
        canvases=canvases,
    )


def _put(storage: Storage, prefix: str, contents: list[bytes], number: int) -> None:
    storage.write_bytes(f"{prefix}{number:06}.jpg", contents[number % len(contents)])


def quantize(folder: Path, weights: bytes, sources: list[ImageSource]) -> bytes:
    """The INT8 file of some weights."""
    (folder / "m.pth").write_bytes(weights)
    (folder / "list.txt").write_text("".join(f"{source.uri}\n" for source in sources), "utf-8")
    values = {
        "model": str(folder / "m.pth"),
        "output": str(folder / "m.onnx"),
        "precision": "int8",
        # Random weights are for speed; the gate judges trained ones.
        "gate": {"nvidia": "skip", "tolerance_px": 1e9},
        "calibration": {"images": str(folder / "list.txt"), "batches": 1, "method": "minmax"},
    }
    run_export(load_from_dict(ExportJob, values))
    return (folder / "m.onnx").read_bytes()


def take_turns(competitors: Mapping[str, Any], num_rounds: int) -> Rounds:
    """What each competitor says of each round; they take turns."""
    rounds: Rounds = {name: [] for name in competitors}
    for _ in range(num_rounds):
        for name, compete in competitors.items():
            rounds[name].append(compete())
    return rounds


def describe(
    case: str,
    rounds: Rounds,
    baselines: Mapping[str, Sequence[str]],
    num_images: int,
    setting: Setting,
) -> list[Record]:
    """A record per competitor, in images per second, with ratios taken round by round."""
    records = []
    for name, outcomes in rounds.items():
        seconds = [outcome["seconds"] for outcome in outcomes]
        record: Record = {"case": f"batch_inference/{case}/{name}", "unit": "img/s"}
        record |= summarise([num_images / value for value in seconds])
        for baseline in baselines.get(name, ()):
            ratios = [
                other["seconds"] / own for other, own in zip(rounds[baseline], seconds, strict=True)
            ]
            p10, median, p90 = (round_to_figures(percentile(ratios, q)) for q in (10, 50, 90))
            record[f"{RATIO}{baseline}"] = median
            record[f"{RATIO}{baseline}_p10_p90"] = [p10, p90]
        config = {**asdict(setting), "batch": BATCH, "threads": THREADS, "read": READ_THREADS}
        checked = "every image came out, exactly once"
        records.append({**record, "checked": checked, "config": config})
    return records


# --- speed ----------------------------------------------------------------------------------------


def measure_speed(place: Place, setting: Setting) -> list[Record]:
    """Engine alone, ours, and Ray Data with torchvision, turn by turn."""
    competitors: dict[str, Any] = {}
    for precision in ("bf16", "int8"):
        competitors[f"engine_{precision}"] = make_engine(place, setting, precision)
        competitors[f"ours_{precision}"] = partial(run_ours, place, setting.num_images, precision)
    competitors["ray_data_torchvision"] = partial(
        torchvision_peer.run_example,
        place.images[setting.num_images],
        place.root,
        setting.num_images,
        setting.side_px,
    )
    rounds = take_turns(competitors, setting.num_rounds)
    baselines = {
        "ours_bf16": ("engine_bf16", "ray_data_torchvision"),
        "ours_int8": ("engine_int8", "ray_data_torchvision"),
    }
    return describe("speed", rounds, baselines, setting.num_images, setting)


def make_engine(place: Place, setting: Setting, precision: str) -> Any:
    """`predict` over the ready canvases, as often as there are images."""
    settings = PredictorSettings(
        batch=BATCH,
        threads=THREADS,
        score_threshold=place.score_threshold,
        precision="bf16" if precision == "bf16" else "auto",
    )
    content = getattr(place, precision)
    predictor, _ = load_predictor(content, uri="m.onnx", backend="openvino", settings=settings)
    batches = list(torch.split(place.canvases, BATCH))

    def predict() -> dict[str, float]:
        start = time.perf_counter()
        for number in range(setting.num_images // BATCH):
            predictor.predict(batches[number % len(batches)])
        return {"seconds": time.perf_counter() - start}

    return predict


def run_ours(place: Place, num_images: int, model: str) -> dict[str, float]:
    """A whole run; the seconds are those between its first image and its last part."""
    values = {
        "model": f"{place.root}/{model}.onnx",
        "images": place.images[num_images],
        "output": f"{place.root}/run-{time.time_ns()}",
        "batch": BATCH,
        "detection": {"score_threshold": place.score_threshold},
        "reading": {"threads": READ_THREADS},
    }
    begin = time.time()
    outcome = run_inference(load_from_dict(InferJob, values))
    assert (outcome.totals.num_images, outcome.totals.num_errors) == (num_images, 0)
    whole_s = time.time() - begin
    return {
        "seconds": num_images / outcome.summary["steady_images_per_s"],
        "other_s": whole_s - outcome.summary["worker_s"],
    }


# --- overhead -------------------------------------------------------------------------------------


def measure_overhead(place: Place, setting: Setting) -> list[Record]:
    """A run that computes nothing against threads that fetch and decode and nothing else."""
    competitors = {
        "ours_no_network": partial(run_ours, place, setting.num_fast_images, "nothing"),
        "thread_pool": partial(run_pool, place, setting),
    }
    rounds = take_turns(competitors, setting.num_rounds)
    baselines = {"ours_no_network": ("thread_pool",)}
    records = describe("overhead", rounds, baselines, setting.num_fast_images, setting)
    starts = [
        run_ours(place, setting.num_images, "nothing")["other_s"] for _ in range(setting.num_rounds)
    ]
    return [
        *records,
        {
            "case": "batch_inference/start_up",
            "unit": "s",
            **summarise(starts),
            "checked": "every image came out, exactly once",
            "config": asdict(setting),
        },
    ]


def run_pool(place: Place, setting: Setting) -> dict[str, float]:
    """Fetch, decode and letterbox all images in threads."""
    storage = Storage()
    sources = [
        ImageSource(number, uri)
        for number, uri in enumerate(storage.list_files(place.images[setting.num_fast_images]))
    ]
    assert len(sources) == setting.num_fast_images
    canvas = (setting.side_px, setting.side_px)
    reading = ReadSettings(threads=READ_THREADS)
    start = time.perf_counter()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        total = sum(
            pool.map(
                lambda source: load_canvas(source, canvas, storage.read_bytes, reading)[0].size,
                sources,
            )
        )
    assert total == setting.num_fast_images * 3 * setting.side_px**2
    return {"seconds": time.perf_counter() - start}


def main() -> None:
    """Print the records of this case alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small network, few images")
    for record in run(parser.parse_args().quick):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
