"""Tells Ray that EC2 takes this machine away, while there is time for a checkpoint.

EC2 announces the end of a spot instance two minutes before, to whoever asks the instance's metadata
service; Ray does not ask. This program asks, beside Ray on each worker of `ray_cluster.yaml`, and
drains the machine's Ray node until that time: a training keeps a checkpoint and goes on elsewhere,
an inference gives its parts to others. It needs Python and the `ray` command only.

    python cluster/spot_notice.py

Source: EC2 User Guide, "Spot Instance interruption notices" and "Use the Instance Metadata
Service".
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger("spot_notice")

Answer = TypeVar("Answer")

# The name by which AWS's own programs find another service.
_ENDPOINT_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
_ENDPOINT = "http://169.254.169.254"
_TOKEN_LIFE_S = 21600
_ANSWER_S = 5.0
_DRAIN_S = 30.0
_LIFE_CYCLE = "instance-life-cycle"
_INSTANCE_ACTION = "spot/instance-action"


class MetadataError(Exception):
    """The metadata service does not answer, or not with what is documented."""


class InstanceMetadata:
    """EC2's metadata service of this instance, version 2.

    Args:
        endpoint: Its URL, without a path.
    """

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint.rstrip("/")
        # The service is on the machine's own link: a proxy could not reach it.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._token = ""

    def read(self, path: str) -> str | None:
        """The value of a category below `meta-data`; None where there is none now.

        Raises:
            MetadataError: If the service does not answer, or refuses.
        """
        for _ in range(2):
            headers = {"X-aws-ec2-metadata-token": self._token or self._renew_token()}
            try:
                return self._ask(f"meta-data/{path}", "GET", headers)
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401:
                    raise MetadataError(f"{self._endpoint}: {error} for {path}") from error
                # Its time is over.
                self._token = ""
        raise MetadataError(f"{self._endpoint}: refuses the token that it has just given")

    def _renew_token(self) -> str:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_LIFE_S)}
        try:
            self._token = self._ask("api/token", "PUT", headers)
        except urllib.error.HTTPError as error:
            raise MetadataError(f"{self._endpoint}: {error} instead of a token") from error
        return self._token

    def _ask(self, path: str, method: str, headers: dict[str, str]) -> str:
        url = f"{self._endpoint}/latest/{path}"
        request = urllib.request.Request(url, headers=headers, method=method)
        try:
            with self._opener.open(request, timeout=_ANSWER_S) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError:
            raise
        except (OSError, HTTPException, UnicodeDecodeError) as error:
            raise MetadataError(f"{url} does not answer: {error}") from error


def parse_notice(text: str) -> datetime:
    """When the instance will be taken.

    Args:
        text: Of `spot/instance-action`, such as
            `{"action": "terminate", "time": "2026-09-18T08:22:00Z"}`.

    Raises:
        MetadataError: If it is something else.
    """
    try:
        end = datetime.fromisoformat(json.loads(text)["time"])
    except (ValueError, KeyError, TypeError) as error:
        raise MetadataError(
            f"{_INSTANCE_ACTION}: expected action and time, got {text!r}"
        ) from error
    return end if end.tzinfo else end.replace(tzinfo=UTC)


@dataclass(frozen=True)
class RayNode:
    """A Ray node on this machine.

    Attributes:
        node_id: Hexadecimal.
        gcs_address: Host and port of its cluster's head.
    """

    node_id: str
    gcs_address: str


def find_nodes(proc: Path = Path("/proc")) -> list[RayNode]:
    """Ray nodes of this machine, by the arguments of their raylets.

    Ray writes a node's id nowhere else on the machine, and a driver that asks for it would be one
    more thing to go wrong in these two minutes.
    """
    found = []
    for path in proc.glob("[0-9]*/cmdline"):
        try:
            program, *arguments = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            # It has ended meanwhile.
            continue
        if Path(program).name != "raylet":
            continue
        values = dict(part[2:].split("=", 1) for part in arguments if _is_setting(part))
        if "node_id" in values and "gcs-address" in values:
            found.append(RayNode(values["node_id"], values["gcs-address"]))
    return sorted(found, key=lambda node: node.node_id)


def _is_setting(argument: str) -> bool:
    return argument.startswith("--") and "=" in argument


def drain(node: RayNode, *, seconds: int, reason: str) -> None:
    """Let Ray place nothing more on a node, and tell what runs there that it ends.

    Args:
        node: On this machine.
        seconds: Until the machine is gone; at least 1, since 0 means for ever to Ray.
        reason: For people who look at the cluster.

    Raises:
        subprocess.SubprocessError: If Ray did not take it.
    """
    command = [
        *(str(Path(sys.executable).parent / "ray"), "drain-node", "--address", node.gcs_address),
        *("--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
        *("--reason-message", reason, "--deadline-remaining-seconds", str(seconds)),
    ]
    subprocess.run(
        command, check=True, timeout=_DRAIN_S, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def ask_until_answered(ask: Callable[[], Answer | None], *, poll_s: float) -> Answer:
    """Ask until there is an answer; returns it.

    A service that fails is asked again: this program must not end before its machine.

    Args:
        ask: Gives None while there is nothing to say; may raise MetadataError.
        poll_s: Seconds between two questions.
    """
    last_fault = ""
    while True:
        try:
            answer = ask()
            if answer is not None:
                return answer
            last_fault = ""
        except MetadataError as error:
            if str(error) != last_fault:
                logger.warning("%s; asked again every %g s", error, poll_s)
            last_fault = str(error)
        time.sleep(poll_s)


def drain_machine(end: datetime, *, only: str | None, poll_s: float) -> bool:
    """Drain the Ray nodes of this machine; a refusal is tried again until the machine's end.

    Args:
        end: Of the machine.
        only: The id of one node; None = all that run here.
        poll_s: Seconds between two tries.

    Returns:
        Whether all were drained.
    """
    done: set[RayNode] = set()
    reason = f"EC2 takes this spot instance at {end:%Y-%m-%dT%H:%M:%SZ}"
    while (left_s := (end - datetime.now(UTC)).total_seconds()) > 0:
        nodes = {node for node in find_nodes() if only in (None, node.node_id)}
        for node in nodes - done:
            try:
                drain(node, seconds=math.ceil(left_s), reason=reason)
            except subprocess.SubprocessError as error:
                said = getattr(error, "stdout", None) or b""
                logger.warning("%s\n%s", error, said.decode(errors="replace").strip())
            else:
                done.add(node)
                logger.info("node %s is drained: %.0f s are left", node.node_id, left_s)
        if nodes and nodes <= done:
            return True
        if not nodes:
            logger.warning("no Ray node %sruns on this machine", f"{only} " if only else "")
        time.sleep(poll_s)
    return False


def main() -> int:
    """Wait for this instance's end, as long as it lives; returns the exit code.

    0: the machine's nodes were drained, or no notice can come. 1: Ray refused until the end.
    """
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--poll-s", type=float, default=5.0, help="between two questions [5]")
    parser.add_argument("--node-id", help="drain this Ray node of the machine only [all]")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    poll_s = options.poll_s
    metadata = InstanceMetadata(os.environ.get(_ENDPOINT_VARIABLE) or _ENDPOINT)

    def read_end() -> datetime | None:
        text = metadata.read(_INSTANCE_ACTION)
        return None if text is None else parse_notice(text)

    life_cycle = ask_until_answered(lambda: metadata.read(_LIFE_CYCLE) or "", poll_s=poll_s)
    if life_cycle != "spot":
        logger.info("this instance is %s: EC2 gives no notice", life_cycle or "of no known kind")
        return 0
    logger.info("waiting for EC2's notice")
    end = ask_until_answered(read_end, poll_s=poll_s)
    logger.warning("EC2 takes this machine at %s", end.isoformat())
    return 0 if drain_machine(end, only=options.node_id, poll_s=poll_s) else 1


if __name__ == "__main__":
    sys.exit(main())
