"""`make schedule`: deployments that can run, runs that really come due, and nothing left behind."""

import importlib
import inspect
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT
from tests.projects import make_project, start, take_folders_as_experts
from tests.test_floating import retune

SCHEDULE = (sys.executable, "-u", "-m", "flows.schedule")


def test_every_deployment_names_a_flow_its_parameters_and_a_limit() -> None:
    deployments = YAML(typ="safe").load(ROOT / "prefect.yaml")["deployments"]
    assert {item["name"] for item in deployments} == {"nightly", "on-demand", "comparison"}
    for item in deployments:
        file, name = item["entrypoint"].split(":")
        flow = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)
        inspect.signature(flow.fn).bind(**item["parameters"])
        assert (ROOT / item["parameters"]["profile"]).is_file()
        assert item["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
        assert item["work_pool"]["name"] == "fmn"


def test_a_taken_port_is_reported(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        variables = {"PYTHONPATH": str(ROOT), "PREFECT_SERVER_API_PORT": port}
        with start(tmp_path, *SCHEDULE, **variables) as process:
            output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert errors.startswith(f"fmn: port {port} is taken")
    assert errors.count("\n") == 1


def wait_until(happened: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.5)


def started_by(owner: "subprocess.Popen[str]") -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("FMN_SCHEDULE") == str(owner.pid)
    ]


@pytest.mark.slow
def test_runs_come_due_see_a_changed_expert_survive_a_killed_worker_and_end_with_ctrl_c(
    tiny_base: Path, tiny_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path, tiny_base)
    take_folders_as_experts(project, tiny_work / "experts")
    deployments = (project / "prefect.yaml").read_text()
    assert '"0 2 * * *"' in deployments
    (project / "prefect.yaml").write_text(deployments.replace('"0 2 * * *"', '"* * * * *"'))
    monkeypatch.chdir(project)
    registered = Path("data/tiny/registered.json")
    lines: list[str] = []

    def is_version(number: int) -> bool:
        return registered.is_file() and f'"version": "{number}"' in registered.read_text()

    with start(project, *SCHEDULE, PREFECT_SERVER_API_PORT="4392") as process:
        assert process.stdout is not None
        reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()))
        reader.start()
        try:
            wait_until(lambda: is_version(1))
            retune("stsb")
            wait_until(lambda: is_version(2))

            next(child for child in started_by(process) if "worker" in child.cmdline()).kill()
            wait_until(lambda: "the worker ended (-9) and is started again\n" in lines)
            retune("stsb")
            wait_until(lambda: is_version(3))
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)
            reader.join()
        assert process.stderr is not None
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, "")
    assert lines[-1] == "stopped\n"
    assert started_by(process) == []
