"""Parts and errors of a run, on a local disk and on a real S3 server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from retinaray.errors import StorageError
from retinaray.inference.pipeline import ImageResult, ImageSource
from retinaray.inference.run_files import PartReceipt, RunFiles, RunTotals
from retinaray.storage import MissingFileError, Storage


@pytest.fixture(params=["local", "s3"])
def run_files(request: pytest.FixtureRequest, tmp_path: Path) -> RunFiles:
    root = request.getfixturevalue("s3_bucket") if request.param == "s3" else str(tmp_path / "run")
    return RunFiles(root, Storage())


def make_results(part: int, *, errors: tuple[int, ...] = (2,)) -> list[ImageResult]:
    """Four images of a part; the first has two detections, the second none."""
    results = []
    for index in range(4):
        number = 4 * part + index
        source = ImageSource(number if part % 2 else f"é/{number}", f"s3://b/{number} ü.jpg")
        if index in errors:
            results.append(ImageResult(source, error=f"broken\n{number}", exception="ImageError"))
            continue
        found = [{"category_id": 7, "bbox": [1.0, 2, 3, 4.5], "score": 0.5 + number / 100}] * 2
        detections = tuple(found[: 2 if index == 0 else 0])
        results.append(ImageResult(source, height=10, width=20, detections=detections))
    return results


def read_all(files: RunFiles) -> dict[str, bytes]:
    uris = files.storage.list_files(files.root)
    return {uri.removeprefix(files.root): files.storage.read_bytes(uri) for uri in uris}


def read_lines(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.splitlines()]


def test_commit_writes_a_part_and_its_errors(run_files: RunFiles) -> None:
    receipt = run_files.commit(3, make_results(3))
    assert receipt == PartReceipt(part=3, num_images=3, num_errors=1, num_detections=2)
    written = read_all(run_files)
    assert sorted(written) == ["/errors/part-000000003.jsonl", "/parts/part-000000003.jsonl"]
    rows = read_lines(written["/parts/part-000000003.jsonl"])
    assert [row["image_id"] for row in rows] == [12, 13, 15]
    assert rows[0]["uri"] == "s3://b/12 ü.jpg"
    assert (rows[0]["height"], rows[0]["width"]) == (10, 20)
    assert rows[0]["detections"][0] == {
        "category_id": 7,
        "bbox": [1.0, 2, 3, 4.5],
        "score": 0.62,
    }
    assert read_lines(written["/errors/part-000000003.jsonl"]) == [
        {
            "image_id": 14,
            "uri": "s3://b/14 ü.jpg",
            "reason": "broken\n14",
            "exception": "ImageError",
        }
    ]
    assert run_files.list_committed() == {3}


def test_a_part_does_not_count_before_all_its_images_are_there(run_files: RunFiles) -> None:
    def die_halfway() -> Any:
        yield from make_results(0)[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_files.commit(0, die_halfway())
    assert run_files.list_committed() == set()
    assert read_all(run_files) == {}


def test_commit_removes_the_errors_of_an_earlier_attempt(run_files: RunFiles) -> None:
    run_files.commit(0, make_results(0, errors=(0, 1)))
    run_files.commit(0, make_results(0, errors=()))
    assert list(read_all(run_files)) == ["/parts/part-000000000.jsonl"]
    # Whoever knows that nobody was here before need not ask the store.
    run_files.commit(1, make_results(1, errors=(0,)))
    run_files.commit(1, make_results(1, errors=()), is_first=True)
    assert "/errors/part-000000001.jsonl" in read_all(run_files)
    run_files.commit(1, make_results(1, errors=()))
    run_files.commit(0, make_results(0, errors=(3,)))
    assert [error["reason"] for error in run_files.read_errors(9)] == ["broken\n3"]
    assert run_files.merge(1) == RunTotals(1, 3, 1, 2)


def test_list_committed_takes_only_files_of_parts(run_files: RunFiles) -> None:
    run_files.commit(12, make_results(12))
    run_files.commit(999_999_999, make_results(0))
    for name in ("parts/part-12.jsonl", "parts/notes.txt", "parts/part-000000001.jsonl.bak"):
        run_files.storage.write_bytes(f"{run_files.root}/{name}", b"")
    assert run_files.list_committed() == {12, 999_999_999}


def test_merge_is_the_same_whatever_the_order_of_writing(run_files: RunFiles) -> None:
    outcomes = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 2, 3, 0, 1, 0]):
        for part in order:
            run_files.commit(part, make_results(part, errors=(part,)))
        totals = run_files.merge(4)
        outcomes.append((totals, read_all(run_files)))
        run_files.remove_all()
        assert read_all(run_files) == {}
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[0][0] == RunTotals(num_parts=4, num_images=12, num_errors=4, num_detections=6)


def test_merge_writes_coco_results_and_the_image_table(run_files: RunFiles) -> None:
    for part in (1, 0):
        run_files.commit(part, make_results(part))
    run_files.merge(2)
    detections = json.loads(run_files.storage.read_bytes(run_files.detections))
    assert [found["image_id"] for found in detections] == ["é/0", "é/0", 4, 4]
    assert set(detections[0]) == {"image_id", "category_id", "bbox", "score"}
    images = json.loads(run_files.storage.read_bytes(run_files.images))
    assert [image["image_id"] for image in images] == ["é/0", "é/1", "é/3", 4, 5, 7]
    assert images[0] == {"image_id": "é/0", "uri": "s3://b/0 ü.jpg", "height": 10, "width": 20}


def test_merge_gives_valid_json_when_nothing_was_found(run_files: RunFiles) -> None:
    run_files.commit(0, make_results(0, errors=(0, 1, 2, 3)))
    assert run_files.merge(1) == RunTotals(1, 0, 4, 0)
    assert json.loads(run_files.storage.read_bytes(run_files.detections)) == []
    assert json.loads(run_files.storage.read_bytes(run_files.images)) == []


def test_merge_refuses_when_a_part_is_missing_and_leaves_no_result(run_files: RunFiles) -> None:
    run_files.commit(0, make_results(0))
    run_files.commit(2, make_results(2))
    with pytest.raises(MissingFileError, match=r"part-000000001\.jsonl"):
        run_files.merge(3)
    assert not run_files.storage.exists(run_files.detections)
    assert not run_files.storage.exists(run_files.images)


def test_read_errors_gives_the_first_ones_in_the_order_of_the_images(run_files: RunFiles) -> None:
    for part in (2, 0, 1):
        run_files.commit(part, make_results(part, errors=(1, 3)))
    assert [error["reason"] for error in run_files.read_errors(3)] == [
        "broken\n1",
        "broken\n3",
        "broken\n5",
    ]
    assert len(run_files.read_errors(100)) == 6


def test_the_record_comes_back_as_it_was_written(run_files: RunFiles) -> None:
    assert run_files.read_record() is None
    record = {"run_id": "ü", "job": {"size": [64, 96], "batch": None}, "num_parts": 2**40}
    run_files.write_record(record)
    assert run_files.read_record() == record


@pytest.mark.parametrize("content", [b"", b'{"run_id": ', b"[1]", b"\xff\xfe"])
def test_read_record_refuses_a_foreign_file(tmp_path: Path, content: bytes) -> None:
    files = RunFiles(str(tmp_path), Storage())
    files.storage.write_bytes(files.record, content)
    with pytest.raises(StorageError, match=r"run\.json: expected a run's record"):
        files.read_record()


def test_remove_all_deletes_the_run_and_nothing_else(run_files: RunFiles) -> None:
    run_files.commit(0, make_results(0))
    run_files.write_record({})
    run_files.merge(1)
    run_files.storage.write_bytes(f"{run_files.manifest}/parts-0.parquet", b"x")
    run_files.storage.write_bytes(run_files.success, b"")
    run_files.storage.write_bytes(f"{run_files.root}/mine.txt", b"keep")
    run_files.remove_all()
    assert read_all(run_files) == {"/mine.txt": b"keep"}


def test_commit_writes_nothing_when_another_run_has_begun(run_files: RunFiles) -> None:
    run_files.write_record({"run_id": "mine"})
    run_files.commit(0, make_results(0), run_id="mine")
    before = read_all(run_files)
    run_files.write_record({"run_id": "later"})
    with pytest.raises(StorageError, match="part 1 belongs to run mine, which is here no longer"):
        run_files.commit(1, make_results(1), run_id="mine")
    after = read_all(run_files)
    assert {name for name in after if name in before} == set(before)
    assert run_files.list_committed() == {0}
