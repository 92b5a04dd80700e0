"""All of torch.cuda that running an engine needs, behind one small class.

Streams and events are torch's own: a stream has `cuda_stream` (its handle), `synchronize` and
`wait_event`, an event has `record(stream)` and `synchronize`.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from retinaray.inference.plan_sidecar import GpuInfo

_DRIVER_FILE = Path("/proc/driver/nvidia/version")


class Device(Protocol):
    """Where an engine runs."""

    def new_stream(self) -> Any:
        """A stream of its own, never the default one."""
        ...

    def new_event(self) -> Any:
        """An event; waiting for it before it was recorded returns at once."""
        ...

    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Make a stream, and its device, the current one of this thread."""
        ...

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros in device memory."""
        ...

    def allocate_staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros in host memory from which the device copies by itself."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy on the current stream; types and layouts may differ on one device."""
        ...

    def capture(self, work: Callable[[], None], stream: Any) -> Callable[[], None]:
        """Record what is queued on a stream; by one thread of a process at a time.

        Args:
            work: Queues it; waits for nothing and allocates nothing.
            stream: Where it is queued; idle.

        Returns:
            Queues all of it again at once, on the current stream.

        Raises:
            RuntimeError: If something in it cannot be recorded.
        """
        ...


class CudaDevice:
    """The current GPU of this thread."""

    def __init__(self) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device())

    def new_stream(self) -> Any:
        """See `Device`."""
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def new_event(self) -> Any:
        """See `Device`."""
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """See `Device`."""
        return torch.cuda.stream(stream)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `Device`."""
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def allocate_staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `Device`."""
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See `Device`."""
        target.copy_(source, non_blocking=True)

    def capture(self, work: Callable[[], None], stream: Any) -> Callable[[], None]:
        """See `Device`."""
        graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves its stream as the current one; the outer block restores it.
        # "thread_local": with the default another thread's allocation would break the capture.
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            work()
        return graph.replay


def describe_gpu() -> GpuInfo:
    """The current GPU."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return GpuInfo(
        name=properties.name,
        compute_capability=(properties.major, properties.minor),
        cuda=torch.version.cuda or "",
        driver=read_driver_version(),
    )


def read_driver_version(path: Path = _DRIVER_FILE) -> str:
    """Version of the NVIDIA driver; empty where Linux does not tell it.

    Args:
        path: The file in which the kernel module describes itself.
    """
    try:
        text = path.read_text("utf-8")
    except OSError:
        return ""
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return found[1] if found else ""


def describe_machine() -> str:
    """Operating system and processor, `Linux x86_64`."""
    return f"{platform.system()} {platform.machine()}"
