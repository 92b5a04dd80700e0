"""A training's caches, from its settings to its batches."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from retinaray.assembly import versioned_reading
from retinaray.assembly.reading import make_image_sources
from retinaray.assembly.training import make_loader, read_inputs, resolve_paths
from retinaray.config.schema import TrainJob
from retinaray.data.batching import Batch
from retinaray.data.decoded_cache import DecodedCache
from retinaray.data.read_cache import ReadCache
from retinaray.storage import Storage

JobFactory = Callable[..., TrainJob]


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file counts as old enough: nobody waits two seconds."""
    monkeypatch.setattr(versioned_reading, "_SETTLED_S", -1.0)


def batches_of(job: TrainJob) -> list[Batch]:
    loader = make_loader(
        job,
        read_inputs(job),
        rank=0,
        world_size=1,
        first_step=0,
        num_processes=0,
        pin_memory=False,
    )
    return list(loader)


def assert_same_batches(one: list[Batch], other: list[Batch]) -> None:
    for left, right in zip(one, other, strict=True):
        for field in fields(Batch):
            if field.name == "image_ids":
                assert left.image_ids == right.image_ids
            elif field.name != "cost":
                assert getattr(left, field.name).equal(getattr(right, field.name)), field.name


@pytest.mark.parametrize("is_decoded", [False, True], ids=["files", "pixels"])
def test_make_loader_gives_the_same_batches_with_a_cache(
    make_train_job: JobFactory, tmp_path: Path, is_decoded: bool
) -> None:
    changes: dict[str, object] = {"run.iters": 6, "run.batch": 2, "augment.mosaic": 0.3}
    plain = batches_of(make_train_job(changes))
    changes |= {"data.cache": str(tmp_path), "data.cache_decoded": is_decoded}
    job = make_train_job(changes)
    assert_same_batches(batches_of(job), plain)
    kept = list(tmp_path.glob(f"retinaray-cache-{os.geteuid()}/entries/*"))
    # PNGs are kept once, whatever their zoom.
    assert len(kept) == 6
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert_same_batches(batches_of(job), plain)
    assert {path: path.stat().st_mtime_ns for path in kept} == times, "written once"


def test_make_loader_reads_s3_through_a_cache(
    make_train_job: JobFactory, tmp_path: Path, image_set: Any, s3_bucket: str
) -> None:
    for path in image_set.folder.glob("*.png"):
        Storage().write_bytes(f"{s3_bucket}/{path.name}", path.read_bytes())
    changes: dict[str, object] = {"run.iters": 6, "run.batch": 2}
    plain = batches_of(make_train_job(changes))
    changes |= {"data.images": s3_bucket, "data.cache": str(tmp_path / "cache")}
    job = make_train_job(changes)
    assert_same_batches(batches_of(job), plain)
    assert len(list(tmp_path.glob("cache/*/entries/*"))) == 6
    # Until the next question is due nothing is asked: the objects may even be gone.
    for path in image_set.folder.glob("*.png"):
        Storage().delete(f"{s3_bucket}/{path.name}")
    trusting = make_train_job(changes | {"data.cache_recheck_s": 3600})
    assert_same_batches(batches_of(trusting), plain)


def test_make_image_sources_follows_the_settings(
    make_train_job: JobFactory, tmp_path: Path, image_set: Any
) -> None:
    uri = f"{image_set.folder}/1.png"
    content = Path(uri).read_bytes()
    kinds = []
    for changes in (
        {},
        {"data.cache": str(tmp_path)},
        {"data.cache": str(tmp_path), "data.cache_decoded": True},
    ):
        job = make_train_job(changes)
        read, decoded = make_image_sources(job.data, job.reading)
        # As loader processes get them.
        read, decoded = pickle.loads(pickle.dumps((read, decoded)))
        assert read(uri) == content
        kinds.append((isinstance(read, ReadCache), isinstance(decoded, DecodedCache)))
    assert kinds == [(False, False), (True, False), (False, True)]


def test_make_image_sources_holds_the_limit_in_gigabytes(
    make_train_job: JobFactory, tmp_path: Path, image_set: Any
) -> None:
    sizes = sorted(path.stat().st_size for path in image_set.folder.glob("*.png"))
    limit_gb = (sizes[0] + 300) / 1e9
    job = make_train_job({"data.cache": str(tmp_path), "data.cache_gb": limit_gb, "run.iters": 3})
    batches_of(job)
    kept = [path.stat().st_size for path in tmp_path.glob("*/entries/*")]
    assert len(kept) == 1
    assert kept[0] <= 1e9 * limit_gb


def test_resolve_paths_makes_the_cache_absolute(
    make_train_job: JobFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = resolve_paths(make_train_job({"data.cache": "cache"}))
    assert job.data.cache == str(tmp_path / "cache")
    assert resolve_paths(make_train_job()).data.cache is None
