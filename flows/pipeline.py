"""The pipeline as a Prefect flow: a task run for each node of the graph.

The stages have their own content keys, so Prefect's result cache is off. A run computes nothing
that an earlier run, the command line or DVC has computed.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture, wait
from prefect.settings import PREFECT_API_URL
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import Task, exponential_backoff

from flows import cluster, dvc, graph, notices, pages, workers
from flows.clock import Clock
from flows.graph import Node
from flows.pages import server_answers
from flows.workers import TransientError, is_transient, one_line
from fmn import params
from fmn.errors import UserError
from fmn.params import Params
from fmn.store.stage import Outcome, only_current
from fmn.store.yaml_file import line_of
from fmn.terminal import progress_bar, say, show_table, status_line

Key = tuple[str, str]  # stage and name
Outcomes = dict[Key, Outcome[Any]]
_LOOKS = 8  # sources that are checked in parallel
RUNNER: Any = ThreadPoolTaskRunner(max_workers=workers.count())


def key_of(node: Node) -> Key:
    """The stage and the name of a node, which identify it in a run."""
    return node.stage, node.name


def _is_transient(_task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    if not isinstance(state.data, TransientError):
        return False
    say(f"{run.name}: {state.data}; retrying")
    return True


@task(
    task_run_name="{node.title}",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=exponential_backoff(5),
    retry_condition_fn=_is_transient,
)
def run_node(node: Node, clock: Clock | None = None) -> Outcome[Any]:
    """Run one stage; report it in the task's log and, if it computed, on the terminal."""
    on_cluster = cluster.takes(node.function)
    with progress_bar(node.title) as bar, pages.progress_page(node.title) as page:

        def progress(done: int, total: int) -> None:
            bar(done, total)
            page(done, total)

        run = cluster.run if on_cluster else workers.run
        outcome = run(node.function, node.arguments, progress)
    seconds = f"{outcome.seconds:7.1f} s" if outcome.computed else "already there"
    line = f"{outcome.stage:<9} {node.name:<12} {seconds}"
    progressed = clock.count(node, outcome) if clock else ""
    get_run_logger().info(f"{line}   {progressed}".rstrip())
    if outcome.computed:
        say(f"{line}   {progressed}".rstrip())
    for note in _notes(outcome):
        get_run_logger().warning(note)
        say(note)
    return outcome


def _notes(outcome: Outcome[Any]) -> list[str]:
    """Notes about a stage's inputs for the user, whether or not it computed anything."""
    messages = getattr(outcome.summary, "messages", ())  # of a fetched checkpoint
    published = getattr(outcome.summary, "published", None)  # of a statistic
    warnings = getattr(outcome.summary, "warnings", ())  # of a task's rows
    return [*messages, *warnings, *([published] if published else [])]


def tags(node: Node) -> set[str]:
    """The tag of a stage that computes on a GPU of this machine.

    `prefect concurrency-limit create fmn-gpu 1` limits such stages, over all runs of a server.
    Prefect takes two seconds to look for the limit of a tag.
    """
    device = getattr(node.arguments.get("settings"), "device", "cpu")
    is_on_gpu = workers.gpus() > 0 if device == "auto" else device != "cpu"
    return {"fmn-gpu"} if is_on_gpu and not cluster.takes(node.function) else set()


def _run_all(nodes: Sequence[Node], clock: Clock) -> dict[Key, PrefectFuture[Outcome[Any]]]:
    """Start a task run for each node once the nodes that it needs have ended and a slot is free.

    So no thread waits for other stages while ready ones lack a thread. Among the ready nodes, the
    one with the longest chain of stages after it starts first.
    """
    needs = {key_of(node): [key_of(need) for need in graph.needs(node, nodes)] for node in nodes}
    behind = dict.fromkeys(needs, 0)
    for key, needed in reversed(needs.items()):
        for each in needed:
            behind[each] = max(behind[each], behind[key] + 1)
    waiting = sorted(nodes, key=lambda node: -behind[key_of(node)])
    futures: dict[Key, PrefectFuture[Outcome[Any]]] = {}
    ended: set[Key] = set()
    ends: SimpleQueue[Key] = SimpleQueue()

    def tell_of(key: Key) -> Callable[[object], None]:
        return lambda _: ends.put(key)

    while len(ended) < len(nodes):
        ready = [node for node in waiting if ended.issuperset(needs[key_of(node)])]
        for node in ready[: cluster.at_once() - len(futures) + len(ended)]:
            key = key_of(node)
            waiting.remove(node)
            futures[key] = future = run_node.with_options(tags=tags(node)).submit(
                node, clock, wait_for=[futures[need] for need in needs[key]], return_state=False
            )
            future.add_done_callback(tell_of(key))
        ended.add(ends.get())
    wait(list(futures.values()))
    return futures


def run_nodes(nodes: Sequence[Node]) -> Outcomes:
    """Run a task for each node, after those that it needs, and wait for all.

    Raises:
        UserError: names the stages that failed and why, and the scores of the evaluated models;
            finished stages keep their outputs.
    """
    with status_line("stages") as show:
        clock = Clock(nodes, show)
        try:
            futures = _run_all(nodes, clock)
        except BaseException:  # Ctrl-C, or Prefect ends the run
            workers.end()
            raise
    if clock.up_to_date:
        say(f"{clock.up_to_date} stages up to date" if clock.up_to_date > 1 else
            "1 stage up to date")  # fmt: skip
    outcomes: Outcomes = {}
    failures: list[str] = []
    for stage, name in map(key_of, nodes):
        future = futures[stage, name]
        result = future.result(raise_on_failure=False) if future.state.is_final() else None
        if isinstance(result, Outcome):
            outcomes[stage, name] = result
        elif isinstance(result, httpx.TransportError):  # of the Prefect server
            raise result
        elif isinstance(result, Exception):
            failures.append(f"{stage} {name}".strip() + f": {one_line(result)}")
    if failures:
        scores = [
            f"{name} {100 * outcome.summary.score:.1f}"
            for (_, name), outcome in outcomes.items()
            if outcome.stage == "evaluate" and outcome.summary.score is not None
        ]
        finished = f"; finished, in percent: {', '.join(scores)}" if scores else ""
        raise UserError("; ".join(failures) + finished)
    return outcomes


def check_sources(settings: params.Params, profile: Path) -> None:
    """Check in parallel that every source and data set exists, before the first stage.

    Transient errors are ignored here: the stages retry.

    Raises:
        UserError: lists the settings whose sources do not exist.
    """

    def problem(setting: str, look: Callable[[], object]) -> str | None:
        try:
            look()
        except UserError as error:
            if is_transient(error):
                return None
            line = line_of(profile, setting.split("."))
            place = f"{profile}:{line}" if line else str(profile)
            return f"{place}: {setting}: {one_line(error)}"
        return None

    with ThreadPoolExecutor(_LOOKS) as pool:
        problems = list(filter(None, pool.map(lambda each: problem(*each), graph.looks(settings))))
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))


@flow(name="fmn", flow_run_name="{profile}", task_runner=RUNNER)
def pipeline(profile: str = "params.yaml") -> Outcomes:
    """Fetch or fine-tune the experts, compute their Fisher, merge, evaluate and register.

    Args:
        profile: the settings file; its paths are relative to the working folder.

    Returns:
        the outcome of every stage, by stage and name.

    Raises:
        UserError: as `run_nodes` does.
    """
    path = Path(profile)
    with notices.failures_reported(path), pages.failures_named(profile):
        settings = params.load(path)
        check_sources(settings, path)
        with cluster.joined(settings):
            outcomes = run_nodes(graph.nodes(settings, path))
        graph.make_folders(settings)
        dvc.keep_in_step(path, [outcome.out for outcome in outcomes.values()])
        report, registered = outcomes["report", ""], outcomes["register", ""]
        version = registered.summary
        computed = [outcome for outcome in outcomes.values() if outcome.computed]
        pages.show_summary(profile, report.summary, version, computed)
        is_new = registered.computed
        pages.name_run(
            f"{profile}: version {version.version}: {version.alias or 'registered'}"
            if is_new
            else f"{profile}: {'nothing new to register' if computed else 'nothing changed'}"
        )
        if registered.computed and version.alias == "champion":
            text = f"{version.name} {version.version} is the new champion: {version.reason}"
            notices.send(path, f"fmn: {text}")
    return outcomes


def run_pipeline(profile: Path) -> dict[str, Any]:
    """Run the flow, then print its table and the places of its results (`fmn run`)."""
    started = time.monotonic()
    settings = params.load(profile)  # a mistake there is reported before Prefect starts
    outcomes: Outcomes | None = None if PREFECT_API_URL.value() else current(settings, profile)
    if outcomes is None:
        with server_answers():
            outcomes = pipeline(str(profile))
    report, registered = outcomes["report", ""], outcomes["register", ""].summary
    computed = any(outcome.computed for outcome in outcomes.values())
    show_table(report.summary.header, report.summary.body)
    say(*report.summary.verdict, wrap=True)
    say(*report.summary.notes)
    say(f"report     {report.out / 'report.html'}")
    say(f"model      {graph.model_folder(settings, settings.model)}")
    say(f"registry   models:/{registered.name}/{registered.version} in {registered.store}")
    say(f"{registered.alias:<10} {registered.reason}")
    seconds = time.monotonic() - started
    say(f"{seconds:.0f} s" + ("" if computed else ", nothing had changed"))
    return {
        **report.summary.model_dump(mode="json"),
        "registered": registered.model_dump(mode="json"),
        "computed": computed,
        "seconds": round(seconds, 1),
        "report": str(report.out / "report.html"),
        "model": str(graph.model_folder(settings, settings.model)),
        "stages": stages_json(outcomes),
    }


def current(settings: Params, profile: Path) -> Outcomes | None:
    """The outcomes of a run that has nothing to compute; None if a stage must compute, or fails.

    This needs neither a Prefect server nor other processes.
    """
    outcomes: Outcomes = {}
    allowed = only_current.set(True)
    try:
        for node in graph.nodes(settings, profile):
            outcomes[node.stage, node.name] = node.function(**node.arguments)
    except Exception:  # the flow will report or retry it
        return None
    finally:
        only_current.reset(allowed)
    dvc.keep_in_step(profile, [outcome.out for outcome in outcomes.values()])
    say(f"{len(outcomes)} stages up to date", *chain(*map(_notes, outcomes.values())))
    return outcomes


def stages_json(outcomes: Outcomes) -> list[dict[str, Any]]:
    """The output of each stage of a run, whether it was computed, and the run time."""
    return [
        {
            "stage": stage,
            "name": name,
            "out": str(outcome.out),
            "computed": outcome.computed,
            "seconds": round(outcome.seconds, 3),
        }
        for (stage, name), outcome in outcomes.items()
    ]


@flow(name="fmn-reproduce", flow_run_name="{profile}", task_runner=RUNNER)
def reproduce(profile: str) -> Outcomes:
    """Run everything in a settings file except the registration."""
    nodes = graph.nodes(params.load(Path(profile)), Path(profile))
    return run_nodes([node for node in nodes if node.stage != "register"])


def rebuild(profile: Path, name: str, threads: int | None) -> tuple[Path, Path]:
    """Run the flow `reproduce` (`fmn reproduce --run`).

    Args:
        profile: the settings file.
        name: the model's name in the settings.
        threads: threads of each stage's process, which affect the last bits; None: the default.

    Returns:
        the merged model and its metrics.
    """
    if threads is not None:
        os.environ["FMN_THREADS"] = str(threads)
    with server_answers():
        outcomes: Outcomes = reproduce(str(profile))
    return graph.model_folder(params.load(profile), name), outcomes["evaluate", name].out
