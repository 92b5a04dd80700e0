"""Memory of one engine: allocated once, used by every batch.

Two slots alternate. While the engine works on one batch, the next is copied into the other slot's
staging memory, and the results of the one before are read from that slot's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from retinaray.errors import InferenceError
from retinaray.inference.onnx_contract import INPUT_NAME, OUTPUT_NAMES
from retinaray.inference.tensorrt_device import Device

NUM_SLOTS = 2
# No output is ever negative: coordinates are clipped to the canvas, the rest counts from 0.
_NEVER_WRITTEN = -1


class Slot:
    """What belongs to one batch on its way.

    Attributes:
        staging: Host memory, N H W 3, from which the device copies.
        decoded: Images that are on the device already; the staging memory is not used then.
        outputs: The engine's outputs of this batch, by name.
        copied: The staging memory may be filled again.
        ready: The outputs are there.
        ticket: Which batch it holds; a number that rises.
    """

    def __init__(self, device: Device, staging: Tensor, outputs: Mapping[str, Tensor]) -> None:
        self.staging = staging
        self.decoded: UInt8[Tensor, "n H W 3"] | None = None
        self.outputs = {
            name: device.allocate(tuple(output.shape), output.dtype)
            for name, output in outputs.items()
        }
        self.copied: Any = device.new_event()
        self.ready: Any = device.new_event()
        self.ticket = -1

    def fill(self, images: UInt8[Tensor, "N 3 H W"]) -> None:
        """Copy a batch in as soon as the device has copied the last one out; the rest is black."""
        self.copied.synchronize()
        count = images.shape[0]
        self.decoded = None
        if images.device != self.staging.device:
            self.decoded = images.permute(0, 2, 3, 1)
            return
        # Decoded images lie in memory pixel by pixel; in that order this is one plain copy.
        self.staging[:count].copy_(images.permute(0, 2, 3, 1))
        self.staging[count:].zero_()


class EngineBuffers:
    """Inputs, outputs and slots of an engine that takes `batch` images per call.

    Args:
        device: Where it runs.
        batch: Images per call.
        canvas: Their height and width.
        input_dtype: What the engine takes.
        output_shapes: Of each output.
    """

    def __init__(
        self,
        device: Device,
        *,
        batch: int,
        canvas: tuple[int, int],
        input_dtype: torch.dtype,
        output_shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._device = device
        self._landing = device.allocate((batch, *canvas, 3), torch.uint8)
        self._input = device.allocate((batch, 3, *canvas), input_dtype)
        self._outputs = {
            name: device.allocate(
                output_shapes[name], torch.int32 if name == "labels" else torch.float32
            )
            for name in OUTPUT_NAMES
        }
        self._slots = [
            Slot(
                device,
                device.allocate_staging((batch, *canvas, 3), torch.uint8),
                self._outputs,
            )
            for _ in range(NUM_SLOTS)
        ]
        self._num_tickets = 0

    @property
    def bindings(self) -> dict[str, Tensor]:
        """What the engine reads and writes, by name."""
        return {INPUT_NAME: self._input, **self._outputs}

    def take_slot(self) -> Slot:
        """The slot of the next batch; what it held is lost."""
        slot = self._slots[self._num_tickets % NUM_SLOTS]
        slot.ticket = self._num_tickets
        self._num_tickets += 1
        return slot

    def queue_input(self) -> None:
        """Queue the step from uploaded pixels to what the engine takes."""
        self._device.copy(self._input, self._landing.permute(0, 3, 1, 2))

    def queue_batch(self, slot: Slot, run: Callable[[], None], stream: Any) -> None:
        """Queue everything for a slot that has been filled.

        Args:
            slot: The batch.
            run: Queues the network.
            stream: The current stream.
        """
        if slot.decoded is None:
            self._device.copy(self._landing, slot.staging)
        else:
            count = slot.decoded.shape[0]
            self._device.copy(self._landing[:count], slot.decoded)
            self._landing[count:].zero_()
        slot.copied.record(stream)
        run()
        for name, output in self._outputs.items():
            self._device.copy(slot.outputs[name], output)
        slot.ready.record(stream)

    def forget_outputs(self) -> None:
        """Overwrite the engine's outputs with what no engine writes; nothing may be queued."""
        for output in self._outputs.values():
            output.fill_(_NEVER_WRITTEN)

    def all_written(self) -> bool:
        """Whether the engine wrote all outputs since `forget_outputs`; waits for the GPU."""
        return not any(bool((output == _NEVER_WRITTEN).any()) for output in self._outputs.values())

    def read_slot(self, slot: Slot, ticket: int, count: int) -> tuple[Tensor, ...]:
        """Boxes, scores and labels of the first images of a batch, on the device.

        Raises:
            InferenceError: If the slot has been given to a later batch.
        """
        if slot.ticket != ticket:
            raise InferenceError(
                "the results of a batch were asked for after two more were started: one predictor "
                "serves one loop at a time; make one for each"
            )
        return tuple(slot.outputs[name][:count] for name in OUTPUT_NAMES)
