"""Training on windows of the resized images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retinaray.assembly.training import check_settings, make_loader, read_inputs
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import TrainJob
from retinaray.data.augmentation import AugmentSettings, Surroundings, draw_plan, move_boxes
from retinaray.errors import ConfigError

# Multiples of 32: the canvas of such images is as large as they are.
HEIGHT, WIDTH = 96, 192
# One small object near a corner, one in the middle.
BOXES = np.array([[4, 6, 12, 16], [96, 40, 110, 52]], dtype=np.float32)


def offsets_for(
    boxes_xyxy: np.ndarray,
    *,
    window: tuple[int, int],
    class_indices: np.ndarray | None = None,
) -> np.ndarray:
    """x and y of the windows of 400 draws on an image of 96x192 that is fitted to itself."""
    plans = [
        draw_plan(
            np.random.default_rng(seed),
            AugmentSettings(),
            height=HEIGHT,
            width=WIDTH,
            boxes_xyxy=boxes_xyxy,
            canvas_height=window[0],
            canvas_width=window[1],
            around=Surroundings((HEIGHT, WIDTH), class_indices),
        )
        for seed in range(400)
    ]
    assert {(plan.scaled_height, plan.scaled_width) for plan in plans} == {(HEIGHT, WIDTH)}
    return np.array([(plan.offset_x, plan.offset_y) for plan in plans])


def test_windows_keep_the_size_of_the_image_and_stay_inside() -> None:
    offsets = offsets_for(BOXES, window=(32, 48))
    assert offsets.min() >= 0
    assert (offsets <= (WIDTH - 48, HEIGHT - 32)).all()


def test_three_windows_in_four_hold_an_object_and_each_object_has_its_share() -> None:
    offsets = offsets_for(BOXES, window=(32, 48))
    centres = (BOXES[:, None, :2] + BOXES[:, None, 2:]) / 2
    holds = ((centres >= offsets) & (centres < offsets + np.array([48, 32]))).all(-1)
    # By chance the corner is held by 13 * 12 of the 145 * 65 windows, the middle by 48 * 32.
    expected = 0.75 + 0.25 * (13 * 12 + 48 * 32) / (145 * 65)
    assert holds.any(0).mean() == pytest.approx(expected, abs=0.06)
    assert holds[0].mean() == pytest.approx(0.375, abs=0.08)
    assert holds[1].mean() == pytest.approx(0.375 + 0.25 * 0.163, abs=0.08)


def test_rare_classes_are_seen_as_often_as_the_others_beside_them() -> None:
    # Nine objects of a class in a corner, one of another in the opposite one.
    crowd = np.array([[4 + i, 6, 12 + i, 16] for i in range(9)], dtype=np.float32)
    boxes = np.concatenate((crowd, np.array([[170, 80, 180, 90]], dtype=np.float32)))

    def share_that_holds_the_last(class_indices: np.ndarray | None) -> float:
        offsets = offsets_for(boxes, window=(32, 48), class_indices=class_indices)
        holds = ((offsets <= (175, 85)) & (offsets + np.array([48, 32]) > (175, 85))).all(-1)
        return float(holds.mean())

    assert share_that_holds_the_last(np.array([0] * 9 + [1])) == pytest.approx(0.375, abs=0.08)
    assert share_that_holds_the_last(np.zeros(10, dtype=np.int64)) == pytest.approx(0.1, abs=0.06)


def test_windows_of_an_image_without_objects_are_anywhere() -> None:
    offsets = offsets_for(np.zeros((0, 4), dtype=np.float32), window=(32, 48))
    assert offsets[:, 0].mean() == pytest.approx(72, abs=8)
    assert offsets[:, 1].mean() == pytest.approx(32, abs=4)
    assert (np.ptp(offsets, axis=0) > (130, 58)).all()


def test_a_window_as_large_as_the_image_is_the_image() -> None:
    assert (offsets_for(BOXES, window=(HEIGHT, WIDTH)) == 0).all()


def test_objects_that_a_window_cuts_to_a_stump_are_ignored() -> None:
    plan = draw_plan(
        np.random.default_rng(0),
        AugmentSettings(),
        height=HEIGHT,
        width=WIDTH,
        boxes_xyxy=np.array([[0, 0, WIDTH, HEIGHT]], dtype=np.float32),
        canvas_height=32,
        canvas_width=48,
        around=Surroundings((HEIGHT, WIDTH)),
    )
    boxes, kept, is_stump = move_boxes(
        plan, np.array([[0, 0, WIDTH, HEIGHT]], dtype=np.float32), canvas_height=32, canvas_width=48
    )
    assert boxes.tolist() == [[0, 0, 48, 32]]
    assert kept.tolist() == is_stump.tolist() == [True]


def write_set(folder: Path) -> Path:
    """Two images of noise of 96x192 with an object each."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in (1, 2):
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append(
            {"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH}
        )
        x, y = 40 * number, 20 * number
        annotations.append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": [x, y, 10, 10]}
        )
    for annotation in annotations:
        annotation |= {"area": 100, "iscrowd": 0}
    tree = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "part"}],
    }
    (folder / "train.json").write_text(json.dumps(tree))
    return folder / "train.json"


def make_job(annotations: Path, windows: tuple[int, int], **augment: object) -> TrainJob:
    still = {"flip": 0, "crop": 0, "jitter": (HEIGHT, HEIGHT)}
    still |= {name: 0 for name in ("brightness", "contrast", "saturation", "hue")}
    data = {
        "images": str(annotations.parent),
        "annotations": str(annotations),
        "resize": HEIGHT,
        "max_size": WIDTH,
        "windows": windows,
    }
    tree = {
        "output": "m.pth",
        "data": data,
        "augment": {**still, **augment},
        "run": {"batch": 2, "epochs": 20},
    }
    return load_from_dict(TrainJob, tree, {})


def find_window(pixels: np.ndarray, photograph: np.ndarray) -> np.ndarray:
    """x and y at which a photograph of noise shows some pixels."""
    rows, columns = np.nonzero((photograph == pixels[0, 0]).all(-1))
    height, width, _ = pixels.shape
    found = [
        (column, row)
        for row, column in zip(rows, columns, strict=True)
        if np.array_equal(photograph[row : row + height, column : column + width], pixels)
    ]
    assert len(found) == 1
    return np.array(found[0])


def test_batches_are_windows_of_the_photographs_and_boxes_follow(tmp_path: Path) -> None:
    job = make_job(write_set(tmp_path), (32, 64))
    inputs = read_inputs(job)
    assert inputs.canvas == (HEIGHT, WIDTH), "validation and the model keep the whole image"
    loader = make_loader(
        job, inputs, rank=0, world_size=1, first_step=0, num_processes=0, pin_memory=False
    )
    num_objects = 0
    for batch in loader:
        assert batch.images.shape == (2, 3, 32, 64)
        for row, image_id in enumerate(batch.image_ids):
            photograph = np.asarray(Image.open(tmp_path / f"{image_id}.png"))
            window = batch.images[row].permute(1, 2, 0).numpy()
            corner = find_window(window, photograph) - np.array([40, 20]) * int(image_id)
            whole = np.array([*-corner, *(10 - corner)])
            boxes = batch.boxes_xyxy[row][batch.is_valid[row]].numpy()
            expected = whole.clip(0, [64, 32, 64, 32])
            if (expected[2:] > expected[:2]).all():
                np.testing.assert_array_equal(boxes, [expected])
                num_objects += 1
            else:
                assert len(boxes) == 0
    assert 20 < num_objects < 40


def test_windows_larger_than_the_images_are_refused(tmp_path: Path) -> None:
    job = make_job(write_set(tmp_path), (256, 64))
    with pytest.raises(ConfigError, match=r"windows=\(256, 64\) .* larger than the 96x192"):
        check_settings(job, read_inputs(job))
