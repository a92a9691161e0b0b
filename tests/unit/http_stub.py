"""A server on this machine that answers whatever a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Stub(ThreadingHTTPServer):
    """Answers with ``status`` and ``parts``, each sent by itself; keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 200
        self.parts: list[bytes | Callable[[], object]] = []
        self.asked: list[tuple[str, dict[str, object] | None]] = []
        self.length: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, json.loads(body) if body else None))
        self.send_response(self.server.status)
        if self.server.length is not None:
            self.send_header("Content-Length", str(self.server.length))
        self.end_headers()
        self.wfile.flush()
        for part in self.server.parts:
            if callable(part):
                part()
                continue
            self.wfile.write(part)
            self.wfile.flush()

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture(name="server")
def server_fixture() -> Iterator[Stub]:
    """A running stub."""
    with Stub() as stub:
        thread = threading.Thread(target=stub.serve_forever, args=(0.01,))
        thread.start()
        yield stub
        stub.shutdown()
        thread.join()
