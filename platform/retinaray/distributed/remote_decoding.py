"""Canvases made by Ray tasks on other nodes, for workers whose own processors are too few.

Machines with GPUs have few processors for each of them. Here a worker sends groups of images away
and gets back canvases, which it reads where Ray's object store has put them, without a copy.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from retinaray.errors import ClusterError, ImageError, RetinarayError
from retinaray.inference.canvas_loading import LoadedCanvas
from retinaray.inference.image_sources import ImageSource

logger = logging.getLogger(__name__)

Outcome = LoadedCanvas | RetinarayError
"""A canvas, or what was raised in its place: one image must not fail those it was sent with."""

# Of a group by Ray itself, for nodes that are taken away; of one image by us, counted.
_GROUP_RETRIES = 3
_MAX_DEATHS = 2
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class DecodePlacement:
    """Where decode tasks may run; each takes one logical processor.

    Attributes:
        resources: Custom resources that each task takes, such as {"decode": 1}.
        labels: Labels that a node must have, such as {"ray.io/node-group": "decode"}.
    """

    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    def to_options(self) -> dict[str, Any]:
        """Options of a Ray task."""
        options: dict[str, Any] = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
        if self.resources:
            options["resources"] = dict(self.resources)
        if self.labels:
            options["label_selector"] = dict(self.labels)
        return options


class RemoteDecoder:
    """A CanvasLoader that has images loaded by Ray tasks; works in drivers and in actors.

    Consecutive images travel in groups. Of these `num_tasks` at most are on their way or wait to be
    taken, so Ray's object store holds at most `num_tasks` x `group` canvases of height x width x 3
    bytes for each decoder, and beyond these the groups of which the caller still holds a canvas.
    To keep all tasks at work the caller must have asked for `num_tasks` x `group` images ahead, and
    it takes them in their order.

    What becomes of failures:
    - the fault of an image, and a store that fails, are raised in that image's place;
    - a task that dies with its node or process is repeated by Ray, elsewhere if need be; after that
      its images are loaded one per task, and one with which two processes died is an ImageError;
    - anything else, such as a cluster that is gone, is raised for the whole group.

    Args:
        load: Fetches and decodes one image; raises RetinarayError. Must survive pickling, and the
            nodes must have its package.
        num_tasks: Tasks on their way at once, at least 1.
        group: Images of a task, at least 1.
        threads: Images of a task that are fetched at once: more than the task's one processor could
            decode, because it mostly waits for the store.
        placement: Nodes that decode; any by default.
    """

    def __init__(
        self,
        *,
        load: Callable[[ImageSource], LoadedCanvas],
        num_tasks: int,
        group: int = 8,
        threads: int = 8,
        placement: DecodePlacement | None = None,
    ) -> None:
        if min(num_tasks, group, threads) < 1:
            raise ValueError(
                f"expected positive numbers, got num_tasks={num_tasks}, group={group}, "
                f"threads={threads}"
            )
        import ray

        self._num_tasks = num_tasks
        self._group_size = group
        self._threads = threads
        options = (placement or DecodePlacement()).to_options()
        self._task: Any = ray.remote(**options)(load_group)
        # Sent once, not with each task.
        self._load = ray.put(load)
        self._lock = threading.Lock()
        self._filling = _Group()
        self._unsent: deque[_Group] = deque()
        self._sent: set[_Group] = set()
        self._running: set[Any] = set()
        self._is_closed = False
        self._waiters = ThreadPoolExecutor(num_tasks, thread_name_prefix="remote-decode")

    def load(self, source: ImageSource) -> Future[LoadedCanvas]:
        """Take an image into the next group, which is sent when it is full or asked for.

        Returns:
            The canvas, read-only; only `result` and `exception` send a group that is not full.
        """
        with self._lock:
            if self._is_closed:
                raise RuntimeError("expected an open decoder: load was called after close")
            group = self._filling
            loaded = _Asked(partial(self._note_asked, group))
            group.orders.append((source, loaded))
            if len(group.orders) == self._group_size:
                self._end_filling()
                self._send_more()
        return loaded

    def close(self) -> None:
        """Cancel what runs and what waits: nobody is left waiting for a result."""
        import ray

        with self._lock:
            self._is_closed = True
            groups = [self._filling, *self._unsent, *self._sent]
            running = list(self._running)
            self._unsent.clear()
        for ref in running:
            # A task that hangs in a codec would not hear a softer request.
            ray.cancel(ref, force=True)
        self._waiters.shutdown(cancel_futures=True)
        for group in groups:
            for _, loaded in group.orders:
                loaded.cancel()

    def _note_asked(self, group: _Group, loaded: _Asked) -> None:
        """Somebody waits for a result: send its group; once all were asked for, send another."""
        with self._lock:
            if group is self._filling:
                self._end_filling()
            if group in self._unsent:
                # Whoever takes results in another order must not wait for what it never takes.
                self._unsent.remove(group)
                self._send(group)
            group.num_asked += not loaded.was_asked
            loaded.was_asked = True
            if group.num_asked == len(group.orders):
                self._sent.discard(group)
            self._send_more()

    def _end_filling(self) -> None:
        self._unsent.append(self._filling)
        self._filling = _Group()

    def _send_more(self) -> None:
        while self._unsent and len(self._sent) < self._num_tasks and not self._is_closed:
            self._send(self._unsent.popleft())

    def _send(self, group: _Group) -> None:
        if not self._is_closed:
            self._sent.add(group)
            self._waiters.submit(self._settle, group)

    def _settle(self, group: _Group) -> None:
        """Have one group loaded, in a thread that waits for it."""
        orders = group.orders
        try:
            outcomes = self._load_together([source for source, _ in orders])
        except BaseException as error:
            for _, loaded in orders:
                _resolve(loaded, error)
            raise
        for (_, loaded), outcome in zip(orders, outcomes, strict=True):
            _resolve(loaded, outcome)

    def _load_together(self, sources: Sequence[ImageSource]) -> list[Outcome]:
        if len(sources) > 1:
            try:
                return self._run(sources, max_retries=_GROUP_RETRIES)
            except _deaths() as error:
                logger.warning(
                    "a decode task of %d images died (%s): loading them singly",
                    len(sources),
                    type(error).__name__,
                )
        return [self._load_alone(source) for source in sources]

    def _load_alone(self, source: ImageSource) -> Outcome:
        for _ in range(_MAX_DEATHS):
            try:
                return self._run([source], max_retries=0)[0]
            except _deaths() as error:
                last = error
        if isinstance(last, _process_deaths()):
            return ImageError(
                f"{source.uri} ended {_MAX_DEATHS} processes that decoded it and nothing else "
                f"({type(last).__name__}): drop the file, or decode it elsewhere to see why"
            )
        return ClusterError(
            f"{source.uri} could not be decoded on another node: {type(last).__name__} "
            f"{_MAX_DEATHS} times; its nodes go away faster than they work: check them"
        )

    def _run(self, sources: Sequence[ImageSource], *, max_retries: int) -> list[Outcome]:
        import ray

        with self._lock:
            if self._is_closed:
                raise ClusterError("the decoder was closed while an image waited: load it again")
            ref = self._task.options(max_retries=max_retries).remote(
                self._load, list(sources), self._threads
            )
            self._running.add(ref)
        try:
            while not ray.wait([ref], timeout=_PATIENCE_S, fetch_local=False)[0]:
                logger.warning(
                    "a decode task has not ended for %g s; is a processor left for it?", _PATIENCE_S
                )
            outcomes: list[Outcome] = ray.get(ref)
            return outcomes
        finally:
            with self._lock:
                self._running.discard(ref)


def load_group(
    load: Callable[[ImageSource], LoadedCanvas], sources: Sequence[ImageSource], threads: int
) -> list[Outcome]:
    """Load some images; this is the task.

    Args:
        load: Fetches and decodes one image.
        sources: The images.
        threads: Images that are loaded at once.

    Returns:
        For each a canvas or its error, in their order.
    """

    def attempt(source: ImageSource) -> Outcome:
        try:
            return load(source)
        except RetinarayError as error:
            return error

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        return list(pool.map(attempt, sources))


class _Asked(Future[LoadedCanvas]):
    """A future that tells when somebody waits for it."""

    def __init__(self, note_asked: Callable[[_Asked], None]) -> None:
        super().__init__()
        self._note_asked = note_asked
        self.was_asked = False

    def result(self, timeout: float | None = None) -> LoadedCanvas:
        self._note_asked(self)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._note_asked(self)
        return super().exception(timeout)


@dataclass(eq=False)
class _Group:
    """Images that travel together.

    Attributes:
        orders: Each image, and who waits for it.
        num_asked: How many of them were asked for.
    """

    orders: list[tuple[ImageSource, _Asked]] = field(default_factory=list)
    num_asked: int = 0


def _resolve(loaded: Future[LoadedCanvas], outcome: Outcome | BaseException) -> None:
    if not loaded.set_running_or_notify_cancel():
        return
    if isinstance(outcome, BaseException):
        loaded.set_exception(outcome)
    else:
        loaded.set_result(outcome)


def _process_deaths() -> tuple[type[Exception], ...]:
    """What Ray raises when a process dies of its work."""
    from ray.exceptions import OutOfMemoryError, WorkerCrashedError

    return (WorkerCrashedError, OutOfMemoryError)


def _deaths() -> tuple[type[Exception], ...]:
    """What Ray raises when a task, or its result, is lost through no error of its code."""
    from ray.exceptions import NodeDiedError, ObjectLostError

    return (*_process_deaths(), NodeDiedError, ObjectLostError)
