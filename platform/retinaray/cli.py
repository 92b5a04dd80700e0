"""The `retinaray` command and the scripts in jobs/: settings in, one JSON line, an exit code.

Both doors call `run_verb`. Runners are imported only when there is a job to run, so that help and
wrong settings cost no torch and no ray.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from retinaray import __version__
from retinaray.endings import (
    EXIT_CODES,
    NOTHING_TO_RUN,
    Ending,
    StopNote,
    judge_error,
    note_signals,
)
from retinaray.errors import ConfigError
from retinaray.terminal import configure_logging, line_width, write_to

if TYPE_CHECKING:
    from retinaray.config.loading import Request
    from retinaray.config.nodes import Job
    from retinaray.log_format import LogFormat

__all__ = ["EXIT_CODES", "VERBS", "Outcome", "Verb", "configure_logging", "main", "run_verb"]

_LOG_FORMAT = "--log-format"
_JSON = "--json"
_HELP = ("-h", "--help", "help")
_VERSION = ("--version", "-V", "version")
COMPLETION = "completion"
# What people type who come from other tools.
_OTHER_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("predict", "detect", "inference", "run"), "infer"),
    **dict.fromkeys(("val", "validate", "test", "score"), "evaluate"),
    **dict.fromkeys(("search", "sweep", "hpo"), "tune"),
    **dict.fromkeys(("check", "lint", "verify"), "doctor"),
    **dict.fromkeys(("fit", "finetune", "fine-tune"), "train"),
    **dict.fromkeys(("import", "migrate"), "import-odtk"),
    **dict.fromkeys(("deploy", "deepstream", "triton"), "bundle"),
}
_FIRST_STEPS = """\
to begin:
  retinaray demo                                  the whole way on data of its own
  retinaray doctor --annotations train.json       is a data set of yours sound?
  retinaray train --help                          examples, and every setting"""


class Outcome(Protocol):
    """What a runner returns."""

    @property
    def exit_code(self) -> int:
        """0 when the job did what it was asked, 1 when it ran and found faults."""

    def to_json(self) -> str:
        """Write the result as one line of JSON."""

    def to_text(self) -> str:
        """Write the result for a person, as a table of several lines."""


@dataclass(frozen=True)
class Verb:
    """One command.

    Attributes:
        job: `module:class` of its settings.
        runner: `module:function` that takes the job and returns an `Outcome`.
        help: One line for `retinaray --help`.
    """

    job: str
    runner: str
    help: str


VERBS: dict[str, Verb] = {
    "train": Verb(
        "retinaray.config.training_schema:TrainJob",
        "retinaray.distributed.train:run_training",
        "train a RetinaNet with Ray Train and keep the best weights",
    ),
    "tune": Verb(
        "retinaray.config.sweep_schema:TuneJob",
        "retinaray.distributed.tune:run_sweep",
        "search anchors and other settings by validation AP with Ray Tune",
    ),
    "evaluate": Verb(
        "retinaray.config.inference_schema:EvaluateJob",
        "retinaray.assembly.evaluation:run_evaluation",
        "score a model or a detections file against ground truth",
    ),
    "thresholds": Verb(
        "retinaray.config.inference_schema:ThresholdsJob",
        "retinaray.assembly.thresholds:run_thresholds",
        "choose score thresholds and NMS for a model without training",
    ),
    "export": Verb(
        "retinaray.config.export_schema:ExportJob",
        "retinaray.assembly.export:run_export",
        "write a trained model as ONNX or a TensorRT engine and check it box by box",
    ),
    "parity": Verb(
        "retinaray.config.parity_schema:ParityJob",
        "retinaray.assembly.parity:run_parity",
        "compare exported files on every runtime with their weights",
    ),
    "bundle": Verb(
        "retinaray.config.export_schema:BundleJob",
        "retinaray.assembly.bundle:run_bundle",
        "hand a model to a Jetson, DeepStream or Triton, with a self-test",
    ),
    "infer": Verb(
        "retinaray.config.batch_schema:InferJob",
        "retinaray.distributed.batch_inference:run_inference",
        "run a model over very many images with Ray Data",
    ),
    "plan": Verb(
        "retinaray.config.plan_schema:PlanJob",
        "retinaray.assembly.job_plan:run_plan",
        "say what a job will take and what is missing, before it starts",
    ),
    "report": Verb(
        "retinaray.config.report_schema:ReportJob",
        "retinaray.assembly.report:run_report",
        "write one HTML page about runs, alone or compared",
    ),
    "anchors": Verb(
        "retinaray.config.sweep_schema:AnchorsJob",
        "retinaray.assembly.anchors:run_anchors",
        "say which ground truth the anchors reach; propose better ones",
    ),
    "doctor": Verb(
        "retinaray.config.inference_schema:DoctorJob",
        "retinaray.assembly.doctor:run_doctor",
        "look for every known fault of a COCO data set",
    ),
    "convert": Verb(
        "retinaray.config.convert_schema:ConvertJob",
        "retinaray.assembly.convert:run_convert",
        "convert labels between COCO, VOC, YOLO, KITTI, Open Images, LabelMe",
    ),
    "import-odtk": Verb(
        "retinaray.config.import_schema:ImportOdtkJob",
        "retinaray.assembly.odtk_import:run_odtk_import",
        "turn a checkpoint of NVIDIA's ODTK into a weights file",
    ),
    "demo": Verb(
        "retinaray.config.inference_schema:DemoJob",
        "retinaray.demo.walkthrough:run_demo",
        "train, export, infer and evaluate on embedded data",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `retinaray` command.

    Args:
        argv: Arguments after the program's name; None = those of this process.

    Returns:
        Exit code, as listed in `EXIT_CODES`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in VERBS:
        return run_verb(arguments[0], arguments[1:])
    is_json = _JSON in arguments
    words = [word for word in arguments if word != _JSON]
    if not words and not is_json:
        write_to(sys.stderr, _format_overview())
        return NOTHING_TO_RUN
    first, rest = (words[0], words[1:]) if words else ("", [])
    if first in VERBS:
        return run_verb(first, [_JSON, *rest])
    if first in _HELP:
        return _print_help(rest, is_json=is_json)
    if first in _VERSION:
        values = {"version": __version__}
        write_to(sys.stdout, f"{json.dumps(values) if is_json else f'retinaray {__version__}'}\n")
        return 0
    if first == COMPLETION:
        return _print_completion(rest[0] if rest else "", is_json=is_json)
    return _refuse(ConfigError(_describe_no_verb(first, rest)), is_json=is_json)


def _refuse(error: ConfigError, *, is_json: bool) -> int:
    """Say what is wrong with a line that has no command."""
    fault = judge_error(error)
    assert fault is not None
    return Ending("", "retinaray --help", is_json=is_json).tell(fault, error)


def _print_help(words: Sequence[str], *, is_json: bool) -> int:
    """What there is, or the help of a command."""
    if words and words[0] in VERBS:
        return run_verb(words[0], ["--help", *([_JSON] if is_json else [])])
    if words and not words[0].startswith("-") and words[0] not in (COMPLETION, *_HELP):
        return _refuse(ConfigError(_describe_no_verb(words[0], [])), is_json=is_json)
    write_to(sys.stdout, _list_commands() if is_json else _format_overview())
    return 0


def _print_completion(shell: str, *, is_json: bool) -> int:
    """The script that completes commands and options in a shell, as it is or as a text in JSON."""
    jobs = {name: _import(verb.job) for name, verb in VERBS.items()}
    summaries = {name: verb.help for name, verb in VERBS.items()}
    try:
        text = _import("retinaray.config.completion:format_completion")(shell, jobs, summaries)
    except ConfigError as error:
        return _refuse(error, is_json=is_json)
    values = {"shell": shell, "script": text}
    write_to(sys.stdout, f"{json.dumps(values)}\n" if is_json else text)
    return 0


def run_verb(verb: str, argv: Sequence[str]) -> int:
    """Run one command from its settings to its exit code.

    Args:
        verb: A key of `VERBS`.
        argv: Arguments after the verb.

    Returns:
        Exit code, as listed in `EXIT_CODES`. An exception that is no fault of the user's or the
        machine's is a defect and leaves with its traceback.
    """
    options = argv[: argv.index("--")] if "--" in argv else argv
    ending = Ending(verb, f"retinaray {verb} --help", is_json=_JSON in options)
    note = StopNote()
    try:
        with note_signals(ending) as note:
            return _run_to_end(verb, argv, ending, note)
    except BaseException as error:
        fault = judge_error(error, stopped_by=note.number)
        if fault is None:
            ending.tell_defect(error)
            raise
        return ending.tell(fault, error)


def _run_to_end(verb: str, argv: Sequence[str], ending: Ending, note: StopNote) -> int:
    """Read the settings, run the job, write its result; `ending` learns how to tell of a fault."""
    ending.log_format, rest = _take_log_format(argv)
    request = _read_request(verb, rest)
    ending.verbosity = request.verbosity
    if request.job is None:
        write_to(sys.stdout, request.printout)
        return 0
    _import("retinaray.config.upload_folder:check_output_stays")(request.job, Path.cwd())
    configure_logging(request.verbosity, ending.log_format, verb=verb)
    note.is_importing = True
    runner = _import(VERBS[verb].runner)
    note.is_importing = False
    outcome: Outcome = runner(request.job)
    if request.is_table_wanted and ending.log_format == "text":
        write_to(sys.stderr, f"{outcome.to_text().rstrip()}\n")
    write_to(sys.stdout, f"{_make_strict(outcome.to_json())}\n")
    return outcome.exit_code


def _make_strict(text: str) -> str:
    """JSON as every reader takes it: Python's NaN and Infinity, which JSON lacks, become null."""
    if "NaN" not in text and "Infinity" not in text:
        return text
    return json.dumps(json.loads(text, parse_constant=lambda _: None))


def _take_log_format(argv: Sequence[str]) -> tuple[LogFormat, list[str]]:
    """The format of the log, and the arguments without the option that names it.

    Raises:
        ConfigError: If the option or the environment variable names no format.
    """
    from retinaray.log_format import FORMATS, VARIABLE

    rest = list(argv)
    source, chosen = VARIABLE, os.environ.get(VARIABLE) or "text"
    end = rest.index("--") if "--" in rest else len(rest)
    for index, token in enumerate(rest[:end]):
        name, equals, value = token.partition("=")
        if name == _LOG_FORMAT:
            taken = [token] if equals else rest[index : min(index + 2, end)]
            source, chosen = _LOG_FORMAT, value if equals else "".join(taken[1:])
            del rest[index : index + len(taken)]
            break
    for log_format in FORMATS:
        if chosen == log_format:
            return log_format, rest
    raise ConfigError(f"{source}={chosen}: expected one of {', '.join(FORMATS)}")


def _read_request(verb: str, argv: Sequence[str]) -> Request[Job]:
    from retinaray.config.loading import read_request

    job_class: type[Job] = _import(VERBS[verb].job)
    return read_request(job_class, argv, epilog=EXIT_CODES)


def _import(path: str) -> Any:
    module, _, name = path.partition(":")
    return vars(importlib.import_module(module))[name]


def _format_overview() -> str:
    margin = max(map(len, VERBS)) + 4
    # Not wider than what is shown elsewhere, such as in a pipe.
    width = max(line_width(sys.stdout) or 100, margin + 20)
    lines = [
        textwrap.fill(
            verb.help,
            width,
            initial_indent=f"  {name}".ljust(margin),
            subsequent_indent=" " * margin,
            break_on_hyphens=False,
        )
        for name, verb in VERBS.items()
    ]
    return "\n".join(
        [
            f"retinaray {__version__}: RetinaNet detectors on Ray",
            "",
            "usage: retinaray COMMAND [arguments]",
            "       retinaray COMMAND --help",
            "       retinaray --version",
            "       retinaray completion bash|zsh|fish    (source its output)",
            "",
            "commands:",
            *lines,
            "",
            _FIRST_STEPS,
            "",
            EXIT_CODES,
            "",
        ]
    )


def _list_commands() -> str:
    commands = {name: verb.help for name, verb in VERBS.items()}
    return json.dumps({"version": __version__, "commands": commands}) + "\n"


def _describe_no_verb(word: str, rest: Sequence[str]) -> str:
    names = ", ".join(VERBS)
    if not word:
        return f"no command came; expected one of {names}"
    if word == "--master":
        return "--master: not needed, Ray connects the workers; set RAY_ADDRESS for a cluster"
    if word.startswith("-"):
        nearest = difflib.get_close_matches(word, ("--help", "--version"), n=1)
        behind = next((verb for verb in rest if verb in VERBS), "COMMAND")
        hint = f"nearest: {nearest[0]}" if nearest else f"write retinaray {behind} {word} ..."
        return f"{word}: options stand behind the command; {hint}"
    nearest = difflib.get_close_matches(word.lower(), VERBS, n=1)
    meant = _OTHER_NAMES.get(word.lower()) or (nearest[0] if nearest else "")
    hint = f"; nearest: {meant}" if meant else ""
    return f"{word}: no such command; expected one of {names}{hint}"
