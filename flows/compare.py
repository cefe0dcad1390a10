"""The comparison of merge methods as a Prefect flow; each cell is computed only once."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from prefect import flow

from flows import cluster, graph, notices, pages
from flows.graph import Node
from flows.pages import server_answers
from flows.pipeline import RUNNER, Outcomes, check_sources, run_nodes, stages_json
from fmn import params
from fmn.errors import UserError
from fmn.experiments import grid
from fmn.experiments.stages import ComparedSettings, CompareSettings, compare
from fmn.fisher.stages import GramSettings, fisher, full_fisher, gram
from fmn.merge.methods import needs_of
from fmn.params import Params
from fmn.registry.stages import log_comparison
from fmn.report.stages import comparison
from fmn.terminal import say, show_table

EXPERT_STAGES = ("fetch-base", "fetch", "data", "finetune")


@flow(name="fmn-compare", flow_run_name="{name} of {profile}", task_runner=RUNNER)
def compare_methods(profile: str, name: str) -> Outcomes:
    """Merge the sets of experts that an entry of the settings' section `compare` asks for.

    Raises:
        UserError: names the stages that failed and why; cells that finished are kept.
    """
    title = f"{name} of {profile}"
    with notices.failures_reported(Path(profile)), pages.failures_named(title):
        settings, comparing = _settings(Path(profile), name)
        check_sources(settings, Path(profile))
        with cluster.joined(settings):
            outcomes = run_nodes(nodes(settings, comparing, Path(profile), name))
    tables = outcomes["comparison", ""].summary
    pages.show_tables(title, tables)
    computed = sum(outcome.computed for outcome in outcomes.values())
    pages.name_run(
        f"{title}: " + (f"{computed} stages computed" if computed else "nothing changed")
    )
    return outcomes


def run_compare(profile: Path, name: str) -> dict[str, Any]:
    """Run the flow, then print its table and the path of its report (`fmn compare`)."""
    started = time.monotonic()
    _settings(profile, name)  # a mistake there is reported before Prefect starts
    with server_answers():
        outcomes: Outcomes = compare_methods(str(profile), name)
    tables = outcomes["comparison", ""]
    show_table(tables.summary.header, tables.summary.body)
    say(*tables.summary.notes)
    say(f"report     {tables.out / 'report.html'}", f"{time.monotonic() - started:.0f} s")
    summary: dict[str, Any] = tables.summary.model_dump(mode="json")
    paths = {"report": str(tables.out / "report.html"), "stages": stages_json(outcomes)}
    return {**summary, **paths, "seconds": round(time.monotonic() - started, 1)}


def _settings(profile: Path, name: str) -> tuple[Params, CompareSettings]:
    settings = params.load(profile)
    if name not in settings.compare:
        names = ", ".join(settings.compare) or "none"
        raise UserError(f"{profile}: compare has no entry {name!r}; its entries are: {names}")
    return settings, settings.compare[name]


class Statistic(NamedTuple):
    """A statistic of every expert that a method needs.

    Attributes:
        argument: the argument of the stage `compare` that takes its files.
        stage, function: the stage that computes it, and its function.
        label: its name for people.
        suffix: the end of the files' names.
        settings: the settings of the stage, by task.
    """

    argument: str
    stage: str
    function: Any
    label: str
    suffix: str
    settings: Mapping[str, Any]


def statistics(merging: ComparedSettings, settings: Params) -> list[Statistic]:
    """The statistics that a method needs."""
    needs, names, own = needs_of(merging.method), settings.experts.tasks, settings.fisher
    chosen = own.model_copy(update={"estimator": merging.estimator or own.estimator})
    infix = "" if chosen == own else f".{chosen.estimator}"
    grams = {name: settings.gram.get(name, GramSettings()) for name in names}
    nodes, full = dict.fromkeys(names, chosen), dict.fromkeys(names, settings.full_fisher)
    by_need = {
        "nodes": Statistic("fisher", "fisher", fisher, chosen.estimator, f"{infix}.parquet", nodes),
        "parameters": Statistic(
            "fisher", "full-fisher", full_fisher, "full", ".full.safetensors", full
        ),
        "gram": Statistic("gram", "gram", gram, "gram", ".gram.safetensors", grams),
    }
    return [by_need[need] for need in (needs.fisher, "gram" if needs.gram else None) if need]


def nodes(settings: Params, comparing: CompareSettings, profile: Path, title: str) -> list[Node]:
    """The nodes of a comparison: experts, statistics, cells, tables, and their log in MLflow."""
    work, names = Path(settings.work), settings.experts.tasks
    out = work / "compare" / title
    methods = {**grid.BOUNDS, **comparing.methods}
    comparing = comparing.model_copy(update={"methods": methods})
    takes = {method: statistics(merging, settings) for method, merging in methods.items()}
    listed = [node for node in graph.nodes(settings, profile) if node.stage in EXPERT_STAGES]

    def path(statistic: Statistic, task: str) -> Path:
        return work / statistic.argument / f"{task}{statistic.suffix}"

    for statistic in {item.suffix: item for items in takes.values() for item in items}.values():
        for name in names:
            arguments = {
                "checkpoint": work / "experts" / name,
                "task": name,
                "data": work / "data" / name,
                "out": path(statistic, name),
                "settings": statistic.settings[name],
            }
            title_of = f"{name} {statistic.label}"
            node = Node(statistic.stage, title_of, statistic.function, arguments)
            listed += graph.in_parts(node, settings)
    cells: dict[str, Path] = {}
    for chosen, members in grid.sets(names, comparing.sets).items():
        for method, merging in methods.items():
            file = quote(method, safe=" ,")  # no two methods have the same file
            cell = out / "cells" / chosen / f"{file}.json"
            cells[f"{chosen}/{method}"] = cell
            arguments = {
                "experts": {name: work / "experts" / name for name in members},
                "base": work / "base",
                "data": work / "data",
                "out": cell,
                "merging": merging,
                "settings": comparing,
            }
            for statistic in takes[method]:
                arguments[statistic.argument] = {name: path(statistic, name) for name in members}
            listed.append(Node("compare", f"{chosen} {method}", compare, arguments))
    tables = out / "tables"
    listed.append(Node("comparison", "", comparison, {"cells": cells, "out": tables}))
    logging = {"title": title, "comparing": comparing, "settings": settings.registry}
    return [*listed, Node("log", "", log_comparison, {"tables": tables, **logging})]
