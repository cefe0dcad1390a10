"""Notices to a webhook: what is sent, and what a webhook that fails costs."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from flows import notices
from fmn import params
from fmn.errors import UserError

PROFILE = "base: b\nexperts: {tasks: [sst2]}\nsources: {sst2: s}\nregistry: {name: m}\n"


class Webhook(HTTPServer):
    """A server that takes notices, at an address that is a secret."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.texts = 200, list[str]()
        self.address = f"http://127.0.0.1:{self.server_port}/services/SECRET"


class Handler(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Content-Type"] == "application/json"
        assert content.keys() == {"text"}
        self.server.texts.append(content["text"])
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def listening() -> Iterator[Webhook]:
    with Webhook() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def webhook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FMN_WEBHOOK", raising=False)
    Path("params.yaml").write_text(PROFILE)
    with listening() as server:
        yield server


def fail(profile: str = "params.yaml") -> None:
    with pytest.raises(UserError, match="no such"), notices.failures_reported(Path(profile)):
        raise UserError("fetch sst2: no such folder")


def test_a_failure_is_reported_to_the_address_of_settings_or_environment(
    webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail()
    assert webhook.texts == [], "there is no webhook"
    monkeypatch.setenv("FMN_WEBHOOK", webhook.address)
    fail()
    assert webhook.texts == ["fmn: params.yaml failed: fetch sst2: no such folder"]
    fail("nowhere.yaml")
    assert len(webhook.texts) == 2, "settings that cannot be read are a failure to report"

    monkeypatch.delenv("FMN_WEBHOOK")
    monkeypatch.setenv("MY_WEBHOOK", webhook.address)
    for address in (webhook.address, "$MY_WEBHOOK"):
        Path("params.yaml").write_text(PROFILE + f"notify: {{webhook: {address}}}\n")
        notices.send(Path("params.yaml"), "<!channel> & <http://evil.example|b>")
    assert webhook.texts[2:] == ["&lt;!channel&gt; &amp; &lt;http://evil.example|b&gt;"] * 2, (
        "no mark-up"
    )
    assert "SECRET" not in repr(params.load(Path("params.yaml")))


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (None, "500"),
        ("http://127.0.0.1:9/SECRET", "ConnectError"),
        ("http://[SECRET", "ConnectError"),
        ("http://SECRET:port", "InvalidURL"),
        ("file:///SECRET", "UnsupportedProtocol"),
    ],
)
def test_a_webhook_that_fails_costs_a_line_without_its_address(
    webhook: Webhook,
    address: str | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    webhook.status = 500
    monkeypatch.setenv("FMN_WEBHOOK", address or webhook.address)
    fail()
    line = f"the webhook did not take the notice ({reason})\n"
    assert (capsys.readouterr()) == (line, "")
