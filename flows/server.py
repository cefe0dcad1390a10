"""The Prefect server that a run reports to."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile

import httpx
from prefect.settings import PREFECT_API_URL, PREFECT_HOME

from fmn.store.machine import origins, refusals_told
from fmn.terminal import complain


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


@contextmanager
def answering() -> Iterator[None]:
    """Where the server does not answer, or not any more, say so in one line and end this process.

    A server that this process started ends with it, on SIGTERM too.

    Raises:
        UserError: a server of our own could not keep its files, which Prefect would find out after minutes.
    """
    signal.signal(signal.SIGTERM, _leave)
    if not PREFECT_API_URL.value():
        home = PREFECT_HOME.value()
        with refusals_told(home):
            home.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=home) as file:
                file.write(b"1")
    try:
        yield
    except Exception as error:
        silent = any(
            isinstance(one, RuntimeError) and "ephemeral Prefect API" in str(one)
            for one in origins(error)
        )
        if not silent and not any(isinstance(one, httpx.TransportError) for one in origins(error)):
            raise
        server = PREFECT_API_URL.value() or "that this run started"
        complain(
            f"the Prefect server {server} does not answer; what finished is kept: run again to go on from here"
        )
        sys.stdout.flush()
        os._exit(1)  # Prefect would spend minutes at exit on events that nobody takes
