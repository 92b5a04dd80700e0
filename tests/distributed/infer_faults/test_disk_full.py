"""A run whose disk is full says so, leaves nothing half-written, and goes on when there is room."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from retinaray.config.schema import InferJob
from retinaray.distributed.batch_inference import run_inference
from retinaray.errors import ClusterError, StorageError

pytestmark = pytest.mark.local_ray

Results = dict[str, bytes]
FULL = r"No space left on device; check the disk's space"


def _check_one_line(error: Exception) -> None:
    assert "\n" not in str(error)


@pytest.mark.slow
def test_infer_goes_on_when_a_full_disk_got_room(
    undisturbed: Results,
    make_job: Callable[..., InferJob],
    small_disk: Callable[[str], Path],
    read_results: Callable[[object], Results],
    list_parts: Callable[[object], dict[str, float]],
) -> None:
    parts = {name: data for name, data in undisturbed.items() if name.startswith("parts/")}
    parts_kib = sum(map(len, parts.values())) // 1024
    # Bookkeeping takes some pages of 4 KiB; half of the parts do not fit.
    disk = small_disk(f"size={parts_kib // 2 + 40}k")
    output = disk / "run"
    with pytest.raises(
        ClusterError, match=rf"of 11 parts were not finished.*cannot write {output}/.*{FULL}"
    ) as parts_error:
        run_inference(make_job(output, workers=2))
    _check_one_line(parts_error.value)
    first = list_parts(output)
    assert 0 < len(first) < 11
    assert not (output / "_SUCCESS").exists()
    # What counts as a part is whole.
    kept = {uri.removeprefix(f"{output}/"): Path(uri).read_bytes() for uri in first}
    assert kept == {name: parts[name] for name in kept}
    assert not list(output.rglob("*.tmp"))

    # Room for the parts, not for what is merged from them, which is about as long.
    small_disk(f"size={parts_kib + parts_kib // 2 + 80}k")
    with pytest.raises(StorageError, match=rf"cannot write {output}/detections\.json: {FULL}") as e:
        run_inference(make_job(output, workers=2))
    _check_one_line(e.value)
    second = list_parts(output)
    assert len(second) == 11
    assert first.items() <= second.items()
    assert not (output / "detections.json").exists()
    assert not (output / "_SUCCESS").exists()

    small_disk(f"size={8 * parts_kib}k")
    outcome = run_inference(make_job(output, workers=2))
    assert read_results(output) == undisturbed
    assert list_parts(output) == second
    assert outcome.images_per_s == 0  # Nothing but the merging was left.
    assert json.loads((output / "run.json").read_bytes())["totals"]["num_images"] == 32


@pytest.mark.slow
@pytest.mark.usefixtures("undisturbed")
def test_infer_names_the_full_disk_when_it_cannot_even_begin(
    make_job: Callable[..., InferJob], small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("size=8k")
    (disk / "other").write_bytes(bytes(8 * 1024))
    with pytest.raises(StorageError, match=rf"cannot write {disk}/run/.*{FULL}") as error:
        run_inference(make_job(disk / "run"))
    _check_one_line(error.value)
    assert not [path for path in (disk / "run").rglob("*") if path.is_file()]
