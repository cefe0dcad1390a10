"""Stages in processes: results, progress and errors come back; nothing outlives its owner."""

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil
import pytest
import requests
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

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


@pytest.fixture
def own_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots in which no process runs yet, so that a test may kill or end theirs."""
    monkeypatch.setattr(workers, "_pools", {})
    monkeypatch.setattr(workers, "_ended", workers._context.Value("b", 0, lock=False))


def count(total: int) -> Outcome:
    return workers.run(count_to, {"total": total, "out": Path()}, no_progress)


@pytest.mark.usefixtures("own_slots")
def test_stages_run_in_one_process_for_each_slot_and_report() -> None:
    reports: list[tuple[int, int]] = []

    def run(_: int) -> Outcome:
        arguments = {"total": 10, "out": Path()}
        return workers.run(count_to, arguments, lambda *step: reports.append(step))

    with ThreadPoolExecutor(6) as threads:
        outcomes = list(threads.map(run, range(6)))
    processes = {outcome.summary["process"] for outcome in outcomes}
    assert len(processes - {os.getpid()}) == min(6, workers.count())
    assert workers.gpus() or {outcome.summary["threads"] for outcome in outcomes} == {"1"}
    assert {total for _, total in reports} == {10}


def test_errors_come_back_as_what_they_are(tmp_path: Path) -> None:
    def error_of(function: Callable[..., Outcome]) -> Exception:
        with pytest.raises((UserError, UnexpectedError)) as caught:
            workers.run(function, {"out": tmp_path / "out"}, no_progress)
        return caught.value

    assert str(error_of(make_a_mistake)) == f"{tmp_path / 'out'}: no such thing"
    full = error_of(fill_the_disk)
    assert f"{tmp_path / 'out'}: no space left on the disk" in str(full)
    assert not isinstance(full, TransientError)
    bug = error_of(break_with_a_secret)
    assert isinstance(bug, UnexpectedError)
    assert "in break_with_a_secret" in str(bug.__cause__), "its traceback"
    assert "hidden" not in f"{bug} {bug.__cause__}"


@pytest.mark.usefixtures("own_slots")
def test_a_killed_process_is_reported_in_one_line_and_harms_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FMN_THREADS", "3")
    line = "^its process was killed, perhaps for lack of memory; run again to go on from here$"
    with ThreadPoolExecutor() as threads:
        other = threads.submit(count, 60)
        with pytest.raises(TransientError, match=line):
            workers.run(die, {"out": Path()}, no_progress)
        assert workers.gpus() or other.result().summary["threads"] == "3"
    assert count(1).computed, "the slot is free again"


@pytest.mark.usefixtures("own_slots")
def test_what_runs_can_be_ended() -> None:
    threading.Timer(2, workers.end).start()
    for _ in range(2):
        with pytest.raises(UserError, match=r"^ended with its run$"):
            count(1000)


RUN = """
from pathlib import Path
from flows import workers
from tests.flows.test_workers import count_to
arguments = {"total": 10000, "out": Path()}
workers.run(count_to, arguments, lambda done, total: print(done, flush=True))
"""


def test_processes_end_when_their_owner_is_killed() -> None:
    command = [sys.executable, "-c", RUN]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
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


def locked_database() -> BaseException:
    with TemporaryDirectory() as folder, closing(sqlite3.connect(f"{folder}/db")) as first:
        first.execute("create table a (b)")
        first.execute("begin exclusive")
        with closing(sqlite3.connect(f"{folder}/db", timeout=0)) as second:
            return raised(lambda: second.execute("select * from a"))


def lacking_table() -> BaseException:
    with closing(sqlite3.connect(":memory:")) as database:
        return raised(lambda: database.execute("select * from nothing"))


def through_mlflow(error: BaseException) -> BaseException:
    """As MLflow wraps an error of its database, and calls it transient."""
    wrapped = MlflowException(str(error), error_code=TEMPORARILY_UNAVAILABLE)
    wrapped.__cause__ = error
    return explained(wrapped)


def explained(error: BaseException) -> BaseException:
    """As stages explain the errors of libraries."""
    explanation = UserError("it failed")
    explanation.__cause__ = error
    return explanation


def answered(status: int) -> BaseException:
    request, response = httpx.Request("GET", "http://hub"), httpx.Response(status)
    return explained(httpx.HTTPStatusError("failed", request=request, response=response))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: raised(lambda: httpx.get("http://127.0.0.1:9", timeout=5)), True),
        (lambda: raised(lambda: requests.get("http://127.0.0.1:9", timeout=5)), True),
        (lambda: TimeoutError("late"), True),
        (lambda: FileNotFoundError("away"), True),
        (lambda: explained(FileNotFoundError("never there")), False),
        (locked_database, True),
        (lambda: through_mlflow(locked_database()), True),
        (lambda: through_mlflow(ConnectionError("gone")), True),
        (lambda: through_mlflow(lacking_table()), False),
        (lambda: answered(503), True),
        (lambda: answered(429), True),
        (lambda: answered(404), False),
        (lambda: UserError("no such thing"), False),
        (lambda: torch.OutOfMemoryError("CUDA out of memory"), False),
        (lambda: KeyError("x"), False),
    ],
)
def test_failures_of_network_servers_and_locks_are_transient_and_others_are_not(
    make: Callable[[], BaseException], expected: bool
) -> None:
    assert is_transient(make()) == expected


def test_an_error_is_one_line() -> None:
    assert one_line(TransientError("a\n b")) == r"a\n b"
    assert one_line(ValueError("a\nb")) == r"ValueError('a\nb')"
