"""Stages in processes: results, progress and errors come back; nothing outlives its owner."""

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import requests
import torch

from flows import workers
from flows.workers import TransientError, UnexpectedError, is_transient, one_line
from fmn.errors import UserError
from fmn.store.stage import Outcome, Progress, no_progress, run_stage
from tests.conftest import ROOT


def count_to(total: int, out: Path, progress: Progress = no_progress) -> Outcome:
    """Stands for a stage: it counts, and reports its process and its number of threads."""
    for done in range(1, total + 1):
        time.sleep(0.05)
        progress(done, total)
    summary = {"process": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")}
    return Outcome("count", out, True, 0.0, summary)


def make_a_mistake(out: Path) -> Outcome:
    raise UserError(f"{out}: no such thing")


def break_with_a_secret(out: Path) -> Outcome:
    raise KeyError("http://me:hidden@host/path")


def fill_the_disk(out: Path) -> Outcome:
    def compute(job: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    return run_stage("fill", 1, out, compute, reads={}, settings={}, summary=str)


def die(out: Path) -> Outcome:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_stage_runs_in_another_process_and_reports(tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    arguments = {"total": 10, "out": tmp_path}
    outcome = workers.run(count_to, arguments, lambda done, total: reports.append((done, total)))
    assert outcome.out == tmp_path
    assert outcome.summary["process"] != os.getpid()
    assert workers.gpus() or outcome.summary["threads"] == "1", "processes share the cores"
    assert reports
    assert reports == sorted(reports)


def test_threads_that_come_first_at_once_share_the_slots(tmp_path: Path) -> None:
    workers._pools.clear()
    arguments = {"total": 4, "out": tmp_path}
    with ThreadPoolExecutor(6) as threads:
        outcomes = threads.map(lambda _: workers.run(count_to, arguments, no_progress), range(6))
        processes = {outcome.summary["process"] for outcome in outcomes}
    assert len(processes) == min(6, workers.count())


def test_errors_come_back_as_what_they_are(tmp_path: Path) -> None:
    def error_of(function: Callable[..., Outcome]) -> Exception:
        with pytest.raises((UserError, UnexpectedError)) as caught:
            workers.run(function, {"out": tmp_path / "out"}, no_progress)
        return caught.value

    assert str(error_of(make_a_mistake)) == f"{tmp_path / 'out'}: no such thing"
    full = error_of(fill_the_disk)
    assert str(full).startswith(f"{tmp_path / 'out'}: no space left")
    assert not isinstance(full, TransientError)
    bug = error_of(break_with_a_secret)
    assert isinstance(bug, UnexpectedError)
    assert "in break_with_a_secret" in str(bug.__cause__), "its traceback"
    assert "hidden" not in f"{bug} {bug.__cause__}"


# ---------------------------------------------------------------------------------------------
# The processes of an owner that has none yet

OWNER = """
import threading, time
from pathlib import Path
from flows import workers
from fmn.errors import UserError
from tests.flows import test_workers

def run(name, progress=lambda done, total: None, **arguments):
    return workers.run(getattr(test_workers, name), {{"out": Path("x"), **arguments}}, progress)

def main():
    {body}

if __name__ == "__main__":
    main()
"""


def owner(folder: Path, body: str) -> "subprocess.Popen[str]":
    script = folder / "owner.py"
    script.write_text(OWNER.format(body=body.strip()))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FMN_THREADS": "3"}
    command = [sys.executable, str(script)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_is_reported_in_one_line_and_harms_no_other(tmp_path: Path) -> None:
    body = """
    def count():
        print("threads", run("count_to", total=60).summary["threads"], flush=True)
    other = threading.Thread(target=count)
    other.start()
    try:
        run("die")
    except UserError as error:
        print(type(error).__name__, error, flush=True)
    other.join()
    count()
"""
    with owner(tmp_path, body) as process:
        output = process.communicate(timeout=120)[0]
    assert "TransientError its process was killed, perhaps for lack of memory; run again" in output
    assert output.count("threads") == 2
    assert workers.gpus() or output.count("threads 3") == 2, "as FMN_THREADS says"


def test_what_runs_can_be_ended(tmp_path: Path) -> None:
    body = """
    threading.Timer(2, workers.end).start()
    for _ in range(2):
        started = time.monotonic()
        try:
            run("count_to", total=10000)
        except UserError as error:
            print(error, time.monotonic() - started < 60, flush=True)
"""
    with owner(tmp_path, body) as process:
        assert process.communicate(timeout=120)[0] == "ended with its run True\n" * 2


def test_processes_end_when_their_owner_is_killed(tmp_path: Path) -> None:
    body = 'run("count_to", lambda done, total: print(done, flush=True), total=10000)'
    with owner(tmp_path, body) as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        assert children
        assert not psutil.wait_procs(children, timeout=10)[1]


# ---------------------------------------------------------------------------------------------
# Transient errors


def raised(call: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception, match=r".") as caught:
        call()
    return caught.value


def locked_database(folder: Path) -> BaseException:
    with sqlite3.connect(folder / "db") as first:
        first.execute("create table a (b)")
        first.execute("begin exclusive")
        second = sqlite3.connect(folder / "db", timeout=0)
        try:
            return raised(lambda: second.execute("select * from a"))
        finally:
            second.close()


def through_mlflow(error: BaseException) -> BaseException:
    """As MLflow wraps an error of its database, and `fmn.registry` one of MLflow."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

    wrapped = MlflowException(str(error), error_code=TEMPORARILY_UNAVAILABLE)
    wrapped.__cause__ = error
    explained = UserError("MLflow at sqlite:///x: it failed")
    explained.__cause__ = wrapped
    return explained


def test_network_errors_and_a_locked_database_are_transient(tmp_path: Path) -> None:
    assert is_transient(raised(lambda: httpx.get("http://127.0.0.1:9", timeout=5)))
    assert is_transient(raised(lambda: requests.get("http://127.0.0.1:9", timeout=5)))
    assert is_transient(TimeoutError("late"))
    locked = locked_database(tmp_path)
    assert is_transient(locked)
    assert is_transient(through_mlflow(locked))
    assert is_transient(through_mlflow(ConnectionError("gone")))


@pytest.mark.parametrize(("status", "expected"), [(503, True), (429, True), (404, False)])
def test_a_busy_server_is_transient_and_one_that_refuses_is_not(
    status: int, expected: bool
) -> None:
    error = UserError("hf://org/name: it failed")
    request, response = httpx.Request("GET", "http://hub"), httpx.Response(status)
    error.__cause__ = httpx.HTTPStatusError("failed", request=request, response=response)
    assert is_transient(error) == expected


def test_mistakes_lack_of_memory_and_bugs_are_not_transient() -> None:
    assert not is_transient(UserError("no such thing"))
    assert not is_transient(MemoryError())
    assert not is_transient(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_transient(KeyError("x"))
    no_table = raised(lambda: sqlite3.connect(":memory:").execute("select * from nothing"))
    assert not is_transient(through_mlflow(no_table)), "MLflow calls it transient"


def test_a_file_that_vanished_may_come_back() -> None:
    assert is_transient(FileNotFoundError("away"))
    mistake = UserError("no such file")
    mistake.__cause__ = FileNotFoundError("away")
    assert not is_transient(mistake)


def test_an_error_is_one_line() -> None:
    assert one_line(TransientError("a\n  b")) == "a b"
    assert one_line(ValueError("a\nb")) == r"ValueError('a\nb')"
