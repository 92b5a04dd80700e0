"""A Ray cluster on machines of the rehearsal: a head that runs no work, nodes that come and go.

Nothing here imports Ray: nodes are `ray start` commands, and what the cluster knows of itself comes
from its dashboard, as it would for an operator.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doors import Door
from environments import (
    PROGRAMS,
    make_autoscaler_environment,
    make_home,
    make_plain_environment,
    start_command,
)
from machines import Machine, MachineRoom, RehearsalError, read_tail, wait_until

logger = logging.getLogger("rehearsal")

# The least that Ray takes is 75 MB; manifests and receipts need less.
_OBJECT_STORE_BYTES = 80_000_000
_START_TIMEOUT_S = 150.0
_HEAD_STARTS = 2
# A node that is silent is given up after 5 * (1 + 3) s; Ray's own values make it 65 s.
_HEALTH_CHECKS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
}
_NO_PROXIES = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Node:
    """A Ray node as the head sees it.

    Attributes:
        node_id: Hexadecimal.
        address: IPv4 address; not unique on an autoscaled cluster here.
        is_alive: Whether the head takes it for alive.
        is_head: Whether it is the head.
    """

    node_id: str
    address: str
    is_alive: bool
    is_head: bool


@dataclass
class Host:
    """A machine with its door to S3.

    Attributes:
        machine: Where its Ray node runs.
        door: Its only way to the S3 server.
        num_cpus: Logical processors that it offers.
        environment: Of its processes.
        folder: Its own files.
    """

    machine: Machine
    door: Door
    num_cpus: int
    environment: Mapping[str, str]
    folder: Path


class RayCluster:
    """A head and the nodes that have joined it; everything ends with `stop`.

    Args:
        room: Where machines are set up.
        folder: Below it every machine has a folder.
        s3_environment: By which the S3 server is reached from here.
        images: Beginning of the path of an image on it, for the doors.
        token: Without it nobody is let in.
    """

    def __init__(
        self,
        room: MachineRoom,
        folder: Path,
        *,
        s3_environment: Mapping[str, str],
        images: str,
        token: str,
    ) -> None:
        self._room = room
        self._folder = folder
        self._s3_environment = s3_environment
        self._images = images
        self._token = token
        self._stack = ExitStack()
        self._head: Host | None = None
        self._gcs_port, self._dashboard_port = 6379, 8265
        self.workers: list[Host] = []

    @property
    def head(self) -> Host:
        """The head.

        Raises:
            RehearsalError: If the cluster was not started.
        """
        if self._head is None:
            raise RehearsalError("expected a cluster that was started")
        return self._head

    @property
    def address(self) -> str:
        """Host and port for RAY_ADDRESS."""
        return f"{self.head.machine.address}:{self._gcs_port}"

    @property
    def dashboard(self) -> str:
        """URL of the dashboard and job server."""
        return f"http://{self.head.machine.address}:{self._dashboard_port}"

    @property
    def has_namespaces(self) -> bool:
        """Whether its machines are kept apart by namespaces."""
        return self._room.has_namespaces

    @property
    def is_running(self) -> bool:
        """Whether there is a head whose command has not ended."""
        return self._head is not None and self._head.machine.is_running()

    def start(self, *, autoscaling: Mapping[str, Any] | None = None) -> None:
        """Start the head, and wait until it answers.

        Args:
            autoscaling: A cluster configuration with a fake provider; `{address}` in its provider's
                `gcs_address` becomes the head's. None = no autoscaler.

        Raises:
            RehearsalError: If it does not come up.
        """
        for remaining in reversed(range(_HEAD_STARTS)):
            self._head = self._boot_head(autoscaling)
            try:
                self._wait_for(self._head)
                return
            except RehearsalError as error:
                # Ray ends a head of which one part is not there in 30 s, as on a busy machine.
                if self.is_running or not remaining:
                    raise
                logger.warning("%s; starting it again", error)

    def add(self, num_cpus: int) -> Host:
        """Start one more node; it joins later, see `settle`."""
        address = self._room.choose_address(is_head=False)
        name = f"node-{address.rpartition('.')[2]}"
        command = [
            *(str(PROGRAMS / "ray"), "start", "--block", f"--address={self.address}"),
            *(f"--node-ip-address={address}", f"--num-cpus={num_cpus}"),
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
        ]
        folder = self._make_folder(name)
        host = self._boot(name, address, command, folder, num_cpus=num_cpus, extra={})
        self.workers.append(host)
        if not self._room.has_namespaces:
            # Nodes that share a folder and start at once take each other's sockets.
            self._wait_for(host)
        return host

    def reshape(self, sizes: Sequence[int]) -> list[Host]:
        """Have exactly so many nodes of so many CPUs; what is there and fits is kept.

        Raises:
            RehearsalError: If nodes do not come or go.
        """
        wanted = list(sizes)
        kept = []
        for host in list(self.workers):
            if host.num_cpus in wanted and host.machine.is_running():
                wanted.remove(host.num_cpus)
                kept.append(host)
            else:
                self.remove(host)
        hosts = [*kept, *map(self.add, wanted)]
        self.settle()
        return hosts

    def remove(self, host: Host) -> None:
        """Take a node away at once."""
        host.machine.kill()
        self.workers.remove(host)

    def settle(self) -> None:
        """Wait until the head knows exactly the nodes that are there.

        Raises:
            RehearsalError: If one does not come or go in time.
        """
        for host in self.workers:
            self._wait_for(host)
        wanted = {host.machine.address for host in self.workers}
        wanted.add(self.head.machine.address)
        wait_until(
            lambda: self._list_living() == wanted,
            f"nodes {sorted(wanted)}",
            timeout_s=_START_TIMEOUT_S,
        )

    def list_workers(self) -> list[Node]:
        """Nodes that the head takes for alive, itself not among them."""
        return [node for node in self.list_nodes() if node.is_alive and not node.is_head]

    def list_nodes(self) -> list[Node]:
        """All nodes that the head remembers.

        Raises:
            RehearsalError: If it does not answer.
        """
        return parse_nodes(self.fetch("/api/v0/nodes?limit=1000"))

    def fetch(self, path: str) -> Any:
        """What the dashboard answers, as JSON.

        Raises:
            RehearsalError: If it does not, or refuses.
        """
        status, body = self.ask(path, token=self._token)
        if status != 200:
            raise RehearsalError(f"expected an answer from {self.dashboard}{path}, got {status}")
        return json.loads(body)

    def ask(self, path: str, *, token: str | None) -> tuple[int, bytes]:
        """Status and body of an answer of the dashboard; status 0 when there is none.

        Args:
            path: Path with query.
            token: Sent along; None sends none.
        """
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(self.dashboard + path, headers=headers)
        try:
            with _NO_PROXIES.open(request, timeout=20) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except (OSError, http.client.HTTPException):
            return 0, b""

    def find_node(self, host: Host) -> Node:
        """The node of a machine.

        Raises:
            RehearsalError: If the head knows none.
        """
        found = [node for node in self.list_workers() if node.address == host.machine.address]
        if not found:
            raise RehearsalError(f"expected a living node at {host.machine.address}, got none")
        return found[0]

    def find_actors(self, class_name: str) -> set[str]:
        """Addresses of the nodes on which living actors of a class run."""
        addresses = {node.node_id: node.address for node in self.list_nodes()}
        rows = self.fetch("/api/v0/actors?limit=1000")["data"]["result"]["result"]
        return {
            addresses[row["node_id"]]
            for row in rows
            if row["class_name"] == class_name and row["state"] == "ALIVE"
        }

    def make_environment(self, host: Host) -> dict[str, str]:
        """Of commands on a machine: they find the cluster, and hold the token."""
        return {**host.environment, "RAY_ADDRESS": self.address}

    def launch_on_head(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command on the head; stdout goes to `log`, stderr beside it to `*.err`."""
        return start_command(
            self.head.machine.make_command(command), self.make_environment(self.head), log
        )

    def stop(self) -> None:
        """End all machines and close their doors."""
        for host in [*self.workers, *([self._head] if self._head else [])]:
            host.machine.kill()
        self.workers.clear()
        self._head = None
        self._stack.close()

    def _make_folder(self, name: str) -> Path:
        number = len(list(self._folder.iterdir())) if self._folder.exists() else 0
        folder = self._folder / f"{number}-{name}"
        folder.mkdir(parents=True)
        return folder

    def _boot_head(self, autoscaling: Mapping[str, Any] | None) -> Host:
        address = self._room.choose_address(is_head=True)
        if not self._room.has_namespaces:
            self._gcs_port, self._dashboard_port = _find_free_port(), _find_free_port()
        command = [
            *(str(PROGRAMS / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
            *(f"--node-ip-address={address}", f"--port={self._gcs_port}", "--num-cpus=0"),
            *(f"--dashboard-host={address}", f"--dashboard-port={self._dashboard_port}"),
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
        ]
        extra = dict(_HEALTH_CHECKS)
        folder = self._make_folder("head")
        if not self._room.has_namespaces:
            command += [
                # Ray has sockets below it, whose paths may have 107 characters.
                f"--temp-dir={tempfile.mkdtemp(prefix='r', dir=self._folder.parents[1])}",
                f"--ray-client-server-port={_find_free_port()}",
            ]
        if autoscaling is not None:
            path = folder / "autoscaling.yaml"
            text = json.dumps(autoscaling).replace("{address}", f"{address}:{self._gcs_port}")
            # JSON is YAML.
            path.write_text(text, encoding="utf-8")
            command.append(f"--autoscaling-config={path}")
            extra |= make_autoscaler_environment(autoscaling["provider"]["head_node_id"])
        return self._boot("head", address, command, folder, num_cpus=0, extra=extra)

    def _boot(
        self,
        name: str,
        address: str,
        command: Sequence[str],
        folder: Path,
        *,
        num_cpus: int,
        extra: Mapping[str, str],
    ) -> Host:
        url = self._s3_environment["AWS_ENDPOINT_URL"].rpartition("://")[2]
        host, _, port = url.partition(":")
        door = Door(self._room.gateway, (host, int(port)), images=self._images)
        self._stack.enter_context(door)
        environment = {
            **make_plain_environment(make_home(folder / "home", self._token)),
            **self._s3_environment,
            "AWS_ENDPOINT_URL": door.url,
            **extra,
        }
        machine = self._room.boot(name, address, command, folder=folder, environment=environment)
        return Host(machine, door, num_cpus, environment, folder)

    def _wait_for(self, host: Host) -> None:
        def is_there() -> bool:
            # Ray's start ends with any of its parts, and a node without a head waits for ever.
            for machine in (self.head.machine, host.machine):
                if not machine.is_running():
                    raise RehearsalError(
                        f"expected {host.machine.name} to join, the Ray of {machine.name} ended: "
                        f"{read_tail(machine.log)}"
                    )
            return host.machine.address in self._list_living()

        wait_until(is_there, f"{host.machine.name} in the cluster", timeout_s=_START_TIMEOUT_S)

    def _list_living(self) -> set[str]:
        """Addresses of all living nodes; none while the dashboard does not answer."""
        with contextlib.suppress(RehearsalError):
            return {node.address for node in self.list_nodes() if node.is_alive}
        return set()


def parse_nodes(answer: Any) -> list[Node]:
    """Nodes from the answer of Ray's state API."""
    return [
        Node(
            node_id=row["node_id"],
            address=row["node_ip"],
            is_alive=row["state"] == "ALIVE",
            is_head=bool(row["is_head_node"]),
        )
        for row in answer["data"]["result"]["result"]
    ]


def _find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
