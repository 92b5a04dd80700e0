"""What trained models cost and what they find, as table and plot.

    python tests/benchmarks/model_tradeoff.py runs/*.pth --images data/bccd/images \
        --annotations data/bccd/test.json --output runs/tradeoff

Every model is exported to ONNX and run by OpenVINO, as `retinaray infer --backend openvino` runs
it: AP and AP50 are of what it finds, the latency is that of one image on the model's canvas, NMS
included, the models taking turns. GFLOPs are of the network for one image, a multiply-add counted
as two. Writes tradeoff.png and tradeoff.json into the output folder; the table goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import retinaray
from retinaray.artifact import ModelCard, read_weights
from retinaray.inference.predictor import Predictor, PredictorSettings, load_predictor
from retinaray.machine import count_cores


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        name: Of its file.
        backbone: Its backbone.
        fpn_channels: Width of pyramid and heads.
        canvas: Height and width.
        gflops: Of the network for one image.
        parameters_m: Millions.
        latency_ms: Median of one image.
        images_per_s: Its inverse.
        ap: On the annotations.
        ap50: At IoU 0.5.
    """

    name: str
    backbone: str
    fpn_channels: int
    canvas: tuple[int, int]
    gflops: float
    parameters_m: float
    latency_ms: float
    images_per_s: float
    ap: float
    ap50: float


def measure(
    models: Sequence[Path], images: str, annotations: str, output: Path, *, num_rounds: int
) -> list[Row]:
    """One row per model, the cheapest first."""
    exported = {path: export(path, output) for path in models}
    latencies = time_in_turns(
        {path: load_engine(file) for path, file in exported.items()}, num_rounds=num_rounds
    )
    rows = []
    for path, file in exported.items():
        card, _ = read_weights(path.read_bytes(), source=str(path))
        scores = retinaray.evaluate(file, images, annotations, backend="openvino").scores.summary
        gflops, parameters = count_cost(card)
        rows.append(
            Row(
                name=path.stem,
                backbone=card.architecture.backbone,
                fpn_channels=card.architecture.fpn_channels,
                canvas=card.canvas,
                gflops=gflops,
                parameters_m=parameters / 1e6,
                latency_ms=latencies[path],
                images_per_s=1000 / latencies[path],
                ap=scores["AP"],
                ap50=scores["AP50"],
            )
        )
    return sorted(rows, key=lambda row: row.latency_ms)


def export(path: Path, output: Path) -> Path:
    """The model as ONNX in the output folder."""
    file = output / f"{path.stem}.onnx"
    retinaray.export_model(path, file)
    return file


def load_engine(file: Path) -> Predictor:
    """OpenVINO on all cores, one image at a time."""
    return load_predictor(
        file.read_bytes(),
        uri=str(file),
        backend="openvino",
        settings=PredictorSettings(batch=1, threads=count_cores()),
    )[0]


def time_in_turns(engines: dict[Path, Predictor], *, num_rounds: int) -> dict[Path, float]:
    """Median milliseconds of one image of noise, by model."""
    generator = torch.Generator().manual_seed(0)
    seconds: dict[Path, list[float]] = {path: [] for path in engines}
    for index in range(num_rounds + 1):
        for path, engine in engines.items():
            shape = (1, *engine.canvas, 3)
            image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            begin = time.perf_counter()
            engine.predict(image.permute(0, 3, 1, 2))
            if index > 0:
                seconds[path].append(time.perf_counter() - begin)
    return {path: 1000 * statistics.median(times) for path, times in seconds.items()}


def count_cost(card: ModelCard) -> tuple[float, int]:
    """GFLOPs of one image and parameters."""
    with torch.device("meta"):
        model = card.build_model().eval()
        image = torch.zeros(1, 3, *card.canvas)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(image)
    return counter.get_total_flops() / 1e9, sum(p.numel() for p in model.parameters())


def format_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| model | canvas | GFLOPs | parameters, M | OpenVINO, ms per image | AP | AP50 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        height, width = row.canvas
        lines.append(
            f"| {row.backbone}, {row.fpn_channels} channels | {height}x{width} | {row.gflops:.1f} "
            f"| {row.parameters_m:.1f} | {row.latency_ms:.1f} | {row.ap:.3f} | {row.ap50:.3f} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], file: Path) -> None:
    """AP over latency, the size of a point by its GFLOPs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    latencies = [row.latency_ms for row in rows]
    sizes = [40 * math.sqrt(row.gflops) for row in rows]
    axes.scatter(latencies, [row.ap for row in rows], s=sizes, alpha=0.6, color="tab:blue")
    # Neighbours have their names above and below.
    for place, row in enumerate(sorted(rows, key=lambda row: row.latency_ms)):
        axes.annotate(
            f"{row.backbone.removesuffix('FPN')}, {row.fpn_channels} ch\n{row.gflops:.0f} GFLOPs",
            (row.latency_ms, row.ap),
            textcoords="offset points",
            xytext=(10, 6 if place % 2 else -24),
            fontsize=9,
        )
    axes.set_xlabel("milliseconds per image (OpenVINO, batch 1)")
    axes.set_ylabel("AP")
    axes.set_xlim(0, 1.25 * max(latencies))
    axes.margins(y=0.25)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measure, print the table, leave picture and figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, help=".pth files")
    parser.add_argument("--images", required=True)
    parser.add_argument("--annotations", required=True)
    parser.add_argument("--output", required=True, type=Path, help="folder for what is left")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows = measure(
        options.models,
        options.images,
        options.annotations,
        options.output,
        num_rounds=options.rounds,
    )
    (options.output / "tradeoff.json").write_text(
        json.dumps([asdict(row) for row in rows], indent=1)
    )
    draw(rows, options.output / "tradeoff.png")
    print(format_table(rows))


if __name__ == "__main__":
    main()
