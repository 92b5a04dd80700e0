"""NVIDIA's package of this machine: found, new enough, and with its log in ours.

TensorRT 10.3 to 11.x, or TensorRT-RTX 1.7 and later, which has the same interface. Members that
only some of these have are guarded where they are used; a test holds every name to the lists of
the bindings themselves.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from retinaray.errors import InferenceError

logger = logging.getLogger(__name__)

_OLDEST = {"tensorrt": (10, 3), "tensorrt_rtx": (1, 7)}
_NEWEST_KNOWN_MAJOR = {"tensorrt": 11, "tensorrt_rtx": 1}
_MAX_REASONS = 4
_MAX_REMEMBERED = 1000


class ErrorLog(Protocol):
    """What TensorRT writes to; see `tensorrt_log`."""

    listeners: dict[int, list[str]]


def load_tensorrt() -> Any:
    """The tensorrt module of a machine with a GPU.

    Returns:
        `tensorrt`, or `tensorrt_rtx_bindings` where only that is installed.

    Raises:
        InferenceError: If there is no GPU, no package, one that does not load, or one that is too
            old.
    """
    # A TensorRT object made without a driver takes the whole process down, so this comes first.
    if not torch.cuda.is_available():
        raise InferenceError(
            "backend 'tensorrt' needs an NVIDIA GPU with CUDA, and torch sees none here: "
            "run the .onnx file with --backend openvino"
        )
    trt = _import_package()
    check_release(trt)
    return trt


def _import_package() -> Any:
    try:
        import tensorrt as trt
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError) or error.name != "tensorrt":
            raise _describe_broken("tensorrt", error) from error
        return _import_rtx(error)
    except OSError as error:
        raise _describe_broken("tensorrt", error) from error
    return trt


def _import_rtx(missing: ImportError) -> Any:
    try:
        # By name: no installation of retinaray asks for it.
        trt = importlib.import_module("tensorrt_rtx_bindings")
    except ModuleNotFoundError:
        raise InferenceError(
            "backend 'tensorrt' needs the tensorrt package: pip install 'retinaray[tensorrt]' on a "
            "machine that reaches NVIDIA's package index (PyPI alone has placeholders only), on a "
            "Jetson take JetPack's own; or run the .onnx file with --backend openvino"
        ) from missing
    except (ImportError, OSError) as error:
        raise _describe_broken("tensorrt_rtx_bindings", error) from error
    logger.warning("the tensorrt package is absent: TensorRT-RTX %s is used", trt.__version__)
    return trt


def _describe_broken(package: str, error: Exception) -> InferenceError:
    return InferenceError(
        f"backend 'tensorrt': the package {package} is installed but does not load "
        f"({type(error).__name__}: {error}): install it again with the libraries that belong to it"
    )


def check_release(trt: Any) -> None:
    """Refuse a TensorRT that is too old.

    Raises:
        InferenceError: If it is.
    """
    flavour = flavour_of(trt)
    release = parse_release(trt.__version__)
    oldest = _OLDEST[flavour]
    if release[:2] < oldest:
        raise InferenceError(
            f"backend 'tensorrt' needs {product_name(flavour)} {oldest[0]}.{oldest[1]} or newer, "
            f"found {trt.__version__}: upgrade it, or build the .onnx file with that version's own "
            "trtexec"
        )
    if release[0] > _NEWEST_KNOWN_MAJOR[flavour]:
        logger.warning(
            "%s %s is newer than any that retinaray was written for",
            product_name(flavour),
            trt.__version__,
        )


def flavour_of(trt: Any) -> str:
    """`tensorrt` or `tensorrt_rtx`: plans of one do not load in the other."""
    return "tensorrt_rtx" if trt.__name__.startswith("tensorrt_rtx") else "tensorrt"


def product_name(flavour: str) -> str:
    """NVIDIA's name of a flavour, for messages."""
    return {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}.get(flavour, flavour)


def parse_release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version; empty when it has none."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()


@functools.cache
def tensorrt_log(trt: Any) -> Any:
    """Where TensorRT logs: this module's logger; errors go to whoever collects them, if anyone.

    A warning that is repeated is logged once. TensorRT keeps a pointer to the first log it is given
    for the life of the process, whatever is passed later: there is one per module, never freed.
    """
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.WARNING,
        trt.ILogger.INFO: logging.DEBUG,
        trt.ILogger.VERBOSE: logging.DEBUG,
    }

    class TensorRtLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            # The bindings do not find their own constructor through super().
            trt.ILogger.__init__(self)
            self.listeners: dict[int, list[str]] = {}
            self._warned: set[str] = set()

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.WARNING)
            if level == logging.ERROR and self.listeners:
                # They become part of an exception, or of a decision that is logged itself.
                level = logging.DEBUG
                for listener in list(self.listeners.values()):
                    listener.append(message)
            elif level == logging.WARNING:
                # A build says some of them once per layer.
                if message in self._warned:
                    level = logging.DEBUG
                elif len(self._warned) < _MAX_REMEMBERED:
                    self._warned.add(message)
            logger.log(level, "%s", message)

    return TensorRtLog()


@contextmanager
def collect_errors(log: ErrorLog) -> Iterator[list[str]]:
    """What TensorRT logs as an error inside the block, from whichever of its threads."""
    messages: list[str] = []
    # Other threads add and remove theirs meanwhile; each has a key of its own.
    log.listeners[id(messages)] = messages
    try:
        yield messages
    finally:
        del log.listeners[id(messages)]


def describe_errors(messages: list[str]) -> str:
    """The last different messages in one line; says so when there are none."""
    different = list(dict.fromkeys(message.strip() for message in messages))
    return "; ".join(different[-_MAX_REASONS:]) or "its log gives no reason"
