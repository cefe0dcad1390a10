"""Stages on the workers of a Dask cluster: experts are computed there, and files travel through a shared storage.

A stage is called where the flow runs, as ever. Where its output is not current, its inputs go to the storage, a worker
calls the same function on its copies of them, and the output comes back the same way. Prefect is on this side alone:
workers need no Prefect server, and retries, progress and messages are those of any stage. One stage at a time runs in a
worker's process.
"""

import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import filelock
from pydantic import BaseModel

from flows import storage, workers
from flows.faults import one_line
from flows.storage import Cache, Made, Storage, Tree
from fmn.errors import UserError
from fmn.fisher.stages import FisherSettings
from fmn.merge import recipe
from fmn.params import Params
from fmn.store import artifacts, machine, stage
from fmn.store.stage import Outcome, Progress

STAGES = ("finetune", "fisher", "full-fisher", "gram", "evaluate", "compare")
ANSWER = 15.0  # seconds that a scheduler, or its first worker, has to answer
PATIENCE = 60.0  # seconds without any worker after which a stage is given up
UNDER_WAY = 64  # stages that are with the cluster at once, and no fewer than twice its threads
_POLL = 0.5  # seconds between two looks at a stage; a worker says how far it is as often


class Input(NamedTuple):
    """Stands for a path in a stage's arguments: a tree of the storage, and the file in it, or the folder itself."""

    digest: str
    name: str


@dataclass(frozen=True)
class Request:
    """A stage that a worker is to run.

    Attributes:
        stage: its name.
        function: it.
        arguments: its arguments; an `Input` stands for each path but `out`.
        out: the name of its output.
        trees: its inputs by digest.
        code: what its worker must run (see `code`).
        threads: of its process, where that has no GPU.
        digest: of all that its output depends on.
    """

    stage: str
    function: Callable[..., Outcome]
    arguments: Mapping[str, Any]
    out: str
    trees: Mapping[str, Tree]
    code: Mapping[str, str]
    threads: int
    digest: str


@dataclass
class _Cluster:
    client: Any  # a distributed.Client
    address: str
    storage: Storage
    told: dict[str, tuple[int, int]] = field(default_factory=dict)  # how far a stage is, by its key
    looked: float = 0.0  # when the workers were counted
    peopled: float = 0.0  # when there was one
    gpus: bool = False  # whether one of them offers GPUs
    lock: threading.Lock = field(default_factory=threading.Lock)


_joined: ContextVar[_Cluster | None] = ContextVar("joined", default=None)


@cache
def code() -> dict[str, str]:
    """What must be the same on all machines: fmn, by its version and the sha256 of its files, and what computes."""
    import flows
    import fmn

    files = [
        path for package in (flows, fmn) for path in sorted(Path(package.__path__[0]).rglob("*.py"))
    ]
    digest = artifacts.digest_bytes("".join(map(artifacts.digest_file, files)).encode())
    found = {"fmn": f"{fmn.__version__} ({digest[:12]})"}
    for name in ("torch", "transformers", "tokenizers"):
        try:
            found[name] = version(name).partition("+")[0]  # a build for GPUs computes alike
        except PackageNotFoundError:
            found[name] = "none"
    return found


def request(
    stage_name: str, function: Callable[..., Outcome], arguments: Mapping[str, Any]
) -> tuple[Request, Any]:
    """What a worker is to run for a stage's arguments, and where its inputs lie here: (folder, tree) of each."""
    trees: dict[str, tuple[Path, Tree]] = {}

    def travelling(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: travelling(name, one) for key, one in value.items()}
        if not isinstance(value, Path):
            return value
        files = storage.tree(value, _tasks(arguments) if name in ("folder", "data") else ())
        digest = storage.digest(files)
        trees[digest] = (value.parent if value.is_file() else value, files)
        return Input(digest, value.name if value.is_file() else "")

    sent = {name: travelling(name, value) for name, value in arguments.items() if name != "out"}
    settings = sent.get("settings")
    if isinstance(settings, FisherSettings):
        sent["settings"] = settings.model_copy(
            update={"workers": 1}
        )  # a worker of the cluster has one GPU
    threads = int(os.environ.get("FMN_THREADS", "1"))
    out = arguments["out"].name  # that of another output would not fit
    described = {
        "stage": stage_name,
        "out": out,
        "arguments": _plain(sent),
        "code": code(),
        "threads": threads,
    }
    digest = artifacts.digest_bytes(artifacts.canonical(described))
    by_digest = {digest: files for digest, (_, files) in trees.items()}
    asked = Request(stage_name, function, sent, out, by_digest, code(), threads, digest)
    return asked, list(trees.values())


def _tasks(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The tasks whose data a stage reads."""
    if "task" in arguments:
        return (arguments["task"],)
    named = (
        arguments.get("names")
        or arguments.get("experts")
        or recipe.read_recipe(arguments["model"])["tasks"]
    )
    return tuple(named)


def _plain(value: Any) -> Any:
    """A request's arguments as JSON has them, without what their results do not depend on."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude={"device", "workers"})
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


@contextmanager
def joined(settings: Params) -> Iterator[None]:
    """Within it, stages that compute experts run on the cluster that the settings name, if they name one.

    Raises:
        UserError: when the scheduler does not answer or has no workers; a worker has no fmn, has another one, or does
            not see the storage; the storage cannot be written.
    """
    if settings.runner == "local":
        yield
        return
    try:
        from prefect_dask import client as prefect_dask
    except ImportError as error:
        raise UserError(
            "runner dask needs prefect-dask: pip install 'fmn[dask]', here and on the workers"
        ) from error
    from prefect.context import FlowRunContext
    from prefect.task_runners import ThreadPoolTaskRunner

    address = str(settings.address)
    shared = Storage(str(settings.storage))
    try:
        connect: Any = prefect_dask.PrefectDaskClient  # for plain functions it is Dask's own
        client = connect(address, timeout=ANSWER, set_as_default=False, name="fmn")
    except (OSError, ValueError) as error:
        raise UserError(
            f"address {address}: no Dask scheduler answers; start it with `dask scheduler`, or correct the address"
        ) from error
    with client:
        cluster = _Cluster(client, address, shared)
        probe = shared.probe()
        try:
            check_workers(cluster, probe)
        finally:
            shared.remove(probe)
        under_way = max(UNDER_WAY, 2 * sum(client.nthreads().values())) + workers.count()
        token = _joined.set(cluster)
        context = FlowRunContext.get()
        try:
            # A stage that waits for the cluster holds a thread, and a run has only as many as it has places here.
            runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=under_way)
            with (
                runner,
                context.model_copy(update={"task_runner": runner}) if context else nullcontext(),
            ):
                yield
        finally:
            _joined.reset(token)


def check_workers(cluster: _Cluster, probe: str) -> None:
    """UserError, naming a worker and what to do, unless all can run stages; `probe` lies in the storage."""
    from distributed import TimeoutError as NoAnswer

    try:
        cluster.client.wait_for_workers(1, timeout=ANSWER)
    except (NoAnswer, TimeoutError) as error:
        raise UserError(
            f"address {cluster.address}: the scheduler has no workers; start some: {_START}"
        ) from error
    found = cluster.client.run(_able, cluster.storage.url, probe, code(), on_error="return")
    for worker, answer in found.items():
        if _lacks_a_module(answer):
            raise UserError(f"worker {worker}: no fmn there ({one_line(answer)}); {_INSTALL}")
        if isinstance(answer, BaseException):
            raise UserError(f"worker {worker}: {one_line(answer)}")
        if answer is not None:
            raise UserError(f"worker {worker}: {answer}")
    _count(cluster)


_INSTALL = "install fmn[dask] of this version there, and restart it"
_START = "`dask worker ADDRESS --nthreads 1 --memory-limit 0 --local-directory DIR`"


def _lacks_a_module(answer: Any) -> bool:
    """Whether a worker could not import something; Dask may have put the error into another's text."""
    return isinstance(answer, Exception) and ModuleNotFoundError.__name__ in repr(answer)


def _able(url: str, probe: str, expected: Mapping[str, str]) -> str | None:
    """On a worker: why it cannot run stages, or None."""
    if why := _differs(expected):
        return why
    try:
        unseen = Storage(url).sees(probe)
    except UserError as error:
        return str(error)
    return unseen and (
        f"does not see what the flow wrote to {url} ({unseen}); give it the rights, or a URL that all machines share"
    )


def _differs(expected: Mapping[str, str]) -> str | None:
    here = code()
    for name, wanted in expected.items():
        if here[name] != wanted:
            return f"{name} {here[name]} there, {wanted} where the flow runs; install the same on both, and restart it"
    return None


def _count(cluster: _Cluster) -> None:
    """Look, every few seconds, whether there are workers and whether some offer GPUs; UserError without a scheduler."""
    if cluster.client.status != "running":  # when it connects again it has forgotten all stages
        raise _gone(cluster)
    with cluster.lock:
        now = time.monotonic()
        if now - cluster.looked < 5:
            return
        try:
            # Not `scheduler_info`, which answers from memory when the scheduler does not.
            found = cluster.client.sync(cluster.client.scheduler.identity, n_workers=-1)[
                "workers"
            ].values()
        except OSError as error:
            raise _gone(cluster) from error
        cluster.looked = now
        cluster.peopled = now if found else cluster.peopled
        cluster.gpus = any(worker["resources"].get("GPU", 0) >= 1 for worker in found)


def _gone(cluster: _Cluster) -> UserError:
    return UserError(
        f"the scheduler {cluster.address} went away; start it and run again to go on from here"
    )


def takes(name: str) -> bool:
    """Whether stages of this name run on the cluster."""
    return name in STAGES and _joined.get() is not None


def run(
    name: str, function: Callable[..., Outcome], arguments: Mapping[str, Any], progress: Progress
) -> Outcome:
    """Call a stage function, and have the cluster make what is not there; raises what `flows.workers.run` does."""
    cluster = _joined.get()
    if cluster is None:
        raise RuntimeError("not joined")

    def elsewhere() -> float:
        asked, inputs = request(name, function, arguments)
        made = cluster.storage.made(asked.digest)
        if made is None:
            for folder, files in inputs:
                cluster.storage.put(folder, files)
            made = _compute(cluster, asked, progress)
        cluster.storage.take(asked.digest, made, arguments["out"])
        return made.seconds

    token = stage.elsewhere.set(elsewhere)
    try:
        return workers.call(function, arguments, progress)
    finally:
        stage.elsewhere.reset(token)


def _compute(cluster: _Cluster, asked: Request, progress: Progress) -> Made:
    """Have a worker run a stage; told how far it is, and cancelled when this run ends."""
    from distributed import KilledWorker

    key = f"{asked.stage} {asked.out}-{uuid.uuid4().hex}"
    topic = f"fmn {key}"

    def hear(event: tuple[float, tuple[int, int]]) -> None:
        cluster.told[key] = event[1]

    _count(cluster)
    cluster.client.subscribe_topic(topic, hear)
    device = getattr(asked.arguments.get("settings"), "device", "cpu")
    future: Any = cluster.client.submit(
        work, asked, cluster.storage.url, key, topic, key=key, pure=False,
        resources={"GPU": 1} if cluster.gpus and device != "cpu" else None,
    )  # fmt: skip
    over = threading.Event()
    future.add_done_callback(lambda _: over.set())
    try:
        while not over.wait(_POLL):
            if workers.ended():
                raise UserError("ended with its run")
            _count(cluster)
            if time.monotonic() - cluster.peopled > PATIENCE:
                raise UserError(
                    f"no worker has been at {cluster.address} for {PATIENCE:.0f} s; start some: {_START}"
                )
            if key in cluster.told:
                progress(*cluster.told[key])
        if future.status not in ("finished", "error"):
            raise _gone(cluster)
        if future.status == "finished":
            made: Made = future.result()
            return made
        error = future.exception()
        if isinstance(error, KilledWorker):
            raise UserError(
                f"{error.allowed_failures + 1} workers ended while they ran it, the last one at"
                f" {error.last_worker.address}: see their logs, and whether they have memory for one model"
            )
        if _lacks_a_module(error):
            raise UserError(f"a worker cannot run it ({one_line(error)}); {_INSTALL}")
        raise error
    finally:
        if cluster.client.status == "running":
            future.cancel()
            cluster.client.unsubscribe_topic(topic)
        cluster.told.pop(key, None)


# What follows runs on workers.

_one_at_a_time = threading.Lock()  # stages set seeds and threads of their process


class Cancelled(Exception):  # noqa: N818
    """Nobody waits for this stage any more."""


@cache
def _home(parent: Path) -> Path:
    """A folder that this process has to itself for as long as it lives, and finds again when it is restarted."""
    for number in range(1000):
        home = parent / f"fmn-{number}"
        home.mkdir(parents=True, exist_ok=True)
        try:
            _held.append(filelock.FileLock(home / ".lock", timeout=0))
            _held[-1].acquire()
        except filelock.Timeout:
            _held.pop()
        else:
            return home
    raise UserError(f"{parent}: no folder to be had there")


_held: list[filelock.BaseFileLock] = []


def work(asked: Request, url: str, key: str, topic: str) -> Made:
    """On a worker: fetch a stage's inputs, run it, and store what it made."""
    from distributed import get_worker

    worker = get_worker()
    if why := _differs(asked.code):
        raise UserError(f"worker {worker.address}: {why}")
    with _one_at_a_time, machine.refusals_told(Path(worker.local_directory).parent):
        shared = Storage(url)
        # Of a worker that ended before it could say so.
        if made := shared.made(asked.digest):
            return made
        # Beside the folder that Dask removes when the worker ends.
        home = _home(Path(worker.local_directory).parent)
        inputs = Cache(home)
        places = {
            digest: inputs.tree(shared, files, set(asked.trees))
            for digest, files in asked.trees.items()
        }
        folder = home / "made" / asked.digest
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.glob(".*.partial-sums")):
            shared.get_sums(asked.digest, folder)
        kept: dict[Path, int] = {}
        due = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal due
            if time.monotonic() < due:
                return
            due = time.monotonic() + _POLL
            task = worker.state.tasks.get(key)
            if task is None or task.state == "cancelled":
                raise Cancelled
            worker.log_event(topic, (done, total))
            for path in folder.glob(".*.partial-sums"):
                if kept.get(path) != (now := path.stat().st_mtime_ns):
                    shared.save_sums(asked.digest, path)
                    kept[path] = now

        _set_threads(asked.threads)
        arguments = {name: _placed(value, places) for name, value in asked.arguments.items()}
        outcome = workers.call(asked.function, {**arguments, "out": folder / asked.out}, progress)
        # Without a note of the cost when an earlier worker ended just before it wrote one.
        _, seconds = artifacts.read_costs(folder).get(outcome.out, ("", outcome.seconds))
        made = Made(storage.tree(folder), seconds)
        shared.keep(asked.digest, folder, made)
        shutil.rmtree(folder)
        return made


def _placed(value: Any, places: Mapping[str, Path]) -> Any:
    if isinstance(value, Input):
        return places[value.digest] / value.name if value.name else places[value.digest]
    return (
        {key: _placed(one, places) for key, one in value.items()}
        if isinstance(value, dict)
        else value
    )


def _set_threads(threads: int) -> None:
    if not workers.gpus():
        import torch

        torch.set_num_threads(threads)
