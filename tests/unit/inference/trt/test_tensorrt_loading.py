"""Finding NVIDIA's package: each way in which it can be missing has its own sentence."""

from __future__ import annotations

import builtins
import importlib
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retinaray.errors import InferenceError
from retinaray.inference.tensorrt_loading import (
    check_release,
    collect_errors,
    describe_errors,
    flavour_of,
    load_tensorrt,
    parse_release,
    tensorrt_log,
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def break_import(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Exception], None]:
    """Importing a package raises an error."""

    def break_it(package: str, error: Exception) -> None:
        whole = builtins.__import__

        def broken(name: str, *args: Any, **kwargs: Any) -> Any:
            if name == package:
                raise error
            return whole(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", broken)

    return break_it


def test_load_tensorrt_looks_for_a_gpu_before_it_imports_anything(
    monkeypatch: pytest.MonkeyPatch, break_import: Callable[[str, Exception], None]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    break_import("tensorrt", AssertionError("imported without a GPU"))
    with pytest.raises(InferenceError, match=r"needs an NVIDIA GPU.*--backend openvino"):
        load_tensorrt()


@pytest.mark.usefixtures("gpu")
def test_load_tensorrt_gives_the_package(monkeypatch: pytest.MonkeyPatch, trt: Any) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    assert load_tensorrt() is trt
    assert flavour_of(trt) == "tensorrt"


@pytest.mark.usefixtures("gpu")
def test_load_tensorrt_names_extra_and_index_when_there_is_no_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    with pytest.raises(InferenceError, match=r"'retinaray\[tensorrt\]'.*NVIDIA's package index"):
        load_tensorrt()


@pytest.mark.usefixtures("gpu")
def test_load_tensorrt_takes_rtx_and_says_so_when_only_that_is_there(
    monkeypatch: pytest.MonkeyPatch,
    make_trt: Callable[[str], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    rtx = make_trt("rtx-1.7.1")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", rtx)
    assert load_tensorrt() is rtx
    assert flavour_of(rtx) == "tensorrt_rtx"
    assert "TensorRT-RTX 1.7.1.116 is used" in caplog.text


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "error",
    [
        ImportError("libnvinfer.so.10: cannot open shared object file"),
        ModuleNotFoundError("No module named 'tensorrt_libs'", name="tensorrt_libs"),
        FileNotFoundError("Could not find: nvinfer_10.dll"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_load_tensorrt_does_not_fall_back_when_the_package_is_broken(
    break_import: Callable[[str, Exception], None], error: Exception
) -> None:
    break_import("tensorrt", error)
    with pytest.raises(InferenceError, match="package tensorrt is installed but") as caught:
        load_tensorrt()
    assert str(error) in str(caught.value)


@pytest.mark.usefixtures("gpu")
def test_load_tensorrt_says_that_rtx_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"{name}: libtensorrt_rtx.so.1: not found")

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(InferenceError, match="tensorrt_rtx_bindings is installed but"):
        load_tensorrt()


@pytest.mark.usefixtures("gpu")
def test_load_tensorrt_refuses_a_version_before_10_3(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(__name__="tensorrt", __version__="8.6.1")
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(InferenceError, match=r"TensorRT 10\.3 or newer, found 8\.6\.1"):
        load_tensorrt()


@pytest.mark.parametrize(
    ("name", "version"), [("tensorrt", "10.2.0.19"), ("tensorrt_rtx_bindings", "1.6.9")]
)
def test_check_release_refuses_the_last_version_that_is_too_old(name: str, version: str) -> None:
    with pytest.raises(InferenceError, match=version):
        check_release(SimpleNamespace(__name__=name, __version__=version))


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("tensorrt", "10.3.0"),
        ("tensorrt", "10.16.1.11"),
        ("tensorrt", "11.5.0"),
        ("tensorrt_rtx_bindings", "1.7.1.116"),
    ],
)
def test_check_release_is_silent_when_the_version_is_known(
    name: str, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_release(SimpleNamespace(__name__=name, __version__=version))
    assert not caplog.records


def test_check_release_warns_of_a_major_that_it_does_not_know(
    caplog: pytest.LogCaptureFixture,
) -> None:
    check_release(SimpleNamespace(__name__="tensorrt", __version__="12.0.0"))
    assert "TensorRT 12.0.0 is newer than any" in caplog.text


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("10.16.1.11", (10, 16, 1, 11)), ("11.4.0rc1", (11, 4, 0)), ("", ()), ("dev", ())],
)
def test_parse_release_reads_the_leading_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert parse_release(version) == numbers


def test_tensorrt_log_speaks_through_ours(trt: Any, caplog: pytest.LogCaptureFixture) -> None:
    trt_log = tensorrt_log(trt)
    # The bindings crash on a log whose own constructor has not run.
    assert trt_log.is_set_up
    with caplog.at_level(logging.DEBUG, "retinaray.inference.tensorrt_loading"):
        for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
            trt_log.log(getattr(trt.ILogger, name), "a " + name)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("ERROR", "a INTERNAL_ERROR"),
        ("ERROR", "a ERROR"),
        ("WARNING", "a WARNING"),
        ("DEBUG", "a INFO"),
        ("DEBUG", "a VERBOSE"),
    ]


def test_tensorrt_log_warns_only_once_of_the_same(
    trt11: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trt_log = tensorrt_log(trt11)
    for message in ("scales become fp32", "scales become fp32", "low on memory"):
        trt_log.log(trt11.ILogger.WARNING, message)
    assert [record.message for record in caplog.records] == ["scales become fp32", "low on memory"]


def test_tensorrt_log_is_one_for_the_life_of_the_process(trt11: Any) -> None:
    # TensorRT keeps a pointer to the first.
    assert tensorrt_log(trt11) is tensorrt_log(trt11)


def test_collect_errors_keeps_errors_and_takes_them_out_of_the_log(
    trt11: Any, caplog: pytest.LogCaptureFixture
) -> None:
    log = tensorrt_log(trt11)
    with collect_errors(log) as outer, collect_errors(log) as inner:
        log.log(trt11.ILogger.ERROR, "first")
        log.log(trt11.ILogger.WARNING, "only a warning")
    log.log(trt11.ILogger.ERROR, "late")
    assert outer == inner == ["first"]
    assert [record.message for record in caplog.records] == ["only a warning", "late"]
    assert not log.listeners


def test_collect_errors_ends_when_the_block_raises(trt11: Any) -> None:
    log = tensorrt_log(trt11)
    with pytest.raises(KeyError), collect_errors(log):
        raise KeyError
    assert not log.listeners


def test_describe_errors_keeps_the_last_four_different_ones() -> None:
    messages = ["a", "b", "b ", "c", "d", "e"]
    assert describe_errors(messages) == "b; c; d; e"
    assert describe_errors([]) == "its log gives no reason"


def test_nvidia_own_log_reaches_ours(rtx: Any) -> None:
    with collect_errors(tensorrt_log(rtx)) as faults:
        # Without a GPU it still parses, and says why it cannot.
        builder = rtx.Builder(tensorrt_log(rtx))
        network = builder.create_network(0)
        assert not rtx.OnnxParser(network, tensorrt_log(rtx)).parse(b"nonsense")
    assert any("Failed to parse the ONNX model" in fault for fault in faults)
