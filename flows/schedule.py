"""`fmn schedule`: a Prefect server, a worker and the deployments of prefect.yaml, until Ctrl-C.

The server listens on loopback. A server or worker that ends is started again. Ctrl-C ends a flow
run in progress; its finished stages are kept.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from fmn import params
from fmn.errors import UserError, refuse_taken_port
from fmn.rows.stages import quickstart_files
from fmn.store import artifacts
from fmn.terminal import say

HOST, PORT = "127.0.0.1", os.environ.get("PREFECT_SERVER_API_PORT", "4200")
API = f"http://{HOST}:{PORT}/api"
LOGS = Path("data/schedule")
COMMANDS = {
    "server": ["server", "start", "--host", HOST, "--port", PORT],
    "worker": ["worker", "start", "--pool", "fmn", "--type", "process"],
}
DEPLOYMENTS = Path("prefect.yaml")
_ONLY_HERE = "\n  - name: comparison"  # a deployment whose settings are in the checkout alone
_MARK = "FMN_SCHEDULE"  # environment variable of all processes that this process starts
_PATIENCE = 60.0  # seconds for the server to come up, and for processes to end
_POLL = 2.0  # seconds between two looks at the processes


def main() -> None:
    """Start everything, report on it, and end all processes at the end.

    A folder without prefect.yaml gets the two deployments of its params.yaml.

    Raises:
        UserError: the port is taken, the server does not come up, or there are no settings.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    os.environ |= {"PREFECT_API_URL": API, _MARK: str(os.getpid())}
    try:
        refuse_taken_port(int(PORT), "PREFECT_SERVER_API_PORT")
        _run()
    except KeyboardInterrupt:
        say("stopped")
    finally:
        _end("prefect.engine")  # flow runs first, as they report to the server
        _end("")


def _write_deployments() -> None:
    if DEPLOYMENTS.exists():
        return
    params.load(Path("params.yaml"))  # which they run
    text = (quickstart_files() / DEPLOYMENTS).read_text()
    with artifacts.atomic_file(DEPLOYMENTS) as partial:
        partial.write_text(text[: text.index(_ONLY_HERE)])
    say(f"written    {DEPLOYMENTS}, with a run of params.yaml every night and one on demand")


def _interrupt(number: int, frame: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough
    raise KeyboardInterrupt


def _run() -> None:
    _write_deployments()
    say(f"starting   the server, whose pages come up at http://{HOST}:{PORT} in half a minute")
    running = {"server": _start("server")}
    _wait_for_server(running["server"])
    _prefect("work-pool", "create", "fmn", "--type", "process", "--overwrite")
    _prefect("deploy", "--all")
    running["worker"] = _start("worker")
    say(f"schedules  http://{HOST}:{PORT}/deployments", f"logs       {LOGS}", "stop       Ctrl-C")
    while True:
        time.sleep(_POLL)
        for name, process in running.items():
            if process.poll() is not None:
                say(f"the {name} ended ({process.returncode}) and is started again")
                running[name] = _start(name)


def _start(name: str) -> "subprocess.Popen[bytes]":
    LOGS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "prefect", *COMMANDS[name]]
    with (LOGS / f"{name}.log").open("ab") as log:
        # A new session, so that only this process receives Ctrl-C, and ends the others in order.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _prefect(*arguments: str) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        output = " ".join((done.stdout + done.stderr).split())
        raise UserError(f"prefect {' '.join(arguments)}: {output[-300:]}")


def _wait_for_server(server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _PATIENCE
    while server.poll() is None and time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{API}/health", timeout=5).is_success:
                return
        time.sleep(0.5)
    raise UserError(f"the Prefect server did not come up; see {LOGS / 'server.log'}")


def _end(word: str) -> None:
    """Terminate marked processes with a word in their commands; kill those that do not end."""
    processes = [
        process
        for process in psutil.process_iter(["environ", "cmdline"])
        if (process.info["environ"] or {}).get(_MARK) == str(os.getpid())
        and process.pid != os.getpid()
        and word in " ".join(process.info["cmdline"])
    ]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=_PATIENCE)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
