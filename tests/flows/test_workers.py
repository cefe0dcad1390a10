"""Stages in worker processes: results, progress and mistakes come back; nothing outlives its owner."""

import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows import workers
from flows.faults import PassingError, UnforeseenError
from fmn.errors import UserError
from fmn.store.stage import Outcome, Progress


def count_to(total: int, out: Path, progress: Progress | None = None) -> Outcome:
    """Stands for a stage: it counts, and says in which process and with how many threads."""
    for done in range(1, total + 1):
        time.sleep(0.05)
        if progress:
            progress(done, total)
    said = {"process": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")}
    return Outcome("count", out, True, 0.0, said)


def make_a_mistake(out: Path) -> Outcome:
    raise UserError(f"{out}: no such thing")


def die(out: Path) -> Outcome:
    os.kill(os.getpid(), signal.SIGKILL)
    return Outcome("die", out, True, 0.0, {})


def test_a_stage_runs_elsewhere_and_reports(tmp_path: Path) -> None:
    reported: list[tuple[int, int]] = []
    outcome = workers.run(
        count_to, {"total": 10, "out": tmp_path}, lambda done, total: reported.append((done, total))
    )
    assert outcome.out == tmp_path
    assert outcome.summary["process"] != os.getpid()
    if not workers.gpus():
        assert outcome.summary["threads"] == "1", (
            "workers share the cores, and do not fight for them"
        )
    assert reported
    assert reported == sorted(reported)


def test_threads_that_come_first_at_once_share_the_slots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    slot = workers._slot

    def slowly(number: int) -> Any:
        time.sleep(0.1)
        made.append(number)
        return slot(number)

    monkeypatch.setattr(workers, "_slot", slowly)
    workers._slots.cache_clear()
    arguments = {"total": 1, "out": tmp_path}
    with ThreadPoolExecutor(4) as threads:
        list(
            threads.map(
                lambda _: workers.run(count_to, arguments, lambda done, total: None), range(4)
            )
        )
    assert made == list(range(workers.count()))


def test_a_users_mistake_stays_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such thing"):
        workers.run(make_a_mistake, {"out": tmp_path}, lambda done, total: None)


def break_with_a_secret(out: Path) -> Outcome:
    raise KeyError("http://me:hidden@host/path")


def test_the_traceback_of_our_own_fault_is_told_without_secrets(tmp_path: Path) -> None:
    with pytest.raises(UnforeseenError, match="KeyError") as caught:
        workers.run(break_with_a_secret, {"out": tmp_path}, lambda done, total: None)
    told = f"{caught.value} {caught.value.__cause__}"
    assert "in break_with_a_secret" in told
    assert "hidden" not in told


def fill_the_disk(out: Path) -> Outcome:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_with_the_output_that_found_no_room(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}: no space left") as caught:
        workers.run(fill_the_disk, {"out": tmp_path}, lambda done, total: None)
    assert not isinstance(caught.value, PassingError)


OWNER = """
import threading, time
from pathlib import Path
from flows import workers
from fmn.errors import UserError
from tests.flows import test_workers

def main():
    {body}

if __name__ == "__main__":
    main()
"""


def owner(tmp_path: Path, body: str) -> "subprocess.Popen[str]":
    script = tmp_path / "owner.py"
    script.write_text(OWNER.format(body=body))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.skipif(workers.gpus() > 0, reason="stages on a GPU keep the machine's threads")
def test_the_number_of_threads_can_be_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMN_THREADS", "3")
    body = """
    outcome = workers.run(test_workers.count_to, {"total": 1, "out": Path("x")}, lambda done, total: None)
    print("threads", outcome.summary["threads"])
"""
    with owner(tmp_path, body.strip()) as process:
        assert process.communicate(timeout=120)[0] == "threads 3\n"


def test_a_worker_that_was_killed_is_told_in_one_line_and_harms_no_other(tmp_path: Path) -> None:
    body = """
    def count():
        outcome = workers.run(test_workers.count_to, {"total": 60, "out": Path("x")}, lambda done, total: None)
        print("counted", outcome.summary["process"], flush=True)
    other = threading.Thread(target=count)
    other.start()
    try:
        workers.run(test_workers.die, {"out": Path("x")}, lambda done, total: None)
    except UserError as error:
        print(type(error).__name__, error, flush=True)
    other.join()
    count()
"""
    with owner(tmp_path, body.strip()) as process:
        said = process.communicate(timeout=120)[0]
    assert "PassingError its process was killed; run again to go on from here" in said
    assert said.count("counted") == 2


def test_a_process_killed_for_want_of_memory_is_no_fault_that_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = iter(range(2))
    monkeypatch.setattr(
        workers, "_killed_for_memory", lambda: next(counted)
    )  # the kernel's counter, before and after
    with pytest.raises(UserError, match="ran out of memory") as caught:
        workers.run(die, {"out": tmp_path}, lambda done, total: None)
    assert not isinstance(caught.value, PassingError)


def test_what_runs_can_be_ended(tmp_path: Path) -> None:
    body = """
    threading.Timer(2, workers.end).start()
    for _ in range(2):
        started = time.monotonic()
        try:
            workers.run(test_workers.count_to, {"total": 10000, "out": Path("x")}, lambda d, t: None)
        except UserError as error:
            print(error, time.monotonic() - started < 60, flush=True)
"""
    with owner(tmp_path, body.strip()) as process:
        said = process.communicate(timeout=120)[0]
    assert said.splitlines() == ["ended with its run True"] * 2


def test_workers_end_when_their_owner_is_killed(tmp_path: Path) -> None:
    body = 'workers.run(test_workers.count_to, {"total": 10000, "out": Path("x")}, lambda d, t: print(d, flush=True))'
    with owner(tmp_path, body) as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        assert children
        _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
