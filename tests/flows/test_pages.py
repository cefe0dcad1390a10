"""The Prefect server of a run: its pages, and a server that goes away or has to go with the run."""

import signal
import socket
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from flows import pages
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
def show(report_file: Path) -> None:
    pages.show_results(["task", "merged"], [["sst2", "91.0"]])
    pages.show_links("http://mlflow.example:5000/", "abc", "my model", "3", report_file)
    with pages.progress_page("a long stage") as progress:
        progress(1, 4)


@pytest.mark.usefixtures("prefect_server")
def test_a_run_shows_results_links_and_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "LONG", 0.0)
    show(tmp_path / "report.html")
    assert "| sst2 | 91.0 |" in shown("results-my-params-yaml")
    links = shown("links-my-params-yaml")
    assert "(http://mlflow.example:5000/#/runs/abc)" in links
    assert "(http://mlflow.example:5000/#/models/my%20model/versions/3)" in links
    assert f"({tmp_path.as_uri()}/report.html)" in links
    assert shown("a-long-stage") == 100


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
        (signal.SIGINT, 130, "fmn: interrupted; finished stages are kept\n"),
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
