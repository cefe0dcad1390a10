"""A flow run's pages on its Prefect server, and a server that does not answer."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import httpx
from prefect import artifacts
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

from fmn.errors import causes
from fmn.report import results as report
from fmn.store.stage import Progress
from fmn.terminal import complain

LONG = 10.0  # seconds after which a stage gets a progress page
MLFLOW = "http://127.0.0.1:5000"  # where `make mlflow` shows a store that has no pages of its own
_POLL = 5.0  # seconds between two updates of a progress page


def _publish(publish: Callable[..., Any], *arguments: Any) -> Any:
    """Create or update an artifact; None where the server refuses it, as the run goes on."""
    try:
        return publish(*arguments)
    except httpx.HTTPError:
        return None


@contextmanager
def progress_page(title: str) -> Iterator[Progress]:
    """Show a stage's progress on a page if it takes long; yields what takes (done, total)."""
    page: UUID | None = None
    due = time.monotonic() + LONG

    def show(done: int, total: int) -> None:
        nonlocal page, due
        if time.monotonic() < due:
            return
        due = time.monotonic() + _POLL
        if page is None:
            page = _publish(
                artifacts.create_progress_artifact, 100 * done / total, _key(title), title
            )
        else:
            _publish(artifacts.update_progress_artifact, page, 100 * done / total)

    yield show
    if page is not None:
        _publish(artifacts.update_progress_artifact, page, 100.0)


def show_results(
    header: Sequence[str], body: Sequence[Sequence[str]], verdict: Sequence[str] = ()
) -> None:
    """Show the table of results of this flow run, and what to make of it."""
    lines = "".join(f"- {report.escaped(line)}\n" for line in verdict)
    text = f"{report.markdown(header, body)}\n{lines}"
    _publish(artifacts.create_markdown_artifact, text, _key("results", flow_run.name))


def show_links(store: str, run: str, model: str, version: str, report_file: Path) -> None:
    """Show links to the MLflow run (its id) in a tracking store, the version and the report."""
    mlflow = store.rstrip("/") if store.startswith("http") else MLFLOW
    text = (
        f"- [MLflow run]({mlflow}/#/runs/{run})\n"
        f"- [{model} {version}]({mlflow}/#/models/{quote(model)}/versions/{version})\n"
        f"- [report]({report_file.resolve().as_uri()})\n\n`make mlflow` serves local pages"
    )
    _publish(artifacts.create_markdown_artifact, text, _key("links", flow_run.name))


def _key(*words: str) -> str:
    """Words as an artifact's key, under which Prefect lines up the artifacts of all runs."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


@contextmanager
def server_answers() -> Iterator[None]:
    """End this process with one line if the Prefect server does not answer, or not any more.

    A server that this process started ends with it, on SIGTERM too.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    except Exception as error:
        if not any(
            isinstance(cause, httpx.TransportError) or "ephemeral Prefect API" in str(cause)
            for cause in causes(error)
        ):
            raise
        server = PREFECT_API_URL.value() or "that this run started"
        complain(
            f"the Prefect server {server} does not answer;"
            " what finished is kept: run again to go on from here"
        )
        sys.stdout.flush()
        os._exit(1)  # Prefect would spend minutes at exit on events that nobody takes
