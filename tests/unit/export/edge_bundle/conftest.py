from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from retinaray.artifact import ModelCard
from retinaray.detector.postprocess import Detections
from retinaray.detector.retinanet import RetinaNet
from retinaray.export.edge_bundle.bundle import BundleSettings, build_bundle
from retinaray.export.edge_bundle.self_test import Sample, candidate_settings
from retinaray.export.onnx_graph import ExportSettings, export_onnx
from retinaray.export.targets import TARGETS
from retinaray.inference.onnxruntime_backend import OnnxRuntimePredictor

STUB = Path(__file__).parent / "deepstream_stub"
FLOAT, HALF, INT8, INT32 = range(4)
NUM_CANDIDATES = 300


class CallerLayer(ctypes.Structure):
    """`CallerLayer` of parser_caller.cpp."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("buffer", ctypes.c_void_p),
        ("data_type", ctypes.c_int32),
        ("num_dims", ctypes.c_uint32),
        ("dims", ctypes.c_uint32 * 8),
    )


@dataclass(frozen=True)
class Layer:
    """One output of an engine as nvinfer shows it to a parser."""

    name: str
    values: np.ndarray | None
    data_type: int
    dims: tuple[int, ...]


class ParserLibrary:
    """The parser's shared library, called as nvinfer calls it."""

    def __init__(self, parser: Path, caller: Path) -> None:
        self.path = parser
        self.caller = caller
        self._name = str(parser).encode()
        self._library = ctypes.CDLL(str(caller))
        self.object_size = self._library.object_size()

    def parse(
        self,
        layers: Sequence[Layer],
        *,
        network: tuple[int, int],
        thresholds: Sequence[float],
        num_classes: int | None = None,
    ) -> list[list[float]] | None:
        """Rows of class, left, top, width, height, score, rotation; None: refused."""
        # Held here, so that the memory lives as long as the call.
        arrays = [np.ascontiguousarray(layer.values) for layer in layers]
        records = (CallerLayer * len(layers))()
        for record, layer, array in zip(records, layers, arrays, strict=True):
            record.name = layer.name.encode()
            record.buffer = None if layer.values is None else array.ctypes.data
            record.data_type = layer.data_type
            record.num_dims = len(layer.dims)
            record.dims[: len(layer.dims)] = layer.dims
        limits = (ctypes.c_float * len(thresholds))(*thresholds)
        found = np.zeros((4096, 7), np.float32)
        count = self._library.call_parser(
            self._name,
            records,
            len(layers),
            ctypes.c_uint32(network[1]),
            ctypes.c_uint32(network[0]),
            ctypes.c_uint32(len(thresholds) if num_classes is None else num_classes),
            limits,
            len(thresholds),
            found.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            len(found),
        )
        assert count != -1, "the library or its function could not be loaded"
        assert count != -3, "the parser refused, and left objects behind"
        return None if count == -2 else found[:count].tolist()


@pytest.fixture(scope="session")
def compiler() -> str:
    path = shutil.which("g++")
    if path is None or shutil.which("make") is None:
        pytest.skip("needs g++ and make to compile the DeepStream parser, which are absent")
    return path


@pytest.fixture(scope="session")
def templates() -> Path:
    """The folder of the files that a bundle is filled from."""
    return Path(str(resources.files("retinaray.export.edge_bundle"))) / "templates"


@pytest.fixture(scope="session")
def compile_parser(
    compiler: str, templates: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., ParserLibrary]:
    """Build the parser with its own Makefile: compile_parser("-DSTUB_ROTATION", includes=...)."""

    @functools.cache
    def build(*defines: str, includes: Path = STUB) -> ParserLibrary:
        folder = tmp_path_factory.mktemp("parser")
        for name in ("retinanet_parser.cpp", "Makefile"):
            shutil.copy(templates / name, folder)
        strict = "-O1 -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror"
        subprocess.run(
            ["make", f"INCLUDES={includes}", f"CXXFLAGS={' '.join([strict, *defines])}"],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        caller = folder / "caller.so"
        command = [compiler, "-std=c++17", "-O0", "-Wall", "-fPIC", "-shared", *defines]
        command += ["-isystem", str(includes), str(STUB / "parser_caller.cpp"), "-o", str(caller)]
        subprocess.run([*command, "-ldl"], check=True, capture_output=True)
        return ParserLibrary(folder / "libretinanet_parser.so", caller)

    return build


@pytest.fixture(scope="session")
def parser(compile_parser: Callable[..., ParserLibrary]) -> ParserLibrary:
    """The parser for the newest DeepStream."""
    return compile_parser("-DSTUB_ROTATION")


@pytest.fixture(scope="session")
def make_layers() -> Callable[..., list[Layer]]:
    """Outputs of an engine: make_layers(boxes [D, 4], scores [D], labels [D], half=False)."""

    def make(
        boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, *, half: bool = False
    ) -> list[Layer]:
        kind, number = (HALF, np.float16) if half else (FLOAT, np.float32)
        count = len(scores)
        return [
            Layer("boxes", np.asarray(boxes, number), kind, (count, 4)),
            Layer("scores", np.asarray(scores, number), kind, (count,)),
            Layer("labels", np.asarray(labels, np.int32), INT32, (count,)),
        ]

    return make


@pytest.fixture(scope="session")
def float_onnx(tiny_card: ModelCard, tiny_model: RetinaNet) -> bytes:
    """`tiny_model` as DeepStream gets it: float32 input, 300 candidates."""
    settings = ExportSettings(canvas=tiny_card.canvas, input_type="float32", top_k=NUM_CANDIDATES)
    return export_onnx(tiny_model, tiny_card, settings)


@pytest.fixture(scope="session")
def samples(float_onnx: bytes) -> list[Sample]:
    """Two images of noise and what the exported file proposes in them."""
    settings = candidate_settings(NUM_CANDIDATES)
    predictor = OnnxRuntimePredictor(float_onnx, uri="model.onnx", settings=settings)
    rng = np.random.default_rng(3)
    made = []
    for number in range(2):
        canvas = rng.integers(0, 256, (*predictor.canvas, 3), dtype=np.uint8)
        images = torch.from_numpy(canvas).permute(2, 0, 1)[None]
        found: Detections = predictor.predict(images)[0]
        made.append(Sample(f"noise {number}", canvas, found))
    return made


@pytest.fixture(scope="session")
def deepstream_include() -> Path:
    """Folder of the real DeepStream headers."""
    folder = os.environ.get("DEEPSTREAM_INCLUDE", "")
    if not folder:
        pytest.skip("needs DeepStream's own headers: set DEEPSTREAM_INCLUDE to their folder")
    return Path(folder)


@pytest.fixture(scope="session")
def jetpack6() -> BundleSettings:
    """An Orin with JetPack 6, FP32."""
    return BundleSettings(
        target=TARGETS["jetpack6"], precision="fp32", batch=(1, 4, 8), frame=(720, 1280)
    )


@pytest.fixture(scope="session")
def bundle_files(
    float_onnx: bytes, samples: list[Sample], jetpack6: BundleSettings
) -> dict[str, bytes]:
    """A complete bundle."""
    return build_bundle(float_onnx, jetpack6, samples)


@pytest.fixture(scope="session")
def fix_batch() -> Callable[[bytes, int], bytes]:
    """An exported file that takes one batch size only: fix_batch(content, 2)."""

    def fix(content: bytes, batch: int) -> bytes:
        model = onnx.load_model_from_string(content)
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = batch
        return bytes(model.SerializeToString())

    return fix
