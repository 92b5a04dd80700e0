"""Namespaces of its own for the whole rehearsal: whatever it makes ends with it, by the kernel.

The rehearsal starts itself a second time, as process 1 of new namespaces (network, mounts,
processes, IPC, host name). When that process ends, for whatever reason, the kernel ends everything
below it and takes interfaces and mounts away. Nothing of the machine outside is ever changed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from types import FrameType

SEAL = (
    "unshare",
    *("--mount", "--net", "--uts", "--ipc", "--pid"),
    *("--fork", "--kill-child", "--mount-proc", "--propagation", "private", "--"),
)
"""Prefix of a command that starts as process 1 of new namespaces."""

_PROGRAMS = ("unshare", "nsenter", "ip", "mount", "bash")


def explain_no_namespaces() -> str:
    """Why namespaces cannot be made here; empty when they can."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"needs the programs {', '.join(missing)}"
    trial = [*SEAL, "ip", "link", "add", "rr1", "type", "veth", "peer", "name", "rr2"]
    answer = subprocess.run(
        trial, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return f"{' '.join(trial[:2])} ...: {answer.stderr.strip()}" if answer.returncode else ""


def run_sealed(command: Sequence[str]) -> int:
    """Run a command as process 1 of new namespaces; it must call `die_with_parent`.

    Returns:
        Its exit code.

    Raises:
        KeyboardInterrupt: On Ctrl-C, after everything inside has ended.
        SystemExit: The same on SIGTERM.
    """
    before = signal.signal(signal.SIGTERM, _leave)
    # In a session of its own: Ctrl-C comes here alone, and ends it without a traceback.
    process = subprocess.Popen([*SEAL, *command], stdin=subprocess.PIPE, start_new_session=True)
    try:
        return process.wait()
    finally:
        process.kill()
        process.communicate()
        signal.signal(signal.SIGTERM, before)


def die_with_parent() -> None:
    """End this process, and with it its namespaces, when stdin closes: even after a SIGKILL."""

    def watch() -> None:
        # Not through sys.stdin: its lock would be missed when the interpreter ends.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
