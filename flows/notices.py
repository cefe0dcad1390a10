"""Send notices to a webhook in Slack's format: about a new champion, or a failed run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from flows.workers import one_line
from fmn import params
from fmn.errors import UserError
from fmn.terminal import say

_TIMEOUT = 10.0  # seconds


@contextmanager
def failures_reported(profile: Path) -> Iterator[None]:
    """Send a notice to the settings file's webhook if the block raises an error."""
    try:
        yield
    except Exception as error:
        send(profile, f"fmn: {profile} failed: {one_line(error)}")
        raise


def send(profile: Path, text: str) -> None:
    """Post a text to the settings file's webhook, if there is one.

    If that fails, a line reports it without the address, which is a secret.
    """
    try:
        webhook = params.load(profile).notify.address
    except UserError:  # the failure may be about the settings file itself
        webhook = os.environ.get(params.WEBHOOK)
    if webhook is None:
        return
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")  # Slack's mark-up
    try:
        httpx.post(webhook, json={"text": plain}, timeout=_TIMEOUT).raise_for_status()
    except httpx.HTTPStatusError as error:
        say(f"the webhook did not take the notice ({error.response.status_code})")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # its message has the address
        reason = type(error).__name__
        say(f"the webhook did not take the notice ({reason})")
