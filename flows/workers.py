"""Run stages in parallel, each in its own process with one GPU or one core."""

import inspect
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from fmn.environment import keep_freed_memory
from fmn.errors import UserError, causes, redacted, system_error
from fmn.store.stage import Outcome, Progress

Stage = Callable[..., Outcome]
_POLL = 0.1  # seconds between two looks at a stage's progress
_RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)
# Errors of Python and of the HTTP clients, by name, as importing the clients is slow.
_NETWORK_ERRORS = {
    *("ConnectionError", "TimeoutError", "TransportError", "Timeout", "ChunkedEncodingError"),
    "RetryError",
}


class TransientError(UserError):
    """A failure that may not happen again, such as a lost connection; the stage is retried."""


class UnexpectedError(Exception):
    """A bug in a stage, reported by its process."""


def one_line(error: BaseException) -> str:
    """The message of an error, with its type unless the user caused it; without secrets."""
    is_message = isinstance(error, UserError | UnexpectedError)
    return redacted(" ".join((str(error) if is_message else repr(error)).split()))


def is_transient(error: BaseException) -> bool:
    """Whether a retry may help: after a network failure, a busy server or a locked database.

    It may also help if a file disappeared, as `dvc checkout` removes a file before it writes the
    new one. (A file that never existed raises a UserError.)
    """
    if isinstance(error, FileNotFoundError):
        return True
    if system_error(error) is not None:  # a full disk, too little memory
        return False
    chain = list(causes(error))
    # MLflow treats every error of its database as transient; SQLite's message is more precise.
    if database := [cause for cause in chain if isinstance(cause, sqlite3.OperationalError)]:
        return any("locked" in str(cause) or "busy" in str(cause) for cause in database)
    return any(map(_is_network_error, chain))


def _is_network_error(error: BaseException) -> bool:
    return (
        isinstance(error, TransientError)
        or not _NETWORK_ERRORS.isdisjoint(kind.__name__ for kind in type(error).__mro__)
        or getattr(getattr(error, "response", None), "status_code", None) in _RETRIED_STATUSES
        or getattr(error, "error_code", None) == "TEMPORARILY_UNAVAILABLE"  # MLflow's
    )


def gpus() -> int:
    """The number of this machine's GPUs, without PyTorch, which is slow to import."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def count() -> int:
    """The number of stages that run in parallel: one on each GPU, or one on each core."""
    return gpus() or len(os.sched_getaffinity(0))


_context = multiprocessing.get_context("spawn")
_ended: Any = _context.Value("b", 0, lock=False)  # shared: not zero once all processes must end
_free: SimpleQueue[int] = SimpleQueue()  # numbers of the slots in which no stage runs
for _number in range(count()):
    _free.put(_number)
# By slot: a pool of one process, and how far its stage is, shared int64 [2]: (done, total).
# Each slot has a pool of its own because a killed process breaks its whole pool.
_pools: dict[int, tuple[ProcessPoolExecutor, Any]] = {}


def run(function: Stage, arguments: Mapping[str, Any], progress: Progress) -> Outcome:
    """Call a stage function in its own process, as soon as a slot is free.

    Raises:
        UserError: the stage raised it.
        TransientError: a retry may help: the stage failed that way, or the process was killed.
        UnexpectedError: the stage has a bug.
    """
    slot = _free.get()
    try:
        check_not_ended()
        if slot not in _pools:
            counter = _context.Array("q", 2, lock=False)
            settings = (counter, _ended, slot, os.getpid())
            _pools[slot] = ProcessPoolExecutor(1, _context, _start_process, settings), counter
        process, counter = _pools[slot]
        counter[:] = [0, 0]
        future = process.submit(call, function, dict(arguments), _report)
        while not future.done():
            wait([future], timeout=_POLL)
            if counter[1]:
                progress(*counter)
        return future.result()
    except BrokenProcessPool as error:
        del _pools[slot]
        check_not_ended()
        raise TransientError(
            "its process was killed, perhaps for lack of memory; run again to go on from here"
        ) from error
    finally:
        _free.put(slot)


def end() -> None:
    """End the stages that run, within about a second, and start no others."""
    _ended.value = 1


def check_not_ended() -> None:
    """Raise a UserError once `end` was called."""
    if _ended.value:
        raise UserError("ended with its run")


# What follows runs in the process of a slot.

_counter: Any = None


def _start_process(counter: Any, must_end: Any, slot: int, parent: int) -> None:
    """Choose the process's GPU or its threads before PyTorch is imported."""
    global _counter
    _counter = counter
    if gpus():
        every = ",".join(map(str, range(gpus())))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[slot % len(visible)]
    else:
        os.environ["OMP_NUM_THREADS"] = os.environ.get("FMN_THREADS", "1")
    keep_freed_memory()
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which calls `end`

    def exit_with_parent() -> None:
        while os.getppid() == parent and not must_end.value:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _report(done: int, total: int) -> None:
    _counter[:] = [done, total]


def call(function: Stage, arguments: Mapping[str, Any], progress: Progress) -> Outcome:
    """Call a stage function in this process; raises the errors of `run`, with one-line messages.

    The causes of an error stay in the process, as they may not be picklable and may have secrets.
    """
    if "progress" in inspect.signature(function).parameters:
        arguments = {**arguments, "progress": progress}
    try:
        return function(**arguments)
    except Exception as error:
        if is_transient(error):
            raise TransientError(one_line(error)) from None
        if isinstance(error, UserError):
            raise UserError(one_line(error)) from None
        text = redacted("".join(traceback.format_exception(error)))
        raise UnexpectedError(one_line(error)) from RuntimeError(text)
