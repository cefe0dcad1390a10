"""A real browser for tests: headless Chromium, driven by its DevTools protocol over two pipes.

The protocol: https://chromedevtools.github.io/devtools-protocol/; over pipes, messages are JSON
that ends in a NUL.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # it does not start as root otherwise
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def program() -> str | None:
    """The browser's command, where there is one."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    """A page of a running browser, with its complaints and requests."""

    def __init__(self, reading: int, writing: int) -> None:
        self.incoming = os.fdopen(reading, "rb", buffering=0)
        self.outgoing = os.fdopen(writing, "wb", buffering=0)
        self.rest = b""
        self.number = 0
        self.session: str | None = None
        self.complaints: list[str] = []
        """Errors and warnings on the console, exceptions, and the browser's own warnings."""
        self.requests: list[str] = []
        """Addresses that were requested."""
        self.loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """What the browser answers; AssertionError where it refuses."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        self.outgoing.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = self.incoming.read(1 << 16)
            assert part, "the browser is gone"
            self.rest += part
        message, self.rest = self.rest.split(b"\0", 1)
        content: dict[str, Any] = json.loads(message)
        self._note(content.get("method", ""), content.get("params", {}))
        return content

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(" ".join(str(one.get("value")) for one in params["args"]))
        if event == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"]["text"])
        if event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if event == "Page.loadEventFired":
            self.loaded = True

    def open(self, path: Path, width: int = 1000, height: int = 900) -> None:
        """Show a file in a window of this size, in CSS pixels."""
        self.complaints, self.requests, self.loaded = [], [], False
        self.size(width, height)
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self.loaded:
            self._next()

    def size(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def media(self, media: str) -> None:
        """ "print" as on paper, "" as on a screen."""
        self.call("Emulation.setEmulatedMedia", media=media)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path: Path) -> None:
        """The page printed on A4, as its own styles say."""
        printed = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        path.write_bytes(base64.b64decode(printed["data"]))


@contextmanager
def running(command: str) -> Iterator[Browser]:
    """A browser with an empty profile of its own; it is gone when the block ends."""
    to_browser, from_browser = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # It reads its pipe 3 and writes its pipe 4.
        shell = f'exec "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
        with subprocess.Popen(
            ["bash", "-c", shell, "bash", command, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(to_browser[0], from_browser[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            os.close(to_browser[0])
            os.close(from_browser[1])
            browser = Browser(from_browser[0], to_browser[1])
            try:
                yield browser
            finally:
                browser.session = None
                browser.outgoing.write(b'{"id": 0, "method": "Browser.close"}\0')
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                browser.incoming.close()
                browser.outgoing.close()
