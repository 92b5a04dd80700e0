"""`load` and `Model.predict` find what the commands find, whatever form the images come in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import retinaray
from retinaray import ImageDetections, Model, cli
from retinaray.errors import (
    CheckpointError,
    ConfigError,
    ImageError,
    InferenceError,
    MissingFileError,
)
from retinaray.inference.onnx_card import replace_onnx_card
from retinaray.inference.onnx_contract import read_onnx_card
from retinaray.storage import Storage

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Model:
    before = torch.get_num_threads()
    loaded = retinaray.load(model_folder / "model.pth")
    torch.set_num_threads(before)
    return loaded


@pytest.fixture(scope="module")
def paths(model_folder: Path) -> list[Path]:
    """The six images, in the order of the COCO file."""
    return [model_folder / "data" / "images" / f"{number}.png" for number in range(1, 7)]


def to_coco(found: list[ImageDetections]) -> list[dict[str, object]]:
    return [entry for number, item in enumerate(found, start=1) for entry in item.to_coco(number)]


@pytest.mark.parametrize(
    ("name", "settings", "flags"),
    [
        ("model.pth", {"score_threshold": 0.3}, ["--score-threshold", "0.3"]),
        (
            "model.pth",
            {"score_threshold": 0.1, "nms": "agnostic", "nms_iou": 0.3, "size": (96, 128)},
            [
                "--score-threshold",
                "0.1",
                "--nms",
                "agnostic",
                "detection.nms_iou=0.3",
                "--size",
                "96",
                "128",
            ],
        ),
        ("model.onnx", {"score_threshold": 0.3}, ["--score-threshold", "0.3"]),
        (
            "model.onnx",
            {"score_threshold": 0.2, "backend": "onnxruntime", "max_detections": 5},
            ["--score-threshold", "0.2", "--backend", "onnxruntime", "--max-detections", "5"],
        ),
    ],
    ids=["torch", "torch-settings", "openvino", "onnxruntime"],
)
def test_predict_finds_what_evaluate_finds_to_the_last_digit(
    name: str,
    settings: dict[str, Any],
    flags: list[str],
    onnx_folder: Path,
    paths: list[Path],
    tmp_path: Path,
) -> None:
    output = tmp_path / "found.json"
    argv = ["--images", str(onnx_folder / "data" / "images"), "--quiet"]
    argv += ["--annotations", str(onnx_folder / "data" / "test.json"), "--output", str(output)]
    assert cli.main(["evaluate", str(onnx_folder / name), *argv, *flags]) == 0
    expected = json.loads(output.read_bytes())
    loaded = retinaray.load(onnx_folder / name, batch=4, **settings)
    assert to_coco(loaded.predict(paths)) == expected
    assert len(expected) > 10
    if "max_detections" in settings:
        assert max(Counter(entry["image_id"] for entry in expected).values()) == 5


def test_predict_finds_the_same_in_every_form_of_an_image(model: Model, paths: list[Path]) -> None:
    pixels = [np.asarray(Image.open(path)) for path in paths]
    expected = to_coco(model.predict(paths))
    forms: list[Callable[[int], Any]] = [
        lambda i: str(paths[i]),
        lambda i: paths[i].read_bytes(),
        lambda i: Image.open(paths[i]),
        lambda i: pixels[i],
        lambda i: torch.from_numpy(pixels[i].copy()).permute(2, 0, 1),
        lambda i: paths[i].as_uri(),
    ]
    for form in forms:
        assert to_coco(model.predict(form(i) for i in range(6))) == expected
    assert to_coco(model.predict([form(i) for i, form in enumerate(forms)])) == expected


def test_predict_reads_images_and_models_from_s3(
    model: Model, model_folder: Path, paths: list[Path], s3_bucket: str
) -> None:
    storage = Storage()
    storage.write_bytes(f"{s3_bucket}/m.pth", (model_folder / "model.pth").read_bytes())
    storage.write_bytes(f"{s3_bucket}/a b.png", paths[1].read_bytes())
    remote = retinaray.load(f"{s3_bucket}/m.pth")
    (found,) = remote.predict(f"{s3_bucket}/a b.png")
    assert found.image == f"{s3_bucket}/a b.png"
    assert found.to_coco(1) == model.predict(paths[1])[0].to_coco(1)
    assert remote.uri == f"{s3_bucket}/m.pth"


def test_predict_keeps_the_order_beyond_what_is_read_ahead(model: Model, paths: list[Path]) -> None:
    def stream() -> Iterator[Path | bytes]:
        for number in range(60):
            yield paths[number % 6] if number % 2 else paths[number % 6].read_bytes()

    single = [item.to_coco(0) for item in model.predict(paths)]
    found = model.predict(stream())
    assert [item.to_coco(0) for item in found] == single * 10
    assert [item.image for item in found[:4]] == [
        *("images[0]", str(paths[1]), "images[2]", str(paths[3]))
    ]


def test_predict_gives_a_list_for_one_image_and_for_none(model: Model, paths: list[Path]) -> None:
    (one,) = model.predict(paths[2])
    assert (one.height, one.width, one.image) == (96, 144, str(paths[2]))
    assert one.names == tuple(f"class {index}" for index in one.class_indices)
    assert set(one.category_ids) <= {7, 17, 27}
    assert model.predict([]) == []


def test_predict_with_a_threshold_finds_what_a_model_loaded_with_it_finds(
    model: Model, model_folder: Path, paths: list[Path]
) -> None:
    strict = retinaray.load(model_folder / "model.pth", score_threshold=0.6)
    expected = to_coco(strict.predict(paths))
    assert to_coco(model.predict(paths, score_threshold=0.6)) == expected
    assert 0 < len(expected) < len(to_coco(model.predict(paths)))
    assert all(min(item.scores, default=1) > 0.6 for item in strict.predict(paths))


@pytest.mark.parametrize("threshold", [0.29, -1.0, 1.0, float("nan")])
def test_predict_refuses_a_threshold_below_that_of_the_model(
    model: Model, paths: list[Path], threshold: float
) -> None:
    with pytest.raises(ConfigError, match=rf"score_threshold={threshold}: expected .* from 0\.3,"):
        model.predict(paths, score_threshold=threshold)


def test_predict_raises_what_is_wrong_with_an_image_and_names_it(
    model: Model, paths: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(paths[0].read_bytes()[:200])
    with pytest.raises(ImageError, match=r"broken\.png: cannot decode PNG"):
        model.predict([paths[0], broken])
    with pytest.raises(ImageError, match=r"^images\[1\]: expected JPEG, PNG"):
        model.predict([paths[0], b"text"])
    with pytest.raises(ImageError, match=r"^images\[0\]: a PIL image of mode F"):
        model.predict(Image.new("F", (9, 9)))
    with pytest.raises(MissingFileError, match=r"absent\.png"):
        model.predict(tmp_path / "absent.png")


def test_predict_keeps_the_place_of_an_image_that_cannot_be_read(
    model: Model, paths: list[Path], tmp_path: Path
) -> None:
    absent = tmp_path / "absent.png"
    found = model.predict([paths[0], absent, b"text", paths[1]], on_error="keep")
    alone = [item.to_coco(0) for item in model.predict(paths[:2])]
    assert [item.to_coco(0) for item in found] == [alone[0], [], [], alone[1]]
    assert [bool(item.error) for item in found] == [False, True, True, False]
    assert str(absent) in found[1].error
    assert found[2].error.startswith("images[2]: expected JPEG")
    assert (found[2].height, found[2].width) == (0, 0)


@pytest.mark.parametrize("on_error", ["raise", "keep"])
def test_predict_refuses_what_is_no_image_whatever_errors_cost(
    model: Model, paths: list[Path], on_error: Any
) -> None:
    with pytest.raises(TypeError, match=r"images\[1\]: expected a path.*got int"):
        model.predict([paths[0], 3], on_error=on_error)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"images\[0\]: expected RGB .*\[9, 9\]"):
        model.predict(np.zeros((9, 9), np.uint8), on_error=on_error)


def test_predict_refuses_an_unknown_way_with_errors(model: Model) -> None:
    with pytest.raises(ValueError, match="expected 'raise' or 'keep', got 'skip'"):
        model.predict([], on_error="skip")  # type: ignore[arg-type]


def test_predict_answers_several_threads(model: Model, paths: list[Path]) -> None:
    # One by one, because sums round differently in a batch.
    expected = [model.predict(path)[0].to_coco(0) for path in paths]
    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(lambda path: model.predict(path)[0].to_coco(0), paths * 3))
    assert answers == expected * 3


def test_draw_reads_the_file_again(model: Model, paths: list[Path]) -> None:
    (found,) = model.predict(paths[2])
    drawn = found.draw()
    # 96x144: the shorter side is enlarged to at least 640, 7 times.
    assert drawn.size == (144 * 7, 96 * 7)
    plain = Image.open(paths[2]).resize(drawn.size, Image.Resampling.BICUBIC)
    changed = (np.asarray(drawn) != np.asarray(plain)).any(axis=2)
    assert 0 < changed.mean() < 1


def test_model_tells_what_it_is(model: Model, model_folder: Path) -> None:
    path = model_folder / "model.pth"
    assert repr(model) == f"Model({path}: 3 classes, 64x96 (height x width), torch)"
    assert model.names == ("class 0", "class 1", "class 2")
    assert model.score_thresholds == (0.3, 0.3, 0.3)
    assert (model.backend, model.reason) == ("torch", "a .pth file is run by torch")
    assert model.card.run_id == "20260101T000000Z-abc"


def test_load_takes_thresholds_per_class_from_the_file(
    onnx_folder: Path, paths: list[Path], tmp_path: Path, tiny_onnx: bytes
) -> None:
    card, _ = read_onnx_card(tiny_onnx, uri="model.onnx")
    tuned = card.__class__(**{**vars(card), "score_thresholds": (0.3, 0.9, 0.5)})
    (tmp_path / "tuned.onnx").write_bytes(replace_onnx_card(tiny_onnx, tuned, uri="model.onnx"))
    found = retinaray.load(tmp_path / "tuned.onnx").predict(paths)
    plain = retinaray.load(onnx_folder / "model.onnx").predict(paths)
    lowest = np.array([0.3, 0.9, 0.5])
    for one, other in zip(found, plain, strict=True):
        kept = other.scores > lowest[other.class_indices]
        np.testing.assert_array_equal(one.scores, other.scores[kept])
    with pytest.raises(ConfigError, match=r"score_threshold=0\.5: expected a number from 0\.9"):
        retinaray.load(tmp_path / "tuned.onnx").predict(paths, score_threshold=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score_threshold": 1.5, "nms_iou": 0}, r"score_threshold=1\.5(.|\n)*nms_iou=0"),
        ({"workers": 4, "write__draw": 3}, r"^workers, write\.draw: a setting of a run over many"),
        ({"backnd": "torch"}, r"backnd=torch: no such key; nearest: backend"),
        ({"model": "other.pth"}, r"^model: a setting of a run"),
        ({"batch": 0}, r"batch=0 \(--batch\): expected a whole number from 1 to 1024"),
    ],
)
def test_load_refuses_wrong_settings(
    model_folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        retinaray.load(model_folder / "model.pth", **settings)


def test_load_refuses_files_that_cannot_be_run(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.pth").write_bytes((model_folder / "model.pth").read_bytes()[:5000])
    (tmp_path / "engine.plan").write_bytes(b"plan")
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cut\.pth: not a readable weights file"):
        retinaray.load(tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"photo\.jpg: expected a model file"):
        retinaray.load(tmp_path / "photo.jpg")
    with pytest.raises(MissingFileError, match=r"absent\.pth"):
        retinaray.load(tmp_path / "absent.pth")
    with pytest.raises(InferenceError, match="cannot run weights files"):
        retinaray.load(model_folder / "model.pth", backend="openvino")
    if not torch.cuda.is_available():
        with pytest.raises(InferenceError, match="needs an NVIDIA GPU"):
            retinaray.load(tmp_path / "engine.plan")
