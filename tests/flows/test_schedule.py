"""`fmn schedule`: deployments that can run, runs that really come due, and nothing left behind."""

import importlib
import inspect
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT, wait_until
from tests.projects import make_project, start, take_folders_as_experts
from tests.test_floating import retune

SCHEDULE = (sys.executable, "-u", "-m", "fmn", "schedule")


@pytest.mark.parametrize("file", ["prefect.yaml", "docs/kubernetes/prefect.yaml"])
def test_every_deployment_names_a_flow_and_its_parameters(file: str) -> None:
    for item in YAML(typ="safe").load(ROOT / file)["deployments"]:
        module, name = item["entrypoint"].rsplit(".", 1)
        flow = getattr(importlib.import_module(module), name)
        inspect.signature(flow.fn).bind(**item["parameters"])
        profile = item["parameters"]["profile"]
        assert (ROOT / profile).is_file() or profile == "settings/params.yaml", "a cluster's own"
        meanwhile = "CANCEL_NEW" if item.get("schedules") else "ENQUEUE"
        assert item["concurrency_limit"] == {"limit": 1, "collision_strategy": meanwhile}


def test_a_taken_port_is_reported(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        variables = {"PYTHONPATH": str(ROOT), "PREFECT_SERVER_API_PORT": port}
        with start(tmp_path, *SCHEDULE, **variables) as process:
            output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert errors.startswith(f"fmn: port {port}: is taken")
    assert errors.count("\n") == 1


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
