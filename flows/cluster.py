"""Run stages on the workers of a Dask cluster; files are transferred through a shared storage.

The flow calls a stage as usual. If its output is not up to date, the inputs are copied to the
storage, a worker calls the same stage function on its copies, and the output and its sidecar are
copied back. The flow handles retries, progress and messages, so workers need no Prefect server.
"""

import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

from flows import workers
from flows.storage import Digests, Storage, digest_files
from flows.workers import Stage
from fmn.errors import UserError, system_errors_explained
from fmn.params import Params
from fmn.store import artifacts, stage
from fmn.store.stage import Outcome, Progress

STAGES = ("finetune", "fisher", "fisher_part", "full_fisher", "gram", "evaluate", "compare")
TIMEOUT = 15.0  # seconds that a scheduler, or its first worker, has to answer
MAX_STAGES = 256  # stages that wait for the cluster at once
_POLL = 0.5  # seconds between two looks at a stage, and between two reports of its progress
_INSTALL = "install fmn[dask] of the flow's version there, and restart it"
_START = "`dask worker ADDRESS --nthreads 1 --memory-limit 0 --local-directory DIR`"


class Files(NamedTuple):
    """Replaces a path in the arguments that are sent to a worker."""

    name: str  # of the file; empty for a folder
    digests: Digests  # of the folder's files, or of the file and what belongs to it


class _Cluster(NamedTuple):
    client: Any  # a distributed.Client
    storage: Storage
    has_gpus: bool  # whether a worker offers Dask's resource GPU


_cluster: ContextVar[_Cluster | None] = ContextVar("cluster", default=None)


@cache
def versions() -> str:
    """The versions that must be equal on all machines: fmn's, its files', and the libraries'."""
    import flows
    import fmn

    folders = [Path(package.__path__[0]) for package in (flows, fmn)]
    files = [file for folder in folders for file in sorted(folder.rglob("*"))]
    code = [artifacts.digest_file(file) for file in files if file.suffix in (".py", ".yaml")]
    digest = artifacts.digest_bytes("".join(code).encode())[:12]
    # A build for GPUs, such as 2.13.0+cu130, counts as the same.
    libraries = ("torch", "transformers", "tokenizers")
    versions = [f"{name} {version(name).partition('+')[0]}" for name in libraries]
    return f"fmn {fmn.__version__} {digest}, {', '.join(versions)}"


@contextmanager
def joined(settings: Params) -> Iterator[None]:
    """Run the stages in `STAGES` on the cluster in the settings, if there is one.

    Raises:
        UserError: the scheduler does not answer or has no workers, or a worker has no fmn or
            another version of it.
    """
    if settings.runner == "local":
        yield
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise UserError(
            "runner dask needs distributed; pip install 'fmn[dask]', here and on the workers"
        ) from error
    from prefect.context import FlowRunContext
    from prefect.task_runners import ThreadPoolTaskRunner

    storage, connect = Storage(str(settings.storage)), cast(Any, Client)
    try:
        client = connect(settings.address, timeout=TIMEOUT, set_as_default=False, name="fmn")
    except (OSError, ValueError) as error:
        raise UserError(
            f"address {settings.address}: no Dask scheduler answers;"
            " start it with `dask scheduler`, or correct the address"
        ) from error
    with client:
        _check_workers(client)
        infos = client.scheduler_info(n_workers=-1)["workers"].values()
        has_gpus = any(info["resources"].get("GPU", 0) >= 1 for info in infos)
        # A stage that waits for the cluster holds a thread of the flow's task runner.
        runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=MAX_STAGES)
        flow = FlowRunContext.get()
        context = flow.model_copy(update={"task_runner": runner}) if flow else nullcontext()
        token = _cluster.set(_Cluster(client, storage, has_gpus))
        try:
            with runner, context:
                yield
        finally:
            _cluster.reset(token)


def _check_workers(client: Any) -> None:
    """Raise UserError, naming the worker, unless there are workers and all run the same code."""
    try:
        client.wait_for_workers(1, timeout=TIMEOUT)
    except TimeoutError as error:
        raise UserError(f"the Dask scheduler has no workers; start some: {_START}") from error
    problems = client.run(_check_versions, versions(), on_error="return")
    for worker, problem in problems.items():
        if problem is not None:
            raise UserError(f"worker {worker}: {workers.one_line(problem)}; {_INSTALL}")


def takes(function: Stage) -> bool:
    """Whether a stage runs on the cluster."""
    return function.__name__ in STAGES and _cluster.get() is not None


def at_once() -> int:
    """How many stages of a flow run at a time; those on the cluster only wait here."""
    return workers.count() if _cluster.get() is None else MAX_STAGES


def run(function: Stage, arguments: Mapping[str, Any], progress: Progress) -> Outcome:
    """Call a stage that computes on the cluster; raises the errors of `flows.workers.run`."""
    cluster = cast(_Cluster, _cluster.get())

    def send(path: Path) -> Files:
        digests = digest_files(path)
        cluster.storage.put(path if path.is_dir() else path.parent, digests)
        return Files("" if path.is_dir() else path.name, digests)

    def compute(out: Path) -> None:
        sent = _replace({key: item for key, item in arguments.items() if key != "out"}, Path, send)
        title = f"{function.__name__} {out.name}"
        digests = _submit(cluster, title, (function, sent, out.name), progress)
        with artifacts.scratch_folder(out) as scratch:
            cluster.storage.get(scratch, digests)
            if (scratch / out.name).is_dir():
                artifacts.publish_folder(scratch / out.name, out)
            else:
                stage.publish_file(scratch, out)

    context = copy_context()
    context.run(stage.remote.set, compute)
    return context.run(workers.call, function, arguments, progress)


def _replace(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Change every value of a type in a stage's arguments, in mappings too."""
    if isinstance(value, Mapping):
        return {key: _replace(item, kind, change) for key, item in value.items()}
    return change(value) if isinstance(value, kind) else value


def _submit(cluster: _Cluster, title: str, call: tuple[Any, ...], progress: Progress) -> Digests:
    """Run `work(*call, ...)` on a worker; it is cancelled if this run ends before."""
    from distributed import KilledWorker

    client, topic = cluster.client, f"{title}-{uuid.uuid4().hex}"
    latest: deque[tuple[int, int]] = deque(maxlen=1)
    client.subscribe_topic(topic, lambda event: latest.append(event[1]))
    device = getattr(call[1].get("settings"), "device", "cpu")
    resources = {"GPU": 1} if cluster.has_gpus and device != "cpu" else None
    threads = int(os.environ.get("FMN_THREADS", "1"))
    call = (work, *call, cluster.storage.url, versions(), threads)
    future = client.submit(*call, key=topic, pure=False, resources=resources)
    try:
        while not future.done() and client.status == "running":
            time.sleep(_POLL)
            workers.check_not_ended()
            if latest:
                progress(*latest[-1])
        if future.status not in ("finished", "error"):
            raise UserError("the Dask scheduler went away; start it, and run again to go on")
        return cast(Digests, future.result())
    except KilledWorker as error:
        raise UserError(f"{error} Perhaps they lack the memory for one model.") from error
    finally:
        if client.status == "running":
            future.cancel()
            client.unsubscribe_topic(topic)


# What follows runs on workers.

_one_at_a_time = threading.Lock()  # stages set the seeds and threads of their process


def _check_versions(expected: str) -> None:
    if versions() != expected:
        raise UserError(f"it has {versions()}; the flow has {expected}")


def work(
    function: Stage, arguments: Mapping[str, Any], out: str, url: str, expected: str, threads: int
) -> Digests:
    """Fetch a stage's inputs, run it, and store its output.

    Inputs stay in the worker's folder; Dask removes it when the worker ends.
    """
    from distributed import get_worker

    _check_versions(expected)
    worker, storage, due = get_worker(), Storage(url), 0.0
    key, home = worker.get_current_task(), Path(worker.local_directory)

    def progress(done: int, total: int) -> None:
        nonlocal due
        if time.monotonic() < due:
            return
        due = time.monotonic() + _POLL
        task = worker.state.tasks.get(key)
        if task is None or task.state == "cancelled":
            raise CancelledError
        worker.log_event(str(key), (done, total))

    def fetch(files: Files) -> Path:
        content = artifacts.canonical(files.digests)
        folder = home / "inputs" / artifacts.digest_bytes(content)
        if not folder.is_dir():
            with artifacts.scratch_folder(folder) as scratch:
                storage.get(scratch, files.digests)
                scratch.rename(folder)
        return folder / files.name

    with _one_at_a_time, system_errors_explained(home), TemporaryDirectory(dir=home) as name:
        if not workers.gpus():
            import torch

            torch.set_num_threads(threads)
        folder = Path(name)
        workers.call(function, {**_replace(arguments, Files, fetch), "out": folder / out}, progress)
        digests = digest_files(folder)
        storage.put(folder, digests)
        return digests
