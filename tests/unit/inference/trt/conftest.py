"""TensorRT without a GPU: its recorded interface, computing through ONNX Runtime.

`TrtModule` is built from the lists of the real bindings, so that a name or an argument which one of
them lacks fails here too. `LazyDevice` runs what is queued on its streams as late as CUDA may.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import inspect
import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from retinaray.artifact import ModelCard

VERSIONS = {"trt-10.3.0": "10.3.0", "trt-10.16.1": "10.16.1.11", "trt-11.4.0": "11.4.0.106"}
RTX = {"rtx-1.7.1": "1.7.1.116"}
Record = dict[str, Any]

# ---------------------------------------------------------------- the recorded interface


def parse_signature(text: str) -> tuple[inspect.Signature | None, str]:
    """Arguments after `self`, and the class of the answer; no arguments where none are recorded."""
    found = re.match(r"\w+\((?P<arguments>.*)\)(?: -> (?P<answer>.+))?$", text, re.DOTALL)
    if found is None or found["arguments"].startswith("*"):
        return None, ""
    parameters = []
    for part in split_arguments(found["arguments"]):
        name, _, rest = part.partition(":")
        if name.strip() == "self":
            continue
        default = inspect.Parameter.empty if "=" not in rest else None
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.append(inspect.Parameter(name.strip(), kind, default=default))
    return inspect.Signature(parameters), re.split(r"[.:]", found["answer"] or "")[-1]


def split_arguments(text: str) -> list[str]:
    """Split at the commas that are in no brackets."""
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += letter in "([<"
        depth -= letter in ")]>"
        if letter == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += letter
    return [part for part in [*parts, current] if part.strip()]


class Recorded:
    """An object of a recorded class: only its members exist, and `actor` answers for them."""

    def __init__(self, record: Record, owner: str, actor: Any) -> None:
        object.__setattr__(self, "_members", record[owner]["members"])
        object.__setattr__(self, "_owner", owner)
        object.__setattr__(self, "_actor", actor)
        object.__setattr__(self, "_record", record)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self._members:
            raise AttributeError(f"{self._owner} has no {name}")
        if self._members[name].startswith("property"):
            return getattr(self._actor, name)
        signature, _ = parse_signature(self._members[name])

        def call(*args: Any, **kwargs: Any) -> Any:
            if signature is not None:
                signature.bind(*args, **kwargs)
            given = [unwrap(value) for value in args]
            answer = getattr(self._actor, name)(*given, **kwargs)
            return wrap(self._record, answer)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if self._members.get(name) != "property rw":
            raise AttributeError(f"{self._owner}.{name} cannot be set")
        setattr(self._actor, name, value)


def wrap(record: Record, answer: Any) -> Any:
    return Recorded(record, answer.recorded, answer) if hasattr(answer, "recorded") else answer


def unwrap(value: Any) -> Any:
    return value._actor if isinstance(value, Recorded) else value


class Logger:
    """`trt.ILogger`: to be inherited from, its constructor to be called by name."""

    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    INTERNAL_ERROR = Severity.INTERNAL_ERROR
    ERROR = Severity.ERROR
    WARNING = Severity.WARNING
    INFO = Severity.INFO
    VERBOSE = Severity.VERBOSE

    def __init__(self) -> None:
        self.is_set_up = True


class TrtModule:
    """A stand-in for `import tensorrt`, made from the record of one version."""

    def __init__(self, record: Record, name: str, version: str, world: World) -> None:
        self.__name__ = name
        self.__version__ = version
        self._record = record
        self._world = world
        self._enums: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._record:
            raise AttributeError(f"module {self.__name__} {self.__version__} has no {name}")
        if self._record[name]["kind"] == "enum":
            if name not in self._enums:
                self._enums[name] = enum.IntEnum(name, self._record[name]["members"])
            return self._enums[name]
        if name == "ILogger":
            assert {"ERROR", "WARNING", "INFO", "VERBOSE"} <= set(self._record[name]["members"])
            return Logger
        makers = {"Builder": SimBuilder, "OnnxParser": SimParser, "Runtime": SimRuntime}
        return lambda *args, **kwargs: self._make(makers[name], name, args, kwargs)

    def _make(self, maker: Any, name: str, args: Any, kwargs: Any) -> Any:
        signature, _ = parse_signature(self._record[name]["members"]["__init__"])
        assert signature is not None
        signature.bind(*args, **kwargs)
        if name in self._world.without:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return wrap(self._record, maker(self, self._world, *[unwrap(value) for value in args]))


def record_bindings(module: Any) -> Record:
    """A record of bindings that can be imported, in the form of the files."""
    record: Record = {}
    for name, thing in inspect.getmembers(module, inspect.isclass):
        if hasattr(thing, "__members__"):
            members = {key: int(value) for key, value in thing.__members__.items()}
            record[name] = {"kind": "enum", "members": members}
        else:
            members = {key: describe_member(getattr(thing, key)) for key in dir(thing)}
            record[name] = {"kind": "class", "members": members}
    return record


def describe_member(member: Any) -> str:
    if isinstance(member, property):
        return "property ro" if member.fset is None else "property rw"
    return ((callable(member) and member.__doc__) or "attr").splitlines()[0]


# ---------------------------------------------------------------- what the objects do


@dataclass
class World:
    """Everything that a test may look at or change.

    Attributes:
        without: Classes of which no object can be made: Builder, Runtime.
        answers_none: Methods that answer None, as they do when they fail.
        parser_faults: Node name, operator and description of what the parser refuses.
        errors: What is logged as an error with the next failure.
        cache_fits: Whether timing caches are of this GPU and version.
        fails_to_run: Whether the network fails.
        refuses_capture: Whether the network fails while it is recorded.
        is_capturable: What TensorRT-RTX says of recording.
        config: The last configuration.
        network_flags: With which the last network was made.
        profile: Shapes of the last profile.
        log: What TensorRT logs to.
        freed: Objects that are gone, in order.
        host_code_allowed: Whether the last runtime was allowed to run code of a plan.
        inputs: What each run of the network was given.
    """

    device: LazyDevice
    without: set[str] = field(default_factory=set)
    answers_none: set[str] = field(default_factory=set)
    parser_faults: list[tuple[str, str, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    cache_fits: bool = True
    fails_to_run: bool = False
    refuses_capture: bool = False
    is_capturable: bool = True
    config: Any = None
    network_flags: int | None = None
    profile: tuple[Any, ...] | None = None
    log: Any = None
    host_code_allowed: bool = False
    freed: list[str] = field(default_factory=list)
    inputs: list[np.ndarray] = field(default_factory=list)

    def fail(self) -> None:
        for message in self.errors:
            self.log.log(Logger.ERROR, message)


class Sim:
    """Remembers when it goes."""

    recorded = ""
    world: World

    def __del__(self) -> None:
        self.world.freed.append(self.recorded)


class SimBuilder(Sim):
    recorded = "Builder"

    def __init__(self, trt: TrtModule, world: World, log: Any) -> None:
        assert log.is_set_up
        self.trt, self.world, world.log = trt, world, log

    def create_network(self, flags: int = 0) -> SimNetwork:
        self.world.network_flags = flags
        return SimNetwork(self.trt, self.world)

    def create_builder_config(self) -> SimConfig:
        self.world.config = SimConfig(self.trt, self.world)
        return self.world.config

    def create_optimization_profile(self) -> SimProfile:
        return SimProfile(self.world)

    def build_serialized_network(self, network: SimNetwork, config: SimConfig) -> bytes | None:
        if "build_serialized_network" in self.world.answers_none:
            self.world.fail()
            return None
        shape = network.get_input(0).shape
        batch = [shape[0]] * 3
        if shape[0] < 0:
            assert config.profile is not None, "a free axis needs a profile"
            batch = [limits[0] for limits in config.profile]
        flag = self.trt.BuilderFlag.VERSION_COMPATIBLE
        head = {
            "version": self.trt.__version__,
            "batch": batch,
            "host_code": bool(config.flags >> int(flag) & 1),
        }
        return json.dumps(head).encode() + b"\n" + network.content


@dataclass
class SimInput:
    recorded = "ITensor"
    shape: tuple[int, ...]


class SimNetwork(Sim):
    recorded = "INetworkDefinition"
    content = b""

    def __init__(self, trt: TrtModule, world: World) -> None:
        self.trt, self.world = trt, world

    def get_input(self, index: int) -> SimInput:
        value = onnx.load_model_from_string(self.content).graph.input[index]
        dims = value.type.tensor_type.shape.dim
        return SimInput(tuple(-1 if axis.dim_param else axis.dim_value for axis in dims))


class SimParser(Sim):
    recorded = "OnnxParser"

    def __init__(self, trt: TrtModule, world: World, network: SimNetwork, log: Any) -> None:
        assert log.is_set_up
        self.trt, self.world, self.network = trt, world, network

    def parse(self, model: bytes) -> bool:
        if self.world.parser_faults or self.world.errors:
            self.world.fail()
            return "parse" not in self.world.answers_none and not self.world.parser_faults
        self.network.content = model
        return True

    @property
    def num_errors(self) -> int:
        return len(self.world.parser_faults)

    def get_error(self, index: int) -> SimFault:
        return SimFault(*self.world.parser_faults[index])


@dataclass
class SimFault:
    recorded = "ParserError"
    name: str
    operator: str
    text: str

    def node_name(self) -> str:
        return self.name

    def node_operator(self) -> str:
        return self.operator

    def desc(self) -> str:
        return self.text

    def node(self) -> int:
        return 17


class SimProfile(Sim):
    recorded = "IOptimizationProfile"
    shapes: tuple[Any, ...] | None = None

    def __init__(self, world: World) -> None:
        self.world = world

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        assert name == "images"
        self.shapes = shapes


class SimCache(Sim):
    recorded = "ITimingCache"

    def __init__(self, world: World, content: bytes) -> None:
        self.world, self.content = world, content

    def serialize(self) -> bytes:
        return self.content + b"+measured"


class SimConfig(Sim):
    recorded = "IBuilderConfig"

    def __init__(self, trt: TrtModule, world: World) -> None:
        self.trt, self.world = trt, world
        # As in TensorRT, TF32 is on until it is cleared.
        self.flags = 1 << int(trt.BuilderFlag.TF32)
        self.pools: dict[str, int] = {}
        self.builder_optimization_level = 3
        self.hardware_compatibility_level: Any = trt.HardwareCompatibilityLevel.NONE
        self.profile: tuple[Any, ...] | None = None
        self.cache: SimCache | None = None

    def set_flag(self, flag: int) -> None:
        self.flags |= 1 << int(flag)

    def clear_flag(self, flag: int) -> None:
        self.flags &= ~(1 << int(flag))

    def set_memory_pool_limit(self, pool: enum.IntEnum, size: int) -> None:
        self.pools[pool.name] = size

    def create_timing_cache(self, content: bytes) -> SimCache | None:
        if content and "create_timing_cache" in self.world.answers_none:
            return None
        return SimCache(self.world, content)

    def set_timing_cache(self, cache: SimCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.content and not self.world.cache_fits:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> SimCache | None:
        return None if "get_timing_cache" in self.world.answers_none else self.cache

    def add_optimization_profile(self, profile: SimProfile) -> int:
        if "add_optimization_profile" in self.world.answers_none:
            return -1
        self.profile = self.world.profile = profile.shapes
        return 0


class SimRuntime(Sim):
    recorded = "Runtime"

    def __init__(self, trt: TrtModule, world: World, log: Any) -> None:
        assert log.is_set_up
        self.trt, self.world, world.log = trt, world, log
        self.engine_host_code_allowed = False
        world.host_code_allowed = False

    def deserialize_cuda_engine(self, plan: bytes) -> SimEngine | None:
        head = json.loads(plan.partition(b"\n")[0])
        own = head["version"] == self.trt.__version__
        self.world.host_code_allowed = self.engine_host_code_allowed
        allowed = head["host_code"] and self.engine_host_code_allowed
        refused = "deserialize_cuda_engine" in self.world.answers_none
        if refused or not (own or allowed) or (head["host_code"] and not allowed):
            self.world.fail()
            return None
        return SimEngine(self.trt, self.world, head["batch"], plan.partition(b"\n")[2])


class SimEngine(Sim):
    recorded = "ICudaEngine"

    def __init__(self, trt: TrtModule, world: World, batch: list[int], content: bytes) -> None:
        self.trt, self.world, self.batch = trt, world, batch
        self.graph = onnx.load_model_from_string(content).graph
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )
        self.values = [*self.graph.input, *self.graph.output]

    @property
    def num_io_tensors(self) -> int:
        return len(self.values)

    def get_tensor_name(self, index: int) -> str:
        return self.values[index].name

    def get_tensor_mode(self, name: str) -> Any:
        is_input = name in {value.name for value in self.graph.input}
        modes = self.trt.TensorIOMode
        return modes.INPUT if is_input else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        types = {
            TensorProto.UINT8: "UINT8",
            TensorProto.FLOAT: "FLOAT",
            TensorProto.INT32: "INT32",
            TensorProto.INT64: "INT64",
        }
        value = next(value for value in self.values if value.name == name)
        return self.trt.DataType[types[value.type.tensor_type.elem_type]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        value = next(value for value in self.values if value.name == name)
        dims = value.type.tensor_type.shape.dim
        return tuple(-1 if axis.dim_param else axis.dim_value for axis in dims)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        assert index == 0
        return [(count, *self.get_tensor_shape(name)[1:]) for count in self.batch]

    def create_execution_context(self) -> SimContext | None:
        if "create_execution_context" in self.world.answers_none:
            self.world.fail()
            return None
        return SimContext(self)


class SimContext(Sim):
    recorded = "IExecutionContext"

    def __init__(self, engine: SimEngine) -> None:
        self.engine, self.world = engine, engine.world
        self.batch = 0
        self.is_set_up = False
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        fewest, _, most = self.engine.batch
        if not fewest <= shape[0] <= most or "set_input_shape" in self.world.answers_none:
            self.world.fail()
            return False
        self.batch = shape[0]
        return shape[1:] == self.engine.get_tensor_shape(name)[1:]

    def infer_shapes(self) -> list[str]:
        return [] if self.batch else ["images"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.batch, *self.engine.get_tensor_shape(name)[1:])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return "set_tensor_address" not in self.world.answers_none

    def execute_async_v3(self, stream_handle: int) -> bool:
        device = self.world.device
        assert stream_handle, "the default stream"
        # The first call sets things up, which no recording allows.
        is_refused = self.world.refuses_capture or not self.is_set_up
        if self.world.fails_to_run or (device.recording is not None and is_refused):
            self.world.fail()
            return False
        # Shapes and addresses are those of the call, not of the run.
        addresses, batch = dict(self.addresses), self.batch
        device.enqueue(lambda: self._compute(addresses, batch), stream_handle)
        return True

    def is_stream_capturable(self, stream_handle: int) -> bool:
        assert stream_handle, "the default stream"
        return self.world.is_capturable

    def _compute(self, addresses: dict[str, int], batch: int) -> None:
        shape = (batch, *self.engine.get_tensor_shape("images")[1:])
        dtype = np.dtype(
            {"UINT8": "uint8", "FLOAT": "float32"}[self.engine.get_tensor_dtype("images").name]
        )
        size = int(np.prod(shape)) * dtype.itemsize
        images = np.frombuffer(ctypes.string_at(addresses["images"], size), dtype).reshape(shape)
        self.world.inputs.append(images)
        self.is_set_up = True
        names = [value.name for value in self.engine.graph.output]
        outputs = self.engine.session.run(names, {"images": images})
        for name, output in zip(names, outputs, strict=True):
            content = np.ascontiguousarray(output).tobytes()
            ctypes.memmove(addresses[name], content, len(content))


# ---------------------------------------------------------------- the device


class LazyStream:
    """Work is done when somebody waits for it, and no earlier."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle
        self.queue: deque[Callable[[], None]] = deque()
        self.num_queued = 0

    def add(self, work: Callable[[], None]) -> None:
        self.queue.append(work)
        self.num_queued += 1

    def run_until(self, position: int) -> None:
        with torch.inference_mode():
            while self.queue and self.num_queued - len(self.queue) < position:
                self.queue.popleft()()

    def synchronize(self) -> None:
        self.run_until(self.num_queued)

    def wait_event(self, event: LazyEvent) -> None:
        # A stream may run as soon as it can; torch's own operators do, here.
        event.synchronize()


class LazyEvent:
    stream: LazyStream | None = None
    position = 0

    def record(self, stream: LazyStream) -> None:
        self.stream, self.position = stream, stream.num_queued

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.run_until(self.position)


class LazyDevice:
    """`Device` on the CPU, as late as CUDA may be, or as early."""

    def __init__(self) -> None:
        self.is_eager = False
        self.streams: dict[int, LazyStream] = {}
        self.current: list[LazyStream] = []
        self.recording: list[Callable[[], None]] | None = None
        self.records_nothing = False
        self.num_replays = 0

    def new_stream(self) -> LazyStream:
        stream = LazyStream(len(self.streams) + 1)
        self.streams[stream.cuda_stream] = stream
        return stream

    def new_event(self) -> LazyEvent:
        return LazyEvent()

    @contextmanager
    def on_stream(self, stream: LazyStream) -> Iterator[None]:
        self.current.append(stream)
        yield
        self.current.pop()

    def synchronize(self) -> None:
        for stream in self.streams.values():
            stream.synchronize()

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        # What was in the memory before; zeros would hide an output that is never written.
        return torch.full(shape, 77, dtype=dtype)

    def allocate_staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, 77, dtype=dtype)

    def enqueue(self, work: Callable[[], None], stream_handle: int) -> None:
        if self.recording is not None:
            self.recording.append(work)
        else:
            self.streams[stream_handle].add(work)
            self.keep_pace()

    def keep_pace(self) -> None:
        if self.is_eager:
            self.synchronize()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        def work() -> None:
            target.copy_(source)

        self.enqueue(work, self.current[-1].cuda_stream)

    def capture(self, work: Callable[[], None], stream: LazyStream) -> Callable[[], None]:
        assert not stream.queue, "the stream must be idle before a recording"
        self.recording = recorded = []
        try:
            work()
        finally:
            self.recording = None
        if self.records_nothing:
            recorded.clear()

        def replay() -> None:
            self.num_replays += 1
            for step in recorded:
                self.current[-1].add(step)
            self.keep_pace()

        return replay


# ---------------------------------------------------------------- fixtures


RECORDS = Path(__file__).resolve().parents[5] / "shared" / "facts" / "trt_api"


@pytest.fixture(scope="session")
def read_record() -> Callable[[str], Record]:
    """The public interface of one version of the bindings."""

    @functools.cache
    def read(name: str) -> Record:
        path = RECORDS / f"{name}.json"
        if not path.is_file():
            pytest.skip(f"needs the recorded interface {path.name} in {RECORDS}, which is absent")
        return json.loads(path.read_text("utf-8"))

    return read


@pytest.fixture(scope="session")
def newest_record(read_record: Callable[[str], Record], request: pytest.FixtureRequest) -> Record:
    """The interface of 11.x.

    Where the records are absent, that of whichever TensorRT-RTX can be imported: it is the same.
    """
    if (RECORDS / "trt-11.4.0.json").is_file():
        return read_record("trt-11.4.0")
    return record_bindings(request.getfixturevalue("rtx"))


@pytest.fixture
def world() -> World:
    """What the stand-in does and has seen."""
    return World(LazyDevice())


@pytest.fixture
def make_trt(read_record: Callable[[str], Record], world: World) -> Callable[[str], TrtModule]:
    """A stand-in for one recorded version: make_trt("trt-10.3.0")."""

    def make(name: str) -> TrtModule:
        if name in RTX:
            return TrtModule(read_record(name), "tensorrt_rtx_bindings", RTX[name], world)
        return TrtModule(read_record(name), "tensorrt", VERSIONS[name], world)

    return make


@pytest.fixture(params=VERSIONS)
def trt(make_trt: Callable[[str], TrtModule], request: pytest.FixtureRequest) -> TrtModule:
    """Each recorded version of TensorRT in turn."""
    return make_trt(request.param)


@pytest.fixture
def trt11(newest_record: Record, world: World) -> TrtModule:
    """One version, where the version does not matter."""
    return TrtModule(newest_record, "tensorrt", VERSIONS["trt-11.4.0"], world)


@pytest.fixture(scope="session")
def make_painter(tiny_card: ModelCard) -> Callable[..., bytes]:
    """An exported file whose scores are brightnesses, to be checked by hand.

    Red of the left half is the score of class 0 there, red of the right half that of class 1,
    and blue of the upper half that of class 2.
    """

    def make(
        *,
        input_type: str = "uint8",
        batch: int | None = None,
        card: ModelCard = tiny_card,
        score_name: str = "scores",
    ) -> bytes:
        height, width = card.canvas
        elem = TensorProto.UINT8 if input_type == "uint8" else TensorProto.FLOAT
        axis = batch or "N"
        half = width // 2
        boxes = [[0, 0, half, height], [half, 0, width, height], [0, 0, width, height // 2]]
        constants = {
            "axes": np.array([1, 2, 3]),
            "begin0": np.array([0, 0, 0]),
            "end0": np.array([1, height, half]),
            "begin1": np.array([0, 0, half]),
            "end1": np.array([1, height, width]),
            "begin2": np.array([2, 0, 0]),
            "end2": np.array([3, height // 2, width]),
            "white": np.float32(255),
            "zero": np.float32(0),
            "corners": np.array([boxes], dtype=np.float32),
            "classes": np.array([[0, 1, 2]], dtype=np.float32),
            "last": np.array([2]),
        }
        nodes = [helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT)]
        for index in range(3):
            nodes += [
                helper.make_node(
                    "Slice", ["pixels", f"begin{index}", f"end{index}", "axes"], [f"part{index}"]
                ),
                helper.make_node("ReduceMean", [f"part{index}"], [f"mean{index}"], axes=[1, 2, 3]),
                helper.make_node("Flatten", [f"mean{index}"], [f"flat{index}"]),
            ]
        nodes += [
            helper.make_node("Concat", [f"flat{index}" for index in range(3)], ["grey"], axis=1),
            helper.make_node("Div", ["grey", "white"], [score_name]),
            helper.make_node("Mul", ["grey", "zero"], ["nothing"]),
            helper.make_node("Add", ["nothing", "classes"], ["numbers"]),
            helper.make_node("Cast", ["numbers"], ["labels"], to=TensorProto.INT32),
            helper.make_node("Unsqueeze", ["nothing", "last"], ["column"]),
            helper.make_node("Add", ["column", "corners"], ["boxes"]),
        ]
        graph = helper.make_graph(
            nodes,
            "painter",
            [helper.make_tensor_value_info("images", elem, [axis, 3, height, width])],
            [
                helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [axis, 3, 4]),
                helper.make_tensor_value_info(score_name, TensorProto.FLOAT, [axis, 3]),
                helper.make_tensor_value_info("labels", TensorProto.INT32, [axis, 3]),
            ],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        for key, text in card.to_metadata().items():
            model.metadata_props.add(key=key, value=text)
        return model.SerializeToString()

    return make


@pytest.fixture(scope="session")
def painter(make_painter: Callable[..., bytes]) -> bytes:
    """`make_painter()` with uint8 input and a free batch."""
    return make_painter()


@pytest.fixture(scope="session")
def rtx() -> Any:
    """NVIDIA's real parser and builder, which work without a GPU."""
    pytest.importorskip("tensorrt_rtx_libs", reason="needs tensorrt-rtx-cu13-libs")
    return pytest.importorskip("tensorrt_rtx_bindings", reason="needs tensorrt-rtx-cu13-bindings")


@pytest.fixture(scope="session")
def parse_recorded() -> Callable[[str], tuple[inspect.Signature | None, str]]:
    """`parse_signature`, for tests."""
    return parse_signature


@pytest.fixture(scope="session")
def live_record(rtx: Any) -> Record:
    """The interface of the bindings of this machine."""
    return record_bindings(rtx)
