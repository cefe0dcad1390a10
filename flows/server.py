"""The Prefect server that a run reports to."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.settings import PREFECT_API_URL

from fmn.machine import origins
from fmn.terminal import complain


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


@contextmanager
def answering() -> Iterator[None]:
    """Where the server does not answer, or not any more, say so in one line and end this process.

    A server that this process started ends with it, on SIGTERM too.
    """
    signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    except Exception as error:
        if not any(isinstance(one, httpx.TransportError) for one in origins(error)):
            raise
        server = PREFECT_API_URL.value() or "that this run started"
        complain(f"the Prefect server {server} does not answer; what finished is kept: run again to go on from here")
        sys.stdout.flush()
        os._exit(1)  # Prefect would spend minutes at exit on events that nobody takes
