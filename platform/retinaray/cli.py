"""The `retinaray` command and the scripts in jobs/: settings in, one JSON line, an exit code.

Both doors call `run_verb`. Runners are imported only when there is a job to run, so that help and
wrong settings cost no torch and no ray.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from retinaray import __version__
from retinaray.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    ImageError,
    MissingFileError,
    RetinarayError,
)

if TYPE_CHECKING:
    from retinaray.config.loading import Request, Verbosity
    from retinaray.config.nodes import Job
    from retinaray.log_format import LogFormat

INTERRUPTED = 130
EXIT_CODES = """\
exit codes:
  0    done
  1    the job failed (cluster, storage, export, runtime), or doctor or plan found faults
  2    nothing to run: wrong settings, or an input that cannot be read
  130  stopped by Ctrl-C
  143  stopped by SIGTERM

The last line of stdout is one JSON object; everything else goes to stderr.
--log-format json (or RETINARAY_LOG_FORMAT=json) makes each line of stderr a JSON object, too."""

_USERS_INPUT = (ConfigError, DatasetError, CheckpointError, ImageError, MissingFileError)
_HANDLER_NAME = "retinaray-cli"
_LOG_FORMAT = "--log-format"

logger = logging.getLogger(__name__)


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
    first, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if first in VERBS:
        return run_verb(first, rest)
    if first in ("-h", "--help", "help"):
        _print(_format_overview())
        return 0
    if first == "--version":
        _print(f"retinaray {__version__}\n")
        return 0
    _complain(ConfigError(_describe_no_verb(first)), "retinaray --help", verbosity="normal")
    return 2


def run_verb(verb: str, argv: Sequence[str]) -> int:
    """Run one command from its settings to its exit code.

    Args:
        verb: A key of `VERBS`.
        argv: Arguments after the verb.

    Returns:
        Exit code, as listed in `EXIT_CODES`. An exception that is no `RetinarayError` is a defect
        and leaves with its traceback.
    """
    verbosity: Verbosity = "normal"
    log_format: LogFormat = "text"
    hint = f"retinaray {verb} --help"
    try:
        log_format, rest = _take_log_format(argv)
        request = _read_request(verb, rest)
        verbosity = request.verbosity
        if request.job is None:
            _print(request.printout)
            return 0
        _import("retinaray.config.upload_folder:check_output_stays")(request.job, Path.cwd())
        configure_logging(verbosity, log_format, verb=verb)
        outcome = _run(verb, request.job)
    except RetinarayError as error:
        if log_format == "json":
            _log_last(verb, str(error), error)
        else:
            _complain(error, hint, verbosity=verbosity)
        return 2 if isinstance(error, _USERS_INPUT) else 1
    except KeyboardInterrupt as error:
        if log_format == "json":
            _log_last(verb, "stopped by Ctrl-C", error)
        else:
            sys.stderr.write("stopped by Ctrl-C\n")
        return INTERRUPTED
    if request.is_table_wanted and log_format == "text":
        sys.stderr.write(f"{outcome.to_text().rstrip()}\n")
        sys.stderr.flush()
    _print(f"{outcome.to_json()}\n")
    return outcome.exit_code


def configure_logging(
    verbosity: Verbosity, log_format: LogFormat = "text", *, verb: str = ""
) -> None:
    """Send the log to stderr: with colours on a terminal, as plain lines elsewhere, or as JSON.

    Args:
        verbosity: "quiet" shows warnings and errors, "normal" also retinaray's information,
            "verbose" also its debugging lines. Other packages log warnings and errors only.
        log_format: "json" writes one object per line, on a terminal too, also for what Python's
            `warnings` says.
        verb: The command, for the JSON lines.
    """
    handler: logging.Handler
    if log_format == "json":
        from retinaray.log_format import make_json_handler

        handler = make_json_handler({"verb": verb})
        logging.captureWarnings(True)
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.set_name(_HANDLER_NAME)
    root = logging.getLogger()
    for earlier in [entry for entry in root.handlers if entry.get_name() == _HANDLER_NAME]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    levels = {"quiet": logging.WARNING, "normal": logging.INFO, "verbose": logging.DEBUG}
    logging.getLogger("retinaray").setLevel(levels[verbosity])


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


def _log_last(verb: str, text: str, error: BaseException) -> None:
    """Say in a JSON line why the command ends; with the traceback where debugging is logged."""
    from retinaray.log_format import describe_worker_log

    # A wrong setting ends the command before its log is set up.
    if describe_worker_log() is None:
        configure_logging("normal", "json", verb=verb)
    is_debugged = logger.isEnabledFor(logging.DEBUG)
    logger.error("%s", text, exc_info=error if is_debugged else None)


def _read_request(verb: str, argv: Sequence[str]) -> Request[Job]:
    from retinaray.config.loading import read_request

    job_class: type[Job] = _import(VERBS[verb].job)
    return read_request(job_class, argv, epilog=EXIT_CODES)


def _run(verb: str, job: Job) -> Outcome:
    outcome: Outcome = _import(VERBS[verb].runner)(job)
    return outcome


def _import(path: str) -> Any:
    module, _, name = path.partition(":")
    return vars(importlib.import_module(module))[name]


def _format_overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            f"retinaray {__version__}: RetinaNet detectors on Ray",
            "",
            "usage: retinaray COMMAND [arguments]",
            "       retinaray COMMAND --help",
            "       retinaray --version",
            "",
            "commands:",
            *lines,
            "",
            EXIT_CODES,
            "",
        ]
    )


def _describe_no_verb(word: str) -> str:
    names = ", ".join(VERBS)
    if not word:
        return f"no command came; expected one of {names}"
    if word == "--master":
        return "--master: not needed, Ray connects the workers; set RAY_ADDRESS for a cluster"
    nearest = difflib.get_close_matches(word, VERBS, n=1)
    hint = f"; nearest: {nearest[0]}" if nearest else ""
    return f"{word}: no such command; expected one of {names}{hint}"


def _complain(error: RetinarayError, hint: str, *, verbosity: Verbosity) -> None:
    if verbosity == "verbose":
        traceback.print_exception(error, file=sys.stderr)
    text = str(error)
    if isinstance(error, ConfigError):
        faults = text.splitlines()
        if len(faults) > 1:
            text = "\n  ".join([f"{len(faults)} settings are wrong:", *faults])
        text += f"\nsee: {hint}"
    sys.stderr.write(f"error: {text}\n")


def _print(text: str) -> None:
    """Write to stdout; a reader that has gone away, as `head` does, is no failure of the job."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more at exit and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
