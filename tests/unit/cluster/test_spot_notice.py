"""spot_notice.py: what it asks EC2's metadata service, and what it does about the answer."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

NODE = "0f" * 28
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def spot_notice(repository: Path) -> Any:
    """The program as a module."""
    path = repository / "cluster" / "spot_notice.py"
    spec = importlib.util.spec_from_file_location("spot_notice", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def metadata(spot_notice: Any, ec2_metadata: Any) -> Any:
    """The program's view of a simulated service."""
    return spot_notice.InstanceMetadata(ec2_metadata.endpoint)


@pytest.fixture
def write_process(tmp_path: Path) -> Callable[..., None]:
    """write_process(7, "raylet", "--a=b") puts a process into a /proc in the test's folder."""

    def write(pid: int, *command: str) -> None:
        folder = tmp_path / str(pid)
        folder.mkdir()
        (folder / "cmdline").write_bytes("\0".join((*command, "")).encode())

    return write


def test_read_is_none_until_there_is_a_notice(metadata: Any, ec2_metadata: Any) -> None:
    assert metadata.read("spot/instance-action") is None
    assert metadata.read("instance-life-cycle") == "spot"
    ec2_metadata.announce(datetime(2026, 9, 18, 8, 22, tzinfo=UTC))
    text = metadata.read("spot/instance-action")
    assert text == '{"action": "terminate", "time": "2026-09-18T08:22:00Z"}'
    assert ec2_metadata.num_tokens == 1


def test_read_asks_for_a_new_token_when_the_old_one_is_over(
    metadata: Any, ec2_metadata: Any
) -> None:
    assert metadata.read("instance-life-cycle") == "spot"
    ec2_metadata.expire_token()
    assert metadata.read("instance-life-cycle") == "spot"
    assert ec2_metadata.num_tokens == 2


def test_read_goes_round_the_users_proxy(metadata: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert metadata.read("instance-life-cycle") == "spot"


def test_read_names_a_service_that_is_not_there(spot_notice: Any, ec2_metadata: Any) -> None:
    ec2_metadata.stop()
    with pytest.raises(spot_notice.MetadataError, match=r"api/token does not answer: .*refused"):
        spot_notice.InstanceMetadata(ec2_metadata.endpoint).read("instance-life-cycle")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"time": "soon"}', '{"time": 3}'])
def test_parse_notice_refuses_what_is_none(spot_notice: Any, text: str) -> None:
    with pytest.raises(spot_notice.MetadataError, match="expected action and time"):
        spot_notice.parse_notice(text)


@pytest.mark.parametrize("zone", ["Z", "", "+00:00"])
def test_parse_notice_reads_the_time_as_utc(spot_notice: Any, zone: str) -> None:
    text = f'{{"action": "stop", "time": "2026-09-18T08:22:00{zone}"}}'
    assert spot_notice.parse_notice(text) == datetime(2026, 9, 18, 8, 22, tzinfo=UTC)


def test_find_nodes_reads_the_arguments_of_raylets(
    spot_notice: Any, write_process: Callable[..., None], tmp_path: Path
) -> None:
    raylet = "/venv/ray/core/src/ray/raylet/raylet"
    write_process(7, raylet, "--gcs-address=10.0.0.1:6379", "--verbose", f"--node_id={NODE}")
    write_process(8, raylet, "--version")
    write_process(9, "python", "agent.py", "--gcs-address=10.0.0.1:6379", f"--node_id={NODE}")
    # A thread of the kernel has no arguments, and a process may end while it is looked at.
    write_process(10)
    (tmp_path / "11").mkdir()
    assert spot_notice.find_nodes(tmp_path) == [spot_notice.RayNode(NODE, "10.0.0.1:6379")]


def test_ask_until_answered_survives_faults_and_tells_each_once(
    spot_notice: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fault = spot_notice.MetadataError("does not answer")
    answers: list[Any] = [fault, fault, None, fault, "spot"]

    def ask() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert spot_notice.ask_until_answered(ask, poll_s=0) == "spot"
    assert answers == []
    assert caplog.text.count("does not answer; asked again every 0 s") == 2


def test_drain_machine_tries_again_what_ray_refused(
    spot_notice: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node, other = (spot_notice.RayNode(name * 28, "10.0.0.1:6379") for name in ("0a", "0b"))
    asked: list[tuple[str, int]] = []

    def drain(node: Any, *, seconds: int, reason: str) -> None:
        assert reason.startswith("EC2 takes this spot instance at 20")
        asked.append((node.node_id[:2], seconds))
        if asked.count((node.node_id[:2], seconds)) == 1 and node == other:
            raise subprocess.CalledProcessError(1, "ray", output=b"no such head")

    monkeypatch.setattr(spot_notice, "find_nodes", lambda: [node, other])
    monkeypatch.setattr(spot_notice, "drain", drain)
    end = datetime.now(UTC) + timedelta(seconds=119.5)
    assert spot_notice.drain_machine(end, only=None, poll_s=0)
    assert sorted(asked) == [("0a", 120), ("0b", 120), ("0b", 120)]
    assert "no such head" in caplog.text


def test_drain_machine_gives_up_when_the_machine_is_gone(
    spot_notice: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spot_notice, "find_nodes", list)
    end = datetime.now(UTC) + timedelta(seconds=0.2)
    assert not spot_notice.drain_machine(end, only=NODE, poll_s=0.05)
    assert f"no Ray node {NODE} runs on this machine" in caplog.text


def test_the_program_ends_where_no_notice_can_come(ec2_metadata: Any, repository: Path) -> None:
    ec2_metadata.life_cycle = "on-demand"
    environment = {**os.environ, "AWS_EC2_METADATA_SERVICE_ENDPOINT": ec2_metadata.endpoint}
    ended = subprocess.run(
        [sys.executable, str(repository / "cluster" / "spot_notice.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    assert "this instance is on-demand: EC2 gives no notice" in ended.stderr
