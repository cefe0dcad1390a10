"""Show a flow run's results on its Prefect server, and handle a server that does not answer."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote
from uuid import UUID

import httpx
from prefect import artifacts
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

from fmn.errors import UserError, causes
from fmn.registry.stages import Registered
from fmn.report import wording
from fmn.report.stages import ReportInfo
from fmn.store.stage import Outcome, Progress
from fmn.terminal import complain

LONG = 10.0  # seconds after which a stage gets a progress page
MLFLOW = "http://127.0.0.1:5000"  # the pages of `fmn mlflow`, for a store without a server
_POLL = 5.0  # seconds between two updates of a progress page


def _publish(publish: Callable[..., Any], *arguments: Any) -> Any:
    """Create or update an artifact; None if the server refuses it, as the run continues."""
    try:
        return publish(*arguments)
    except httpx.HTTPError:
        return None


@contextmanager
def progress_page(title: str) -> Iterator[Progress]:
    """Show the progress of a long stage on a page; yields a function of (done, total)."""
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


def show_summary(
    profile: str, report: ReportInfo, version: Registered, computed: Sequence[Outcome[Any]]
) -> None:
    """Show the results of a run on a page: verdict, table, legend, links, and computed stages.

    Args:
        profile: the settings file; Prefect lists the pages of its runs together.
        report: the report's table and verdict.
        version: the registered version.
        computed: the stages that were not up to date.
    """
    mlflow = version.store.rstrip("/") if version.store.startswith("http") else MLFLOW
    links = [
        f"[version {version.version} of {version.name}]"
        f"({mlflow}/#/models/{quote(version.name)}/versions/{version.version})",
        f"[its run]({mlflow}/#/runs/{version.run})",
        f"[the report, among the run's artifacts]({mlflow}/#/runs/{version.run}/artifacts)",
    ]
    where = "" if version.store.startswith("http") else " (`fmn mlflow` serves these pages)"
    costs = [
        [outcome.stage, outcome.out.stem, f"{outcome.seconds:.1f}"]
        for outcome in sorted(computed, key=lambda each: -each.seconds)
    ]
    table = f"\n## Computed\n\n{wording.markdown(['stage', 'of', 'seconds'], costs)}"
    text = (
        f"{_tables(report)}\n{' · '.join(links)}{where}\n\n{version.alias or 'registered'}:"
        f" {wording.escaped(version.reason)}\n{table if costs else ''}"
    )
    _publish(artifacts.create_markdown_artifact, text, _key("summary", profile))


def show_tables(title: str, tables: ReportInfo) -> None:
    """Show the tables of a comparison on a page."""
    _publish(artifacts.create_markdown_artifact, _tables(tables), _key("summary", title))


def _tables(report: ReportInfo) -> str:
    """Verdict, table and legend in Markdown."""
    verdict = "\n\n".join(wording.escaped(line) for line in report.verdict)
    legend = "\n".join(f"- {wording.escaped(line)}" for line in report.notes)
    return f"{verdict}\n\n{wording.markdown(report.header, report.body)}\n{legend}\n"


def name_run(name: str) -> None:
    """Rename this flow run by its outcome."""

    def rename() -> None:
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(str(flow_run.id)), name=name)

    _publish(rename)


@contextmanager
def failures_named(title: str) -> Iterator[None]:
    """Rename this flow run as failed if a stage fails in the block."""
    try:
        yield
    except UserError:
        name_run(f"{title}: failed")
        raise


def _key(*words: str) -> str:
    """An artifact's key; Prefect lists the artifacts of all runs with the same key together."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


@contextmanager
def server_answers() -> Iterator[None]:
    """End this process with one line if the Prefect server does not answer.

    A server that this process started ends with it, also on SIGTERM.
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
        os._exit(1)  # a normal exit waits minutes for Prefect to send its events
