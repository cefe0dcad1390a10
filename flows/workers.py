"""Stages in processes of their own, side by side: each has a GPU, or its share of the cores."""

import inspect
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from fmn.errors import UserError
from fmn.stage import Outcome, Progress

_POLL = 0.1  # seconds between two looks at a worker's progress


class _Pool(NamedTuple):
    workers: ProcessPoolExecutor
    counts: Any  # shared int64 [2 * workers]: how much a worker has done, and of how much
    free: SimpleQueue[int]  # places in `counts`


def gpus() -> int:
    """GPUs of this machine that the driver lists; counted without PyTorch, which takes seconds to import."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def count() -> int:
    """How many stages run side by side: one on each GPU, or one on each core."""
    return gpus() or len(os.sched_getaffinity(0))


@cache
def _pool() -> _Pool:
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", 2 * count(), lock=False)
    order = context.Value("i", 0)
    workers = ProcessPoolExecutor(count(), context, _settle, (counts, order, os.getpid()))
    free: SimpleQueue[int] = SimpleQueue()
    for place in range(count()):
        free.put(place)
    return _Pool(workers, counts, free)


def run(function: Callable[..., Outcome], arguments: Mapping[str, Any], progress: Progress) -> Outcome:
    """Call a stage function in a worker process. Raises what it raises; UserError when the worker was killed."""
    pool = _pool()
    place = pool.free.get()
    pool.counts[2 * place : 2 * place + 2] = [0, 0]
    try:
        future = pool.workers.submit(_work, function, dict(arguments), place)
        while not future.done():
            wait([future], timeout=_POLL)
            done, total = pool.counts[2 * place : 2 * place + 2]
            if total:
                progress(done, total)
        return future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for want of memory; run again to go on from here"
        ) from error
    finally:
        pool.free.put(place)


_counts: Any = None


def _settle(counts: Any, order: Any, parent: int) -> None:
    """In a new worker, before it imports PyTorch: its GPU or its threads, and an end when the parent ends."""
    global _counts
    _counts = counts
    with order.get_lock():
        index, order.value = order.value, order.value + 1
    if gpus():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus())))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[index % len(seen)]
    else:
        os.environ["OMP_NUM_THREADS"] = os.environ.get("FMN_THREADS", "1")
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(function: Callable[..., Outcome], arguments: dict[str, Any], place: int) -> Outcome:
    def report(done: int, total: int) -> None:
        _counts[2 * place : 2 * place + 2] = [done, total]

    if "progress" in inspect.signature(function).parameters:
        arguments["progress"] = report
    return function(**arguments)
