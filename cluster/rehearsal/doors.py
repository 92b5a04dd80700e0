"""A machine's way to the S3 server, at which its image requests can be counted and held.

The server of `retinaray.demo` listens on 127.0.0.1 alone. A door listens where one machine reaches
it and forwards bytes both ways. It knows of HTTP no more than how a request for an image begins.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 1 << 16


class Door:
    """A TCP forwarder that lets everything through, and image requests as it is told.

    Args:
        host: Address to listen on; the port is free.
        target: Host and port of the S3 server.
        images: Beginning of the path of an image: `/bucket/prefix/`.

    Attributes:
        url: What the machine uses as its S3 endpoint.
    """

    def __init__(self, host: str, target: tuple[str, int], *, images: str) -> None:
        self._target = target
        self._marker = b"GET " + images.encode()
        self._state = threading.Condition()
        self._budget: int | None = None
        self._is_closed = False
        self._num_waiting = 0
        self._asked: list[str] = []
        self._listener = socket.create_server((host, 0), backlog=128)
        self.url = f"http://{host}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="door", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def asked(self) -> list[str]:
        """Paths of the images asked for so far, in order, repetitions and waiting ones included."""
        with self._state:
            return list(self._asked)

    @property
    def num_waiting(self) -> int:
        """Image requests that are held now."""
        with self._state:
            return self._num_waiting

    def admit(self, count: int | None) -> None:
        """Let so many more image requests through and hold those after them; None holds none."""
        with self._state:
            self._budget = count
            self._state.notify_all()

    def forget(self) -> None:
        """Start a new list of what was asked for."""
        with self._state:
            self._asked.clear()

    def close(self) -> None:
        """Take no more connections; what waits is let go."""
        with self._state:
            self._is_closed = True
            self._state.notify_all()
        # A thread in accept() is woken by shutdown, not by close.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                if self._is_closed:
                    return
                continue
            threading.Thread(target=self._serve, args=(client,), name="door", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Carry one connection's bytes both ways; a client without a server is sent away."""
        with client, contextlib.suppress(OSError), socket.create_connection(self._target) as server:
            back = threading.Thread(target=_carry, args=(server, client), name="door", daemon=True)
            back.start()
            self._carry_requests(client, server)
            back.join()

    def _carry_requests(self, client: socket.socket, server: socket.socket) -> None:
        while chunk := client.recv(_CHUNK_BYTES):
            # Requests without a body come whole, and one at a time on a connection.
            if chunk.startswith(self._marker):
                self._wait_for_turn(chunk.split(b" ", 2)[1].decode())
            server.sendall(chunk)
        server.shutdown(socket.SHUT_WR)

    def _wait_for_turn(self, path: str) -> None:
        with self._state:
            self._asked.append(path.partition("?")[0])
            self._num_waiting += 1
            self._state.wait_for(lambda: self._budget is None or self._budget or self._is_closed)
            self._num_waiting -= 1
            if self._budget:
                self._budget -= 1


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(_CHUNK_BYTES):
            sink.sendall(chunk)
        sink.shutdown(socket.SHUT_WR)
