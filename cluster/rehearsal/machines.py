"""Machines of the rehearsal: namespaces with an address each or, without root, process trees.

A machine is one long-running command, `ray start --block`, with everything below it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sealing import SEAL

from retinaray.errors import RetinarayError

HERE = Path(__file__).resolve().parent
_BRIDGE = "rr0"
_GATEWAY = "10.77.0.1"
_PAUSE_S = 0.1
# Ends a command when the rehearsal is killed; Ray ends what is below it in the same way.
_TIE = ("setpriv", "--pdeathsig", "KILL", "--")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class RehearsalError(RetinarayError):
    """Something that should have held did not; the text is for the table."""


def wait_until(
    condition: Callable[[], bool], description: str, *, timeout_s: float, pause_s: float = _PAUSE_S
) -> float:
    """Wait for a condition; returns how long that took, in seconds.

    Raises:
        RehearsalError: If it does not come in time.
    """
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > timeout_s:
            raise RehearsalError(f"expected within {timeout_s:g} s: {description}; it did not come")
        time.sleep(pause_s)
    return time.monotonic() - start


class Machine(Protocol):
    """A computer of the cluster, as far as the rehearsal is concerned.

    Attributes:
        name: Its host name.
        address: IPv4 address.
        log: What its command writes.
    """

    name: str
    address: str
    log: Path

    def is_running(self) -> bool:
        """Whether its command has not ended."""

    def make_command(self, command: Sequence[str]) -> list[str]:
        """The command that runs another one on this machine."""

    def kill(self) -> None:
        """End every process of it at once, as a power cut would."""

    def cut_off(self) -> None:
        """Let it go silent without ending: nobody is told, no connection is closed."""


class MachineRoom(Protocol):
    """Where machines are set up.

    Attributes:
        gateway: Address at which all machines reach this process.
        has_namespaces: Whether a machine has a network, a /tmp/ray and process numbers of its own.
    """

    gateway: str
    has_namespaces: bool

    def choose_address(self, *, is_head: bool) -> str:
        """An address that no machine has now; of a head one at which drivers beside it look."""

    def boot(
        self,
        name: str,
        address: str,
        command: Sequence[str],
        *,
        folder: Path,
        environment: Mapping[str, str],
    ) -> Machine:
        """Start a machine with a command; `folder` is its own, and holds its log."""


@dataclass
class NamespaceMachine:
    """A machine in namespaces; see `Machine`."""

    name: str
    address: str
    log: Path
    cable: str
    process: subprocess.Popen[bytes]

    def is_running(self) -> bool:
        """Whether its command has not ended."""
        return self.process.poll() is None

    def make_command(self, command: Sequence[str]) -> list[str]:
        """The command that runs another one on this machine."""
        pid = self.process.pid
        inside = f"--pid=/proc/{pid}/ns/pid_for_children"
        return [
            *("nsenter", f"--target={pid}", "--net", "--mount", "--uts", "--ipc", inside, "--"),
            *command,
        ]

    def kill(self) -> None:
        """End process 1 of its namespace; the kernel ends all others with it."""
        self.process.kill()
        self.process.wait()

    def cut_off(self) -> None:
        """Pull the cable."""
        _ip("link", "set", self.cable, "down")


class NamespaceRoom:
    """Machines in namespaces, on a bridge; only for a process that `run_sealed` has started."""

    has_namespaces = True

    def __init__(self) -> None:
        self.gateway = _GATEWAY
        self._count = 0
        _ip("link", "set", "lo", "up")
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{_GATEWAY}/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")

    def choose_address(self, *, is_head: bool) -> str:  # noqa: ARG002
        """An address that no machine has had."""
        self._count += 1
        return f"{_GATEWAY.rpartition('.')[0]}.{self._count + 1}"

    def boot(
        self,
        name: str,
        address: str,
        command: Sequence[str],
        *,
        folder: Path,
        environment: Mapping[str, str],
    ) -> NamespaceMachine:
        """Start a machine and plug it in.

        Raises:
            RehearsalError: If its namespaces do not come up.
        """
        (folder / "tmp").mkdir()
        setup = ["bash", str(HERE / "node.sh"), name, address, _GATEWAY, str(folder)]
        log = folder / "node.log"
        process = _start([*SEAL, *setup, *command], log, environment)
        machine = NamespaceMachine(
            name, address, log, f"cable{address.rpartition('.')[2]}", process
        )
        wait_until(
            lambda: _has_own_network(process.pid) or not machine.is_running(),
            f"namespaces of {name}",
            timeout_s=10,
        )
        if not machine.is_running():
            raise RehearsalError(f"expected namespaces for {name}: {read_tail(log)}")
        peer = ("type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        _ip("link", "add", machine.cable, *peer)
        _ip("link", "set", machine.cable, "master", _BRIDGE, "up")
        return machine


@dataclass
class LoopbackMachine:
    """A process tree with an address in 127.0.0.0/8; see `Machine`."""

    name: str
    address: str
    log: Path
    process: subprocess.Popen[bytes]

    def is_running(self) -> bool:
        """Whether its command has not ended."""
        return self.process.poll() is None

    def make_command(self, command: Sequence[str]) -> list[str]:
        """The command itself: there is but one machine."""
        return list(command)

    def kill(self) -> None:
        """End all of its processes."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def cut_off(self) -> None:
        """Stop all of its processes: they answer nobody, and their connections stay open."""
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        if not self.is_running():
            return
        for pid in [self.process.pid, *find_descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


class LoopbackRoom:
    """Machines that share this one's network and files, told apart by loopback addresses."""

    has_namespaces = False

    def __init__(self) -> None:
        self.gateway = "127.0.0.1"
        self._count = 0

    def choose_address(self, *, is_head: bool) -> str:
        """For heads this machine's address, where drivers look; else one of the loopback."""
        self._count += 1
        return _find_own_address() if is_head else f"127.0.0.{self._count + 1}"

    def boot(
        self,
        name: str,
        address: str,
        command: Sequence[str],
        *,
        folder: Path,
        environment: Mapping[str, str],
    ) -> LoopbackMachine:
        """Start a machine."""
        log = folder / "node.log"
        local = {"GLOO_SOCKET_IFNAME": "lo", **environment}
        return LoopbackMachine(name, address, log, _start([*_TIE, *command], log, local))


def find_descendants(root: int) -> list[int]:
    """Processes below one, their children after them."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found = [root]
    for pid in found:
        found.extend(child for child, parent in parents.items() if parent == pid)
    return found[1:]


def read_tail(path: Path, num_lines: int = 5) -> str:
    """The last lines of a log in one; empty when there is none."""
    if not path.exists():
        return ""
    lines = _COLOURS.sub("", path.read_text(encoding="utf-8", errors="replace")).splitlines()
    return " | ".join(line.strip() for line in lines[-num_lines:] if line.strip())


def _start(
    command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:
        return subprocess.Popen(
            [*command],
            cwd=log.parent,
            env={**environment},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _find_own_address() -> str:
    """This machine's address as Ray finds it, in place of any 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: the kernel only chooses a route.
            probe.connect(("8.8.8.8", 80))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _has_own_network(pid: int) -> bool:
    mine = Path("/proc/self/ns/net").readlink()
    try:
        return Path(f"/proc/{pid}/ns/net").readlink() != mine
    except OSError:  # it ended meanwhile
        return False


def _ip(*arguments: str) -> None:
    answer = subprocess.run(
        ["ip", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise RehearsalError(f"ip {' '.join(arguments)}: {answer.stderr.strip()}")
