"""INT8 by NVIDIA's Model Optimizer, where the built-in quantisation costs too much accuracy.

It pins versions of onnx and onnxruntime that are not ours, and so runs in a Python environment of
its own, whose interpreter the caller names. It quantises in float32, and `mixed_precision.to_fp16`
casts the rest: the cast of Model Optimizer goes by ranges that it has seen, and takes statistics
over maps to float16.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8
from torch import Tensor

from retinaray.errors import ExportError
from retinaray.export.calibration import check_count, check_images
from retinaray.export.graph_index import index_graph, load_graph
from retinaray.export.mixed_precision import find_half_nodes
from retinaray.export.onnx_graph import IR_VERSIONS, check_contract, set_batch
from retinaray.export.targets import Target
from retinaray.inference.onnx_contract import read_fixed_batch, read_precision

if TYPE_CHECKING:
    import onnx

MODELOPT_REQUIREMENT = "nvidia-modelopt[onnx]==0.47.*"
# Model Optimizer raises every INT8 file to this one.
MODELOPT_OPSET = 19
_INSTALL = (
    "python3.11 -m venv /path/to/environment && /path/to/environment/bin/pip install "
    f"'{MODELOPT_REQUIREMENT}' (some 6 GB), then give /path/to/environment/bin/python"
)
_NO_PACKAGE = 3
_SCRIPT = f"""
import json, sys
request = json.loads(open(sys.argv[1]).read())
try:
    import numpy
    from modelopt.onnx.quantization import quantize
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit({_NO_PACKAGE})
images = numpy.memmap(
    request["images"], dtype=request["dtype"], mode="r", shape=tuple(request["shape"])
)
quantize(
    request["model"],
    quantize_mode="int8",
    calibration_data={{"images": numpy.asarray(images)}},
    calibration_method=request["method"],
    calibration_eps=["cpu"],
    high_precision_dtype="fp32",
    nodes_to_exclude=request["excluded"],
    output_path=request["output"],
    log_level="WARNING",
)
"""

ModeloptMethod = Literal["entropy", "max"]


def check_modelopt_target(target: Target) -> None:
    """Refuse a target that cannot read what Model Optimizer writes, before minutes are spent.

    Raises:
        ExportError: If its TensorRT is too old.
    """
    target.check_opset(MODELOPT_OPSET, what="INT8 by Model Optimizer")


def quantize_with_modelopt(
    content: bytes,
    batches: Iterable[UInt8[Tensor, "N 3 H W"]],
    *,
    python: str,
    method: ModeloptMethod = "entropy",
    timeout_s: float = 3600.0,
) -> bytes:
    """Quantise an exported file in another Python environment.

    Args:
        content: An exported float32 file.
        batches: Images of the file's canvas, preprocessed as for inference; they go to a temporary
            file, and that program loads all of them.
        python: Interpreter of an environment with Model Optimizer.
        method: Its calibration.
        timeout_s: Give up after this long.

    Returns:
        Q/DQ file of opset 19 with float32 scales and INT8 weights, card included.

    Raises:
        ExportError: If the file is not a float32 one, there are no images, the environment lacks
            something, or Model Optimizer fails.
    """
    precision = read_precision(content)
    if precision != "fp32":
        raise ExportError(f"INT8 is made from a float32 file, and this one is {precision} already")
    if not os.access(python, os.X_OK) or Path(python).is_dir():
        raise ExportError(f"{python}: no Python interpreter is there; make one: {_INSTALL}")
    proto = load_graph(content)
    set_batch(proto, None)
    with tempfile.TemporaryDirectory(prefix="retinaray-") as folder:
        request = _write_request(Path(folder), proto, batches, method)
        _run(python, request, timeout_s)
        output = Path(folder) / "quantized.onnx"
        if not output.is_file():
            raise ExportError(f"{python}: Model Optimizer wrote no file and gave no reason")
        quantized = load_graph(output.read_bytes())
    _fold_constants(quantized)
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(proto.metadata_props)
    quantized.ir_version = IR_VERSIONS[MODELOPT_OPSET]
    set_batch(quantized, read_fixed_batch(content))
    check_contract(quantized, opset=MODELOPT_OPSET)
    return bytes(quantized.SerializeToString())


def _write_request(
    folder: Path, proto: onnx.ModelProto, batches: Iterable[Tensor], method: ModeloptMethod
) -> Path:
    """Write the model, the images and what to do with them; returns the last one's path."""
    from onnx import helper

    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    tensor = proto.graph.input[0].type.tensor_type
    shape = [axis.dim_value for axis in tensor.shape.dim[1:]]
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    num_images = 0
    with (folder / "images.bin").open("wb") as stream:
        for batch in batches:
            check_images(batch, shape)
            stream.write(batch.numpy().astype(dtype).tobytes())
            num_images += len(batch)
    check_count(num_images)
    request: dict[str, Any] = {
        "model": str(folder / "model.onnx"),
        "output": str(folder / "quantized.onnx"),
        "images": str(folder / "images.bin"),
        "dtype": dtype.name,
        "shape": [num_images, *shape],
        "method": method,
        "excluded": _list_excluded(proto),
    }
    (folder / "script.py").write_text(_SCRIPT)
    path = folder / "request.json"
    path.write_text(json.dumps(request))
    return path


def _list_excluded(proto: onnx.ModelProto) -> list[str]:
    """Patterns of Model Optimizer's for the nodes that stay as they are, each for one node."""
    index = index_graph(proto.graph)
    half = find_half_nodes(index)
    names = [node.name for number, node in enumerate(index.nodes) if number not in half]
    return [f"^{re.escape(name)}$" for name in names]


def _run(python: str, request: Path, timeout_s: float) -> None:
    # Isolated: nothing of this environment's paths may reach the other.
    command = [python, "-I", str(request.parent / "script.py"), str(request)]
    try:
        child = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"{python}: Model Optimizer took longer than {timeout_s:g} s; give fewer images"
        ) from error
    except OSError as error:
        raise ExportError(f"{python}: cannot be run: {error}; make one: {_INSTALL}") from error
    reason = child.stderr.strip()[-2000:]
    if child.returncode == _NO_PACKAGE:
        raise ExportError(
            f"{python}: has no working Model Optimizer ({reason}); make an environment: {_INSTALL}"
        )
    if child.returncode != 0:
        raise ExportError(
            f"{python}: Model Optimizer failed with exit status {child.returncode}: "
            f"{reason or 'it left no message'}"
        )


def _fold_constants(proto: onnx.ModelProto) -> None:
    """Write constants as initializers and quantised weights as INT8, each once.

    Model Optimizer leaves weights in float32, a copy for each convolution, before a node that
    quantises them.
    """
    from onnx import helper, numpy_helper

    graph = proto.graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(
                helper.get_node_attr_value(node, "value")
            )
        elif node.op_type == "QuantizeLinear" and set(node.input) <= set(constants):
            axis = {a.name: helper.get_attribute_value(a) for a in node.attribute}.get("axis", 1)
            values, scale, zero = (constants[name] for name in node.input)
            constants[node.output[0]] = _quantize(values, scale, zero, axis)
        else:
            kept.append(node)
    names: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    for node in kept:
        for slot, name in enumerate(node.input):
            if name in constants:
                array = constants[name]
                key = (array.dtype.str, array.shape, array.tobytes())
                node.input[slot] = names.setdefault(key, name)
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(
        numpy_helper.from_array(constants[name], name) for name in names.values()
    )


def _quantize(
    values: npt.NDArray[Any], scale: npt.NDArray[Any], zero: npt.NDArray[Any], axis: int
) -> npt.NDArray[Any]:
    """What QuantizeLinear makes of a constant with a zero point of 0."""
    if zero.any():
        raise ExportError(
            "Model Optimizer wrote a zero point other than 0, which no TensorRT takes"
        )
    shape = [1] * values.ndim
    if scale.ndim:
        shape[axis] = -1
    levels = np.rint(values / scale.reshape(shape) if scale.ndim else values / scale)
    limits = np.iinfo(zero.dtype)
    return np.asarray(np.clip(levels, limits.min, limits.max).astype(zero.dtype))
