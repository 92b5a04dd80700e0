"""The parser for nvinfer: hand-made outputs through dlopen, and random ones under sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

STUB = Path(__file__).parent / "deepstream_stub"
NETWORK = (100, 200)  # height, width
THRESHOLDS = [0.5, 0.25]

BOXES = np.array(
    [
        [10, 20, 50, 80],
        [-5, -8, 30, 40],  # reaches out at the top left
        [150, 60, 260, 130],  # and at the bottom right
        [10, 20, 50, 80],  # class 0 at its threshold
        [10, 20, 50, 80],  # class 1 just above its own
        [60, 70, 60, 90],  # no width
        [60, 70, 50, 90],  # right before left
        [210, 20, 230, 80],  # beside the network
    ]
)
SCORES = np.array([0.875, 0.75, 0.625, 0.5, 0.28125, 0.9, 0.9, 0.9])
LABELS = np.array([0, 1, 0, 0, 1, 0, 0, 0])
# class, left, top, width, height, score, rotation
EXPECTED = [
    [0, 10, 20, 40, 60, 0.875, 0],
    [1, 0, 0, 30, 40, 0.75, 0],
    # A little above the lower edge, which nvinfer's rounding must not pass.
    [0, 150, 60, 50, 40 - 1 / 1024, 0.625, 0],
    [1, 10, 20, 40, 60, 0.28125, 0],
]


@pytest.mark.parametrize(
    ("defines", "size"), [((), 24), (("-DSTUB_ROTATION",), 28)], ids=["6.2", "9.0"]
)
def test_parser_gives_the_boxes_when_built_for_either_struct(
    compile_parser: Callable[..., Any],
    make_layers: Callable[..., Any],
    defines: tuple[str, ...],
    size: int,
) -> None:
    library = compile_parser(*defines)
    assert library.object_size == size
    for half in (False, True):
        layers = make_layers(BOXES, SCORES, LABELS, half=half)
        assert library.parse(layers, network=NETWORK, thresholds=THRESHOLDS) == EXPECTED
        # By name, wherever the engine puts them.
        assert library.parse(layers[::-1], network=NETWORK, thresholds=THRESHOLDS) == EXPECTED


def test_parser_compiles_against_the_real_headers(
    compile_parser: Callable[..., Any], make_layers: Callable[..., Any], deepstream_include: Path
) -> None:
    library = compile_parser("-DREAL_HEADERS", "-Wno-error", includes=deepstream_include)
    layers = make_layers(BOXES, SCORES, LABELS)
    assert library.parse(layers, network=NETWORK, thresholds=THRESHOLDS) == EXPECTED


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_parser_drops_what_is_not_finite(
    parser: Any, make_layers: Callable[..., Any], bad: float
) -> None:
    boxes, scores, labels = BOXES[:2].astype(float), SCORES[:2].copy(), LABELS[:2]
    for corner in range(4):
        broken = boxes.copy()
        broken[0, corner] = bad
        layers = make_layers(broken, scores, labels)
        found = parser.parse(layers, network=NETWORK, thresholds=THRESHOLDS)
        assert found == EXPECTED[1:2]
    scores[0] = bad
    layers = make_layers(boxes, scores, labels)
    assert parser.parse(layers, network=NETWORK, thresholds=THRESHOLDS) == EXPECTED[1:2]


@pytest.mark.parametrize("label", [-1, 2, 2**31 - 1, -(2**31)])
def test_parser_drops_classes_that_are_not_configured(
    parser: Any, make_layers: Callable[..., Any], label: int
) -> None:
    layers = make_layers(BOXES[:2], SCORES[:2], np.array([label, 1]))
    assert parser.parse(layers, network=NETWORK, thresholds=THRESHOLDS) == EXPECTED[1:2]


def test_parser_widens_every_half(parser: Any, make_layers: Callable[..., Any]) -> None:
    # All 31743 positive finite numbers of 16 bits, smallest first, as right edges of boxes.
    halves = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16)
    found: list[float] = []
    for start in range(0, len(halves), 3840):
        part = halves[start : start + 3840]
        boxes = np.zeros((len(part), 4), np.float16)
        boxes[:, 2], boxes[:, 3] = part, 1
        layers = make_layers(boxes, np.full(len(part), 0.75), np.zeros(len(part)), half=True)
        rows = parser.parse(layers, network=(1, 1 << 20), thresholds=THRESHOLDS)
        found += [row[3] for row in rows]
    assert found == halves.astype(np.float64).tolist()


@pytest.mark.parametrize("frame_height", [480, 720, 1080, 1200, 2160])
def test_parser_keeps_boxes_above_the_lower_edge_of_the_frame(
    parser: Any, make_layers: Callable[..., Any], frame_height: int
) -> None:
    # nvinfer drops a box when top / ratio + height / ratio, in single precision, passes the frame.
    tops = np.linspace(0, 511, 3000, dtype=np.float32)
    boxes = np.stack([tops * 0, tops, tops * 0 + 9, tops * 0 + 600], axis=1)
    layers = make_layers(boxes, np.full(len(tops), 0.75), np.zeros(len(tops)))
    rows = np.array(parser.parse(layers, network=(512, 512), thresholds=[0.5]), np.float32)
    assert len(rows) == len(tops)
    ratio = 512 / frame_height
    top, height = (np.float32(rows[:, column] / ratio) for column in (2, 4))
    assert (top + height <= frame_height).all()
    assert (top + height > frame_height - 0.01).all()


Change = Callable[[list[Any]], list[Any]]


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: layers[1:],
        lambda layers: layers[:2],
        lambda layers: [replace(layers[0], name="Boxes"), *layers[1:]],
        lambda layers: [replace(layers[0], values=None), *layers[1:]],
        lambda layers: [*layers[:2], replace(layers[2], data_type=0)],
        lambda layers: [*layers[:2], replace(layers[2], data_type=4)],
        lambda layers: [layers[0], replace(layers[1], data_type=3), layers[2]],
        lambda layers: [replace(layers[0], data_type=2), *layers[1:]],
        lambda layers: [replace(layers[0], dims=(8, 5)), *layers[1:]],
        lambda layers: [replace(layers[0], dims=(32,)), *layers[1:]],
        lambda layers: [replace(layers[0], dims=(1, 8, 4)), *layers[1:]],
        lambda layers: [replace(layers[0], dims=(7, 4)), *layers[1:]],
        lambda layers: [*layers[:2], replace(layers[2], dims=(9,))],
        lambda layers: [*layers[:2], replace(layers[2], dims=(8, 1))],
        lambda layers: [replace(layer, dims=(0, *layer.dims[1:])) for layer in layers],
        lambda layers: [replace(layer, dims=(3841, *layer.dims[1:])) for layer in layers],
        lambda layers: [replace(layer, dims=(2**31, *layer.dims[1:])) for layer in layers],
        lambda layers: [replace(layer, dims=(2**32 - 1, *layer.dims[1:])) for layer in layers],
    ],
)
def test_parser_refuses_outputs_that_are_not_ours(
    parser: Any, make_layers: Callable[..., Any], change: Change
) -> None:
    layers = change(make_layers(BOXES, SCORES, LABELS))
    assert parser.parse(layers, network=NETWORK, thresholds=THRESHOLDS) is None


@pytest.mark.parametrize(
    ("network", "thresholds", "num_classes"),
    [((0, 200), [0.5], 1), ((100, 0), [0.5], 1), (NETWORK, [0.5], 0), (NETWORK, [0.5], 2)],
    ids=["no height", "no width", "no classes", "too few thresholds"],
)
def test_parser_refuses_settings_that_say_too_little(
    parser: Any,
    make_layers: Callable[..., Any],
    network: tuple[int, int],
    thresholds: list[float],
    num_classes: int,
) -> None:
    layers = make_layers(BOXES, SCORES, LABELS)
    found = parser.parse(layers, network=network, thresholds=thresholds, num_classes=num_classes)
    assert found is None


def test_parser_tells_each_fault_once(
    parser: Any,
    make_layers: Callable[..., Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # Under another name it is loaded once more, and has told nothing yet.
    library = type(parser)(shutil.copy(parser.path, tmp_path / "other.so"), parser.caller)
    layers = make_layers(BOXES, SCORES, LABELS)
    for _ in range(3):
        library.parse(layers[1:], network=NETWORK, thresholds=THRESHOLDS)
        library.parse(layers, network=NETWORK, thresholds=[])
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2
    assert "boxes: the engine has no output of this name" in told[0]
    assert "num-detected-classes" in told[1]


def test_parser_survives_random_outputs(compiler: str, templates: Path, tmp_path: Path) -> None:
    program = tmp_path / "fuzz"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = [compiler, "-std=c++17", "-O1", "-g", *sanitizers, "-DSTUB_ROTATION"]
    command += ["-isystem", str(STUB), str(STUB / "parser_fuzz.cpp")]
    build = subprocess.run(
        [*command, str(templates / "retinanet_parser.cpp"), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot find" in build.stderr:
        pytest.skip("needs the sanitizers' libraries (libasan, libubsan), which are absent")
    assert build.returncode == 0, build.stderr
    run = subprocess.run(
        [str(program), "8000"], capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == 0, run.stdout + run.stderr
    accepted, refused, objects = (int(word) for word in run.stdout.split() if word.isdigit())
    # Both ways were taken, and not only with empty results.
    assert accepted > 2000
    assert refused > 2000
    assert objects > 5000
