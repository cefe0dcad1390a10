"""The whole pipeline as one Prefect flow over fmn's stages: a task run a stage and expert.

The stages keep their own content keys, so Prefect's result cache is off: a run repeats nothing that an earlier run, the
command line or DVC has done.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture, wait
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import Task, exponential_backoff

from flows import cluster, dvc, limits, notices, pages, workers
from flows.faults import PassingError, one_line
from flows.server import answering
from fmn import params
from fmn.errors import UserError
from fmn.evaluate import stages as evaluate_stages
from fmn.experiments import stages as experiments_stages
from fmn.fisher import stages as fisher_stages
from fmn.merge import stages as merge_stages
from fmn.merge.stages import MergeSettings
from fmn.models import labels
from fmn.models import stages as models_stages
from fmn.params import Params
from fmn.registry import stages as registry_stages
from fmn.report import stages as report_stages
from fmn.store.stage import Outcome
from fmn.tasks import stages as tasks_stages
from fmn.terminal import progress_bar, say, show_table


@dataclass(frozen=True)
class Layout:
    """Where a run keeps its files, below the profile's ``work``; dvc.yaml has the same paths."""

    work: Path

    @property
    def data(self) -> Path:
        return self.work / "data"

    @property
    def base(self) -> Path:
        return self.work / "base"

    @property
    def report(self) -> Path:
        return self.work / "report"

    @property
    def registered(self) -> Path:
        return self.work / "registered.json"

    def expert(self, name: str) -> Path:
        return self.work / "experts" / name

    def fisher(self, name: str) -> Path:
        return self.work / "fisher" / f"{name}.parquet"

    def gram(self, name: str) -> Path:
        return self.work / "fisher" / f"{name}.gram.safetensors"

    def merged(self, name: str) -> Path:
        # Where the base itself lies, there is no place for the base below every expert's head.
        return self.work / ("base-heads" if name == "base" else name)

    def expert_metrics(self, name: str) -> Path:
        return self.work / "metrics" / "experts" / f"{name}.json"

    def metrics(self, name: str) -> Path:
        return self.work / "metrics" / f"{name}.json"


STAGES: Mapping[str, Callable[..., Outcome]] = {
    "fetch": models_stages.fetch,
    "data": tasks_stages.prepare,
    "finetune": models_stages.finetune,
    "fisher": fisher_stages.fisher,
    "full-fisher": fisher_stages.full_fisher,
    "gram": fisher_stages.gram,
    "merge": merge_stages.merge,
    "realign": merge_stages.realign,
    "evaluate": evaluate_stages.evaluate,
    "compare": experiments_stages.compare,
    "comparison": report_stages.write_comparison,
    "report": report_stages.write_report,
    "register": registry_stages.register,
    "log": registry_stages.log_comparison,
}


def _worth_another_try(_task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    if not isinstance(state.data, PassingError):
        return False
    say(f"{run.name}: {state.data}; trying again")
    return True


@task(
    task_run_name="{stage} {name}",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=exponential_backoff(5),
    retry_condition_fn=_worth_another_try,
)
def run_stage(stage: str, name: str, arguments: dict[str, Any]) -> Outcome:
    """Run one stage with these arguments; say what it did in the task's log and on the terminal."""
    title = f"{stage} {name}".strip()
    elsewhere = cluster.takes(stage)
    slot = nullcontext() if elsewhere else limits.device_slot(arguments)
    with slot, progress_bar(title) as bar, pages.progress_page(title) as page:

        def progress(done: int, total: int) -> None:
            bar(done, total)
            page(done, total)

        if elsewhere:
            outcome = cluster.run(stage, STAGES[stage], arguments, progress)
        else:
            outcome = workers.run(STAGES[stage], arguments, progress)
    line = f"{stage:<9} {name:<12} " + (
        f"{outcome.seconds:7.1f} s" if outcome.computed else "already there"
    )
    get_run_logger().info(line)
    say(line)
    for note in labels.notes(outcome.summary.get("labels", {})):
        get_run_logger().warning(note)
        say(note)
    return outcome


@flow(
    name="fmn",
    flow_run_name="{profile}",
    task_runner=ThreadPoolTaskRunner(max_workers=workers.count()),  # type: ignore[arg-type]
)
def pipeline(profile: str = "params.yaml") -> dict[str, Any]:
    """Fetch or fine-tune the experts, compute their Fisher, merge, evaluate and register.

    Args:
        profile: the settings file; its paths are relative to the working folder.

    Returns:
        the numbers of the result table, the registered version, and whether anything was computed.

    Raises:
        UserError: naming every stage that failed, and why; what finished is kept.
    """
    with notices.failures_told(Path(profile)):
        settings = params.load(Path(profile))
        layout = Layout(Path(settings.work))
        with cluster.joined(settings):
            outcomes = collect(submit_stages(settings, layout, profile))
        dvc.keep_in_step(Path(profile), [outcome.out for outcome in outcomes.values()])
        found, registered = outcomes["report", ""].summary, dict(outcomes["register", ""].summary)
        pages.show_results(*found["table"])
        pages.show_links(registered, layout.report)
        if outcomes["register", ""].computed:
            registry_stages.record_dvc_lock(registered["run"])
            notices.tell_champion(Path(profile), registered)
    return {
        **found,
        "registered": registered,
        "computed": any(outcome.computed for outcome in outcomes.values()),
    }


Futures = dict[tuple[str, str], PrefectFuture[Outcome]]
Submit = Callable[..., None]


def submitter(futures: Futures) -> Submit:
    """What submits a stage's task run into `futures`, by (stage, name), after those that it needs."""

    def submit(stage: str, name: str, needs: list[tuple[str, str]], **arguments: Any) -> None:
        after = [futures[need] for need in needs]
        futures[stage, name] = run_stage.submit(
            stage, name, arguments, wait_for=after, return_state=False
        )

    return submit


def submit_experts(submit: Submit, settings: Params, layout: Layout) -> dict[str, tuple[str, str]]:
    """Submit base, data and experts; returns the stage that makes each task's expert."""
    names = settings.experts.tasks
    submit("fetch", "base", [], source=settings.base, out=layout.base)
    for name, source in settings.sources.items():
        submit("fetch", name, [], source=source, out=layout.expert(name))
    for name in names:
        submit("data", name, [], task=name, out=layout.data / name, settings=settings.data)
    made = {name: ("finetune" if name in settings.finetune else "fetch", name) for name in names}
    for name, tuning in settings.finetune.items():
        submit(
            *made[name], [("fetch", "base"), ("data", name)], base=layout.base, task=name, folder=layout.data,
            out=layout.expert(name), settings=tuning,
        )  # fmt: skip
    return made


def submit_stages(settings: Params, layout: Layout, profile: str | None) -> Futures:
    """Submit every stage's task run, by (stage, name).

    Each comes after what it needs, and stage by stage: a run that waits for its expert holds a worker's place.

    Args:
        settings: what to make.
        layout: where.
        profile: the name of the settings file, which the registry is told; without one nothing is registered.
    """
    futures: Futures = {}
    names = settings.experts.tasks
    # Bounds stand beside what the profile asks for: nothing merged, and what everybody tries first.
    merges = {
        "base": MergeSettings(method="average", scale=0),
        "average": MergeSettings(method="average"),
        "merged": settings.merge,
    }
    submit = submitter(futures)
    made = submit_experts(submit, settings, layout)
    for name in names:
        submit(
            "fisher", name, [made[name], ("data", name)], checkpoint=layout.expert(name), task=name,
            data=layout.data, out=layout.fisher(name), settings=settings.fisher,
        )  # fmt: skip
        submit(
            "evaluate", name, [made[name], ("data", name)], model=layout.expert(name), names=[name],
            folder=layout.data, out=layout.expert_metrics(name), settings=settings.evaluate,
        )  # fmt: skip
    for name, settled in settings.gram.items():
        submit(
            "gram", name, [made[name], ("data", name)], checkpoint=layout.expert(name), task=name, data=layout.data,
            out=layout.gram(name), settings=settled,
        )  # fmt: skip
    experts = {name: layout.expert(name) for name in names}
    fisher_files = {name: layout.fisher(name) for name in names}
    statistics = [("fisher", name) for name in names] + [("gram", name) for name in settings.gram]
    for model, merging in merges.items():
        submit(
            "merge", model, statistics, experts=experts, fisher_files=fisher_files, base=layout.base,
            out=layout.merged(model), settings=merging, gram_files={name: layout.gram(name) for name in settings.gram},
        )  # fmt: skip
        submit(
            "evaluate", model, [("merge", model)], model=layout.merged(model), names=[], folder=layout.data,
            out=layout.metrics(model), settings=settings.evaluate,
        )  # fmt: skip
    for model, realigning in sorted(settings.realign.items()):
        submit(
            "realign", model, [("merge", "merged")], model=layout.merged("merged"), experts=experts, folder=layout.data,
            out=layout.merged(model), settings=realigning,
        )  # fmt: skip
        submit(
            "evaluate", model, [("realign", model)], model=layout.merged(model), names=[], folder=layout.data,
            out=layout.metrics(model), settings=settings.evaluate,
        )  # fmt: skip
    models = [*merges, *sorted(settings.realign)]
    evaluated = [("evaluate", name) for name in [*names, *models]]
    submit(
        "report", "", evaluated, experts={name: layout.expert_metrics(name) for name in names},
        merged_models={model: layout.metrics(model) for model in models}, fisher_files=fisher_files,
        out=layout.report, work=layout.work,
    )  # fmt: skip
    if profile is not None:
        submit(
            "register", "", [("report", "")], model=layout.merged("merged"), metrics=layout.metrics("merged"),
            report_folder=layout.report, out=layout.registered, settings=settings.registry, profile=profile,
            params=settings,
        )  # fmt: skip
    return futures


def collect(futures: Futures) -> dict[tuple[str, str], Outcome]:
    """What every stage did.

    Raises:
        UserError: naming the stages that failed by themselves, why, and what the models scored that were evaluated.
    """
    try:
        wait(list(futures.values()))
    except BaseException:  # Ctrl-C, or Prefect ends the run
        workers.end()
        raise
    outcomes: dict[tuple[str, str], Outcome] = {}
    failures: list[str] = []
    for (stage, name), future in futures.items():
        found = future.result(raise_on_failure=False) if future.state.is_final() else None
        if isinstance(found, Outcome):
            outcomes[stage, name] = found
        elif isinstance(
            found, httpx.TransportError
        ):  # of the Prefect server: stages run in processes of their own
            raise found
        elif isinstance(found, Exception):
            failures.append(f"{stage} {name}".strip() + f": {one_line(found)}")
    pages.show_costs(outcomes)
    if failures:
        evaluated = {
            name: outcome.summary
            for (stage, name), outcome in outcomes.items()
            if stage == "evaluate"
        }
        scores = ", ".join(
            f"{name} {100 * summary['score']:.1f}" for name, summary in evaluated.items()
        )
        raise UserError(
            "; ".join(failures) + (f"; finished, in percent: {scores}" if scores else "")
        )
    return outcomes


def run_pipeline(profile: Path) -> dict[str, Any]:
    """Run the flow and print its table and where to look; what `fmn run` does."""
    started = time.monotonic()
    params.load(profile)  # a mistake there is told before Prefect starts
    with answering():
        outcome: dict[str, Any] = pipeline(str(profile))
    layout = Layout(Path(params.load(profile).work))
    show_table(*outcome["table"])
    say(*outcome["notes"])
    registered = outcome["registered"]
    say(f"report     {layout.report / 'report.html'}")
    say(f"model      {layout.merged('merged')}")
    say(f"registry   models:/{registered['name']}/{registered['version']} in {registered['store']}")
    say(f"{registered['alias']:<10} {registered['reason']}")
    say(
        f"{time.monotonic() - started:.0f} s"
        + ("" if outcome["computed"] else ", nothing had changed")
    )
    return outcome
