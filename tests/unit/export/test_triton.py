"""The model repository for Triton, its settings read by protobuf's own text parser."""

from __future__ import annotations

import importlib.util
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from retinaray.errors import CheckpointError, ExportError
from retinaray.export.edge_bundle.signature import read_signature
from retinaray.export.triton import TritonSettings, build_triton_repository, write_triton_config

# What is used of Triton's model_config.proto: message to fields as number, type, repeated.
# A type in capitals is an enumeration, one that starts with a capital a message.
SCHEMA: dict[str, dict[str, tuple[int, str, bool]]] = {
    "ModelConfig": {
        "name": (1, "string", False),
        "platform": (2, "string", False),
        "version_policy": (3, "Policy", False),
        "max_batch_size": (4, "int32", False),
        "input": (5, "Input", True),
        "output": (6, "Output", True),
        "instance_group": (7, "Group", True),
        "dynamic_batching": (11, "Batching", False),
        "parameters": (14, "Parameter", True),
    },
    "Policy": {"latest": (1, "Latest", False)},
    "Latest": {"num_versions": (1, "uint32", False)},
    "Input": {
        "name": (1, "string", False),
        "data_type": (2, "DATA_TYPE", False),
        "dims": (4, "int64", True),
    },
    "Output": {
        "name": (1, "string", False),
        "data_type": (2, "DATA_TYPE", False),
        "dims": (3, "int64", True),
    },
    "Group": {"count": (2, "int32", False), "kind": (4, "KIND", False)},
    "Batching": {
        "preferred_batch_size": (1, "int32", True),
        "max_queue_delay_microseconds": (2, "uint64", False),
    },
    "Parameter": {"key": (1, "string", False), "value": (2, "Value", False)},
    "Value": {"string_value": (1, "string", False)},
}
ENUMS = {
    "DATA_TYPE": {"TYPE_INVALID": 0, "TYPE_UINT8": 2, "TYPE_INT32": 8, "TYPE_FP32": 11},
    "KIND": {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2},
}


def make_schema() -> Any:
    """The message class of SCHEMA's ModelConfig."""
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="t", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value, number in values.items():
            enum.value.add(name=value, number=number)
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            added = message.field.add(name=field, number=number)
            added.label = types.LABEL_REPEATED if repeated else types.LABEL_OPTIONAL
            if kind in ENUMS:
                added.type, added.type_name = types.TYPE_ENUM, f".t.{kind}"
            elif kind in SCHEMA:
                added.type, added.type_name = types.TYPE_MESSAGE, f".t.{kind}"
            else:
                added.type = types.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))


@pytest.fixture(scope="module")
def config_class() -> Any:
    return make_schema()


@pytest.fixture
def settings() -> TritonSettings:
    return TritonSettings(name="cells", batch=(1, 4, 16), instances=2)


def fix_batch(content: bytes, batch: int) -> bytes:
    model = onnx.load_model_from_string(content)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return bytes(model.SerializeToString())


def test_config_says_what_the_file_takes_and_gives(
    tiny_onnx: bytes, settings: TritonSettings, config_class: Any
) -> None:
    text = write_triton_config(read_signature(tiny_onnx, uri="a.onnx"), settings)
    config = text_format.Parse(text, config_class())
    assert (config.name, config.platform) == ("cells", "tensorrt_plan")
    assert config.max_batch_size == 16
    (tensor,) = config.input
    assert (tensor.name, tensor.data_type, list(tensor.dims)) == ("images", 2, [3, 64, 96])
    # What ONNX Runtime sees of the same file, the batch left out.
    kinds = {"tensor(float)": 11, "tensor(int32)": 8}
    session = onnxruntime.InferenceSession(tiny_onnx)
    outputs = [(o.name, kinds[o.type], list(o.shape[1:])) for o in session.get_outputs()]
    assert [(o.name, o.data_type, list(o.dims)) for o in config.output] == outputs
    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, 1)
    assert config.version_policy.latest.num_versions == 1
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    parameters = {entry.key: entry.value.string_value for entry in config.parameters}
    assert parameters["retinaray.score_thresholds"] == "[0.3, 0.3, 0.3]"
    assert parameters["retinaray.nms_iou"] == "0.5"
    assert parameters["retinaray.run_id"] == "20260101T000000Z-abc"


@pytest.mark.skipif(
    importlib.util.find_spec("tritonclient") is None,
    reason="needs Triton's own schema, the package tritonclient, which is not installed",
)
def test_config_is_one_of_tritons_own_schema(tiny_onnx: bytes, settings: TritonSettings) -> None:
    package = importlib.util.find_spec("tritonclient")
    assert package is not None
    # Its __init__ imports grpc, which nothing here needs.
    path = Path(next(iter(package.submodule_search_locations or []))) / "grpc/model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    text = write_triton_config(read_signature(tiny_onnx, uri="a.onnx"), settings)
    assert text_format.Parse(text, module.ModelConfig()).max_batch_size == 16


def test_config_of_a_fixed_batch_has_the_batch_as_an_axis(
    tiny_onnx: bytes, settings: TritonSettings, config_class: Any
) -> None:
    content = fix_batch(tiny_onnx, 4)
    with pytest.raises(ExportError, match=r"batch \(1, 4, 16\): the ONNX file takes batches of 4"):
        build_triton_repository(content, settings)
    settings = replace(settings, batch=(4, 4, 4))
    text = write_triton_config(read_signature(content, uri="a.onnx"), settings)
    config = text_format.Parse(text, config_class())
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [4, 3, 64, 96]
    assert [output.dims[0] for output in config.output] == [4, 4, 4]
    assert not config.HasField("dynamic_batching")


def test_config_of_single_images_batches_nothing(
    tiny_onnx: bytes, settings: TritonSettings, config_class: Any
) -> None:
    signature = read_signature(tiny_onnx, uri="a.onnx")
    text = write_triton_config(signature, replace(settings, batch=(1, 1, 1)))
    config = text_format.Parse(text, config_class())
    assert config.max_batch_size == 1
    assert not config.HasField("dynamic_batching")


def test_config_quotes_whatever_the_card_holds(
    tiny_onnx: bytes, settings: TritonSettings, config_class: Any
) -> None:
    signature = read_signature(tiny_onnx, uri="a.onnx")
    run_id = 'a "quoted" \\ run\nof two lines'
    signature = replace(signature, card=replace(signature.card, run_id=run_id))
    config = text_format.Parse(write_triton_config(signature, settings), config_class())
    assert config.parameters[-1].value.string_value == run_id


def test_repository_for_onnxruntime_holds_the_file(
    tiny_onnx: bytes, settings: TritonSettings, config_class: Any
) -> None:
    settings = replace(settings, platform="onnxruntime_onnx", kind="cpu")
    files = build_triton_repository(tiny_onnx, settings)
    assert list(files) == [
        "cells/1/model.onnx",
        "cells/README.md",
        "cells/config.pbtxt",
        "cells/labels.txt",
    ]
    assert files["cells/1/model.onnx"] == tiny_onnx
    assert files["cells/labels.txt"] == b"class 0\nclass 1\nclass 2\n"
    config = text_format.Parse(files["cells/config.pbtxt"].decode(), config_class())
    assert (config.platform, config.instance_group[0].kind) == ("onnxruntime_onnx", 2)
    assert build_triton_repository(tiny_onnx, settings) == files


def test_repository_for_tensorrt_holds_the_engine_or_how_to_build_it(
    tiny_onnx: bytes, settings: TritonSettings, tmp_path: Path
) -> None:
    files = build_triton_repository(tiny_onnx, settings, plan=b"an engine")
    assert files["cells/1/model.plan"] == b"an engine"
    assert "cells/model.onnx" not in files
    assert b"engine is missing" not in files["cells/README.md"]

    files = build_triton_repository(tiny_onnx, settings)
    assert files["cells/model.onnx"] == tiny_onnx
    assert not [name for name in files if name.startswith("cells/1/model")]
    # The command of the README, run by a shell.
    command = files["cells/README.md"].decode().split("```")[1].replace("cd cells\n", "")
    script = f"trtexec() {{ printf '%s\\n' \"$@\"; }}\n{command}"
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [
        "--onnx=model.onnx",
        "--stronglyTyped",
        "--minShapes=images:1x3x64x96",
        "--optShapes=images:4x3x64x96",
        "--maxShapes=images:16x3x64x96",
        "--saveEngine=1/model.plan",
    ]


@pytest.mark.parametrize(
    ("changes", "plan", "message"),
    [
        ({"name": "my cells"}, None, "Triton model name 'my cells': expected letters"),
        ({"name": "../x/y"}, None, "Triton model name"),
        ({"name": ""}, None, "Triton model name"),
        ({"platform": "onnxruntime_onnx"}, b"x", "leave the engine out"),
        ({"kind": "cpu"}, None, "tensorrt_plan runs on GPUs only"),
        ({"batch": (2, 1, 4)}, None, "expected 1 <= least <= usual <= most"),
    ],
)
def test_repository_refuses_settings_that_contradict_each_other(
    tiny_onnx: bytes,
    settings: TritonSettings,
    changes: dict[str, Any],
    plan: bytes | None,
    message: str,
) -> None:
    with pytest.raises(ExportError, match=message):
        build_triton_repository(tiny_onnx, replace(settings, **changes), plan=plan)


def test_read_signature_refuses_other_files(tiny_onnx: bytes) -> None:
    with pytest.raises(CheckpointError, match="not a readable ONNX file"):
        read_signature(b"no model", uri="a.onnx")
    model = onnx.load_model_from_string(tiny_onnx)
    model.graph.output[1].type.tensor_type.shape.dim[1].dim_param = "D"
    with pytest.raises(ExportError, match=r"a\.onnx: expected outputs .* with the same fixed D"):
        read_signature(model.SerializeToString(), uri="a.onnx")


def test_read_signature_counts_candidates(tiny_onnx: bytes) -> None:
    signature = read_signature(tiny_onnx, uri="a.onnx")
    outputs = onnxruntime.InferenceSession(tiny_onnx).run(
        None, {"images": np.zeros((1, 3, 64, 96), np.uint8)}
    )
    assert signature.num_candidates == outputs[1].shape[1]
    assert (signature.input_type, signature.fixed_batch) == ("uint8", None)
    assert signature.card.canvas == (64, 96)
