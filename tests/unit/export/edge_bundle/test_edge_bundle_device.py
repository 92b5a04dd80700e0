"""The bundle on a device: its scripts as a user runs them, with stand-ins for NVIDIA's tools."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retinaray.export.edge_bundle.bundle import BundleSettings, build_bundle, write_bundle
from retinaray.export.edge_bundle.engine_script import EngineRecipe, write_engine_script
from retinaray.export.edge_bundle.recipes import make_recipe
from retinaray.export.edge_bundle.self_test import Sample
from retinaray.export.mixed_precision import to_fp16
from retinaray.export.targets import TARGETS

TEGRA = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"


class Device:
    """A bundle on a Jetson with JetPack 6.2: a folder of programs, and what its system says."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        self.bundle = folder / "bundle"
        write_bundle(files, self.bundle)
        self.engine = self.bundle / json.loads(files["manifest.json"])["engine"]
        self._programs = folder / "programs"
        self._programs.mkdir()
        self.tegra = folder / "nv_tegra_release"
        self.tegra.write_text(TEGRA)
        self.log = folder / "log"
        text = (Path(__file__).parent / "fake_trtexec.py.txt").read_text()
        self.add_program("trtexec", text.replace("@PYTHON@", sys.executable))
        self.add_packages({"libnvinfer-bin": "10.3.0.30-1+cuda12.5"})

    def add_program(self, name: str, text: str) -> Path:
        path = self._programs / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def add_packages(self, versions: dict[str, str]) -> None:
        cases = "".join(f"  {name}) printf '%s' {value!r} ;;\n" for name, value in versions.items())
        self.add_program(
            "dpkg-query",
            '#!/usr/bin/env bash\ncase "${@: -1}" in\n' + cases + "  *) exit 1 ;;\nesac\n",
        )

    def remove(self, name: str) -> None:
        (self._programs / name).unlink()

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        # dirname, sed and their like, and no program of NVIDIA's.
        path = f"{self._programs}:/usr/bin:/bin"
        variables = {
            "PATH": path,
            "TEGRA_RELEASE": str(self.tegra),
            "FAKE_LOG": str(self.log),
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            **environment,
        }
        return subprocess.run(
            [*command],
            cwd=self.bundle.parent,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def build(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("bash", str(self.bundle / "build_engine.sh"), **environment)

    def run_self_test(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        script = str(self.bundle / "selftest.py")
        return self.run(sys.executable, script, *options, **environment)

    def commands(self) -> list[list[str]]:
        """What trtexec was called with, `--help` left out."""
        return [shlex.split(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def device(tmp_path: Path, bundle_files: dict[str, bytes]) -> Device:
    return Device(tmp_path, bundle_files)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, bundle_files: dict[str, bytes]) -> Device:
    """A device on which the engine was built."""
    made = Device(tmp_path_factory.mktemp("built"), bundle_files)
    run = made.build()
    assert run.returncode == 0, run.stderr
    return made


def test_build_engine_calls_trtexec_as_the_target_wants(
    built: Device, bundle_files: dict[str, bytes]
) -> None:
    assert built.commands()[0] == [
        "--onnx=model.onnx",
        "--minShapes=images:1x3x64x96",
        "--optShapes=images:4x3x64x96",
        "--maxShapes=images:8x3x64x96",
        "--stronglyTyped",
        "--profilingVerbosity=detailed",
        "--exportLayerInfo=layers.json",
        "--memPoolSize=workspace:2048",
        "--timingCacheFile=timing.cache",
        f"--saveEngine={built.engine.name}.partial",
    ]
    assert built.engine.read_bytes() == bundle_files["model.onnx"]
    assert not list(built.bundle.glob("*.partial"))
    assert "RUNNING TensorRT.trtexec" in (built.bundle / "build_engine.log").read_text()


def test_build_engine_falls_back_to_weak_typing_and_says_so(device: Device) -> None:
    run = device.build(FAKE_REFUSE="--stronglyTyped", WORKSPACE_MIB="512")
    assert run.returncode == 0, run.stderr
    strong, weak = device.commands()
    assert "--stronglyTyped" in strong
    # FP32 needs no flag with weak typing.
    assert [word for word in strong if word not in weak] == ["--stronglyTyped"]
    assert "--memPoolSize=workspace:512" in weak
    assert "NOTE: the strongly typed build failed" in run.stdout
    assert (device.bundle / "build_engine_strong.log").is_file()


def test_build_engine_gives_up_when_trtexec_fails(device: Device) -> None:
    run = device.build(FAKE_REFUSE="--onnx")
    assert run.returncode == 7
    assert "trtexec failed twice" in run.stderr
    assert not list(device.bundle.glob("*.engine*"))


def test_build_engine_needs_trtexec(device: Device) -> None:
    device.remove("trtexec")
    run = device.build()
    assert run.returncode == 3
    assert "apt install libnvinfer-bin" in run.stderr
    assert "Do not pip install tensorrt" in run.stderr
    run = device.build(TRTEXEC="/nowhere/trtexec")
    assert run.returncode == 3
    assert "TRTEXEC=/nowhere/trtexec is no program" in run.stderr


def test_build_engine_takes_the_trtexec_that_it_is_given(device: Device, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where" / "trtexec"
    elsewhere.parent.mkdir()
    (tmp_path / "programs" / "trtexec").rename(elsewhere)
    run = device.build(TRTEXEC=str(elsewhere))
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("package", "banner", "code", "message"),
    [
        ("8.5.2-1+cuda11.4", "8502", 4, "for TensorRT 10.3 (jetpack6), here is TensorRT 8.5"),
        ("10.13.3.9-1+cuda13.0", "101303", 4, "here is TensorRT 10.13"),
        ("10.3.0.30-1", "8502", 4, "libnvinfer-bin is TensorRT 10.3, but"),
        ("1:10.3.1-1", "100301", 0, ""),
        (None, "100300", 0, ""),
        ("10.3.0.30-1", "none", 0, ""),
        (None, "none", 4, "cannot tell the version of TensorRT"),
    ],
)
def test_build_engine_wants_the_tensorrt_of_its_target(
    device: Device, package: str | None, banner: str, code: int, message: str
) -> None:
    device.add_packages({} if package is None else {"libnvinfer-bin": package})
    run = device.build(FAKE_VERSION=banner)
    assert run.returncode == code, run.stderr
    assert message in run.stderr


def test_build_engine_believes_the_version_that_it_is_told(device: Device) -> None:
    device.add_packages({})
    assert device.build(FAKE_VERSION="none", TENSORRT_VERSION="10.3.0").returncode == 0
    assert device.build(FAKE_VERSION="none", TENSORRT_VERSION="10.30").returncode == 4
    assert device.build(FAKE_VERSION="none", TENSORRT_VERSION="new").returncode == 4


@pytest.mark.parametrize(
    ("tegra", "package", "code", "message"),
    [
        ("# R35 (release), REVISION: 4.1, GCID: 1\n", None, 5, "(L4T 36), here is L4T 35.4.1"),
        ("# R38 (release), REVISION: 2.0, GCID: 1\n", None, 5, "here is L4T 38.2.0"),
        (None, "36.4.3-20250107174145", 0, ""),
        (None, "35.4.1-20230801124926", 5, "here is L4T 35.4.1"),
        (None, None, 5, "this is no Jetson, or a container"),
        ("something else\n", None, 5, "this is no Jetson, or a container"),
        ("", None, 5, "this is no Jetson, or a container"),
    ],
)
def test_build_engine_wants_the_jetpack_of_its_target(
    device: Device, tegra: str | None, package: str | None, code: int, message: str
) -> None:
    packages = {"libnvinfer-bin": "10.3.0.30-1"}
    device.add_packages(packages | ({} if package is None else {"nvidia-l4t-core": package}))
    if tegra is None:
        device.tegra.unlink()
    else:
        device.tegra.write_text(tegra)
    run = device.build()
    assert run.returncode == code, run.stderr
    assert message in run.stderr
    assert device.build(L4T_VERSION="36.4").returncode == 0


def test_build_engine_refuses_a_damaged_model(device: Device) -> None:
    path = device.bundle / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    run = device.build()
    assert run.returncode == 6
    assert "model.onnx has another SHA-256" in run.stderr
    path.unlink()
    run = device.build()
    assert run.returncode == 6
    assert "model.onnx is missing" in run.stderr


def test_build_engine_for_other_machines_refuses_a_jetson(
    device: Device, bundle_files: dict[str, bytes]
) -> None:
    recipe = make_recipe(TARGETS["deepstream-dgpu"], "fp32", bundle_files["model.onnx"])
    files = {"build_engine.sh": write_script(recipe, device.bundle / "model.onnx")}
    write_bundle(files, device.bundle)
    run = device.build()
    assert run.returncode == 5
    assert "for deepstream-dgpu, and this is a Jetson (L4T 36.4.3)" in run.stderr
    device.tegra.unlink()
    run = device.build()
    assert run.returncode == 0, run.stderr


def write_script(recipe: EngineRecipe, onnx: Path, **changes: Any) -> bytes:
    digest = subprocess.run(["sha256sum", onnx], capture_output=True, check=True, text=True).stdout
    values = {
        "onnx_name": onnx.name,
        "onnx_sha256": digest.split()[0],
        "engine_name": "a.engine",
        "canvas": (64, 96),
        "batch": (1, 1, 1),
        "fixed_batch": None,
    }
    return write_engine_script(recipe, **{**values, **changes}).encode()


def test_build_engine_without_a_fallback_stops_at_the_first_failure(
    device: Device, bundle_files: dict[str, bytes]
) -> None:
    recipe = make_recipe(TARGETS["jetpack6"], "fp32", bundle_files["model.onnx"])
    recipe = replace(recipe, flags=(), fallback_flags=None)
    script = write_script(recipe, device.bundle / "model.onnx", fixed_batch=1)
    write_bundle({"build_engine.sh": script}, device.bundle)
    run = device.build(FAKE_REFUSE="--onnx")
    assert run.returncode == 7
    assert "trtexec failed: see build_engine.log" in run.stderr
    run = device.build()
    assert run.returncode == 0, run.stderr
    # A file of a fixed batch must be given no shapes.
    assert [word.partition("=")[0] for word in device.commands()[-1]] == [
        "--onnx",
        "--memPoolSize",
        "--timingCacheFile",
        "--saveEngine",
    ]


def test_self_test_passes_on_the_engine_of_the_model(built: Device) -> None:
    run = built.run_self_test()
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["noise", "0"], ["noise", "1"]]
    assert ", 0 missing, 0 too many" in lines[0]
    assert lines[-1].startswith("PASSED: 0 of ")
    assert int(lines[-1].split()[3]) > 20
    command = built.commands()[-1]
    assert "--shapes=images:1x3x64x96" in command
    assert "--loadInputs=images:input.bin" in command


@pytest.mark.parametrize(
    "fault",
    [
        {"FAKE_SHIFT_PX": "3"},
        {"FAKE_SHIFT_PX": "-1.5"},
        {"FAKE_SHIFT_SCORE": "0.05"},
        {"FAKE_SHIFT_SCORE": "-0.05"},
        {"FAKE_NAN": "1"},
    ],
    ids=lambda fault: " ".join(map("=".join, fault.items())),
)
def test_self_test_fails_when_the_engine_finds_something_else(
    built: Device, fault: dict[str, str]
) -> None:
    run = built.run_self_test(**fault)
    assert run.returncode == 1, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1].startswith("FAILED: ")


def test_self_test_tells_small_differences(built: Device) -> None:
    run = built.run_self_test(FAKE_SHIFT_PX="0.25", FAKE_SHIFT_SCORE="0.005")
    assert run.returncode == 0, run.stdout
    # trtexec writes six digits.
    assert re.search(r"largest difference 0.25[01] px, score 0.00500$", run.stdout)


def test_self_test_sees_a_missing_class(built: Device, tmp_path: Path) -> None:
    # As if the engine had been built from another model: two classes change places.
    copy = tmp_path / "copy"
    write_bundle({path.name: path.read_bytes() for path in built.bundle.glob("*.*")}, copy)
    write_bundle(
        {f"selftest/{path.name}": path.read_bytes() for path in built.bundle.glob("selftest/*")},
        copy,
    )
    path = copy / "selftest" / "expected.json"
    expected = json.loads(path.read_text())
    for sample in expected["samples"]:
        sample["labels"] = [(1, 0, 2)[label] for label in sample["labels"]]
    path.write_text(json.dumps(expected))
    run = built.run(sys.executable, str(copy / "selftest.py"))
    assert run.returncode == 1
    assert ", 0 missing" not in run.stdout


def test_self_test_says_what_keeps_it_from_running(
    device: Device, built: Device, tmp_path: Path
) -> None:
    run = device.run_self_test()
    assert run.returncode == 2
    assert "run bash build_engine.sh first" in run.stderr
    engine = str(built.engine)
    run = device.run_self_test("--engine", engine, FAKE_REFUSE="--loadEngine")
    assert run.returncode == 2
    assert "trtexec ended with code 1" in run.stderr
    assert "&&&& FAILED" in run.stderr
    run = device.run_self_test("--engine", engine, "--trtexec", "/nowhere/trtexec")
    assert run.returncode == 2
    assert "trtexec is not at /nowhere/trtexec" in run.stderr
    image = device.bundle / "selftest" / "000.ppm"
    image.write_bytes(image.read_bytes()[:-1])
    run = device.run_self_test("--engine", engine)
    assert run.returncode == 2
    assert "000.ppm is not the image that was packed" in run.stderr
    (device.bundle / "selftest" / "expected.json").write_text("{")
    run = device.run_self_test("--engine", engine)
    assert run.returncode == 2
    assert "copy the bundle again" in run.stderr


def test_self_test_does_not_pass_when_there_is_nothing_to_compare(
    built: Device, device: Device
) -> None:
    path = device.bundle / "selftest" / "expected.json"
    expected = json.loads(path.read_text())
    expected["thresholds"] = [0.999] * 3
    path.write_text(json.dumps(expected))
    run = device.run_self_test("--engine", str(built.engine))
    assert run.returncode == 3
    assert "NOTHING TO COMPARE" in run.stdout


def test_self_test_fills_a_fixed_batch(
    device: Device,
    fix_batch: Callable[[bytes, int], bytes],
    float_onnx: bytes,
    samples: list[Sample],
    jetpack6: BundleSettings,
) -> None:
    content = fix_batch(float_onnx, 2)
    files = build_bundle(content, replace(jetpack6, batch=(2, 2, 2)), samples)
    write_bundle(files, device.bundle)
    assert device.build().returncode == 0
    run = device.run_self_test()
    assert run.returncode == 0, run.stdout + run.stderr
    assert not [word for word in device.commands()[-1] if word.startswith("--shapes")]


def test_self_test_knows_an_engine_of_half_precision(
    device: Device, float_onnx: bytes, samples: list[Sample], jetpack6: BundleSettings
) -> None:
    content = to_fp16(float_onnx)
    files = build_bundle(content, replace(jetpack6, precision="fp16"), samples)
    write_bundle(files, device.bundle)
    run = device.build(FAKE_REFUSE="--stronglyTyped")
    assert run.returncode == 0, run.stderr
    assert "--fp16" in device.commands()[-1]
    # The samples are those of the FP32 file: FP16 alone must not make it fail.
    run = device.run_self_test()
    assert run.returncode == 0, run.stdout + run.stderr
    assert "tolerance (fp16)" in run.stdout
