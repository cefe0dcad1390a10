"""The Prefect server of a run: its pages, and a server that goes away or has to go with the run."""

import signal
import socket
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.runtime import flow_run

from flows import pages
from fmn.cli import INTERRUPTED
from fmn.registry.stages import Registered
from fmn.report.stages import ReportInfo
from fmn.store.stage import Outcome
from tests.conftest import wait_until
from tests.projects import FMN, make_project, start

PORT = 4391


def shown(key: str) -> Any:
    """The content of the only artifact with this key."""
    chosen = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
    with get_client(sync_client=True) as client:
        (artifact,) = client.read_artifacts(artifact_filter=chosen)
    return artifact.data


@flow(flow_run_name="my params.yaml")
def show() -> str:
    tables = ReportInfo(
        header=["task", "merged"], body=[["sst2", "91.0"]], notes=["scores: accuracy"],
        verdict=["It keeps 96 %."], results={},
    )  # fmt: skip
    version = Registered(
        name="my model", version="3", run="abc", store="http://mlflow.example:5000/",
        alias="champion", reason="the first one",
    )  # fmt: skip
    done = Outcome("fisher", Path("fisher/sst2.parquet"), True, 12.34, None)
    pages.show_summary("my params.yaml", tables, version, [done])
    pages.name_run("my params.yaml: version 3: champion")
    with pages.progress_page("a long stage") as progress:
        progress(1, 4)
    return str(flow_run.id)


@pytest.mark.usefixtures("prefect_server")
def test_a_run_shows_a_summary_and_progress_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LONG", 0.0)
    run = show()
    summary = shown("summary-my-params-yaml")
    assert summary.index("It keeps 96 %.") < summary.index("| sst2 | 91.0 |")
    assert "- scores: accuracy" in summary
    assert "(http://mlflow.example:5000/#/runs/abc)" in summary
    assert "(http://mlflow.example:5000/#/models/my%20model/versions/3)" in summary
    assert "file:" not in summary, "browsers do not follow it from a server's page"
    assert "| fisher | sst2 | 12.3 |" in summary
    assert shown("a-long-stage") == 100
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(UUID(run)).name == "my params.yaml: version 3: champion"


@pytest.mark.slow
def test_a_server_that_dies_costs_a_line(tiny_base: Path, tmp_path: Path) -> None:
    folder = make_project(tmp_path, tiny_base)
    url = f"http://127.0.0.1:{PORT}/api"
    line = (
        f"fmn: the Prefect server {url} does not answer;"
        " what finished is kept: run again to go on from here\n"
    )
    serve = (sys.executable, "-m", "prefect", "server", "start", "--port", str(PORT))
    with start(folder, *serve) as server:
        wait_until(lambda: is_listening(PORT))
        with start(folder, *FMN, "run", PREFECT_API_URL=url) as process:
            assert process.stdout is not None
            process.stdout.readline()
            server.kill()
            server.communicate()
            output, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (1, line)
    assert "Traceback" not in output
    with start(folder, *FMN, "run", PREFECT_API_URL=url) as process:
        assert process.communicate(timeout=300)[1] == line


def is_listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "status", "line"),
    [
        (signal.SIGINT, 130, f"fmn: {INTERRUPTED}\n"),
        (signal.SIGTERM, 143, ""),
    ],
)
def test_a_run_that_is_stopped_leaves_nothing_behind(
    sent: signal.Signals, status: int, line: str, tiny_base: Path, tmp_path: Path
) -> None:
    folder = make_project(tmp_path, tiny_base)
    with start(folder, *FMN, "run") as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("uvicorn" in child.cmdline() for child in children)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (status, line)
    assert not psutil.wait_procs(children, timeout=10)[1]
