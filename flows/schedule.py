"""`make schedule`: a Prefect server, a worker and the deployments of prefect.yaml, on loopback, until Ctrl-C.

What ends before that is started again. A flow run that is under way at Ctrl-C is ended; its finished stages are kept.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from fmn.errors import UserError
from fmn.terminal import complain, say

HOST = "127.0.0.1"
POOL = "fmn"
LOGS = Path("data/schedule")
_MARK = "FMN_SCHEDULE"  # in the environment of all that this process starts, however far down
_PATIENCE = 60.0  # seconds for the server to come up, and for what runs to end
_LOOK = 2.0  # seconds between two looks


def main() -> None:
    """Start everything, say what happens, and leave nothing behind."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, _interrupt)
    port = int(os.environ.get("PREFECT_SERVER_API_PORT", "4200"))
    url = f"http://{HOST}:{port}"
    environment = {**os.environ, "PREFECT_API_URL": f"{url}/api", _MARK: str(os.getpid())}
    commands = {
        "server": ["server", "start", "--host", HOST, "--port", str(port)],
        "worker": ["worker", "start", "--pool", POOL, "--type", "process"],
    }
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        _check_free(port)
        with _everything_ended(environment, running):
            running["server"] = _start("server", commands["server"], environment)
            _wait_for(f"{url}/api/health", running["server"])
            _prefect(environment, "work-pool", "create", POOL, "--type", "process", "--overwrite")
            _prefect(environment, "deploy", "--all")
            running["worker"] = _start("worker", commands["worker"], environment)
            say(f"schedules  {url}/deployments", f"logs       {LOGS}", "stop       Ctrl-C")
            told = datetime.now(UTC)
            while True:
                time.sleep(_LOOK)
                for name, process in running.items():
                    if process.poll() is not None:
                        say(f"the {name} ended ({process.returncode}) and is started again")
                        running[name] = _start(name, commands[name], environment)
                with suppress(httpx.HTTPError):
                    told = _tell_runs(f"{url}/api", told)
    except UserError as error:
        complain(str(error))
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        say("stopped")


def _interrupt(number: int, frame: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough
    raise KeyboardInterrupt


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"port {port} is taken, perhaps by another Prefect server; stop it, or set PREFECT_SERVER_API_PORT"
            ) from error


def _start(
    name: str, arguments: list[str], environment: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / f"{name}.log").open("ab") as log:
        # A session of its own: Ctrl-C in the terminal is for this process, which then ends the others in order.
        return subprocess.Popen(
            [sys.executable, "-m", "prefect", *arguments],
            env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def _prefect(environment: Mapping[str, str], *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())
        raise UserError(f"prefect {' '.join(arguments)}: {said[-300:]}")


def _wait_for(url: str, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _PATIENCE
    while server.poll() is None and time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5).is_success:
                return
        time.sleep(0.5)
    raise UserError(
        f"the Prefect server did not come up in {_PATIENCE:.0f} s; see {LOGS / 'server.log'}"
    )


def _tell_runs(api: str, since: datetime) -> datetime:
    """A line for every flow run that ended since then; returns until when that is told."""
    asked = {"flow_runs": {"end_time": {"after_": since.isoformat()}}, "sort": "END_TIME_DESC"}
    runs = [
        run
        for run in _asked(f"{api}/flow_runs/filter", asked)
        if datetime.fromisoformat(run["end_time"]) > since
    ]
    names = (
        {one["id"]: one["name"] for one in _asked(f"{api}/deployments/filter", {})} if runs else {}
    )
    for run in reversed(runs):
        since = datetime.fromisoformat(run["end_time"])
        message = " ".join((run["state"]["message"] or "").split())
        what = f"{names.get(run['deployment_id'], run['name'])} {run['state_name'].lower()}"
        say(
            f"{since.astimezone():%H:%M:%S}   {what}, {run['total_run_time']:.0f} s"
            + (f": {message}" if message else "")
        )
    return since


def _asked(url: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    answer: list[dict[str, Any]] = httpx.post(url, json=body, timeout=5).raise_for_status().json()
    return answer


@contextmanager
def _everything_ended(
    environment: Mapping[str, str], running: Mapping[str, "subprocess.Popen[bytes]"]
) -> Iterator[None]:
    """In the end, end all that was started: flow runs first, which tell the server, then the others."""
    try:
        yield
    finally:
        _end(pid for pid, command in _started(environment).items() if b"prefect.engine" in command)
        for name in ("worker", "server"):
            if name in running:
                _end([running[name].pid])
                running[name].wait()
        _end(_started(environment))


def _started(environment: Mapping[str, str]) -> dict[int, bytes]:
    """The processes that carry the mark of this one, with their command lines."""
    mark = f"{_MARK}={environment[_MARK]}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone, or somebody else's
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes()
    return found


def _end(processes: Iterable[int]) -> None:
    """Ask processes to end, and end those that have not done so in time."""
    left = set(processes)
    for number, patience in ((signal.SIGTERM, _PATIENCE), (signal.SIGKILL, 5.0)):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + patience
        while left and time.monotonic() < deadline:
            time.sleep(0.1)
            left = {pid for pid in left if _lives(pid)}


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    main()
