"""Notices to a webhook that takes Slack's JSON: a new champion, or a run that failed."""

import json
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.workers import one_line
from fmn import params
from fmn.errors import UserError
from fmn.terminal import say

_TIMEOUT = 10.0  # seconds


@contextmanager
def failures_reported(profile: Path) -> Iterator[None]:
    """Send a notice of what goes wrong within, to the settings file's webhook."""
    try:
        yield
    except Exception as error:
        send(profile, f"fmn: {profile} failed: {one_line(error)}")
        raise


def send(profile: Path, text: str) -> None:
    """Post a text to the settings file's webhook, if there is one.

    Where that fails, a line says so, without the address, which is a secret.
    """
    try:
        webhook = params.load(profile).notify.address
    except UserError:  # the failure to report may be the file's
        webhook = os.environ.get(params.WEBHOOK)
    if webhook is None:
        return
    body, headers = json.dumps({"text": text}).encode(), {"Content-Type": "application/json"}
    try:
        if not webhook.startswith(("https://", "http://")):
            raise ValueError
        request = urllib.request.Request(webhook, body, headers)  # noqa: S310
        with urllib.request.urlopen(request, timeout=_TIMEOUT):  # noqa: S310  # nosec B310
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "code", type(error).__name__)  # an HTTP status, or the error's type
        say(f"the webhook did not take the notice ({reason})")
