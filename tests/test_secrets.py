"""A run leaves no secret behind and prints none; what it starts listens on loopback alone."""

import math
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests import projects
from tests.conftest import ROOT
from tests.registry.test_tracking import serving

MARK = "Geheim"
PROFILE = ".profile.yaml"
SECRETS = {
    "HF_TOKEN": f"hf_{MARK}1",
    "MLFLOW_TRACKING_USERNAME": "somebody",
    "MLFLOW_TRACKING_PASSWORD": f"{MARK}2",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}3/K7MDENG",
    "AWS_SESSION_TOKEN": f"{MARK}4",
    "FMN_WEBHOOK": f"http://127.0.0.1:9/services/{MARK}5",
}


def leaks(folder: Path) -> list[str]:
    """The files below a folder that hold a secret, without the settings that it was put in."""
    files = [
        path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(PROFILE)
    ]
    return [str(path.relative_to(folder)) for path in files if MARK.encode() in path.read_bytes()]


def listening(process: psutil.Process) -> set[str]:
    """The addresses that a process and its descendants listen on."""
    addresses: set[str] = set()
    for member in [process, *process.children(recursive=True)]:
        with suppress(psutil.Error):  # it has ended
            connections = member.net_connections("inet")
            addresses |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return addresses


def watched(process: "subprocess.Popen[str]", seconds: float = math.inf) -> set[str]:
    """The addresses that a command listens on, until it ends, or for some time after the first."""
    addresses: set[str] = set()
    deadline = math.inf
    while process.poll() is None and time.monotonic() < deadline:
        addresses |= listening(psutil.Process(process.pid))
        if addresses and deadline == math.inf:
            deadline = time.monotonic() + seconds
        time.sleep(0.3)
    return addresses


@pytest.fixture(scope="module")
def project(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return projects.make_project(tmp_path_factory.mktemp("project"), tiny_base)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address, with user name and password, of a real MLflow server."""
    folder = tmp_path_factory.mktemp("server")
    database = ("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}")
    files = ("--artifacts-destination", str(folder / "files"))
    with serving("server", *database, *files, path="/health") as address:
        yield address.replace("//", f"//somebody:{MARK}6@")
    assert leaks(folder) == []


def profile(project: Path, name: str, old: str, new: str) -> Path:
    assert old in projects.PROFILE
    file = project / f"{name}{PROFILE}"
    file.write_text(projects.PROFILE.replace(old, new))
    return file


@pytest.mark.slow
def test_a_run_tells_no_secret_and_listens_on_loopback_alone(project: Path, store: str) -> None:
    webhook = f"notify: {{webhook: 'http://127.0.0.1:9/{MARK}7'}}\nevaluate:"
    plain = profile(project, "plain", "evaluate:", webhook)
    no_server = f"http://somebody:{MARK}8@127.0.0.1:9"
    folder = f"base: https://user:{MARK}9@host/model?token={MARK}10"
    hub, data = f"base: hf://user:{MARK}11@org/name", f"source: 'https://user:{MARK}12@host/data'"
    runs = [
        ("registered", plain, store, True),
        ("nothing to do", plain, store, True),
        ("no server", plain, no_server, False),
        ("no source", profile(project, "source", "base: source", folder), store, False),
        ("no hub source", profile(project, "hub", "base: source", hub), store, False),
        ("no data", profile(project, "data", "source: embedded", data), store, False),
    ]
    quick = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    for name, file, uri, succeeds in runs:
        options = ["--params", file.name, *(["--verbose"] if succeeds else [])]
        variables = {"MLFLOW_TRACKING_URI": uri, **quick, **SECRETS}
        with projects.start(project, *projects.FMN, "run", *options, **variables) as process:
            addresses = watched(process) if name == "registered" else {"127.0.0.1"}
            out, err = process.communicate()
        assert (process.returncode == 0) == succeeds, f"{name}: {out}{err}"
        assert MARK not in out + err, name
        assert addresses == {"127.0.0.1"}, name
        assert not leaks(project), name
        if not succeeds:
            assert len(err.splitlines()) == 1, f"{name}: {err}"


@pytest.mark.slow
@pytest.mark.parametrize("which", ["schedule", "mlflow"])
def test_what_make_starts_listens_on_loopback_alone(which: str, project: Path) -> None:
    shutil.copy(ROOT / "Makefile", project)
    printed = subprocess.run(
        ["make", "-n", "-o", ".venv/installed", which, "MLFLOW_PORT=5391"],
        cwd=project, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    command = printed[printed.index("fmn ") :]
    variables = {"PREFECT_SERVER_API_PORT": "5392", **SECRETS}
    with projects.start(project, "bash", "-c", command, **variables) as process:
        try:
            addresses = watched(process, seconds=10)
        finally:
            if which == "mlflow":
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.terminate()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
    assert addresses == {"127.0.0.1"}, out + err
    assert MARK not in out + err
    assert not leaks(project)
