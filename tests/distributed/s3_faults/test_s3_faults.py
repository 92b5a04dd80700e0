"""Runs from S3 to S3 through a proxy that breaks requests; `calm` is what they must equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest

from retinaray.config.schema import InferJob
from retinaray.demo.embedded_s3 import EmbeddedS3
from retinaray.demo.scenes import SceneSet
from retinaray.distributed.batch_inference import run_inference
from retinaray.errors import ClusterError, StorageError
from retinaray.storage import Storage

pytestmark = pytest.mark.local_ray

BUCKET = "retinaray-tests"
MERGED = ("detections.json", "images.json")


@pytest.fixture(scope="module")
def storage(s3_server: EmbeddedS3) -> Storage:
    """The server without the proxy."""
    return Storage(endpoint_url=s3_server.endpoint_url)


@pytest.fixture(scope="module")
def bucket(ray_cluster: object, storage: Storage, scenes: SceneSet) -> str:
    """The scenes' images below a prefix of their own."""
    name = f"s3://{BUCKET}/faults"
    for path in sorted(scenes.images.glob("test*")):
        storage.write_bytes(f"{name}/images/{path.name}", path.read_bytes())
    return name


@pytest.fixture(scope="module")
def make_s3_job(
    bucket: str, make_infer_job: Callable[..., InferJob]
) -> Callable[[str, str], InferJob]:
    """Inference from and to the bucket, seen at an address."""

    def make(name: str, endpoint_url: str) -> InferJob:
        return make_infer_job(
            f"{bucket}/{name}", images=f"{bucket}/images", reading__endpoint_url=endpoint_url
        )

    return make


@pytest.fixture(scope="module")
def calm(
    ray_cluster: object,
    make_s3_job: Callable[[str, str], InferJob],
    s3_server: EmbeddedS3,
    storage: Storage,
) -> dict[str, bytes]:
    """The merged files of an undisturbed run."""
    outcome = run_inference(make_s3_job("calm", s3_server.endpoint_url))
    assert outcome.totals.num_images == 16
    return {name: storage.read_bytes(f"{outcome.run}/{name}") for name in MERGED}


def read_merged(storage: Storage, root: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(f"{root}/{name}") for name in MERGED}


def test_run_inference_gives_the_same_bytes_when_many_requests_fail(
    calm: dict[str, bytes],
    make_s3_job: Callable[[str, str], InferJob],
    storage: Storage,
    faulty_s3: Any,
) -> None:
    faults = cycle(["500", "503", "reset", "truncate", "slow", "lose_answer"])

    def choose(method: str, path: str, number: int) -> str:
        return next(faults) if number % 5 == 4 else ""

    faulty_s3.choose = choose
    outcome = run_inference(make_s3_job("broken", faulty_s3.endpoint_url))
    assert read_merged(storage, outcome.run) == calm
    assert set(faulty_s3.met) == {"500", "503", "reset", "truncate", "slow", "lose_answer"}


@pytest.mark.slow
def test_run_inference_goes_on_when_credentials_expired_and_were_renewed(
    calm: dict[str, bytes],
    make_s3_job: Callable[[str, str], InferJob],
    storage: Storage,
    faulty_s3: Any,
) -> None:
    job = make_s3_job("expired", faulty_s3.endpoint_url)
    reads: list[str] = []

    def expire(method: str, path: str, number: int) -> str:
        if method == "GET" and "/images/" in path:
            reads.append(path)
        return "expired" if len(reads) > 6 else ""

    faulty_s3.choose = expire
    with pytest.raises(StorageError, match=r"cannot list .*/parts: the session token has expired"):
        run_inference(job)
    # A failing store is not taken for failing images.
    assert not list(storage.list_files(f"{job.output}/errors"))
    faulty_s3.heal()
    outcome = run_inference(job)
    assert read_merged(storage, outcome.run) == calm


def test_run_inference_accounts_for_an_image_that_vanished_after_it_was_listed(
    calm: dict[str, bytes],
    make_s3_job: Callable[[str, str], InferJob],
    storage: Storage,
    bucket: str,
    scenes: SceneSet,
    faulty_s3: Any,
) -> None:
    victim = sorted(scenes.images.glob("test*"))[-1]

    def delete_at_first_read(method: str, path: str, number: int) -> str:
        if method == "GET" and "/images/" in path:
            storage.delete(f"{bucket}/images/{victim.name}")
        return ""

    faulty_s3.choose = delete_at_first_read
    try:
        outcome = run_inference(make_s3_job("vanished", faulty_s3.endpoint_url))
    finally:
        storage.write_bytes(f"{bucket}/images/{victim.name}", victim.read_bytes())
    assert (outcome.totals.num_images, outcome.totals.num_errors) == (15, 1)
    assert outcome.errors[0]["exception"] == "MissingFileError"
    kept = [row for row in json.loads(calm["images.json"]) if not row["uri"].endswith(victim.name)]
    assert json.loads(storage.read_bytes(f"{outcome.run}/images.json")) == kept


@pytest.mark.slow
def test_run_inference_keeps_its_parts_when_the_server_goes_away(
    calm: dict[str, bytes],
    make_s3_job: Callable[[str, str], InferJob],
    storage: Storage,
    faulty_s3: Any,
) -> None:
    job = make_s3_job("away", faulty_s3.endpoint_url)

    def refuse(method: str, path: str, number: int) -> str:
        is_late = "part-000000002" in path or "part-000000003" in path
        return "503" if method == "PUT" and "/parts/" in path and is_late else ""

    faulty_s3.choose = refuse
    with pytest.raises(ClusterError, match=r"2 of 4 parts were not finished.*fewer requests"):
        run_inference(job)
    assert len(list(storage.list_files(f"{job.output}/parts"))) == 2
    faulty_s3.heal()
    outcome = run_inference(job)
    assert read_merged(storage, outcome.run) == calm
