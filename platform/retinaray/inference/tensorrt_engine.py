"""A plan loaded into TensorRT: runtime, engine and one execution context, held to our contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from retinaray.errors import CheckpointError, InferenceError
from retinaray.inference.onnx_contract import INPUT_NAME, OUTPUT_NAMES
from retinaray.inference.tensorrt_loading import (
    collect_errors,
    describe_errors,
    flavour_of,
    product_name,
    tensorrt_log,
)

_OUTPUT_TYPES = {"boxes": torch.float32, "scores": torch.float32, "labels": torch.int32}


class LoadedEngine:
    """An engine on the current GPU; not for two threads at once.

    Args:
        trt: The tensorrt module.
        plan: Serialized engine.
        uri: Its name, for messages.
        allow_host_code: Let TensorRT run the code in a version-compatible plan. Only for plans
            that say they are one: the code runs with the rights of this process.

    Raises:
        CheckpointError: If the plan has other inputs or outputs than an exported detector.
        InferenceError: If TensorRT does not load it.
    """

    def __init__(self, trt: Any, plan: bytes, *, uri: str, allow_host_code: bool) -> None:
        self._uri = uri
        self._name = f"{product_name(flavour_of(trt))} {trt.__version__}"
        self._log = tensorrt_log(trt)
        with collect_errors(self._log) as faults:
            self._runtime = _make_runtime(trt, self._log, self._name, faults)
            if allow_host_code:
                self._runtime.engine_host_code_allowed = True
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise InferenceError(
                    f"{uri}: {self._name} does not load this engine: {describe_errors(faults)}"
                )
            self.input_dtype = _check_tensors(trt, self._engine, uri)
            self._context = self._engine.create_execution_context()
            if self._context is None:
                raise InferenceError(
                    f"{uri}: {self._name} cannot make an execution context: "
                    f"{describe_errors(faults)}. Where GPU memory is short, a smaller batch helps"
                )

    @property
    def batch_limits(self) -> tuple[int, int]:
        """Fewest and most images per call; the same for a fixed batch."""
        fixed = int(self._engine.get_tensor_shape(INPUT_NAME)[0])
        if fixed >= 0:
            return fixed, fixed
        fewest, _, most = self._engine.get_tensor_profile_shape(INPUT_NAME, 0)
        return int(fewest[0]), int(most[0])

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of the images that it takes."""
        _, _, height, width = tuple(self._engine.get_tensor_shape(INPUT_NAME))
        return height, width

    def choose_batch(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Fix the number of images per call.

        Args:
            batch: Within the limits.

        Returns:
            The shape of each output.

        Raises:
            InferenceError: If TensorRT refuses it.
        """
        with collect_errors(self._log) as faults:
            accepted = self._context.set_input_shape(INPUT_NAME, (batch, 3, *self.canvas))
            missing = self._context.infer_shapes() if accepted else [INPUT_NAME]
            if missing:
                raise InferenceError(
                    f"{self._uri}: {self._name} refuses batches of {batch} images (shapes missing: "
                    f"{', '.join(missing)}): {describe_errors(faults)}"
                )
        return {name: tuple(self._context.get_tensor_shape(name)) for name in OUTPUT_NAMES}

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Tell where inputs and outputs lie; the tensors must stay alive.

        Raises:
            InferenceError: If TensorRT refuses an address.
        """
        for name, tensor in tensors.items():
            if not self._context.set_tensor_address(name, tensor.data_ptr()):
                raise InferenceError(f"{self._uri}: {self._name} refuses the memory of {name!r}")

    def enqueue(self, stream_handle: int) -> None:
        """Queue one call on a CUDA stream.

        Raises:
            InferenceError: If TensorRT refuses; the text has its reasons.
        """
        with collect_errors(self._log) as faults:
            if not self._context.execute_async_v3(stream_handle):
                raise InferenceError(
                    f"{self._uri}: {self._name} failed to run the engine: {describe_errors(faults)}"
                )

    def is_capturable(self, stream_handle: int) -> bool:
        """Whether a call can be recorded as a CUDA graph, as far as can be known before."""
        # TensorRT-RTX only: it may still be compiling kernels.
        if not hasattr(self._context, "is_stream_capturable"):
            return True
        return bool(self._context.is_stream_capturable(stream_handle))

    def close(self) -> None:
        """Free the GPU memory: the context first, then what it was made from."""
        self._context = None
        self._engine = None
        self._runtime = None


def _make_runtime(trt: Any, log: Any, name: str, faults: list[str]) -> Any:
    try:
        runtime = trt.Runtime(log)
    # What the bindings raise when the library gives no object, without a usable driver say.
    except TypeError as error:
        raise InferenceError(
            f"{name} gives no runtime ({describe_errors(faults)}): it needs a GPU and a driver "
            "that it supports"
        ) from error
    return runtime


def _check_tensors(trt: Any, engine: Any, uri: str) -> torch.dtype:
    """Hold inputs and outputs to the contract of exported files; the input's type."""
    dtypes = {
        trt.DataType.UINT8: torch.uint8,
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.INT32: torch.int32,
    }
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
    types = {name: dtypes.get(engine.get_tensor_dtype(name)) for name in names}
    input_dtype = types.pop(INPUT_NAME, None)
    if (
        inputs != {INPUT_NAME}
        or input_dtype not in (torch.uint8, torch.float32)
        or types != _OUTPUT_TYPES
    ):
        raise CheckpointError(
            f"{uri}: expected an engine of an exported detector with input {INPUT_NAME!r} "
            f"(uint8 or float32) and outputs {', '.join(OUTPUT_NAMES)}, found {', '.join(names)}: "
            "build it from a file that `retinaray export` wrote"
        )
    return input_dtype
