"""The place where scenarios happen: machines, one cluster at a time, S3, and what is compared with.

Undisturbed results are made once, by whoever needs them first.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters import RayCluster
from environments import REPOSITORY, make_home, make_plain_environment, start_command
from machines import MachineRoom, RehearsalError
from workload import NUM_STEPS, Command, Results, Workload

FINISH_S = 240.0
"""What a tiny run may take on a busy machine; on two idle cores it takes a tenth of it."""


@dataclass(frozen=True)
class Finding:
    """What a scenario saw; its columns in the table are those of `result_table.Row`."""

    done: str
    survived: str
    recovery_s: float | None = None


class Lab:
    """Everything that scenarios share.

    Args:
        room: Where machines are set up.
        folder: On the disk that all machines share; commands log here.
        workload: The data.
        s3_environment: By which the S3 server is reached from here.
        images: Beginning of the path of an image on it.
        token: Of all clusters; never written anywhere but into homes.
    """

    def __init__(
        self,
        room: MachineRoom,
        folder: Path,
        workload: Workload,
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
        self._cluster: RayCluster | None = None
        self._commands: list[Command] = []
        self._results: Results | None = None
        self._reference_training = ""
        self.workload = workload

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.reset()

    def open_cluster(self) -> RayCluster:
        """The cluster without an autoscaler; a head is started when none runs."""
        if self._cluster is None or not self._cluster.is_running:
            self._cluster = self._make_cluster()
            self._cluster.start()
        return self._cluster

    def open_autoscaling_cluster(self, configuration: Mapping[str, Any]) -> RayCluster:
        """A new cluster in place of the one there is."""
        self._cluster = self._make_cluster()
        self._cluster.start(autoscaling=configuration)
        return self._cluster

    def reset(self) -> None:
        """End the cluster and all commands: what comes next finds nothing of them."""
        for command in self._commands:
            command.end()
        self._commands.clear()
        if self._cluster is not None:
            self._cluster.stop()
        self._cluster = None

    def start_training(self, cluster: RayCluster, name: str) -> Command:
        """Start a training on the head."""
        return self._launch(cluster, name, "train", self.workload.make_training(name))

    def start_inference(
        self, cluster: RayCluster, name: str, *, workers: int, num_cpus: int | None = None
    ) -> Command:
        """Start an inference on the head; it counts on processors that are not there yet."""
        arguments = self.workload.make_inference(name, workers=workers)
        if num_cpus is not None:
            arguments += ["--cpus", str(num_cpus)]
        return self._launch(cluster, name, "infer", arguments)

    def start_outside(self, name: str, command: Sequence[str], *, with_token: bool) -> Command:
        """Start a command in the checkout on no machine of the cluster, with or without a token."""
        home = make_home(self._make_path(f"{name}-home"), self._token if with_token else None)
        environment = make_plain_environment(home)
        if not with_token:
            del environment["RAY_AUTH_MODE"]
        log = self._make_path(f"{name}.log")
        return self._follow(start_command(command, environment, log, REPOSITORY), log)

    def undisturbed_results(self, cluster: RayCluster) -> Results:
        """What an inference finds when nothing happens; on three nodes of the cluster."""
        if self._results is None:
            cluster.reshape([2, 2, 2])
            self.start_inference(cluster, "undisturbed", workers=3).finish(timeout_s=FINISH_S)
            results = self.workload.read_results("undisturbed")
            if "detections.json" not in results:
                raise RehearsalError(f"expected a detections.json, got {sorted(results)}")
            self._results = results
        return self._results

    def undisturbed_tensors(self, cluster: RayCluster) -> dict[str, Any]:
        """Weights of a training to which nothing happens; on two nodes of the cluster."""
        if not self._reference_training:
            cluster.reshape([1, 1])
            command = self.start_training(cluster, "reference")
            self.keep_training("reference", command.finish(timeout_s=FINISH_S))
        return self.workload.read_tensors(self._reference_training)

    def keep_training(self, name: str, outcome: Mapping[str, Any]) -> None:
        """Let a training to which nothing happened be what others are compared with.

        Raises:
            RehearsalError: If it did not take its steps.
        """
        if outcome.get("steps") != NUM_STEPS:
            raise RehearsalError(f"expected {NUM_STEPS} steps, got {outcome.get('steps')}")
        self._reference_training = name

    def _launch(
        self, cluster: RayCluster, name: str, verb: str, arguments: Sequence[str]
    ) -> Command:
        log = self._make_path(f"{verb}-{name}.log")
        command = [sys.executable, "-m", "retinaray", verb, *arguments]
        return self._follow(cluster.launch_on_head(command, log), log)

    def _follow(self, process: subprocess.Popen[bytes], log: Path) -> Command:
        self._commands.append(Command(process, log))
        return self._commands[-1]

    def _make_cluster(self) -> RayCluster:
        self.reset()
        return RayCluster(
            self._room,
            self._folder / "nodes",
            s3_environment=self._s3_environment,
            images=self._images,
            token=self._token,
        )

    def _make_path(self, name: str) -> Path:
        return self._folder / name
