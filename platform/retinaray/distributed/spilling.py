"""Whether Ray moves objects to disk, which a batch inference never needs: it passes no pixels."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from retinaray.errors import ClusterError

logger = logging.getLogger(__name__)

_ASK_EVERY_S = 30.0
_TIMEOUT_S = 10.0


def read_spilled_bytes() -> int:
    """Bytes that the object stores of all living nodes have written to disk since they started.

    One question to one node, which asks the others: some milliseconds on one machine. What was
    deleted or read back since is still counted; what a lost node spilled is not.

    Raises:
        ClusterError: If the cluster does not answer within ten seconds.
    """
    from ray._private.internal_api import get_memory_info_reply
    from ray._private.state import state

    try:
        reply = get_memory_info_reply(  # type: ignore[no-untyped-call]
            state, timeout_seconds=_TIMEOUT_S
        )
    # What gRPC raises is a bare Exception of a package that only Ray declares.
    except Exception as error:
        raise ClusterError(
            f"expected the memory statistics of Ray within {_TIMEOUT_S:g} s, got {error}: look "
            "whether its nodes are alive (ray status)"
        ) from error
    return int(reply.store_stats.spilled_bytes_total)


class SpillWatch:
    """Looks now and then whether the object store spills, and says so once.

    A cluster may serve others as well: only what is spilled while this watches counts, whoever
    did it. That a cluster does not answer ends no run.

    Args:
        read: Gives the bytes spilled so far; raises ClusterError.
        clock: Seconds that never go back; another one in tests.
    """

    def __init__(
        self,
        read: Callable[[], int] = read_spilled_bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._clock = read, clock
        self._has_warned = False
        self._start_bytes: int | None = None
        self._bytes = 0
        self._next_s = clock()
        self.check()

    def check(self, *, now: bool = False) -> int:
        """Ask, if the last time was half a minute ago or `now` is set.

        Returns:
            Bytes spilled since the watch began, as last known.
        """
        if not now and self._clock() < self._next_s:
            return self._bytes
        self._next_s = self._clock() + _ASK_EVERY_S
        try:
            spilled = self._read()
        except ClusterError as error:
            logger.info("spilling is not known: %s", error)
            return self._bytes
        if self._start_bytes is None:
            self._start_bytes = spilled
        # A node that was lost took its count along.
        self._bytes = max(self._bytes, spilled - self._start_bytes)
        if self._bytes and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "object store spilled %.3g GiB: Ray writes to disk what does not fit into memory, "
                "which slows the run down; look for other jobs on the cluster, or give its nodes "
                "a larger object store",
                self._bytes / 1024**3,
            )
        return self._bytes
