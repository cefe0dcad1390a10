"""The comparison of merge methods as a Prefect flow: every cell is computed once, and kept."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows import cluster, notices, pages, workers
from flows.pipeline import Futures, Layout, collect, submit_experts, submitter
from flows.server import answering
from fmn import params
from fmn.errors import UserError
from fmn.experiments import grid
from fmn.experiments.stages import ComparedSettings, CompareSettings
from fmn.fisher.stages import GramSettings
from fmn.merge.methods import NEEDS
from fmn.params import Params
from fmn.store.stage import Outcome
from fmn.terminal import say, show_table


@flow(
    name="fmn-compare",
    flow_run_name="{name} of {profile}",
    task_runner=ThreadPoolTaskRunner(max_workers=workers.count()),  # type: ignore[arg-type]
)
def compare(profile: str, name: str) -> dict[tuple[str, str], Outcome]:
    """Merge the sets of experts that an entry of the profile's section `compare` asks for, each with all its methods.

    Raises:
        UserError: naming every stage that failed, and why; cells that finished are kept.
    """
    with notices.failures_told(Path(profile)):
        settings, comparing = _settings(Path(profile), name)
        layout = Layout(Path(settings.work))
        with cluster.joined(settings):
            outcomes = collect(
                submit_comparison(settings, comparing, layout, layout.work / "compare" / name)
            )
    pages.show_results(*outcomes["comparison", ""].summary["table"])
    return outcomes


def _settings(profile: Path, name: str) -> tuple[Params, CompareSettings]:
    settings = params.load(profile)
    if name not in settings.compare:
        there = ", ".join(settings.compare) or "nothing"
        raise UserError(f"{profile}: its section compare has no {name!r}; it has {there}")
    return settings, settings.compare[name]


class Statistic(NamedTuple):
    """What a method takes of every expert: the stage that computes it, its name in task runs, file suffix, settings."""

    stage: str
    name: str
    suffix: str
    settings: Mapping[str, Any]


def statistics(merging: ComparedSettings, settings: Params) -> dict[str, Statistic]:
    """What a method takes, by the argument of the stage `compare` that the files go to."""
    needs, names = NEEDS[merging.method], settings.experts.tasks
    found = {}
    if needs.fisher == "nodes":
        estimator = merging.estimator or settings.fisher.estimator
        suffix = ".parquet" if estimator == settings.fisher.estimator else f".{estimator}.parquet"
        chosen = settings.fisher.model_copy(update={"estimator": estimator})
        found["fisher_files"] = Statistic("fisher", estimator, suffix, dict.fromkeys(names, chosen))
    if needs.fisher == "parameters":
        full = dict.fromkeys(names, settings.full_fisher)
        found["fisher_files"] = Statistic("full-fisher", "full", ".full.safetensors", full)
    if needs.gram:
        grams = {name: settings.gram.get(name, GramSettings()) for name in names}
        found["gram_files"] = Statistic("gram", "gram", ".gram.safetensors", grams)
    return found


def submit_comparison(
    settings: Params, comparing: CompareSettings, layout: Layout, out: Path
) -> Futures:
    """Submit experts, the statistics that any of the methods takes, the cells and, into `out`, the tables."""
    futures: Futures = {}
    submit = submitter(futures)
    made = submit_experts(submit, settings, layout)
    names = settings.experts.tasks
    methods = grid.bounded(comparing.methods)
    comparing = comparing.model_copy(update={"methods": methods})
    takes = {method: statistics(merging, settings) for method, merging in methods.items()}

    def file(statistic: Statistic, task: str) -> Path:
        return layout.work / "fisher" / f"{task}{statistic.suffix}"

    for statistic in {
        one.suffix: one for given in takes.values() for one in given.values()
    }.values():
        for name in names:
            submit(
                statistic.stage, f"{name} {statistic.name}", [made[name], ("data", name)],
                checkpoint=layout.expert(name), task=name, data=layout.data, out=file(statistic, name),
                settings=statistic.settings[name],
            )  # fmt: skip
    tuned_on = {
        name: (None if tuning.examples == "all" else tuning.examples, tuning.seed)
        for name, tuning in settings.finetune.items()
    }
    cells: dict[str, dict[str, Path]] = {}
    for chosen, members in grid.sets(names, comparing.sets).items():
        cells[chosen] = {
            method: out / "cells" / chosen / f"{_file(method)}.json" for method in methods
        }
        for method, merging in methods.items():
            files = {
                argument: {n: file(one, n) for n in members}
                for argument, one in takes[method].items()
            }
            after = [
                (one.stage, f"{name} {one.name}")
                for one in takes[method].values()
                for name in members
            ]
            after += [
                ("fetch", "base"),
                *(made[name] for name in members),
                *(("data", name) for name in members),
            ]
            submit(
                "compare", f"{chosen} {method}", after,
                experts={name: layout.expert(name) for name in members}, base=layout.base, folder=layout.data,
                out=cells[chosen][method], merging=merging, settings=comparing,
                tuned_on={name: tuned_on.get(name, (None, 0)) for name in members},
                **{"fisher_files": {}, "gram_files": {}, **files},
            )  # fmt: skip
    submit(
        "comparison",
        "",
        [key for key in futures if key[0] == "compare"],
        cells=cells,
        out=out / "tables",
    )
    submit(
        "log", "", [("comparison", "")], tables=out / "tables", title=out.name, comparing=comparing,
        settings=settings.registry,
    )  # fmt: skip
    return futures


def _file(method: str) -> str:
    return re.sub(r"[^\w.-]+", "-", method)


def run_compare(profile: Path, name: str) -> dict[str, Any]:
    """Run the flow and print its table and where to look; what `fmn compare` does."""
    started = time.monotonic()
    settings, _ = _settings(profile, name)  # a mistake there is told before Prefect starts
    with answering():
        found = dict(compare(str(profile), name)["comparison", ""].summary)
    show_table(*found["table"])
    say(
        f"report     {Path(settings.work) / 'compare' / name / 'tables' / 'report.html'}",
        f"{time.monotonic() - started:.0f} s",
    )
    return found
