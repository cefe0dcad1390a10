"""What a flow run shows on the Prefect server's pages: results, costs, links, progress; it runs on without them."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.runtime import flow_run

from fmn.report import results as report
from fmn.store.stage import Outcome, Progress

LONG = 10.0  # seconds after which a stage has a progress page
_STEP = 5.0  # seconds between two looks at it
MLFLOW = "http://127.0.0.1:5000"  # where `make mlflow` shows a store that has no pages of its own

_gone = False  # whether the server has stopped answering


def _publish(make: Callable[..., Any], *arguments: Any) -> Any:
    """Make or change an artifact; None where that fails. A server that went away is waited for once."""
    global _gone
    if _gone:
        return None
    try:
        return make(*arguments)
    except httpx.HTTPError as error:
        _gone = isinstance(error, httpx.TransportError)
        return None


@contextmanager
def progress_page(title: str) -> Iterator[Progress]:
    """A progress artifact for a stage that takes long. Yields what takes (done, total)."""
    page: UUID | None = None
    due = time.monotonic() + LONG

    def report_progress(done: int, total: int) -> None:
        nonlocal page, due
        if time.monotonic() < due:
            return
        due = time.monotonic() + _STEP
        if page is None:
            page = _publish(create_progress_artifact, 100 * done / total, _key(title), title)
        else:
            _publish(update_progress_artifact, page, 100 * done / total)

    yield report_progress
    if page is not None:
        _publish(update_progress_artifact, page, 100.0)


def show_costs(outcomes: Mapping[tuple[str, str], Outcome]) -> None:
    """A table of what the stages of this flow run did, and how long each took."""
    rows = [
        {
            "stage": stage,
            "of": name,
            "seconds": round(outcome.seconds, 1),
            "computed": outcome.computed,
        }
        for (stage, name), outcome in outcomes.items()
    ]
    total = sum(outcome.seconds for outcome in outcomes.values())
    _publish(
        create_table_artifact,
        rows,
        _key("costs", flow_run.name),
        f"{total:.0f} s of work, side by side",
    )


def show_results(header: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """The table of results of this flow run."""
    _publish(
        create_markdown_artifact, report.markdown(header, body), _key("results", flow_run.name)
    )


def show_links(registered: Mapping[str, Any], report_folder: Path) -> None:
    """Links to the MLflow run, the registered version and the report."""
    store = registered["store"]
    pages = store.rstrip("/") if store.startswith("http") else MLFLOW
    version = f"{registered['name']} {registered['version']}"
    page = next(iter(sorted(report_folder.glob("*.html"))), report_folder)
    links = {
        "run": (f"{pages}/#/runs/{registered['run']}", f"MLflow run of {version}"),
        "version": (
            f"{pages}/#/models/{quote(registered['name'])}/versions/{registered['version']}",
            version,
        ),
        "report": (page.resolve().as_uri(), f"report of {version}"),
    }
    for name, (link, text) in links.items():
        described = f"{text}; `make mlflow` serves local pages"
        _publish(create_link_artifact, link, text, _key(name, flow_run.name), described)


def _key(*words: str) -> str:
    """Words as an artifact's key, under which Prefect lines up the artifacts of all runs."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
