"""Every setting of `plan`: which job, on which nodes, and what nobody can look up."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from retinaray.config.batch_schema import InferJob
from retinaray.config.export_schema import ExportJob
from retinaray.config.inference_schema import EvaluateJob
from retinaray.config.loading import load_from_argv
from retinaray.config.nodes import Flag, Job, Location
from retinaray.config.options import OptionTable
from retinaray.config.sweep_schema import TuneJob
from retinaray.config.training_schema import TrainJob
from retinaray.config.yaml_files import read_yaml
from retinaray.errors import ConfigError

PlannedJob = TrainJob | TuneJob | InferJob | EvaluateJob | ExportJob
PlannedVerb = Literal["train", "tune", "infer", "evaluate", "export"]
PLANNED: dict[str, type[Job]] = {
    job_class.verb: job_class for job_class in (TrainJob, TuneJob, InferJob, EvaluateJob, ExportJob)
}
"""Job classes that can be planned, by verb."""

_COUNTED = re.compile(r"(?:(\d+)x)?(.+)")
_RESOURCES = re.compile(r"\(([^()]*)\)")
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)(KiB|MiB|GiB|TiB|kB|MB|GB|TB|)")
_UNITS = {
    "": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_KEYS = ("cpu", "gpu", "mem", "gpu_mem")
_IN_BYTES = ("mem", "gpu_mem")
_SYNTAX = (
    "expected COUNTxTYPE, as in 2xg5.12xlarge, or COUNTx(cpu=48,gpu=4,mem=192GiB,gpu_mem=24GiB)"
)


@dataclass(frozen=True)
class NodeRequest:
    """Equal machines, as they are asked for.

    Attributes:
        count: How many, at least 1.
        type: Name of their kind; none = `resources` says what they have.
        resources: Of each: cpu and gpu (numbers), mem and gpu_mem (bytes, gpu_mem of each GPU).
    """

    count: int
    type: str | None
    resources: Mapping[str, float]


def parse_nodes(text: str) -> tuple[NodeRequest, ...]:
    """Read a list of machines.

    Args:
        text: As in `2xg5.12xlarge,4xc7i.4xlarge` or `2x(cpu=48,gpu=4,mem=192GiB,gpu_mem=24GiB)`;
            a count of 1 may be left out.

    Raises:
        ValueError: If it is malformed; one line per fault.
    """
    faults: list[str] = []
    requests = []
    for entry in re.split(r",(?![^()]*\))", re.sub(r"\s", "", text)):
        match = _COUNTED.fullmatch(entry)
        count = int(match[1] or 1) if match else 0
        if match is None or count < 1:
            faults.append(f"{entry!r}: {_SYNTAX}")
            continue
        inner = _RESOURCES.fullmatch(match[2])
        resources: Mapping[str, float] = {}
        if inner is not None:
            resources = _parse_resources(inner[1], faults)
        elif not re.fullmatch(r"[A-Za-z][\w.-]*", match[2]):
            faults.append(f"{entry!r}: {_SYNTAX}")
        requests.append(NodeRequest(count, None if inner else match[2], resources))
    if faults:
        raise ValueError("\n".join(faults))
    return tuple(requests)


def _parse_resources(text: str, faults: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for entry in text.split(","):
        key, equals, value = entry.partition("=")
        amount = _AMOUNT.fullmatch(value)
        if key not in _KEYS or not equals or amount is None or key in found:
            faults.append(f"{entry!r}: expected each of {', '.join(_KEYS)} once, as in mem=192GiB")
        elif (key in _IN_BYTES) != bool(amount[2]):
            faults.append(
                f"{entry!r}: expected a size with its unit, as in {key}=24GiB"
                if key in _IN_BYTES
                else f"{entry!r}: expected a number without a unit"
            )
        else:
            found[key] = float(amount[1]) * _UNITS[amount[2]]
    faults += [f"({text}): lacks {key}" for key in ("cpu", "mem") if f"{key}=" not in text]
    if found.get("gpu", 0) and "gpu_mem" not in found:
        faults.append(f"({text}): lacks gpu_mem, the memory of each GPU")
    if not all(map(math.isfinite, found.values())) or found.get("cpu", 1) <= 0:
        faults.append(f"({text}): expected finite numbers, and cpu above 0")
    return found


def _expect_nodes(value: str | None) -> str | None:
    if value is not None:
        parse_nodes(value)
    return value


def _expect_words(value: str | None) -> str | None:
    try:
        shlex.split(value or "")
    except ValueError as error:
        raise ValueError(f"expected options as on a command line: {error}") from error
    return value


class PlanJob(Job):
    """Say what a job will take and what is missing, before anything is started."""

    verb: ClassVar[str] = "plan"
    examples: ClassVar[tuple[str, ...]] = (
        "retinaray plan --job jobs/configs/train/bccd_resnet18.yaml",
        "retinaray plan --job jobs/configs/train_small_objects.yaml --nodes 2xg5.12xlarge "
        '--with="--workers 8 --batch 32"',
        "retinaray plan --job jobs/configs/infer_s3.yaml --num-images 1000000 "
        '--nodes "4x(cpu=8,gpu=1,mem=32GiB,gpu_mem=24GiB),c7i.4xlarge"',
    )

    job: Annotated[Location, Flag("--job", metavar="FILE.yaml")]
    """Settings of the job, as for its --config."""
    command: Annotated[PlannedVerb | None, Flag("--verb")] = None
    """Which command the file is for; none = told from what is in it."""
    options: Annotated[str, AfterValidator(_expect_words), Flag("--with", metavar="'OPTIONS'")] = ""
    """The rest of the job's command line, written --with="--workers 8"."""
    nodes: Annotated[
        Location | None, AfterValidator(_expect_nodes), Flag("--nodes", metavar="NxTYPE,...")
    ] = None
    """Machines, head included: EC2 types, or (cpu=48,gpu=4,mem=192GiB,gpu_mem=24GiB); none = this
    machine alone."""
    num_images: Annotated[int | None, Field(ge=1), Flag("--num-images", unit="images")] = None
    """Images of the job where they cannot be counted, or shall not; none = count them."""
    image_bytes: Annotated[int, Field(ge=1), Flag("--image-bytes", unit="bytes")] = 200_000
    """Bytes of an image file where none can be looked at."""
    max_listed: Annotated[int, Field(ge=1), Flag("--max-listed", unit="files")] = 100_000
    """Files that are looked at, at most."""


def find_verb(tree: Mapping[str, Any]) -> str:
    """Which command a job file is for.

    Args:
        tree: Its settings.

    Returns:
        The verb whose settings it has: with the fewest keys that are not there, and the fewest
        required ones that the file lacks.

    Raises:
        ConfigError: If it fits several equally well.
    """
    distances = {verb: _count_misfits(tree, job_class) for verb, job_class in PLANNED.items()}
    nearest = [verb for verb, misfits in distances.items() if misfits == min(distances.values())]
    if len(nearest) > 1:
        raise ConfigError(
            f"the job file could be for {' or '.join(nearest)}: say which with --verb"
        )
    return nearest[0]


def _count_misfits(tree: Mapping[str, Any], job_class: type[Job]) -> int:
    table = OptionTable(job_class)
    kinds = dict.fromkeys(table.sections, True)
    kinds |= {
        option.path[0]: option.shape.kind == "mapping"
        for option in table.options
        if len(option.path) == 1
    }
    unknown = sum(
        key not in kinds or (isinstance(value, dict) != kinds[key] and value is not None)
        for key, value in tree.items()
    )
    required = (name for name, field in job_class.model_fields.items() if field.is_required())
    return unknown + sum(name not in tree for name in required)


def load_planned(plan: PlanJob) -> PlannedJob:
    """The job that is to be planned.

    Raises:
        ConfigError: If anything in its file or in the options is wrong; all faults at once.
    """
    file = read_yaml(plan.job)
    if not file.is_readable:
        raise ConfigError("\n".join(file.faults))
    verb = plan.command or find_verb(file.tree)
    job = load_from_argv(PLANNED[verb], ["--config", plan.job, *shlex.split(plan.options)])
    assert isinstance(job, PlannedJob)
    return job
