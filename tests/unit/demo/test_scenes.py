from __future__ import annotations

import importlib.util
import itertools
import json
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retinaray.demo import scenes
from retinaray.demo.scenes import SceneSet, make_scene_set
from retinaray.errors import DatasetError

SPLITS = ("train", "val", "test")


def read(scene_set: SceneSet, split: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(getattr(scene_set, split).read_text())
    return content


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SceneSet:
    """A set large enough for statistics: about 500 digits."""
    folder = tmp_path_factory.mktemp("scenes")
    return make_scene_set(folder, num_train=48, num_val=8, num_test=8, seed=3)


@pytest.fixture(scope="module")
def boxes_xywh(made: SceneSet) -> np.ndarray:
    return np.array([a["bbox"] for split in SPLITS for a in read(made, split)["annotations"]])


def test_make_scene_set_writes_the_images_it_lists(made: SceneSet) -> None:
    listed = [image for split in SPLITS for image in read(made, split)["images"]]
    assert sorted(image["file_name"] for image in listed) == sorted(
        path.name for path in made.images.iterdir()
    )
    assert len(listed) == 64
    for image in listed:
        with Image.open(made.images / image["file_name"]) as opened:
            assert (opened.format, opened.mode, opened.size) == ("JPEG", "RGB", (320, 320))
            assert (image["width"], image["height"]) == opened.size


def test_make_scene_set_numbers_from_one_as_coco_does(made: SceneSet) -> None:
    for split in SPLITS:
        content = read(made, split)
        annotations = content["annotations"]
        image_ids = [image["id"] for image in content["images"]]
        assert image_ids == list(range(1, len(image_ids) + 1))
        assert [a["id"] for a in annotations] == list(range(1, len(annotations) + 1))
        assert [c["id"] for c in content["categories"]] == list(range(1, 11))
        assert content["categories"][7]["name"] == "digit-7"
        assert all(a["area"] == a["bbox"][2] * a["bbox"][3] for a in annotations)
        assert all(a["iscrowd"] == 0 for a in annotations)
        per_image = Counter(a["image_id"] for a in annotations)
        assert set(per_image) == set(image_ids)
        assert 4 <= min(per_image.values()) <= max(per_image.values()) <= 12
    assert made.num_boxes == sum(len(read(made, split)["annotations"]) for split in SPLITS)


def test_make_scene_set_keeps_boxes_inside_the_image(boxes_xywh: np.ndarray) -> None:
    assert boxes_xywh[:, :2].min() >= 0
    assert (boxes_xywh[:, :2] + boxes_xywh[:, 2:]).max() <= 320
    assert boxes_xywh[:, 2:].min() >= 2


def test_make_scene_set_covers_the_sizes_log_uniformly(boxes_xywh: np.ndarray) -> None:
    longer = boxes_xywh[:, 2:].max(axis=1)
    assert 8 <= longer.min() <= 9
    assert 140 <= longer.max() <= 160
    # Log-uniform over 8..160: the quartiles are 8 * 20 ** (1/4, 1/2, 3/4) = 16.9, 35.8, 75.7.
    # Large digits that find no room shrink, which lowers the upper ones a little.
    assert np.percentile(longer, [25, 50, 75]) == pytest.approx([16.9, 35.8, 75.7], rel=0.25)


def test_make_scene_set_gives_each_digit_about_as_often(made: SceneSet) -> None:
    counts = Counter(a["category_id"] for s in SPLITS for a in read(made, s)["annotations"])
    shares = np.array([counts[number] for number in range(1, 11)]) / made.num_boxes
    # Four standard deviations of a fair draw: sqrt(0.1 * 0.9 / 500) = 0.0134.
    assert shares == pytest.approx([0.1] * 10, abs=0.054)


def test_make_scene_set_lets_digits_overlap_only_a_little(made: SceneSet) -> None:
    for split in SPLITS:
        content = read(made, split)
        for image in content["images"]:
            found = [a["bbox"] for a in content["annotations"] if a["image_id"] == image["id"]]
            for (x1, y1, w1, h1), (x2, y2, w2, h2) in itertools.combinations(found, 2):
                canvas = np.zeros((320, 320), dtype=np.uint8)
                canvas[y1 : y1 + h1, x1 : x1 + w1] += 1
                canvas[y2 : y2 + h2, x2 : x2 + w2] += 1
                assert (canvas == 2).sum() <= 0.2 * (canvas > 0).sum()


def test_make_scene_set_scores_one_against_itself_in_pycocotools(
    made: SceneSet, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = COCO(str(made.train))
    annotations = read(made, "train")["annotations"]
    evaluation = COCOeval(truth, truth.loadRes([{**a, "score": 0.9} for a in annotations]), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    # AP, AP50, AP75, and AP of small, medium and large objects
    assert evaluation.stats[:6] == pytest.approx([1.0] * 6)


def test_make_scene_set_repeats_itself_for_a_seed(tmp_path: Path) -> None:
    counts = {"num_train": 3, "num_val": 1, "num_test": 2, "image_size": (96, 128)}
    folders = [tmp_path / name for name in ("first", "again", "longer", "other")]
    seeds = (5, 5, 5, 6)
    for folder, seed in zip(folders, seeds, strict=True):
        more = {"num_train": 5} if folder.name == "longer" else {}
        make_scene_set(folder, **{**counts, **more}, seed=seed)  # type: ignore[arg-type]
    first, again, longer, other = (
        {path.name: path.read_bytes() for path in folder.rglob("*.*")} for folder in folders
    )
    assert len(first) == 6 + 3
    assert again == first
    assert {name: longer[name] for name in first if name != "train.json"} == {
        name: content for name, content in first.items() if name != "train.json"
    }
    assert not set(other.values()) & set(first.values())


def test_make_scene_set_takes_height_before_width(tmp_path: Path) -> None:
    made = make_scene_set(tmp_path, num_train=2, num_val=0, num_test=0, image_size=(80, 200))
    content = read(made, "train")
    assert [(i["height"], i["width"]) for i in content["images"]] == [(80, 200)] * 2
    with Image.open(made.images / "train-00001.jpg") as opened:
        assert opened.size == (200, 80)
    boxes = np.array([a["bbox"] for a in content["annotations"]])
    assert (boxes[:, 0] + boxes[:, 2]).max() <= 200
    assert (boxes[:, 1] + boxes[:, 3]).max() <= 80
    assert boxes[:, 2:].max() <= 40
    assert read(made, "val")["images"] == []


def test_make_scene_set_asks_the_network_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    assert make_scene_set(tmp_path, num_train=1, num_val=1, num_test=1).num_boxes >= 12


def test_make_scene_set_uses_no_sample_and_no_photo_twice_across_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, set[bytes]] = {split: set() for split in SPLITS}
    photos: dict[str, set[bytes]] = {split: set() for split in SPLITS}
    split = ""
    draw_digit, crop_background = scenes.draw_digit, scenes.crop_background

    def note_sample(sample: Any, size_px: float, rng: Any) -> Any:
        used[split].add(sample.tobytes())
        return draw_digit(sample, size_px, rng)

    def note_photo(photo: Image.Image, image_size: tuple[int, int], rng: Any) -> Any:
        photos[split].add(photo.tobytes())
        return crop_background(photo, image_size, rng)

    monkeypatch.setattr(scenes, "draw_digit", note_sample)
    monkeypatch.setattr(scenes, "crop_background", note_photo)
    for split in SPLITS:
        counts = {f"num_{name}": 8 * (name == split) for name in SPLITS}
        make_scene_set(tmp_path / split, image_size=(64, 64), **counts)
    for one, other in itertools.combinations(SPLITS, 2):
        assert not used[one] & used[other]
        assert not photos[one] & photos[other]
    assert min(len(samples) for samples in used.values()) >= 8 * 4 * 0.7
    assert min(len(found) for found in photos.values()) >= 2


def test_split_digit_samples_deals_out_every_sample_and_every_digit_alike() -> None:
    parts = scenes.split_digit_samples(0)
    assert sum(len(part.digits) for part in parts.values()) == 1797
    for split, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        counts = np.bincount(parts[split].digits, minlength=10)
        # scikit-learn has 174 to 183 samples of each digit
        assert counts.min() >= 174 * share - 1
        assert counts.max() <= 183 * share + 1
        assert parts[split].ink.min() == 0
        assert parts[split].ink.max() == 1


@pytest.mark.parametrize("grey", [0.0, 128.0, 255.0])
def test_paste_digits_gives_boxes_that_the_ink_touches(
    grey: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenes, "MIN_DIGITS", 1)
    monkeypatch.setattr(scenes, "MAX_DIGITS", 1)
    samples = scenes.split_digit_samples(0)["test"]
    background = np.full((200, 320, 3), grey, dtype=np.float32)
    num_cut_off = 0
    for seed in range(60):
        picture, truth = scenes.paste_digits(background, samples, np.random.default_rng(seed))
        [(_, (left, top, right, bottom))] = truth
        change = np.abs(picture - background).max(axis=2)
        inked = change > 0.4 * change.max()
        rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
        found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert found == pytest.approx((left, top, right, bottom), abs=1)
        # Nothing of note lies outside.
        outside = change.copy()
        outside[top:bottom, left:right] = 0
        assert outside.max() < 0.4 * change.max()
        num_cut_off += left == 0 or top == 0 or right == 320 or bottom == 200
    assert (background == grey).all()
    assert num_cut_off >= 1


def test_paste_digits_stands_out_from_every_photograph() -> None:
    samples = scenes.split_digit_samples(0)["train"]
    for names in scenes._PHOTOS.values():
        for name in names:
            rng = np.random.default_rng(0)
            background = scenes.crop_background(scenes.load_photo(name), (320, 320), rng)
            picture, truth = scenes.paste_digits(background, samples, rng)
            for _, (left, top, right, bottom) in truth:
                change = np.abs(picture - background)[top:bottom, left:right]
                assert change.max() >= 25


@pytest.mark.parametrize("size_px", [8.5, 12.0, 40.0, 159.5])
def test_draw_digit_keeps_its_size(size_px: float) -> None:
    samples = scenes.split_digit_samples(0)["train"]
    for number in range(20):
        ink = scenes.draw_digit(samples.ink[number], size_px, np.random.default_rng(number))
        rows, columns = np.nonzero(ink >= scenes.VISIBLE_INK)
        longer = max(np.ptp(rows), np.ptp(columns)) + 1
        assert abs(longer - size_px) <= 1
        assert ink.min() == 0
        assert ink.max() <= 1
        assert ink.max() > 0.8


def test_load_photo_gives_colour_pictures_of_useful_size() -> None:
    for name in ("china", "astronaut", "brick"):
        photo = scenes.load_photo(name)
        assert photo.mode == "RGB"
        assert min(photo.size) >= 300
    with pytest.raises(DatasetError, match=r"'sunflower'.*retinaray\[demo\]"):
        scenes.load_photo("sunflower")


def test_make_scene_set_refuses_wrong_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"counts of 0 or more.*'val': -1"):
        make_scene_set(tmp_path, num_train=1, num_val=-1, num_test=1)
    with pytest.raises(ValueError, match=r"64x64 px or more.*\(63, 320\)"):
        make_scene_set(tmp_path, num_train=1, num_val=1, num_test=1, image_size=(63, 320))


def test_make_scene_set_refuses_to_mix_with_an_earlier_set(made: SceneSet) -> None:
    with pytest.raises(DatasetError, match=r"no earlier images in .*delete or name another"):
        make_scene_set(made.images.parent, num_train=1, num_val=0, num_test=0)


def test_make_scene_set_names_the_extra_when_a_package_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DatasetError, match=r"package sklearn.*pip install 'retinaray\[demo\]'"):
        make_scene_set(tmp_path / "new", num_train=1, num_val=0, num_test=0)
    assert not (tmp_path / "new").exists()
