"""A proxy on loopback in front of an MLflow server, or of none, with faults on demand."""

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Headers of one connection, not of what it carries.
_HOP_HEADERS = ("connection", "keep-alive", "transfer-encoding", "content-length", "host")


@dataclass
class Proxy:
    """Its address, its faults, and how many requests it got.

    Attributes:
        faults: of the next requests, one each: a status, "cut" (in the middle of the answer),
            "slow" (no answer for a minute) or "" (none). Later requests have none.
        always: the fault of every request, if not empty.
    """

    url: str
    faults: list[int | str] = field(default_factory=list)
    always: int | str = ""
    requests: int = 0


@contextmanager
def proxy(port: int | None = None) -> Iterator[Proxy]:
    """A proxy of the server at a port; without a port, requests without a fault get a 503."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(
            self, status: int, body: bytes, headers: list[tuple[str, str]], length: int
        ) -> None:
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in _HOP_HEADERS:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def _handle(self) -> None:
            state.requests += 1
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = state.always or (state.faults.pop(0) if state.faults else "")
            if fault == "slow":
                time.sleep(60)
            if fault == "cut":
                self.close_connection = True
                self._answer(200, b"{", [], 1000)
            elif isinstance(fault, int) or port is None:
                self._answer(fault if isinstance(fault, int) else 503, b"{}", [], 2)
            else:
                headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_HEADERS}
                with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as server:
                    server.request(self.command, self.path, body, headers)
                    answer = server.getresponse()
                    content = answer.read()
                self._answer(answer.status, content, answer.getheaders(), len(content))

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = Proxy(f"http://127.0.0.1:{server.server_port}")
    options = {"poll_interval": 0.05}
    threading.Thread(target=server.serve_forever, kwargs=options, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
