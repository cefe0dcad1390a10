"""Stages in processes of their own, side by side: each has a GPU, or its share of the cores."""

import inspect
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from flows.faults import PassingError, UnforeseenError, one_line, passes
from fmn.errors import UserError, redacted
from fmn.store import machine
from fmn.store.stage import Outcome, Progress

_POLL = 0.1  # seconds between two looks at a worker's progress


class _Slot(NamedTuple):
    """A place where stages run one after the other, in one process for as long as that lives."""

    number: int
    worker: ProcessPoolExecutor
    counts: Any  # shared int64 [2]: how much the stage has done, and of how much


def gpus() -> int:
    """GPUs of this machine that the driver lists; counted without PyTorch, which takes seconds to import."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def count() -> int:
    """How many stages run side by side: one on each GPU, or one on each core."""
    return gpus() or len(os.sched_getaffinity(0))


class _RemoteError(Exception):
    """An error of another process with its traceback, as text."""


_context = multiprocessing.get_context("spawn")
_first_use = threading.RLock()  # two threads at once must not make the slots twice


@cache
def _ended() -> Any:
    """Shared: not zero once nothing is to run any more."""
    return _context.Value("b", 0, lock=False)


def _slot(number: int) -> _Slot:
    counts = _context.Array("q", 2, lock=False)
    return _Slot(
        number,
        ProcessPoolExecutor(1, _context, _settle, (counts, _ended(), number, os.getpid())),
        counts,
    )


@cache
def _slots() -> SimpleQueue[_Slot]:
    """The slots that are free."""
    free: SimpleQueue[_Slot] = SimpleQueue()
    for number in range(count()):
        free.put(_slot(number))
    return free


def run(
    function: Callable[..., Outcome], arguments: Mapping[str, Any], progress: Progress
) -> Outcome:
    """Call a stage function in a worker process, and leave the others in peace when it dies.

    Raises:
        what the stage raises; PassingError when its reason may pass by itself, or when the process was killed;
        UserError when it was killed for want of memory.
    """
    with _first_use:
        free = _slots()
    slot = free.get()
    slot.counts[:] = [0, 0]
    killed = _killed_for_memory()
    try:
        _check_not_ended()
        future = slot.worker.submit(_work, function, dict(arguments))
        while not future.done():
            wait([future], timeout=_POLL)
            done, total = slot.counts
            if total:
                progress(done, total)
        return future.result()
    except BrokenProcessPool as error:
        _check_not_ended()
        slot = _slot(slot.number)
        if _killed_for_memory() > killed:
            raise UserError(
                "the machine ran out of memory, and its process was killed; free some and run again to go on"
            ) from error
        raise PassingError("its process was killed; run again to go on from here") from error
    finally:
        free.put(slot)


def end() -> None:
    """End the stages that run, within about a second, and start no others."""
    with _first_use:
        _ended().value = 1


def ended() -> bool:
    """Whether `end` was called."""
    with _first_use:
        return bool(_ended().value)


def _check_not_ended() -> None:
    if ended():
        raise UserError("ended with its run")


def _killed_for_memory() -> int:
    """How many processes the kernel has killed for want of memory."""
    try:
        counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    except OSError:
        return 0
    return int(counters.get("oom_kill", 0))


_counts: Any = None


def _settle(counts: Any, ended: Any, number: int, parent: int) -> None:
    """In a new worker, before it imports PyTorch: its GPU or its threads, and an end when the parent ends."""
    global _counts
    _counts = counts
    if gpus():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus())))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[number % len(seen)]
    else:
        os.environ["OMP_NUM_THREADS"] = os.environ.get("FMN_THREADS", "1")
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then calls `end`
    threading.Thread(target=_end_with, args=(parent, ended), daemon=True).start()


def _end_with(parent: int, ended: Any) -> None:
    while os.getppid() == parent and not ended.value:
        time.sleep(1)
    os._exit(1)


def _work(function: Callable[..., Outcome], arguments: dict[str, Any]) -> Outcome:
    def report(done: int, total: int) -> None:
        _counts[:] = [done, total]

    return call(function, arguments, report)


def call(
    function: Callable[..., Outcome], arguments: Mapping[str, Any], progress: Progress
) -> Outcome:
    """Call a stage function here; PassingError when the reason why it fails may pass by itself."""
    reported = (
        {"progress": progress} if "progress" in inspect.signature(function).parameters else {}
    )
    try:
        return function(**arguments, **reported)
    except PassingError:
        raise
    except Exception as error:
        # What it was raised from does not travel to the parent, nor do secrets, which would be in the server's log.
        told = (
            error if isinstance(error, UserError) else machine.refusal(error, arguments.get("out"))
        )
        if told is None and not passes(error):
            raise UnforeseenError(one_line(error)) from _RemoteError(
                redacted("".join(traceback.format_exception(error)))
            )
        raise (PassingError if passes(told or error) else UserError)(
            one_line(told or error)
        ) from None
