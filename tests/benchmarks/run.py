"""Runs the benchmarks and keeps their figures.

    python tests/benchmarks/run.py [case ...] [--quick] [--append]

JSON lines go to stdout, a table to stderr; `--append` also writes the lines to results/CASE.jsonl.
A case is a file beside this one with `run(quick: bool) -> list[Record]`, and imports from here what
it needs to time competitors and to describe the outcome. README.md explains the fields.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retinaray.machine import count_cores

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
DISTRIBUTIONS = (
    "retinaray",
    "torch",
    "torchvision",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "pillow",
    "simplejpeg",
)
# Flags that decide which matrix units a runtime can use.
CPU_FLAGS = ("amx", "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni")
REQUIRED = ("case", "value", "unit", "n", "median", "p10", "p90", "checked", "config")
RATIO = "times_as_fast_as_"

Record = dict[str, Any]


class RecordError(Exception):
    """A case gave a record that cannot be kept."""


# --- what a case uses -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounds:
    """Times of competitors that took turns.

    Attributes:
        wall_s: Seconds of every round, by competitor; equal positions are the same round.
        cpu_s: Processor seconds of the whole process, likewise.
        outputs: What each competitor returned last.
    """

    wall_s: dict[str, list[float]]
    cpu_s: dict[str, list[float]]
    outputs: dict[str, Any]


def time_rounds(
    competitors: Mapping[str, Callable[[], object]],
    *,
    num_rounds: int,
    num_warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = time.process_time,
) -> Rounds:
    """Run the competitors in turns, A B C A B C ..., so that a busy machine slows them alike.

    Args:
        competitors: What to time, by name; each waits for its own device.
        num_rounds: Rounds that count, at least 1.
        num_warmup: Rounds before them that do not.
        clock: Gives seconds.
        cpu_clock: Gives processor seconds.
    """
    wall_s: dict[str, list[float]] = {name: [] for name in competitors}
    cpu_s: dict[str, list[float]] = {name: [] for name in competitors}
    outputs: dict[str, object] = {}
    for index in range(num_warmup + num_rounds):
        for name, compete in competitors.items():
            # The last output is freed before the clock runs, not while it does.
            outputs.pop(name, None)
            cpu_start, start = cpu_clock(), clock()
            outputs[name] = compete()
            end, cpu_end = clock(), cpu_clock()
            if index >= num_warmup:
                wall_s[name].append(end - start)
                cpu_s[name].append(cpu_end - cpu_start)
    return Rounds(wall_s=wall_s, cpu_s=cpu_s, outputs=outputs)


def make_records(
    case: str,
    rounds: Rounds,
    *,
    unit: str,
    convert: Callable[[float], float],
    baselines: Mapping[str, Sequence[str]],
    checked: str,
    config: Mapping[str, Any],
) -> list[Record]:
    """One record per competitor, named CASE/COMPETITOR.

    Args:
        case: What was measured.
        rounds: The times.
        unit: Unit of the values.
        convert: Turns the seconds of one round into a value.
        baselines: With which competitors one is compared, by wall clock and by processor time. A
            ratio is the median over the rounds of baseline's time over own time: 2 means twice as
            fast.
        checked: The fact about the outputs that was asserted.
        config: Everything that another run needs to repeat this one.
    """
    records = []
    for name, seconds in rounds.wall_s.items():
        record: Record = {"case": f"{case}/{name}", "unit": unit}
        record |= summarise([convert(value) for value in seconds])
        record["cpu_s"] = round_to_figures(percentile(rounds.cpu_s[name], 50))
        for baseline in baselines.get(name, ()):
            ratios = _divide(rounds.wall_s[baseline], seconds)
            p10, median, p90 = (round_to_figures(percentile(ratios, q)) for q in (10, 50, 90))
            record[f"{RATIO}{baseline}"] = median
            record[f"{RATIO}{baseline}_p10_p90"] = [p10, p90]
            cpu_ratios = _divide(rounds.cpu_s[baseline], rounds.cpu_s[name])
            record[f"cpu_{RATIO}{baseline}"] = round_to_figures(percentile(cpu_ratios, 50))
        records.append({**record, "checked": checked, "config": dict(config)})
    return records


def _divide(others: Sequence[float], own: Sequence[float]) -> list[float]:
    return [other / max(value, 1e-9) for other, value in zip(others, own, strict=True)]


def summarise(values: Sequence[float]) -> Record:
    """The fields value, n, median, p10 and p90 of at least one value."""
    p10, median, p90 = (round_to_figures(percentile(values, q)) for q in (10, 50, 90))
    return {"value": median, "n": len(values), "median": median, "p10": p10, "p90": p90}


def percentile(values: Sequence[float], percent: float) -> float:
    """Percentile in [0, 100] of at least one value, linear between the two nearest."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def round_to_figures(value: float, figures: int = 4) -> float:
    """A number with that many significant figures."""
    return float(f"{value:.{figures}g}")


def skip(case: str, reason: str) -> Record:
    """The record of a case that cannot run here."""
    return {"case": case, "value": None, "unit": "skipped", "n": 0, "reason": reason}


# --- what is added to every record ----------------------------------------------------------------


def describe_hardware() -> Record:
    """Processor, cores, matrix units, memory, GPU, and how busy the machine is already."""
    cpuinfo = Path("/proc/cpuinfo")
    name, flags = parse_cpuinfo(cpuinfo.read_text() if cpuinfo.exists() else "")
    return {
        "cpu": name or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": count_cores(),
        "flags": flags,
        "has_amx": any(flag.startswith("amx") for flag in flags),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpu": _describe_gpu(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def parse_cpuinfo(text: str) -> tuple[str, list[str]]:
    """Name of the processor, and those of its flags that matter here; both may be empty."""
    pairs = (line.partition(":") for line in text.splitlines())
    info = {key.strip(): value.strip() for key, _, value in pairs}
    # x86 calls them flags, Arm features.
    flags = (info.get("flags") or info.get("Features") or "").split()
    return info.get("model name", ""), sorted(f for f in flags if f.startswith(CPU_FLAGS))


def _describe_gpu() -> str | None:
    """Name and driver of the first GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.partition("\n")[0].strip() or None


def collect_versions() -> dict[str, str]:
    """Python and the packages that do the work."""
    versions = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def read_commit() -> str:
    """The commit that runs, with `+changes` when the working tree differs from it."""
    commit = _ask_git("rev-parse", "HEAD")
    changes = _ask_git("status", "--porcelain", "--untracked-files=no")
    return f"{commit or 'unknown'}{'+changes' if changes else ''}"


def _ask_git(*arguments: str) -> str:
    try:
        answer = subprocess.run(
            ["git", *arguments], cwd=FOLDER, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return answer.stdout.strip()


def check_record(record: Record) -> None:
    """Refuse a record that lacks a field or whose numbers cannot be.

    Raises:
        RecordError: If so.
    """
    name = record.get("case")
    if record.get("unit") == "skipped":
        if not record.get("reason"):
            raise RecordError(f"{name}: a skipped case needs a reason")
        return
    missing = [key for key in REQUIRED if not record.get(key) and record.get(key) != 0]
    if missing:
        raise RecordError(f"{name}: expected {', '.join(REQUIRED)}; {', '.join(missing)} missing")
    numbers = [record[key] for key in ("p10", "median", "p90")]
    numbers += [value for key, value in record.items() if RATIO in key and "p10" not in key]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
        raise RecordError(f"{name}: expected finite numbers, got {numbers}")
    if not record["p10"] <= record["median"] <= record["p90"] or record["n"] < 1:
        raise RecordError(f"{name}: expected p10 <= median <= p90 of n >= 1, got {record}")


# --- the command ----------------------------------------------------------------------------------


def find_cases(folder: Path = FOLDER) -> list[str]:
    """Names of the files that define `run`, sorted."""
    return sorted(
        path.stem
        for path in folder.glob("*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "run"
    )


def run_case(name: str, *, quick: bool) -> list[Record]:
    """Run a case and complete its records.

    Raises:
        RecordError: If a record is incomplete.
    """
    module = importlib.import_module(name)
    hardware = describe_hardware()
    start = time.perf_counter()
    records = module.run(quick=quick)
    common = {
        "quick": quick,
        "case_s": round(time.perf_counter() - start, 1),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": read_commit(),
        "hardware": hardware,
        "versions": collect_versions(),
    }
    complete = [record | common for record in records]
    for record in complete:
        check_record(record)
    return complete


def format_table(records: Iterable[Record]) -> str:
    """One line per record with its median, spread and ratios."""
    rows = [("case", "median", "p10", "p90", "unit", "n", "times as fast as")]
    for record in records:
        if record["unit"] == "skipped":
            rows.append((record["case"], "-", "-", "-", "skipped", "0", record["reason"]))
            continue
        ratios = [
            f"{key.removeprefix(RATIO)} {value:g} (cpu {record[f'cpu_{key}']:g})"
            for key, value in record.items()
            if key.startswith(RATIO) and not key.endswith("_p10_p90")
        ]
        numbers = (f"{record[key]:g}" for key in ("median", "p10", "p90"))
        rows.append((record["case"], *numbers, record["unit"], str(record["n"]), ", ".join(ratios)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if 0 < index < 4 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def append_records(name: str, records: Iterable[Record], folder: Path = RESULTS) -> None:
    """Add the records that hold a figure to FOLDER/NAME.jsonl."""
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        for record in records:
            if record["unit"] != "skipped":
                file.write(json.dumps(record) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases that are named, or all."""
    cases = find_cases()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("case", nargs="*", help=f"of {', '.join(cases)}; none = all")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--append", action="store_true", help="add to results/CASE.jsonl")
    options = parser.parse_args(argv)
    if unknown := set(options.case) - set(cases):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; expected of {', '.join(cases)}")
    everything = []
    for name in options.case or cases:
        records = run_case(name, quick=options.quick)
        for record in records:
            print(json.dumps(record), flush=True)
        if options.append:
            append_records(name, records)
        everything += records
    print(f"\n{format_table(everything)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    # Cases import this file as `run`; the command uses the same copy.
    sys.exit(importlib.import_module("run").main())
