"""A training whose checkpoints go to an S3 server that refuses some of them for a while."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retinaray.artifact import read_weights
from retinaray.assembly.job_plan_workers import WorkerPlan
from retinaray.config.schema import TrainJob
from retinaray.distributed.run_store import RunStore
from retinaray.distributed.stop_signals import StopSignal
from retinaray.distributed.train_events import TrainEvents
from retinaray.distributed.train_run import RunSetup, fit_workers, run_workers
from retinaray.errors import ClusterError
from retinaray.training.checkpoint_files import find_checkpoints, read_manifest, read_verified

pytestmark = [pytest.mark.local_ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def pieces_s3(faulty_s3: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The proxy for clients that do not tell a body's length before: Ray's, for its own list."""
    handler = faulty_s3._server.RequestHandlerClass
    read_whole = handler._read_body

    def read(self: Any) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return bytes(read_whole(self))
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
            del self.headers["Expect"]
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        body = b"".join(pieces)
        del self.headers["Content-Length"]
        self.headers["Content-Length"] = str(len(body))
        return body

    monkeypatch.setattr(handler, "_read_body", read)
    return faulty_s3


@pytest.fixture
def fit_on_s3(
    make_train_job: Callable[..., TrainJob], s3_bucket: str, pieces_s3: Any, tmp_path: Path
) -> Callable[..., Any]:
    """A training whose checkpoints go through the proxy; gives its store, its events and `fit`."""

    def make(name: str, *, keep_every: int = 0, **changes: object) -> Any:
        job = make_train_job(tmp_path / "model.pth", **changes)
        store = RunStore(f"{s3_bucket}/{name}", pieces_s3.endpoint_url)
        events: list[Any] = []

        def fit() -> Any:
            setup = RunSetup(
                run_id=name,
                store=store,
                events=TrainEvents(tmp_path, events.append),
                stop=StopSignal(),
                keep_every=keep_every,
            )
            return fit_workers(job, PLAN, setup)

        return store, events, fit

    return make


PLAN = WorkerPlan(num_workers=1, num_cpus=1, num_gpus=0, num_threads=1)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: object,
    make_train_job: Callable[..., TrainJob],
    tmp_path_factory: pytest.TempPathFactory,
) -> Tensors:
    """The weights of the training when its checkpoints go to a folder and nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    options: dict[str, Any] = {"folder": folder, "run_id": "calm", "handle_event": lambda _: None}
    result = run_workers(make_train_job(folder / "model.pth"), PLAN, **options)
    return _read(Path(result.checkpoint.path).joinpath("weights.pth").read_bytes())


@pytest.mark.slow
def test_fit_workers_keeps_checkpoints_on_s3_when_the_server_refuses_for_a_while_and_is_slow(
    undisturbed: Tensors,
    fit_on_s3: Callable[..., Any],
    pieces_s3: Any,
    wait_until: Callable[[Callable[[], object], str], None],
) -> None:
    store, events, fit = fit_on_s3("slow", keep_every=2)
    refused: list[str] = []

    def is_overtaken() -> bool:
        return any(event["kind"] == "progress" and event["step"] > 2 for event in events)

    def refuse_some(method: str, path: str, number: int) -> str:
        is_state = method == "PUT" and "/step_00000002/training.pth" in path
        if is_state:
            wait_until(is_overtaken, "a step after that whose checkpoint is on its way")
        if is_state and len(refused) < 3:
            refused.append(path)
            return "503"
        return "slow" if method == "PUT" and "/step_00000004/" in path else ""

    pieces_s3.choose = refuse_some
    result = fit()
    assert len(refused) == 3
    assert pieces_s3.met["slow"] >= 2
    assert [event["step"] for event in events if event["kind"] == "progress"] == [1, 2, 3, 4, 5, 6]
    assert not [event for event in events if event["kind"] == "recovery"]
    names = find_checkpoints(store.checkpoints, store.files)
    assert names[0] == "step_00000006"
    assert len(names) <= 3
    _check_newest(store, "slow", undisturbed)
    # Of three epochs the second is kept for good.
    (kept,) = store.files.list_files(store.kept)
    assert kept.endswith("/kept/step_00000004.pth")
    card, _ = read_weights(store.files.read_bytes(kept), source=kept)
    assert card.run_id == "slow"

    # The last checkpoint is cut off, as an upload that was never finished, and made again.
    store.files.delete(f"{store.checkpoints}/{names[0]}/checkpoint.json")
    events.clear()
    again = fit()
    steps = [event["step"] for event in events if event["kind"] == "progress"]
    assert steps[-1] == 6
    assert steps == list(range(steps[0], 7))
    (recovery,) = [event for event in events if event["kind"] == "recovery"]
    assert recovery["restored_step"] == steps[0] - 1
    assert again.metrics["step"] == result.metrics["step"] == 6
    _check_newest(store, "slow", undisturbed)


@pytest.mark.slow
def test_fit_workers_names_the_server_that_refuses_for_good_and_goes_on_when_it_is_back(
    undisturbed: Tensors, fit_on_s3: Callable[..., Any], pieces_s3: Any
) -> None:
    store, _, fit = fit_on_s3("refused", run__max_failures=0)

    def refuse(method: str, path: str, number: int) -> str:
        return "503" if method == "PUT" and "/step_00000004/training.pth" in path else ""

    pieces_s3.choose = refuse
    with pytest.raises(ClusterError, match=r"cannot write s3://.*/step_00000004/.*SlowDown") as e:
        fit()
    assert "\n" not in str(e.value)
    assert find_checkpoints(store.checkpoints, store.files) == ["step_00000002"]

    pieces_s3.heal()
    assert fit().metrics["step"] == 6
    _check_newest(store, "refused", undisturbed)


def _check_newest(store: RunStore, run_id: str, wanted: Tensors) -> None:
    """Whether the newest checkpoint is whole and holds these weights, bit for bit."""
    newest = find_checkpoints(store.checkpoints, store.files)[0]
    assert newest.startswith("step_00000006")
    folder = f"{store.checkpoints}/{newest}"
    manifest = read_manifest(folder, run_id=run_id, files=store.files)
    content = read_verified(folder, "weights.pth", manifest=manifest, files=store.files)
    found = _read(content)
    assert found.keys() == wanted.keys()
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]


def _read(content: bytes) -> Tensors:
    return dict(read_weights(content, source="weights.pth")[1].state_dict())
