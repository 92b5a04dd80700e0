"""A proxy before the real S3 server that breaks requests as networks and servers do."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from retinaray.demo.embedded_s3 import EmbeddedS3

FAULTS = ("500", "503", "reset", "truncate", "slow", "lose_answer", "expired")
_ERRORS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "expired": (400, "ExpiredToken"),
}
_HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive"}
_SLOW_S = 1.5


def choose_none(method: str, path: str, number: int) -> str:
    """No fault."""
    return ""


class FaultyS3:
    """The proxy.

    Attributes:
        choose: Gives the fault of a request from its method, its path and its number from 0 on;
            empty for none. Settable at any time.
        met: How often each fault was served.
    """

    def __init__(self, upstream: str) -> None:
        self.choose: Callable[[str, str, int], str] = choose_none
        self.met: Counter[str] = Counter()
        self._number = -1
        self._lock = threading.Lock()
        address = urlsplit(upstream)
        self.upstream = (address.hostname or "127.0.0.1", address.port or 80)
        owner = self

        class Handler(_ProxyHandler):
            proxy = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint_url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[FaultyS3]:
        """Serve inside the block."""
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def heal(self) -> None:
        """Serve no more faults."""
        self.choose = choose_none

    def next_fault(self, method: str, path: str) -> str:
        """The fault of the request that has just come."""
        with self._lock:
            self._number += 1
            fault = self.choose(method, path, self._number)
            assert fault in ("", *FAULTS)
            if fault:
                self.met[fault] += 1
            return fault


class _ProxyHandler(BaseHTTPRequestHandler):
    proxy: FaultyS3
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        body = self._read_body()
        fault = self.proxy.next_fault(self.command, self.path)
        if fault in _ERRORS:
            self._answer_error(*_ERRORS[fault])
            return
        if fault == "slow":
            time.sleep(_SLOW_S)
        if fault == "reset":
            self._reset()
            return
        connection = http.client.HTTPConnection(*self.proxy.upstream, timeout=60)
        try:
            # The signature covers the headers, the host among them: they pass as they are.
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
            if fault == "lose_answer":
                self._reset()
                return
            self._pass_on(answer, content, is_cut=fault == "truncate")
        finally:
            connection.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815

    def _read_body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
            del self.headers["Expect"]
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _pass_on(self, answer: http.client.HTTPResponse, content: bytes, *, is_cut: bool) -> None:
        self.send_response_only(answer.status, answer.reason)
        length = None
        for name, value in answer.getheaders():
            if name.lower() == "content-length":
                length = value
            elif name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        # The answer to HEAD tells a length, and has no body.
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if is_cut and len(content) > 1:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self._reset()
            return
        self.wfile.write(content)

    def _answer_error(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        """End the connection as a crashed server does: with RST, not FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def faulty_s3(s3_server: EmbeddedS3) -> Iterator[FaultyS3]:
    """The proxy, without faults until the test sets `choose`."""
    with FaultyS3(s3_server.endpoint_url).running() as proxy:
        yield proxy
