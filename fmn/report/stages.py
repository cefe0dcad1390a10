"""The stages that write a run's report and the tables of a comparison."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fmn.errors import UserError
from fmn.experiments.files import Cell
from fmn.merge.recipe import Recipe, read_recipe
from fmn.store import stage
from fmn.store.records import Record
from fmn.store.stage import Job, Outcome, read_record

if TYPE_CHECKING:
    from fmn.fisher.architectures import NodeValues
    from fmn.report.figures import Picture
    from fmn.report.results import Table

REPORT = 13
COMPARISON = 7
Paths = Mapping[str, Path]


class ReportInfo(Record):
    """A report's table, verdict, notes and numbers, as a terminal shows them.

    Attributes:
        headline: the column that the report is about; a comparison has none, and no verdict.
    """

    header: list[str]
    body: list[list[str]]
    notes: list[str]
    results: dict[str, Any]
    verdict: list[str] = Field(default_factory=list)
    headline: str = ""


def report(
    *,
    merged: Mapping[str, Path],
    out: Path,
    models: Mapping[str, Path] = {},
    experts: Mapping[str, Path] = {},
    fisher: Mapping[str, Path] = {},
    headline: str = "",
    registry: str = "",
) -> Outcome[ReportInfo]:
    """Write report.html, the page of a run, and its tables, pictures and model cards as files.

    Args:
        merged: the metrics file of each merged model, by the name to show
        out: folder of the page, the pictures, the numbers and the model cards
        models: the folder of each merged model, by the same names: how it was merged is read there
        experts: the metrics file of each expert, by task
        fisher: the Fisher artifact of each expert, by task
        headline: the merged model that the report is about, by its name; default: the last one
            that is neither base nor average
        registry: name of the registered model that it becomes a version of, to mark and link
    """
    if not merged:
        raise UserError("--merged NAME=FILE: no metrics file of a merged model; give one")
    if "expert" in merged:
        raise UserError("--merged expert=FILE: the experts' column is called so; choose another")
    if unknown := [name for name in models if name not in merged]:
        raise UserError(f"--model {unknown[0]}=DIR: no metrics of it; give --merged too")
    if headline and headline not in merged:
        raise UserError(f"--headline {headline}: no metrics of it; give --merged too")
    files = {"merged": merged, "models": models, "experts": experts, "fisher": fisher}
    return stage.run_stage(
        "report",
        REPORT,
        out,
        lambda job: _write_report(job, headline, registry, **files),
        # Predictions lie beside their metrics file, whose sidecar holds their digest.
        reads={f"{kind} {name}": path for kind in files for name, path in files[kind].items()},
        settings={
            "headline": headline,
            "registry": registry,
            **{kind: list(paths) for kind, paths in files.items()},
        },
        summary=lambda folder: stage.read_info(folder, ReportInfo),
        is_folder=True,
    )


def _write_report(
    job: Job, headline: str, registry: str,
    merged: Paths, models: Paths, experts: Paths, fisher: Paths,
) -> ReportInfo:  # fmt: skip
    from fmn.report import card, figures, page, results, verdict, wording

    evaluated = {name: results.read_evaluated(path) for name, path in merged.items()}
    alone = {task: results.read_evaluated(path) for task, path in experts.items()}
    for task, expert in alone.items():
        if [*expert.metrics.tasks] != [task]:
            problem = f"the metrics of {', '.join(expert.metrics.tasks)}, not of the expert"
            raise UserError(f"--expert {task}={experts[task]}: {problem}; evaluate it alone")
    table = results.tabulate(alone, evaluated, headline)
    recipes = {}
    for name, folder in models.items():
        if evaluated[name].metrics.model != job.inputs[f"models {name}"]:
            raise UserError(f"{merged[name]}: not the metrics of {folder}; evaluate that model")
        recipes[name] = _in_order(read_recipe(folder), table.tasks)
    if recipe := recipes.get(table.headline):
        _check_fisher(job, recipe, table.headline, fisher)
    values = _read_fisher({task: fisher[task] for task in _ordered(fisher, table.tasks)})
    costs = results.read_costs(fisher, models, experts, merged)
    sizes = _sizes(table, models, recipes)
    content = results.Report(table, recipes, values, costs, sizes, registry)
    words = verdict.verdict(content)

    numbers = results.results(table) | {"parameters": dict(content.sizes)}
    header, body = results.text_table(table)
    (job.path / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
    main_numbers = json.dumps(results.main_numbers(table), indent=1)
    (job.path / "metrics.json").write_text(main_numbers + "\n")
    (job.path / "table.md").write_text(wording.markdown(header, body))
    tables: Mapping[str, Sequence[Sequence[Any]]] = {
        "scores.csv": [("scored", "score"), *results.score_rows(table)],
        "costs.csv": [results.Cost._fields, *costs],
    }
    for name, rows in tables.items():
        with (job.path / name).open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    pictures = figures.draw(figures.RUN_PICTURES, content)
    html = page.render("report.html", report=content, pictures=pictures)
    _write_page(job.path, html, pictures)
    (job.path / "cards").mkdir()
    for name, recipe in recipes.items():
        of_model = words if name == table.headline else ()
        text = card.card(recipe, evaluated[name].metrics, of_model)
        (job.path / "cards" / f"{name}.md").write_text(text)
    notes = results.notes(table)
    return ReportInfo(
        header=header, body=body, notes=notes, results=numbers, verdict=words,
        headline=table.headline,
    )  # fmt: skip


def _read_fisher(fisher: Paths) -> "dict[str, NodeValues]":
    from fmn.fisher.files import read_fisher

    return {task: read_fisher(path)[0] for task, path in fisher.items()}


def _ordered(names: Iterable[str], tasks: Sequence[str]) -> list[str]:
    """Names of tasks in the order of the tables, others after them."""
    return sorted(names, key=[*tasks, *names].index)


def _in_order(recipe: Recipe, tasks: Sequence[str]) -> Recipe:
    """Put a recipe's experts and coefficients into the order of the tables."""
    names = _ordered(recipe.experts, tasks)
    update = {
        "experts": {task: recipe.experts[task] for task in names},
        "coefficients": {task: recipe.coefficients[task] for task in names},
    }
    return recipe.model_copy(update=update)


def _sizes(table: "Table", models: Paths, recipes: Mapping[str, Recipe]) -> dict[str, float]:
    """Parameters by column, in units of one encoder; empty if a folder has no safetensors files."""
    from fmn.report.frontier import size

    try:
        by_model = {name: size(folder, recipes[name].tasks) for name, folder in models.items()}
    except UserError:
        return {}
    sizes = {name: each.merged for name, each in by_model.items()}
    if by_model and "expert" in table.columns:
        sizes["expert"] = max(each.apart for each in by_model.values())
    return {name: sizes[name] for name in table.columns if name in sizes}


def _check_fisher(job: Job, recipe: Recipe, name: str, fisher: Paths) -> None:
    for task in fisher.keys() & recipe.fisher:
        if recipe.fisher[task].digest != job.inputs[f"fisher {task}"]:
            raise UserError(
                f"{fisher[task]}: not the Fisher that {name} was merged with; give that one"
            )


def _write_page(folder: Path, html: str, pictures: "Mapping[str, Sequence[Picture]]") -> None:
    """Write ``report.html``, and its pictures as files of their own."""
    (folder / "report.html").write_text(html)
    (folder / "pictures").mkdir()
    for picture in (picture for section in pictures.values() for picture in section):
        (folder / "pictures" / f"{picture.name}.svg").write_text(picture.svg + "\n")


def comparison(*, cells: Mapping[str, Path], out: Path) -> Outcome[ReportInfo]:
    """Write the tables of a comparison of merge methods: report.html, pictures, numbers.

    Args:
        cells: the file of each cell, by SET/METHOD
        out: folder of the page, the pictures and the numbers
    """
    return stage.run_stage(
        "comparison",
        COMPARISON,
        out,
        lambda job: _write_comparison(job.path, cells),
        reads=cells,
        settings={"order": list(cells)},
        summary=lambda folder: stage.read_info(folder, ReportInfo),
        is_folder=True,
    )


def _write_comparison(folder: Path, paths: Paths) -> ReportInfo:
    from fmn.report import comparison, figures, page, wording

    cells: dict[str, dict[str, Cell]] = {}
    for name, path in paths.items():
        experts, _, method = name.partition("/")
        cells.setdefault(experts, {})[method] = read_record(path, Cell)
    content = comparison.compare(cells)
    numbers = comparison.numbers(cells, content)
    stage.write_record(folder / "results.json", numbers)
    header, body = comparison.text_table(content)
    methods = wording.markdown(header, body)
    tables = page.render("table.md", comparison=content, methods=methods)
    (folder / "table.md").write_text(tables.rstrip() + "\n")
    pictures = figures.draw(figures.COMPARISON_PICTURES, content)
    html = page.render("comparison.html", comparison=content, pictures=pictures)
    _write_page(folder, html, pictures)
    notes = comparison.notes(content)
    return ReportInfo(header=header, body=body, notes=notes, results=numbers.methods)
