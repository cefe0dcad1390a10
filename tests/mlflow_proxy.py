"""A proxy on loopback before a real MLflow server, or before none, that misbehaves as it is told."""

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Headers of one connection, not of what it carries.
_HOPS = ("connection", "keep-alive", "transfer-encoding", "content-length", "host")


@dataclass
class Proxy:
    """Where it listens, what it does, and how often it was asked.

    Attributes:
        faults: what happens to the next requests, one each: a status, "cut" (in the middle of the answer), "slow" (no
            answer for a minute) or "" (it goes through, as all that come after do).
        always: what happens to every request, where that is not empty.
    """

    url: str
    faults: list[int | str] = field(default_factory=list)
    always: int | str = ""
    asked: int = 0


@contextmanager
def proxy(port: int | None = None) -> Iterator[Proxy]:
    """A proxy before a server on loopback; without a port every request that is to go through is answered with 503."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(
            self, status: int, body: bytes, headers: list[tuple[str, str]], length: int
        ) -> None:
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in _HOPS:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def _pass(self) -> None:
            made.asked += 1
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = made.always or (made.faults.pop(0) if made.faults else "")
            if fault == "slow":
                time.sleep(60)
            if fault == "cut":
                self.close_connection = True
                self._answer(200, b"{", [], 1000)
            elif isinstance(fault, int) or port is None:
                self._answer(fault if isinstance(fault, int) else 503, b"{}", [], 2)
            else:
                kept = {
                    name: value for name, value in self.headers.items() if name.lower() not in _HOPS
                }
                with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as server:
                    server.request(self.command, self.path, body, kept)
                    answer = server.getresponse()
                    content = answer.read()
                self._answer(answer.status, content, answer.getheaders(), len(content))

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    made = Proxy(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    ).start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
