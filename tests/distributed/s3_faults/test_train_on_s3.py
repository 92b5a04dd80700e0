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
from retinaray.distributed.train_run import RunSetup, fit_workers
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


@pytest.mark.slow
def test_fit_workers_keeps_checkpoints_on_s3_when_the_server_refuses_for_a_while(
    make_train_job: Callable[..., TrainJob], s3_bucket: str, pieces_s3: Any, tmp_path: Path
) -> None:
    job = make_train_job(tmp_path / "model.pth")
    plan = WorkerPlan(num_workers=1, num_cpus=1, num_gpus=0, num_threads=1)
    events: list[Any] = []
    refused: list[str] = []

    def refuse_some(method: str, path: str, number: int) -> str:
        is_state = method == "PUT" and "/step_00000002/training.pth" in path
        if is_state and len(refused) < 3:
            refused.append(path)
            return "503"
        return ""

    pieces_s3.choose = refuse_some
    store = RunStore(f"{s3_bucket}/run", pieces_s3.endpoint_url)

    def fit() -> Any:
        setup = RunSetup(
            run_id="on-s3",
            store=store,
            events=TrainEvents(tmp_path, events.append),
            stop=StopSignal(),
            keep_every=2,
        )
        return fit_workers(job, plan, setup)

    result = fit()
    assert len(refused) == 3
    assert [event["step"] for event in events if event["kind"] == "progress"] == [1, 2, 3, 4, 5, 6]
    assert not [event for event in events if event["kind"] == "recovery"]
    names = find_checkpoints(store.checkpoints, store.files)
    assert names[0] == "step_00000006"
    assert len(names) <= 3
    folder = f"{store.checkpoints}/{names[0]}"
    manifest = read_manifest(folder, run_id="on-s3", files=store.files)
    weights = read_verified(folder, "weights.pth", manifest=manifest, files=store.files)
    # Of three epochs the second is kept for good.
    (kept,) = store.files.list_files(store.kept)
    assert kept.endswith("/kept/step_00000004.pth")
    card, _ = read_weights(store.files.read_bytes(kept), source=kept)
    assert card.run_id == "on-s3"

    # The last checkpoint is cut off, as an upload that was never finished, and made again.
    store.files.delete(f"{folder}/checkpoint.json")
    events.clear()
    again = fit()
    steps = [event["step"] for event in events if event["kind"] == "progress"]
    assert steps[-1] == 6
    assert steps == list(range(steps[0], 7))
    (recovery,) = [event for event in events if event["kind"] == "recovery"]
    assert recovery["restored_step"] == steps[0] - 1
    assert again.metrics["step"] == result.metrics["step"] == 6
    name = f"{store.checkpoints}/{find_checkpoints(store.checkpoints, store.files)[0]}"
    manifest = read_manifest(name, run_id="on-s3", files=store.files)
    redone = read_verified(name, "weights.pth", manifest=manifest, files=store.files)
    first, second = (
        read_weights(content, source="weights.pth")[1].state_dict() for content in (weights, redone)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
