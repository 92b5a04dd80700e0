"""The pieces of the multi-node rehearsal that need no cluster: doors, tables, what is compared."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "cluster" / "rehearsal"
TIMEOUT_S = 20.0

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Import a module of cluster/rehearsal as the scripts import each other."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """An HTTP server that answers with the path it was asked for."""

    class Echo(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.path.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def door(load: Load, server: ThreadingHTTPServer) -> Iterator[Any]:
    """A door to the server, whose images lie below /b/images/."""
    host, port = server.server_address[:2]
    with load("doors").Door("127.0.0.1", (host, port), images="/b/images/") as found:
        yield found


@pytest.fixture
def ask() -> Callable[[str], bytes]:
    """Fetch a URL, past any proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def fetch(url: str) -> bytes:
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            return bytes(answer.read())

    return fetch


@pytest.fixture
def ask_later(ask: Callable[[str], bytes]) -> Callable[[str], threading.Thread]:
    """Fetch a URL in a thread; its `answers` has what came."""

    def start(url: str) -> threading.Thread:
        answers: list[bytes] = []
        thread = threading.Thread(target=lambda: answers.append(ask(url)), daemon=True)
        thread.answers = answers  # type: ignore[attr-defined]
        thread.start()
        return thread

    return start


@pytest.fixture
def wait(load: Load) -> Callable[[Callable[[], bool]], float]:
    """Wait for a condition."""
    return lambda condition: float(
        load("machines").wait_until(condition, "it", timeout_s=TIMEOUT_S, pause_s=0.01)
    )


def test_door_forwards_and_lists_images_when_nothing_is_held(
    door: Any, ask: Callable[[str], bytes]
) -> None:
    assert ask(f"{door.url}/b/images/train/a.jpg?x=1") == b"/b/images/train/a.jpg?x=1"
    assert ask(f"{door.url}/b/tiny.pth") == b"/b/tiny.pth"
    assert door.asked == ["/b/images/train/a.jpg"]
    door.forget()
    assert door.asked == []


def test_door_holds_images_after_its_budget_and_nothing_else(
    door: Any,
    ask: Callable[[str], bytes],
    ask_later: Callable[[str], Any],
    wait: Callable[[Callable[[], bool]], float],
) -> None:
    door.admit(1)
    assert ask(f"{door.url}/b/images/a.jpg") == b"/b/images/a.jpg"
    held = ask_later(f"{door.url}/b/images/b.jpg")
    wait(lambda: door.num_waiting == 1)
    assert ask(f"{door.url}/b/runs/parts") == b"/b/runs/parts"
    assert held.answers == []
    door.admit(None)
    held.join(TIMEOUT_S)
    assert held.answers == [b"/b/images/b.jpg"]
    assert door.num_waiting == 0


def test_door_refuses_connections_when_it_is_closed(
    door: Any, wait: Callable[[Callable[[], bool]], float]
) -> None:
    port = int(door.url.rpartition(":")[2])
    door.close()

    def is_refused() -> bool:
        with contextlib.closing(socket.socket()) as client:
            return client.connect_ex(("127.0.0.1", port)) != 0

    assert wait(is_refused) < TIMEOUT_S


def test_door_serves_the_next_client_when_the_server_was_away(
    load: Load, server: ThreadingHTTPServer, ask: Callable[[str], bytes]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        nobody = unused.getsockname()
    with load("doors").Door("127.0.0.1", nobody, images="/b/") as door:
        with pytest.raises((urllib.error.URLError, OSError)):
            ask(f"{door.url}/b/a.jpg")
        door._target = server.server_address[:2]
        assert ask(f"{door.url}/b/a.jpg") == b"/b/a.jpg"


def test_wait_until_says_what_did_not_come(load: Load) -> None:
    machines = load("machines")
    with pytest.raises(machines.RehearsalError, match="within 0 s: a third node; it did not come"):
        machines.wait_until(lambda: False, "a third node", timeout_s=0, pause_s=0)


def test_read_tail_joins_the_last_lines_without_colours(load: Load, tmp_path: Path) -> None:
    log = tmp_path / "node.log"
    log.write_text("first\n\x1b[31msecond\x1b[39m\n\n third\n")
    assert load("machines").read_tail(log, 3) == "second | third"
    assert load("machines").read_tail(tmp_path / "none.log") == ""


def test_find_descendants_lists_children_and_theirs(load: Load) -> None:
    command = ["bash", "-c", "sleep 1000 & echo ready; wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        (child,) = load("machines").find_descendants(process.pid)
        assert child in load("machines").find_descendants(os.getpid())
        assert process.pid in load("machines").find_descendants(os.getpid())
        assert process.pid not in load("machines").find_descendants(child)
        process.kill()
        os.kill(child, 9)


def test_loopback_machine_kill_ends_the_whole_tree(load: Load, tmp_path: Path) -> None:
    room = load("machines").LoopbackRoom()
    machine = room.boot(
        "one",
        room.choose_address(is_head=True),
        ["bash", "-c", "sleep 1000 & echo $! ; echo $GLOO_SOCKET_IFNAME; wait"],
        folder=tmp_path,
        environment={"PATH": os.environ["PATH"]},
    )
    load("machines").wait_until(
        lambda: len(machine.log.read_text().split()) == 2, "two lines", timeout_s=TIMEOUT_S
    )
    child, interface = machine.log.read_text().split()
    assert machine.is_running()
    assert machine.address.count(".") == 3
    assert interface == "lo"
    assert room.choose_address(is_head=False) == "127.0.0.3"
    assert room.choose_address(is_head=True) == machine.address
    machine.kill()
    assert not machine.is_running()
    # Killed, and waited for by whoever inherits it: gone, or a zombie until then.
    stat = Path(f"/proc/{child}/stat")
    load("machines").wait_until(
        lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z",
        "its end",
        timeout_s=TIMEOUT_S,
    )


def test_loopback_machine_ends_when_the_rehearsal_is_killed(load: Load, tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys, time; sys.path.insert(0, sys.argv[1]); import machines;"
        "room = machines.LoopbackRoom(); folder = pathlib.Path(sys.argv[2]);"
        "machine = room.boot('one', '127.0.0.1', ['sleep', '1000'], folder=folder,"
        " environment={'PATH': os.environ['PATH']});"
        "print(machine.process.pid, flush=True); time.sleep(1000)"
    )
    command = [sys.executable, "-c", script, str(FOLDER), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        stat = Path(f"/proc/{int(process.stdout.readline())}/stat")
        load("machines").wait_until(
            lambda: "(sleep)" in stat.read_text(), "the command", timeout_s=TIMEOUT_S
        )
        process.kill()
        load("machines").wait_until(
            lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z",
            "its end",
            timeout_s=TIMEOUT_S,
        )
        assert process.wait() == -9


def test_parse_nodes_reads_what_the_state_api_answers(load: Load) -> None:
    row = {"node_id": "ab", "node_ip": "10.77.0.2", "state": "ALIVE", "is_head_node": True}
    dead = {"node_id": "cd", "node_ip": "10.77.0.3", "state": "DEAD", "is_head_node": False}
    nodes = load("clusters").parse_nodes({"data": {"result": {"result": [row, dead]}}})
    assert [(node.node_id, node.address, node.is_alive, node.is_head) for node in nodes] == [
        ("ab", "10.77.0.2", True, True),
        ("cd", "10.77.0.3", False, False),
    ]


def test_make_home_keeps_the_token_from_others(load: Load, tmp_path: Path) -> None:
    home = load("environments").make_home(tmp_path / "with", "secret")
    path = home / ".ray" / "auth_token"
    assert path.read_text() == "secret"
    assert path.stat().st_mode & 0o777 == 0o600
    bare = load("environments").make_home(tmp_path / "without", None)
    assert list((bare / ".ray").iterdir()) == []


def test_make_plain_environment_hands_on_no_secret_of_the_caller(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "theirs")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "theirs")
    environment = load("environments").make_plain_environment(tmp_path)
    assert "theirs" not in environment.values()
    assert environment["HOME"] == str(tmp_path)
    assert environment["RAY_AUTH_MODE"] == "token"


def test_find_json_takes_the_last_object_of_a_log(load: Load) -> None:
    workload = load("workload")
    text = 'x\n{"steps": 1}\n{"steps": 12}\nJob succeeded\n'
    assert workload.find_json(text) == {"steps": 12}
    with pytest.raises(workload.RehearsalError, match="JSON object as the last line, got: 'no'"):
        workload.find_json("no")


def test_find_last_step_takes_the_newest_checkpoint(load: Load) -> None:
    workload = load("workload")
    snapshot = {"results": [{"name": "step_00000004"}, {"name": "step_00000008"}]}
    assert workload.find_last_step(json.dumps(snapshot)) == 8
    assert workload.find_last_step("{}") == 0


def test_find_parts_counts_images_from_one(load: Load) -> None:
    # Three images a part: 1..3 are part 0, 4..6 part 1, 60 is the last of part 19.
    paths = [f"/b/test-{number:05}.jpg" for number in (1, 3, 4, 60)]
    assert load("workload").Workload.find_parts(None, paths) == {0, 1, 19}


def test_command_wait_says_what_it_wrote_when_it_ended_before(load: Load, tmp_path: Path) -> None:
    workload = load("workload")
    script = "import sys; sys.stderr.write('no node\\n'); sys.exit(3)"
    log = tmp_path / "run.log"
    process = load("environments").start_command([sys.executable, "-c", script], {}, log)
    command = workload.Command(process, log)
    with pytest.raises(workload.RehearsalError, match="exit code 3: no node"):
        command.wait_until(lambda: False, "a part", timeout_s=TIMEOUT_S)
    with pytest.raises(workload.RehearsalError, match="expected exit code 0, got 3: no node"):
        command.finish(timeout_s=TIMEOUT_S)


def test_command_end_kills_what_still_runs(load: Load, tmp_path: Path) -> None:
    workload = load("workload")
    environment = {"PATH": os.environ["PATH"]}
    process = load("environments").start_command(["sleep", "1000"], environment, tmp_path / "a.log")
    command = workload.Command(process, tmp_path / "a.log")
    with pytest.raises(workload.RehearsalError, match="within 0 s: a part; it did not come"):
        command.wait_until(lambda: False, "a part", timeout_s=0)
    with pytest.raises(workload.RehearsalError, match="end within 0 s, it runs on"):
        command.finish(timeout_s=0)
    command.end()
    assert process.returncode == -9


@pytest.mark.parametrize(
    ("steps", "taken", "is_whole"),
    [
        (list(range(5, 13)), 12, True),
        ([6, *range(5, 13)], 12, True),
        (list(range(1, 13)), 12, True),
        (list(range(6, 13)), 12, False),
        ([5, *range(7, 13)], 12, False),
        (list(range(5, 13)), 11, False),
        (list(range(5, 12)), 12, False),
    ],
    ids=["whole", "late-report", "over-again", "gap", "hole", "fewer", "no-end"],
)
def test_check_continuation_wants_every_step_after_the_checkpoint(
    load: Load, steps: list[int], taken: int, is_whole: bool
) -> None:
    module = load("training_scenarios")
    if is_whole:
        module.check_continuation(steps, checkpoint=4, taken=taken)
        return
    with pytest.raises(module.RehearsalError, match=r"expected steps \[5, 6, "):
        module.check_continuation(steps, checkpoint=4, taken=taken)


def test_compare_results_names_what_differs(load: Load) -> None:
    module = load("inference_scenarios")
    expected = {"detections.json": b"[]", "parts/a": b"1", "parts/b": b"2"}
    module.compare_results(dict(expected), expected)
    found = {"detections.json": b"[1]", "parts/a": b"1", "errors/c": b""}
    with pytest.raises(
        module.RehearsalError, match=r"3 files .* 3 differ: detections.json, errors/c, parts/b"
    ):
        module.compare_results(found, expected)


def test_choose_victim_takes_the_least_busy_that_has_work(load: Load) -> None:
    module = load("inference_scenarios")
    hosts = [SimpleNamespace(door=SimpleNamespace(num_waiting=count)) for count in (6, 0, 3)]
    assert module.choose_victim(hosts) is hosts[2]
    with pytest.raises(module.RehearsalError, match="2 nodes at least, they are on 1"):
        module.choose_victim(hosts[:2])
