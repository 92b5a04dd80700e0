"""Pictures of a run: which, where, what they show, and that none can end a run."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retinaray.assembly.run_pictures import PictureSettings, RunPictures
from retinaray.errors import MissingFileError, StorageError
from retinaray.inference.hash_choice import NUM_HASHES, is_chosen, limit_for_share
from retinaray.inference.pipeline import ImageResult, ImageSource
from retinaray.inference.run_files import RunFiles
from retinaray.storage import Storage

NAMES: dict[int | str, str] = {7: "car", 17: "../traffic light"}
BLUE, RED = (0, 0, 250), (250, 0, 0)


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(str(tmp_path / "run"), Storage())


def paint(height: int = 400, width: int = 600, kind: str = "PNG") -> bytes:
    """Blue, with a red block in rows 100 to 199, columns 300 to 349 of 400 x 600."""
    pixels = np.full((400, 600, 3), BLUE, dtype=np.uint8)
    pixels[100:200, 300:350] = RED
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST).save(stream, kind)
    return stream.getvalue()


def make_result(image_id: int | str = 1, *detections: dict[str, Any]) -> ImageResult:
    source = ImageSource(image_id, f"s3://b/{image_id}.png")
    return ImageResult(source, height=400, width=600, detections=detections)


def make_pictures(
    files: RunFiles, read: Callable[[str], bytes] = lambda _: paint(), **settings: Any
) -> RunPictures:
    chosen = PictureSettings(**({"limit": NUM_HASHES} | settings))
    return RunPictures(files, chosen, names=NAMES, read=read)


def list_names(files: RunFiles) -> list[str]:
    uris = files.storage.list_files(files.root)
    return [uri.removeprefix(files.root + "/") for uri in uris]


def open_picture(files: RunFiles, name: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(files.storage.read_bytes(f"{files.root}/{name}"))))


def assert_close(pixel: np.ndarray, colour: tuple[int, int, int]) -> None:
    assert np.abs(pixel.astype(int) - colour).max() < 40, (pixel, colour)


def assert_drawn(row: np.ndarray, edges: list[int]) -> None:
    """Lines of the first class's colour cross a blue row at these columns and nowhere else."""
    # JPEG smears the colours of thin lines.
    drawn = np.flatnonzero(row[:, 0] > 120)
    assert {edges[np.abs(np.array(edges) - column).argmin()] for column in drawn} == set(edges)
    assert all(np.abs(np.array(edges) - column).min() < 8 for column in drawn)


BOX = {"category_id": 7, "bbox": [300.0, 100.0, 50.0, 100.0], "score": 0.9}


def test_follow_passes_all_results_on_and_draws_the_chosen(files: RunFiles) -> None:
    results = [make_result(number) for number in range(40)]
    limit = limit_for_share(0.2)
    pictures = make_pictures(files, limit=limit, seed=5)
    assert list(pictures.follow(results)) == results
    chosen = [r.source.image_id for r in results if is_chosen(r.source, limit=limit, seed=5)]
    assert 0 < len(chosen) < 20
    assert sorted(list_names(files)) == sorted(f"overlays/{number}.jpg" for number in chosen)


def test_follow_draws_nothing_by_default_and_of_errors(files: RunFiles) -> None:
    def refuse(uri: str) -> bytes:
        raise AssertionError(f"read {uri}")

    results = [make_result(1), ImageResult(ImageSource(2, "x"), error="broken", exception="E")]
    assert list(make_pictures(files, refuse, limit=0).follow(results)) == results
    assert list(make_pictures(files, refuse).follow(results[1:])) == results[1:]
    assert list_names(files) == []


@pytest.mark.parametrize(
    ("max_side_px", "shape", "scale"),
    [
        # 400 is below the 640 which overlays enlarge to: twice.
        (1600, (800, 1200), 2.0),
        # 600 wide shrinks to 300, 200 high; 640 / 200 rounded up is 4.
        (300, (800, 1200), 2.0),
    ],
)
def test_overlays_show_boxes_where_they_are(
    files: RunFiles, max_side_px: int, shape: tuple[int, int], scale: float
) -> None:
    box = {**BOX, "bbox": [100.0, 200.0, 80.0, 120.0]}
    list(make_pictures(files, max_side_px=max_side_px).follow([make_result(1, box)]))
    picture = open_picture(files, "overlays/1.jpg")
    assert picture.shape == (*shape, 3)
    row = picture[round(280 * scale)]
    assert_drawn(row, [round(100 * scale), round(180 * scale)])
    assert_close(picture[round(150 * scale), round(325 * scale)], RED)


def test_overlays_keep_boxes_in_place_when_a_large_jpeg_is_decoded_smaller(files: RunFiles) -> None:
    content = paint(3200, 4800, "JPEG")
    box = {**BOX, "bbox": [800.0, 1600.0, 640.0, 960.0]}  # eight times as large
    list(make_pictures(files, lambda _: content, max_side_px=1200).follow([make_result(1, box)]))
    picture = open_picture(files, "overlays/1.jpg")
    assert picture.shape == (800, 1200, 3)
    assert_drawn(picture[560], [200, 360])
    assert_close(picture[300, 650], RED)


def test_crops_are_cut_with_a_margin_and_sorted_by_category(files: RunFiles) -> None:
    other = {"category_id": 17, "bbox": [0.0, 0.0, 10.0, 600.0], "score": 0.5}
    results = [make_result("a/b", BOX, other)]
    list(make_pictures(files, has_crops=True).follow(results))
    names = [name for name in list_names(files) if name.startswith("crops")]
    assert len(names) == 2
    assert names[1].startswith("crops/traffic_light-")
    assert names[0].startswith("crops/car/a_b-")
    assert [name[-6:] for name in names] == ["_1.jpg", "_2.jpg"]
    # A tenth of 50 x 100 on each side: columns 295 to 355, rows 90 to 210.
    crop = open_picture(files, names[0])
    assert crop.shape == (120, 60, 3)
    assert_close(crop[60, 30], RED)
    assert_close(crop[5, 30], BLUE)
    # Cut at the edges of the image: columns 0 to 11, rows 0 to 400.
    assert open_picture(files, names[1]).shape == (400, 11, 3)


@pytest.mark.parametrize(
    ("bbox", "shape"),
    [
        ([599.99, 399.99, 0.01, 0.01], (1, 1)),
        ([10.4, 10.4, 0.01, 0.01], (1, 1)),
        ([0.0, 0.0, 600.0, 400.0], (80, 120)),
        ([0.0, 200.0, 600.0, 0.5], (1, 120)),
    ],
)
def test_crops_of_any_size_become_pictures(
    files: RunFiles, bbox: list[float], shape: tuple[int, int]
) -> None:
    results = [make_result(1, {**BOX, "bbox": bbox})]
    list(make_pictures(files, has_crops=True, max_side_px=120).follow(results))
    assert open_picture(files, "crops/car/1_1.jpg").shape == (*shape, 3)


def test_crops_are_the_best_so_many(files: RunFiles) -> None:
    boxes = [{**BOX, "score": 1 - number / 100} for number in range(30)]
    list(make_pictures(files, has_crops=True, max_crops=4).follow([make_result(1, *boxes)]))
    crops = [name for name in list_names(files) if name.startswith("crops")]
    assert crops == [f"crops/car/1_{number}.jpg" for number in (1, 2, 3, 4)]


def test_pictures_are_the_same_bytes_each_time(files: RunFiles) -> None:
    contents = []
    for _ in range(2):
        list(make_pictures(files, has_crops=True).follow([make_result(1, BOX)]))
        contents.append([files.storage.read_bytes(f"{files.root}/{n}") for n in list_names(files)])
    assert len(contents[0]) == 2
    assert contents[0] == contents[1]


@pytest.mark.parametrize("content", [b"no image", b""])
def test_a_picture_that_cannot_be_drawn_is_logged(
    files: RunFiles, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    def read(uri: str) -> bytes:
        if not content:
            raise MissingFileError(f"cannot read {uri}: no such file")
        return content

    results = [make_result(1, BOX)]
    assert list(make_pictures(files, read).follow(results)) == results
    assert "no picture of s3://b/1.png: " in caplog.text
    assert list_names(files) == []


def test_a_place_that_cannot_be_written_is_an_error(files: RunFiles) -> None:
    Path(files.root).parent.mkdir(exist_ok=True)
    Path(files.root).write_bytes(b"a file where the folder should be")
    with pytest.raises(StorageError, match=r"cannot write .*overlays/1\.jpg"):
        list(make_pictures(files).follow([make_result(1)]))


def test_settings_of_reading_hold_for_pictures(
    files: RunFiles, caplog: pytest.LogCaptureFixture
) -> None:
    list(make_pictures(files, max_pixels=400 * 600 - 1).follow([make_result(1)]))
    assert "no picture of s3://b/1.png: " in caplog.text
