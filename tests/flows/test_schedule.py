"""`make schedule`: deployments that can run, runs that really come due, and nothing left behind."""

import importlib
import inspect
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import psutil
import pytest
from ruamel.yaml import YAML

from fmn.store import artifacts
from tests.conftest import ROOT
from tests.projects import PROFILE, make_project, start
from tests.test_floating import retune

PORT = "4392"


def test_every_deployment_names_a_flow_its_parameters_and_a_limit() -> None:
    deployments = YAML(typ="safe").load(ROOT / "prefect.yaml")["deployments"]
    assert {one["name"] for one in deployments} == {"nightly", "on-demand", "comparison"}
    for one in deployments:
        file, name = one["entrypoint"].split(":")
        flow = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)
        inspect.signature(flow.fn).bind(**one["parameters"])
        assert (ROOT / one["parameters"]["profile"]).is_file()
        assert one["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
        assert one["work_pool"]["name"] == "fmn"


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with start(
            tmp_path,
            sys.executable,
            "-m",
            "flows.schedule",
            PYTHONPATH=str(ROOT),
            PREFECT_SERVER_API_PORT=port,
        ) as process:
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"fmn: port {port} is taken")
    assert err.count("\n") == 1


@pytest.fixture
def project(
    tiny_base: Path, tiny_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A project whose experts are folders, with a nightly run every minute."""
    folder = make_project(tmp_path, tiny_base)
    for task in ("sst2", "stsb"):
        shutil.copytree(tiny_work / "experts" / task, folder / "models" / task)
        (folder / "models" / task / "fmn.json").unlink()
    head, rest = PROFILE.split("sources:")
    tail = rest[rest.index("data:") :]
    (folder / "params.yaml").write_text(
        f"{head}sources: {{sst2: models/sst2, stsb: models/stsb}}\n{tail}"
    )
    deployments = (folder / "prefect.yaml").read_text()
    assert '"0 2 * * *"' in deployments
    (folder / "prefect.yaml").write_text(deployments.replace('"0 2 * * *"', '"* * * * *"'))
    monkeypatch.chdir(folder)
    return folder


def wait_until(happened: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.5)


def version() -> str | None:
    file = Path("data/tiny/registered.json")
    return str(artifacts.read_json(file)["version"]) if file.is_file() else None


def started_by(owner: "subprocess.Popen[str]") -> list[psutil.Process]:
    mark = str(owner.pid)
    return [
        one
        for one in psutil.process_iter(["environ"])
        if (one.info["environ"] or {}).get("FMN_SCHEDULE") == mark
    ]


@pytest.mark.slow
def test_runs_come_due_see_a_changed_expert_survive_a_killed_worker_and_end_with_ctrl_c(
    project: Path,
) -> None:
    said: list[str] = []

    def read(lines: TextIO) -> None:
        said.extend(iter(lines.readline, ""))

    def hears(word: str) -> Callable[[], bool]:
        since = len(said)
        return lambda: any(word in line for line in said[since:])

    with start(
        project, sys.executable, "-u", "-m", "flows.schedule", PREFECT_SERVER_API_PORT=PORT
    ) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=read, args=(process.stdout,))
        reader.start()
        try:
            wait_until(hears("nightly completed"))
            assert version() == "1"

            retune("stsb")
            wait_until(lambda: version() == "2")

            restarted = hears("the worker ended (-9) and is started again")
            next(one for one in started_by(process) if "worker" in one.cmdline()).kill()
            wait_until(restarted)
            wait_until(hears("nightly completed"))
            assert version() == "2", "nothing has changed since"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)
            reader.join()
        assert process.stderr is not None
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, "")
    assert said[-1] == "stopped\n"
    assert started_by(process) == []
