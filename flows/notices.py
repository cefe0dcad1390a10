"""Notices to a webhook that takes Slack's JSON: a new champion, or a run that failed. The address is a secret."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.faults import one_line
from fmn import params
from fmn.errors import UserError
from fmn.terminal import say

_PATIENCE = 10.0  # seconds


@contextmanager
def failures_told(profile: Path) -> Iterator[None]:
    """Tell the profile's webhook of what goes wrong within."""
    try:
        yield
    except Exception as error:
        send(_webhook(profile), f"fmn: {profile} failed: {one_line(error)}")
        raise


def tell_champion(profile: Path, registered: Mapping[str, Any]) -> None:
    """Tell the profile's webhook of a version that became the champion."""
    if registered.get("alias") == "champion":
        reason = f": {registered['reason']}" if registered.get("reason") else ""
        send(
            _webhook(profile),
            f"fmn: {registered['name']} {registered['version']} is the new champion{reason}",
        )


def _webhook(profile: Path) -> str | None:
    try:
        return params.load(profile).notify.address
    except UserError:  # the failure to tell of may be the profile's
        return os.environ.get(params.WEBHOOK)


def send(webhook: str | None, text: str) -> None:
    """Post a text. Where that fails, a line says so and nothing else happens; it does not hold the address."""
    if webhook is None:
        return
    body = json.dumps({"text": text}).encode()
    try:
        if not webhook.startswith(("https://", "http://")):
            raise ValueError
        request = urllib.request.Request(webhook, body, {"Content-Type": "application/json"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=_PATIENCE):  # noqa: S310  # nosec B310
            pass
    except (OSError, ValueError) as error:
        reason = (
            f"status {error.code}"
            if isinstance(error, urllib.error.HTTPError)
            else type(error).__name__
        )
        say(f"the webhook did not take the notice ({reason})")
