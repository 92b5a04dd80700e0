"""cluster/README.md: its numbers are the code's, its sums are right, its commands exist."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from retinaray import s3_objects
from retinaray.config.loading import load_from_argv
from retinaray.config.nodes import BackboneName
from retinaray.config.schema import InferJob, TrainJob
from retinaray.detector.retinanet import RetinaNet
from retinaray.inference.manifest import cut_parts
from retinaray.inference.part_attempts import PartAttempts
from retinaray.inference.part_table import write_parts
from retinaray.inference.pipeline import ImageResult, ImageSource
from retinaray.inference.run_files import RunFiles
from retinaray.storage import Storage

# 64 parts of 16, 64 of 64, 256 of 256: 1024 + 4096 + 65536 images in 384 parts.
SMALL_PARTS, IN_SMALL_PARTS = 384, 70_656


@pytest.fixture
def sheet(repository: Path) -> str:
    """The text of cluster/README.md."""
    return (repository / "cluster" / "README.md").read_text("utf-8")


def count_parts(num_images: int) -> int:
    """Parts of so many images; only for more than the small parts hold."""
    return SMALL_PARTS + -(-(num_images - IN_SMALL_PARTS) // 1000)


def make_sources(number: int) -> list[ImageSource]:
    return [ImageSource(image_id, f"s3://b/{image_id}.jpg") for image_id in range(1, number + 1)]


def test_count_parts_agrees_with_the_cut() -> None:
    sizes = [len(part.sources) for part in cut_parts(make_sources(72_700))]
    assert Counter(sizes[:SMALL_PARTS]) == {16: 64, 64: 64, 256: 256}
    assert sum(sizes[:SMALL_PARTS]) == IN_SMALL_PARTS
    # 2,044 images are left: two full parts and one of 44.
    assert sizes[SMALL_PARTS:] == [1000, 1000, 44]
    assert len(sizes) == count_parts(72_700)


def read_rows(sheet: str) -> list[list[int]]:
    """The table of requests as numbers."""
    rows = re.findall(r"^\| ([\d,]+) \| (.+?) files? \|$", sheet, re.MULTILINE)
    return [[int(n.replace(",", "")) for n in [first, *rest.split(" | ")]] for first, rest in rows]


def test_table_of_requests_adds_up(sheet: str) -> None:
    rows = read_rows(sheet)
    assert [row[0] for row in rows] == [10**4, 10**6, 10**7, 10**9]
    for images, parts, gets, puts, deletes, lists, files in rows:
        # 1,024 + 4,096 images in 128 parts; the other 4,880 fill 19 parts of 256, and 16 are left.
        assert parts == (128 + 20 if images == 10**4 else count_parts(images))
        assert gets == images + 2 * parts
        assert puts == 2 * parts
        assert deletes == parts
        assert lists == images // 1000
        assert files == -(-parts // 500)


def test_manifest_has_500_parts_per_file(tmp_path: Path) -> None:
    folder = str(tmp_path)
    write_parts(cut_parts(make_sources(1001), 1), folder, Storage())
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("", {"GetObject": 2, "PutObject": 2, "DeleteObject": 1}),
        ("broken", {"GetObject": 2, "PutObject": 3, "DeleteObject": 1}),
    ],
    ids=["no errors", "errors"],
)
def test_requests_per_part_are_those_of_the_sheet(
    error: str, expected: dict[str, int], s3_bucket: str
) -> None:
    asked: list[str] = []
    files = RunFiles(s3_bucket, Storage())
    files.write_record({"run_id": "r"})

    def note(model: Any, **_: Any) -> None:
        asked.append(model.name)

    events = s3_objects.S3Objects(None, 5.0, 60.0, 5).client().meta.events
    events.register("before-parameter-build.s3", note)
    attempts = PartAttempts(s3_bucket, 0, Storage())
    attempts.begin()
    (source,) = make_sources(1)
    results = [ImageResult(source, 4, 4, error=error)]
    files.commit(0, results, run_id="r", is_first=attempts.is_first)
    attempts.end()
    events.unregister("before-parameter-build.s3", note)
    assert Counter(asked) == expected


def read_price(sheet: str, sign: str) -> list[float]:
    (values,) = re.findall(rf"^\| {sign} \| .* \| \**([^|]*?)\** \|$", sheet, re.MULTILINE)
    return [float(number) for number in re.findall(r"[\d.]+", values.partition("measure")[0])]


def test_dollars_follow_from_the_prices(sheet: str) -> None:
    (on_demand, spot), (get,), (put,) = (read_price(sheet, sign) for sign in "PGW")
    (rate,) = re.findall(r"\*\*assumed (\d+)\*\*", sheet)
    gpu = [price * 1e6 / (3600 * int(rate)) for price in (on_demand, spot)]
    requests = 1000 * get + put + (2 * put + 2 * get)
    terms = "{:.3f} + {:.3f} + {:.3f} + {:.4f} = **{:.2f} on demand**"
    text = terms.format(gpu[0], 1000 * get, put, 2 * put + 2 * get, gpu[0] + requests)
    assert text in sheet
    assert f"{gpu[1]:.3f} + {requests:.3f} = **{gpu[1] + requests:.2f} on spot**" in sheet
    # A thousand times as many images; parts are 1,000,314.
    total = [1000 * gpu[0], 1e9 / 1000 * get, 2 * 1_000_314 / 1000 * put, 1e6 / 1000 * put]
    assert "GPU {:.0f}, GET {:.0f}, PUT {:.0f}, LIST {:.0f} on demand".format(*total) in sheet
    (nat,) = read_price(sheet, "T'")
    assert f"{200_000 * nat:,.0f} more" in sheet


@pytest.mark.parametrize(
    ("images_per_s", "shown"),
    [
        (11_000, "25 h at 11,000 keys/s"),
        # 1,000 keys take 91 ms at 11,000 per second; with 100 ms more, 5,238 keys pass per second.
        (1000 / (1000 / 11_000 + 0.1), "53 h where a page takes 100 ms"),
        (66_000, "4.2 h at 66,000 images/s"),
        # Merging: 1e9 / 19,000 / 3,600 = 14.6.
        (19_000, "15 h at 19,000 images/s"),
    ],
)
def test_hours_follow_from_the_rates(images_per_s: float, shown: str, sheet: str) -> None:
    number = shown.partition(" ")[0]
    digits = len(number.partition(".")[2])
    assert f"{1e9 / images_per_s / 3600:.{digits}f}" == number
    assert shown in sheet


def test_reading_and_cutting_take_turns_in_one_thread(sheet: str) -> None:
    assert round(1 / (1 / 115_000 + 1 / 156_000), -3) == 66_000
    assert "(115,000 to read, 156,000 to cut and write)" in sheet


def list_submitted(sheet: str) -> list[list[str]]:
    """Arguments after `python jobs/VERB.py` of each submission, the verb first."""
    text = re.sub(r"\\\n\s*", "", sheet)
    found = re.findall(r"python jobs/(\w+)\.py (.*)", text)
    return [[verb, *shlex.split(arguments)] for verb, arguments in found]


def test_submitted_commands_are_ours(
    sheet: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    classes = {"infer": InferJob, "train": TrainJob}
    submitted = list_submitted(sheet)
    assert [verb for verb, *_ in submitted] == ["infer", "train"]
    for verb, *arguments in submitted:
        assert (repository / "jobs" / f"{verb}.py").is_file()
        assert load_from_argv(classes[verb], arguments)


def test_files_that_are_named_exist(sheet: str, repository: Path) -> None:
    named = set(re.findall(r"cluster/(?:iam|kuberay)/[\w.-]+\.\w+|jobs/[\w/.-]+\.\w+", sheet))
    assert len(named) >= 8
    assert [name for name in sorted(named) if not (repository / name).is_file()] == []


@pytest.mark.parametrize("backbone", ["ResNet18FPN", "ResNet50FPN"])
def test_sheet_of_training_counts_the_weights_that_are_exchanged(
    sheet: str, backbone: BackboneName
) -> None:
    model = RetinaNet(backbone=backbone, num_classes=80, norm="frozen_bn")
    number = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    said = re.search(rf"{backbone}[^:;]*?([\d,]+)(?: weights)?: ([\d.]+) MB", sheet)
    assert said is not None
    assert int(said[1].replace(",", "")) == number
    assert float(said[2]) == round(4 * number / 1e6, 1)


def expect_efficiency(num_gpus: int, gigabits: float) -> float:
    """The sheet's formula: what one GPU's step is of the step of many."""
    step, size, bucket = 16 / 350, 4 * 37_915_572, 25 * 2**20
    nodes, local = -(-num_gpus // 8), min(num_gpus, 8)
    between = 2 * (nodes - 1) / nodes * size / (gigabits * 1e9 / 8)
    exchange = 2 * (local - 1) / local * size / 450e9 + between
    backward = max(2 / 3 * step + bucket / size * exchange, exchange)
    hops = 2 * math.log2(num_gpus) * 15e-6
    return step / (step / 3 + (backward if num_gpus > 1 else 2 / 3 * step) + hops)


def test_sheet_of_training_follows_its_formula(sheet: str) -> None:
    rows = re.findall(r"^\| (\d+) \| ((?:[01]\.\d{3}(?: \| )?){4}) \|$", sheet, re.MULTILINE)
    assert [int(number) for number, _ in rows] == [1, 8, 16, 64, 256, 1000]
    for number, values in rows:
        expected = [expect_efficiency(int(number), speed) for speed in (25, 100, 400, 3200)]
        assert [float(value) for value in values.split(" | ")] == [round(e, 3) for e in expected]
