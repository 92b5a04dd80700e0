"""A cluster of several nodes on this machine, and what it survives.

    python cluster/rehearsal/rehearsal.py [--only NAME ...] [--json FILE] [--no-namespaces]

As root every node has network, address, /tmp/ray and process numbers of its own; without, nodes
are processes with addresses of the loopback. Ray asks for a token everywhere, and S3 is a real
server. The table goes to stdout, progress to stderr; the exit code is 1 when a row failed.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from access_scenarios import refuse_without_token, submit_training
from autoscaling_scenario import scale_from_zero
from inference_scenarios import (
    cut_inference_node_off,
    drain_inference_node,
    kill_inference_node,
)
from lab import Finding, Lab
from machines import LoopbackRoom, MachineRoom, NamespaceRoom
from result_table import Row, format_table, write_json
from sealing import die_with_parent, explain_no_namespaces, run_sealed
from training_scenarios import kill_training_node
from workload import BUCKET, IMAGES, Workload

from retinaray.demo.embedded_s3 import EmbeddedS3
from retinaray.errors import RetinarayError
from retinaray.machine import count_cores
from retinaray.storage import Storage

logger = logging.getLogger("rehearsal")

SCENARIOS: dict[str, Callable[[Lab], Finding]] = {
    "no-token": refuse_without_token,
    "submit": submit_training,
    "train-kill": kill_training_node,
    "infer-kill": kill_inference_node,
    "infer-cut": cut_inference_node_off,
    "infer-drain": drain_inference_node,
    "autoscale": scale_from_zero,
}
# Where paths stay short enough for sockets, whatever TMPDIR is.
_SHARED = "/var/tmp"
_FAILURES = (RetinarayError, OSError, subprocess.SubprocessError)
_SECRET_FILES = ("auth_token", "s3.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rehearsal; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = make_parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    if options.sealed is not None:
        die_with_parent()
        return rehearse(options, NamespaceRoom(), Path(options.sealed))
    reason = "--no-namespaces" if options.no_namespaces else explain_no_namespaces()
    folder = Path(tempfile.mkdtemp(prefix="rr-", dir=_SHARED))
    passed = False
    try:
        if reason:
            logger.info("nodes are processes on the loopback, without namespaces: %s", reason)
            signal.signal(signal.SIGTERM, _leave)
            code = rehearse(options, LoopbackRoom(), folder)
        else:
            script = str(Path(__file__).resolve())
            code = run_sealed([sys.executable, script, "--sealed", str(folder), *arguments])
        passed = code == 0
        return code
    except KeyboardInterrupt:
        logger.info("stopped by Ctrl-C, everything is taken down")
        return 130
    finally:
        _clean(folder, keep_logs=not passed and options.keep_logs)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", action="append", choices=SCENARIOS, default=[], help="a scenario; repeatable"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    parser.add_argument(
        "--no-namespaces", action="store_true", help="nodes as processes on the loopback"
    )
    parser.add_argument(
        "--keep-logs", action="store_true", help="keep all logs when a scenario failed"
    )
    # How the rehearsal calls itself inside its namespaces.
    parser.add_argument("--sealed", metavar="FOLDER", help=argparse.SUPPRESS)
    return parser


def rehearse(options: argparse.Namespace, room: MachineRoom, folder: Path) -> int:
    """Run the scenarios and print the table; returns the exit code."""
    load, num_cores = os.getloadavg()[0], count_cores()
    if load > num_cores:
        logger.warning(
            "the machine is busy (load %.0f on %d cores): times are longer, and Ray gives a start "
            "up after 30 s",
            load,
            num_cores,
        )
    wanted = [name for name in SCENARIOS if not options.only or name in options.only]
    with EmbeddedS3(folder / "s3") as server:
        os.environ.update(server.environment())
        server.create_bucket(BUCKET)
        workload = Workload(folder / "work", Storage())
        with Lab(
            room,
            folder / "work",
            workload,
            s3_environment=server.environment(),
            images=IMAGES,
            token=secrets.token_hex(32),
        ) as lab:
            rows = run_scenarios({name: SCENARIOS[name] for name in wanted}, lab)
    sys.stdout.write(format_table(rows) + "\n")
    sys.stdout.flush()
    if options.json is not None:
        write_json(rows, options.json, has_namespaces=room.has_namespaces)
    return 0 if all(row.passed for row in rows) else 1


def run_scenarios(scenarios: Mapping[str, Callable[[Lab], Finding]], lab: Lab) -> list[Row]:
    """One row per scenario; after a failure the next one gets a new cluster."""
    rows = []
    for name, scenario in scenarios.items():
        start = time.monotonic()
        logger.info("%s: %s", name, (scenario.__doc__ or "").splitlines()[0])
        try:
            finding, passed = scenario(lab), True
        except _FAILURES as error:
            lab.reset()
            finding, passed = Finding((scenario.__doc__ or "").strip(), str(error)), False
        seconds = time.monotonic() - start
        logger.info("%s: %s in %.0f s", name, "passed" if passed else "FAILED", seconds)
        rows.append(Row(name, finding.done, finding.survived, finding.recovery_s, seconds, passed))
    return rows


def _clean(folder: Path, *, keep_logs: bool) -> None:
    """Remove everything, or all but what must not lie around."""
    if not keep_logs:
        shutil.rmtree(folder)
        return
    for path in folder.rglob("*"):
        if path.name in _SECRET_FILES:
            path.unlink()
    logger.info("logs are kept in %s", folder)


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
