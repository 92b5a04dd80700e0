"""What is in a bundle: the same bytes each time, keys that DeepStream has, hashes that hold."""

from __future__ import annotations

import ast
import configparser
import json
import logging
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retinaray.artifact import ModelCard, hash_content
from retinaray.data.coco import Category, CategoryTable
from retinaray.detector.postprocess import Detections
from retinaray.errors import ExportError
from retinaray.export.edge_bundle.bundle import (
    BundleSettings,
    build_bundle,
    write_bundle,
)
from retinaray.export.edge_bundle.deepstream_files import (
    DeepStreamSetting,
    parse_version,
    write_deepstream_files,
)
from retinaray.export.edge_bundle.manifest import check_bundle
from retinaray.export.edge_bundle.self_test import Sample
from retinaray.export.edge_bundle.template_text import fill_template, quote_shell
from retinaray.export.mixed_precision import to_fp16
from retinaray.export.targets import TARGETS

FILES = {
    "LICENSE",
    "Makefile",
    "README.md",
    "SHA256SUMS",
    "build_engine.sh",
    "config_infer_primary.txt",
    "deepstream_app.txt",
    "deepstream_kitti.txt",
    "kitti/.keep",
    "labels.txt",
    "manifest.json",
    "model.onnx",
    "retinanet_parser.cpp",
    "selftest.py",
    "selftest/000.ppm",
    "selftest/001.ppm",
    "selftest/expected.json",
}

# Of nvinfer's gstnvinfer_property_parser.h.
INFER_KEYS = {
    "batch-size",
    "cluster-mode",
    "crop-objects-to-roi-boundary",
    "custom-lib-path",
    "gie-unique-id",
    "gpu-id",
    "infer-dims",
    "labelfile-path",
    "maintain-aspect-ratio",
    "model-color-format",
    "model-engine-file",
    "net-scale-factor",
    "network-mode",
    "network-type",
    "num-detected-classes",
    "onnx-file",
    "output-blob-names",
    "parse-bbox-func-name",
    "process-mode",
    "scaling-filter",
    "strongly-typed",
    "symmetric-padding",
}
STRONG = {"network-mode": "0", "strongly-typed": "1", "onnx-file": "model.onnx"}
CLASS_KEYS = {"pre-cluster-threshold", "nms-iou-threshold", "topk"}
# Of deepstream-app's deepstream_config_file_parser.c and deepstream_app_config_parser.c.
APP_KEYS = {
    "application": {
        "enable-perf-measurement",
        "perf-measurement-interval-sec",
        "gie-kitti-output-dir",
    },
    "source0": {"enable", "type", "uri", "gpu-id"},
    "streammux": {
        "gpu-id",
        "batch-size",
        "batched-push-timeout",
        "live-source",
        "width",
        "height",
        "enable-padding",
    },
    "primary-gie": {"enable", "gpu-id", "gie-unique-id", "batch-size", "interval", "config-file"},
    "tracker": {
        "enable",
        "tracker-width",
        "tracker-height",
        "gpu-id",
        "ll-lib-file",
        "ll-config-file",
        "display-tracking-id",
    },
    "osd": {"enable", "border-width", "text-size", "text-color", "text-bg-color"},
    "tiled-display": {"enable"},
    "sink0": {"enable", "type", "sync", "qos"},
    "sink1": {
        "enable",
        "type",
        "container",
        "codec",
        "enc-type",
        "sync",
        "bitrate",
        "output-file",
    },
}


def read_config(content: bytes) -> configparser.ConfigParser:
    config = configparser.ConfigParser(interpolation=None, comment_prefixes=("#",))
    config.optionxform = str  # type: ignore[assignment]
    config.read_string(content.decode())
    return config


@pytest.fixture
def setting() -> DeepStreamSetting:
    return DeepStreamSetting(
        target="jetpack7",
        version="9.1",
        precision="fp16",
        is_strongly_typed=True,
        engine_name="model_b4_fp16.engine",
        onnx_name="model.onnx",
        batch=(1, 4),
        frame=(1080, 1920),
    )


def test_build_bundle_gives_the_same_bytes_each_time(
    float_onnx: bytes,
    samples: list[Sample],
    jetpack6: BundleSettings,
    bundle_files: dict[str, bytes],
) -> None:
    assert set(bundle_files) == FILES
    assert list(bundle_files) == sorted(FILES)
    assert build_bundle(float_onnx, jetpack6, samples) == bundle_files


def test_build_bundle_leaves_no_placeholder(bundle_files: dict[str, bytes]) -> None:
    for name, content in bundle_files.items():
        if not name.endswith((".onnx", ".ppm")):
            assert not re.findall(r"@[A-Z_]+@", content.decode()), name


@pytest.mark.parametrize(
    ("name", "kind", "flags", "deepstream"),
    [
        ("jetpack5", "fp32", "--fp16", "6.3"),
        ("jetpack6", "fp16", "--stronglyTyped", "7.1"),
        ("jetpack7", "fp16", "--stronglyTyped", "9.2"),
        ("deepstream-dgpu", "fp16", "--stronglyTyped", "9.2"),
    ],
)
def test_build_bundle_serves_every_device_with_deepstream(
    float_onnx: bytes,
    samples: list[Sample],
    name: str,
    kind: str,
    flags: str,
    deepstream: str,
) -> None:
    content = to_fp16(float_onnx) if kind == "fp16" else float_onnx
    settings = BundleSettings(TARGETS[name], "fp16", (1, 2, 2))
    files = build_bundle(content, settings, samples[:1])
    script = files["build_engine.sh"]
    subprocess.run(["bash", "-n"], input=script, check=True)
    assert f"FLAGS=('{flags}'".encode() in script
    manifest = json.loads(files["manifest.json"])
    assert (manifest["target"], manifest["deepstream"]) == (name, deepstream)
    readme = files["README.md"].decode()
    assert manifest["engine"] in readme
    assert ("nvpmodel" in readme) is name.startswith("jetpack")
    assert ("Jetson Linux" in readme) is name.startswith("jetpack")
    assert f"DeepStream {deepstream}" in readme


def test_manifest_says_what_the_bundle_is(
    float_onnx: bytes, bundle_files: dict[str, bytes]
) -> None:
    manifest = json.loads(bundle_files["manifest.json"])
    assert manifest["target"] == "jetpack6"
    assert manifest["precision"] == "fp32"
    assert manifest["model"]["run_id"] == "20260101T000000Z-abc"
    assert manifest["model"]["sha256"] == hash_content(float_onnx)
    assert manifest["model"]["num_candidates"] == 300
    assert set(manifest["files"]) == FILES - {"manifest.json", "SHA256SUMS"}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == hash_content(bundle_files[name])
        assert entry["bytes"] == len(bundle_files[name])


def test_sums_are_what_coreutils_reads(bundle_files: dict[str, bytes], tmp_path: Path) -> None:
    write_bundle(bundle_files, tmp_path / "bundle")
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    subprocess.run(command, cwd=tmp_path / "bundle", check=True)
    assert len(bundle_files["SHA256SUMS"].splitlines()) == len(FILES) - 1


def test_check_bundle_names_every_file_that_changed(
    bundle_files: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    write_bundle(bundle_files, folder)
    (folder / "model_b8_fp32.engine").write_bytes(b"made on the device")
    assert check_bundle(folder)["target"] == "jetpack6"
    (folder / "labels.txt").write_text("else\n")
    (folder / "selftest" / "001.ppm").unlink()
    message = r"2 of 15 files .*labels.txt \(another SHA-256\), selftest/001.ppm \(No such file"
    with pytest.raises(ExportError, match=message):
        check_bundle(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "FileNotFoundError"),
        (b"{", "JSONDecodeError"),
        (b"[]", "TypeError"),
        (b'{"files": {}}', "KeyError"),
        (b'{"files": {"a": 1}, "format": "x"}', "TypeError"),
        (b'{"files": {}, "format": "x"}', "expected format 'retinaray-edge-bundle-1', found 'x'"),
    ],
)
def test_check_bundle_refuses_what_is_no_bundle(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ExportError, match=message):
        check_bundle(tmp_path)


def test_write_bundle_replaces_bundles_only(bundle_files: dict[str, bytes], tmp_path: Path) -> None:
    write_bundle(bundle_files, tmp_path / "new")
    write_bundle(bundle_files, tmp_path / "new")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    with pytest.raises(ExportError, match="photos: expected no such folder, or an earlier bundle"):
        write_bundle(bundle_files, tmp_path / "photos")


def test_infer_config_has_only_keys_of_nvinfer(bundle_files: dict[str, bytes]) -> None:
    config = read_config(bundle_files["config_infer_primary.txt"])
    assert set(config["property"]) <= INFER_KEYS
    groups = [name for name in config.sections() if name != "property"]
    assert groups == ["class-attrs-all", "class-attrs-0", "class-attrs-1", "class-attrs-2"]
    for name in groups:
        assert set(config[name]) == CLASS_KEYS
    # nvinfer takes a comment behind a value for part of the value.
    assert not [value for group in config.values() for value in group.values() if "#" in value]


def test_infer_config_says_what_the_network_needs(bundle_files: dict[str, bytes]) -> None:
    config = read_config(bundle_files["config_infer_primary.txt"])
    values = config["property"]
    assert values["infer-dims"] == "3;64;96"
    assert values["batch-size"] == "8"
    manifest = json.loads(bundle_files["manifest.json"])
    digest = manifest["model"]["sha256"][:8]
    assert values["model-engine-file"] == f"model_{digest}_b8_fp32.engine" == manifest["engine"]
    assert values["num-detected-classes"] == "3"
    assert values["net-scale-factor"] == "1.0"
    assert values["model-color-format"] == "0"
    assert values["maintain-aspect-ratio"] == "1"
    assert values["symmetric-padding"] == "0"
    assert values["scaling-filter"] == "1"
    assert values["crop-objects-to-roi-boundary"] == "1"
    assert values["cluster-mode"] == "2"
    assert values["parse-bbox-func-name"] == "NvDsInferParseRetinaNet"
    assert values["custom-lib-path"] == "libretinanet_parser.so"
    assert b"libretinanet_parser.so:" in bundle_files["Makefile"]


def test_infer_config_has_the_thresholds_of_each_class(
    tiny_card: ModelCard, setting: DeepStreamSetting
) -> None:
    card = replace(tiny_card, score_thresholds=(0.3, 0.05, 0.625), nms_iou=0.45, max_detections=50)
    config = read_config(write_deepstream_files(card, setting)["config_infer_primary.txt"])
    for index, threshold in enumerate(card.score_thresholds):
        group = config[f"class-attrs-{index}"]
        assert float(group["pre-cluster-threshold"]) == threshold
        assert float(group["nms-iou-threshold"]) == 0.45
        assert group["topk"] == "50"
    assert config["class-attrs-all"]["pre-cluster-threshold"] == "0.05"


@pytest.mark.parametrize(
    ("version", "precision", "is_strong", "expected"),
    [
        # It could not be told which layers stay FP32.
        ("6.3", "fp16", False, {"network-mode": "2"}),
        ("6.3", "fp32", False, {"network-mode": "0", "onnx-file": "model.onnx"}),
        # From a Q/DQ file nvinfer would silently build FP16.
        ("6.3", "int8", False, {"network-mode": "1"}),
        # Without strongly-typed it would build a typed file with types of its own choice.
        ("7.1", "fp16", True, {"network-mode": "2"}),
        ("8.0", "int8", True, {"network-mode": "1"}),
        ("7.1", "fp32", True, {"network-mode": "0", "onnx-file": "model.onnx"}),
        ("9.0", "fp16", True, STRONG),
        ("9.2", "int8", True, STRONG),
        ("10.0", "fp32", True, STRONG),
    ],
)
def test_infer_config_lets_nvinfer_build_only_the_same_engine(
    tiny_card: ModelCard,
    setting: DeepStreamSetting,
    version: str,
    precision: str,
    is_strong: bool,
    expected: dict[str, str],
) -> None:
    setting = replace(setting, version=version, precision=precision, is_strongly_typed=is_strong)
    config = read_config(write_deepstream_files(tiny_card, setting)["config_infer_primary.txt"])
    keys = ("network-mode", "strongly-typed", "onnx-file")
    found = {key: config["property"][key] for key in keys if key in config["property"]}
    assert found == expected


def test_infer_config_follows_the_suppression_of_the_model(
    tiny_card: ModelCard, setting: DeepStreamSetting
) -> None:
    card = replace(tiny_card, nms_kind="none")
    config = read_config(write_deepstream_files(card, setting)["config_infer_primary.txt"])
    assert config["property"]["cluster-mode"] == "4"
    assert "nms-iou-threshold" not in config["class-attrs-0"]
    with pytest.raises(ExportError, match="nms_kind='agnostic': nvinfer suppresses"):
        write_deepstream_files(replace(tiny_card, nms_kind="agnostic"), setting)


@pytest.mark.parametrize("name", ["deepstream_app.txt", "deepstream_kitti.txt"])
def test_app_config_has_only_keys_of_deepstream_app(
    bundle_files: dict[str, bytes], name: str
) -> None:
    config = read_config(bundle_files[name])
    assert set(config.sections()) == set(APP_KEYS)
    for section, keys in APP_KEYS.items():
        assert set(config[section]) <= keys
    assert config["primary-gie"]["config-file"] in bundle_files
    assert (config["streammux"]["batch-size"], config["primary-gie"]["batch-size"]) == ("1", "8")
    # The muxer must leave scaling to nvinfer.
    assert (config["streammux"]["width"], config["streammux"]["height"]) == ("1280", "720")
    assert config["streammux"]["enable-padding"] == "0"


def test_app_config_for_kitti_writes_every_frame(bundle_files: dict[str, bytes]) -> None:
    config = read_config(bundle_files["deepstream_kitti.txt"])
    folder = config["application"]["gie-kitti-output-dir"]
    assert f"{folder}/.keep" in bundle_files
    assert config["primary-gie"]["interval"] == "0"
    assert config["tracker"]["enable"] == "0"
    assert config["sink0"]["sync"] == "0"
    assert (
        "gie-kitti-output-dir" not in read_config(bundle_files["deepstream_app.txt"])["application"]
    )


def test_labels_are_lines_that_deepstream_reads_back(
    tiny_card: ModelCard, setting: DeepStreamSetting
) -> None:
    table = CategoryTable((Category(1, "red; cell"), Category(2, "a\nb"), Category(3, "a b")))
    card = replace(tiny_card, categories=table)
    lines = write_deepstream_files(card, setting)["labels.txt"].decode().splitlines()
    assert lines == ["red, cell", "a b", "a b (3)"]


def test_sample_images_are_the_canvases(
    samples: list[Sample], bundle_files: dict[str, bytes]
) -> None:
    for index, sample in enumerate(samples):
        content = bundle_files[f"selftest/{index:03d}.ppm"]
        head = b"P6\n96 64\n255\n"
        assert content.startswith(head)
        pixels = np.frombuffer(content[len(head) :], np.uint8).reshape(64, 96, 3)
        np.testing.assert_array_equal(pixels, sample.canvas)


def test_expected_outputs_hold_all_that_can_be_a_partner(
    samples: list[Sample], bundle_files: dict[str, bytes]
) -> None:
    expected = json.loads(bundle_files["selftest/expected.json"])
    for sample, entry in zip(samples, expected["samples"], strict=True):
        scores = sample.candidates.scores.numpy()
        # Thresholds are 0.3, scores may differ by 0.01.
        kept = scores >= 0.28
        assert 0 < kept.sum() < len(scores)
        np.testing.assert_allclose(entry["scores"], scores[kept], atol=1e-6)
        np.testing.assert_allclose(
            entry["boxes"], sample.candidates.boxes_xyxy.numpy()[kept], atol=1e-3
        )
        assert entry["labels"] == sample.candidates.labels.numpy()[kept].tolist()
        assert entry["lowest_score"] == pytest.approx(scores.min(), abs=1e-6)


def test_build_bundle_warns_when_the_self_test_compares_nothing(
    float_onnx: bytes,
    samples: list[Sample],
    jetpack6: BundleSettings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    empty = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    with caplog.at_level(logging.WARNING):
        build_bundle(float_onnx, jetpack6, [replace(samples[0], candidates=empty)])
    assert "found nothing in 1 self-test images" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": (1, 3, 2)}, r"batch \(1, 3, 2\): expected 1 <= least <= usual <= most"),
        ({"batch": (0, 1, 1)}, "expected 1 <= least"),
        ({"deepstream": "9.1"}, "target jetpack6 has DeepStream 7.1, asked for 9.1"),
        ({"target": TARGETS["tensorrt11"]}, "target tensorrt11 .* has no DeepStream"),
        ({"precision": "fp16"}, "fp16 is built there from a file of kind fp16, got fp32"),
    ],
)
def test_build_bundle_refuses_settings_that_make_no_sense(
    float_onnx: bytes,
    samples: list[Sample],
    jetpack6: BundleSettings,
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ExportError, match=message):
        build_bundle(float_onnx, replace(jetpack6, **changes), samples)


def test_build_bundle_refuses_uint8_input(
    tiny_onnx: bytes, samples: list[Sample], jetpack6: BundleSettings
) -> None:
    with pytest.raises(ExportError, match="jetpack6: expected an ONNX file with float32 input"):
        build_bundle(tiny_onnx, jetpack6, samples)


def test_build_bundle_refuses_samples_that_do_not_fit(
    float_onnx: bytes, samples: list[Sample], jetpack6: BundleSettings
) -> None:
    with pytest.raises(ExportError, match="needs at least one image"):
        build_bundle(float_onnx, jetpack6, [])
    wrong = replace(samples[0], canvas=np.zeros((96, 64, 3), np.uint8))
    with pytest.raises(ExportError, match=r"noise 0: expected uint8 \(64, 96, 3\), got uint8 \(96"):
        build_bundle(float_onnx, jetpack6, [wrong])


def test_build_bundle_takes_files_of_a_fixed_batch(
    fix_batch: Callable[[bytes, int], bytes],
    float_onnx: bytes,
    samples: list[Sample],
    jetpack6: BundleSettings,
) -> None:
    content = fix_batch(float_onnx, 2)
    with pytest.raises(ExportError, match="takes batches of 2 only"):
        build_bundle(content, jetpack6, samples)
    files = build_bundle(content, replace(jetpack6, batch=(2, 2, 2)), samples)
    assert b"Shapes=" not in files["build_engine.sh"]
    assert json.loads(files["selftest/expected.json"])["fixed_batch"] == 2


def test_licence_is_that_of_the_project(bundle_files: dict[str, bytes]) -> None:
    repository = Path(__file__).resolve().parents[4]
    assert bundle_files["LICENSE"] == (repository / "LICENSE").read_bytes()


def test_self_test_runs_on_the_oldest_python_of_a_jetson(bundle_files: dict[str, bytes]) -> None:
    # JetPack 5 has Python 3.8, and no package can be asked for.
    tree = ast.parse(bundle_files["selftest.py"], feature_version=(3, 8))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert imported == {
        "argparse", "array", "json", "os", "re", "shutil", "subprocess", "sys", "tempfile",
    }  # fmt: skip


def test_build_script_is_valid_bash(bundle_files: dict[str, bytes]) -> None:
    subprocess.run(["bash", "-n"], input=bundle_files["build_engine.sh"], check=True)


def test_fill_template_wants_each_value_exactly_once() -> None:
    with pytest.raises(ValueError, match=r"Makefile: .*without a placeholder \['X'\]"):
        fill_template("Makefile", {"X": 1})
    with pytest.raises(ValueError, match=r"build_engine.sh: without a value \['ENGINE'"):
        fill_template("build_engine.sh", {})


def test_quote_shell_keeps_every_character() -> None:
    text = "a b'c\"d$(e)\\"
    command = f"printf %s {quote_shell(text)}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    assert found.stdout.decode() == text


@pytest.mark.parametrize(
    ("text", "version"), [("7.1", (7, 1)), ("9.0.1", (9, 0)), ("10.12", (10, 12))]
)
def test_parse_version_reads_major_and_minor(text: str, version: tuple[int, int]) -> None:
    assert parse_version(text) == version


def test_parse_version_refuses_words() -> None:
    with pytest.raises(ExportError, match="DeepStream version 'newest'"):
        parse_version("newest")
