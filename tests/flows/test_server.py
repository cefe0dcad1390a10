"""The server of a run: one that goes away under it, and one that has to go with it."""

import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.server import answering
from fmn.errors import UserError
from tests.projects import make_project, start

PORT = "4391"


@pytest.mark.slow
def test_a_server_that_dies_costs_a_line_and_the_run_is_taken_up_again(
    tiny_base: Path, tmp_path: Path
) -> None:
    folder = make_project(tmp_path, tiny_base)
    url = f"http://127.0.0.1:{PORT}/api"
    line = f"fmn: the Prefect server {url} does not answer; what finished is kept: run again to go on from here\n"
    with start(
        folder, sys.executable, "-m", "prefect", "server", "start", "--port", PORT
    ) as server:
        wait_for(f"{url}/health")
        with start(folder, sys.executable, "-m", "fmn", "run", PREFECT_API_URL=url) as process:
            assert process.stdout is not None
            process.stdout.readline()
            server.kill()
            server.communicate()
            out, err = process.communicate(timeout=300)
        assert process.returncode == 1
        assert err == line
        assert "Traceback" not in out
    with start(folder, sys.executable, "-m", "fmn", "run", PREFECT_API_URL=url) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err == line


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
    with start(folder, sys.executable, "-m", "fmn", "run") as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("uvicorn" in child.cmdline() for child in children)
        process.send_signal(sent)
        _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (status, line)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_a_home_that_cannot_be_written_is_told_before_a_server_starts() -> None:
    home = Path("/sys/prefect")  # where nobody can
    with (
        temporary_settings({PREFECT_HOME: home}, restore_defaults={PREFECT_API_URL}),
        pytest.raises(UserError, match=r"/sys/prefect: .*(read-only|no permission)"),
        answering(),
    ):
        raise AssertionError("it went on")


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            httpx.get(url, timeout=5)
            return
        time.sleep(0.5)
    raise TimeoutError(url)
