"""Where the canvases of a part are made: on the engine's GPU, or on processors elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial

from retinaray.assembly.job_plan_workers import DECODE_GROUP
from retinaray.assembly.reading import make_read_settings
from retinaray.config.schema import InferJob
from retinaray.distributed.remote_decoding import DecodePlacement, RemoteDecoder
from retinaray.inference.canvas_loading import CanvasLoader, load_canvas
from retinaray.inference.gpu_decoding import GpuJpegLoader
from retinaray.inference.stage_times import StageClock


@dataclass(frozen=True)
class PartLoader:
    """What makes the canvases of a part.

    Attributes:
        loader: None = threads of the worker itself.
        ahead: Images that it wants to be asked for ahead.
    """

    loader: CanvasLoader | None = None
    ahead: int = 0


@contextmanager
def open_loader(
    job: InferJob,
    canvas: tuple[int, int],
    read: Callable[[str], bytes],
    clock: StageClock,
    *,
    num_tasks: int,
) -> Iterator[PartLoader]:
    """The loader that a job asks for, closed at the end.

    Args:
        job: The job.
        canvas: Height and width of the network.
        read: Gives the bytes at a URI.
        clock: Counts where the time goes, except in other processes.
        num_tasks: Decode tasks of this part at once, where other processors decode.

    Raises:
        InferenceError: If a GPU shall decode and there is none.
    """
    settings = make_read_settings(job.reading)
    if job.decoding.device == "gpu":
        on_gpu = GpuJpegLoader(canvas=canvas, read=read, settings=settings, clock=clock)
        with closing(on_gpu):
            yield PartLoader(on_gpu, ahead=job.reading.threads)
    elif job.decoding.num_cpus:
        resource = job.decoding.resource
        elsewhere = RemoteDecoder(
            load=partial(load_canvas, canvas=canvas, read=read, settings=settings),
            num_tasks=num_tasks,
            group=DECODE_GROUP,
            threads=job.reading.threads,
            placement=DecodePlacement(resources={resource: 1} if resource else {}),
        )
        with closing(elsewhere):
            yield PartLoader(elsewhere, ahead=num_tasks * DECODE_GROUP)
    else:
        yield PartLoader()
