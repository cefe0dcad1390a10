"""The stages that write a run's report and the tables of a comparison."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn.errors import UserError
from fmn.experiments.files import Cell
from fmn.merge.recipe import Recipe, read_recipe
from fmn.store import stage
from fmn.store.records import Record
from fmn.store.stage import Job, Outcome, read_record

if TYPE_CHECKING:
    from fmn.report.figures import Picture

REPORT = 7
COMPARISON = 5
Paths = Mapping[str, Path]


class ReportInfo(Record):
    """What a report says on a terminal: its table, notes below it, and the numbers."""

    header: list[str]
    body: list[list[str]]
    notes: list[str]
    results: dict[str, Any]


def report(
    *,
    merged: Mapping[str, Path],
    out: Path,
    models: Mapping[str, Path] = {},
    experts: Mapping[str, Path] = {},
    fisher: Mapping[str, Path] = {},
) -> Outcome[ReportInfo]:
    """Write report.html, the page of a run: tables, pictures, and the same as files of their own.

    Args:
        merged: the metrics file of each merged model, by the name to show
        out: folder of the page, the pictures, the numbers and the model cards
        models: the folder of each merged model, by the same names: how it was merged is read there
        experts: the metrics file of each expert, by task
        fisher: the Fisher artifact of each expert, by task
    """
    if not merged:
        raise UserError("--merged NAME=FILE: no metrics file of a merged model; give one")
    if "expert" in merged:
        raise UserError("--merged expert=FILE: the experts' column is called so; choose another")
    if unknown := [name for name in models if name not in merged]:
        raise UserError(f"--model {unknown[0]}=DIR: no metrics of it; give --merged too")
    files = {"merged": merged, "models": models, "experts": experts, "fisher": fisher}
    return stage.run_stage(
        "report",
        REPORT,
        out,
        lambda job: _write_report(job, **files),
        # Predictions lie beside their metrics file, whose sidecar holds their digest.
        reads={f"{kind} {name}": path for kind in files for name, path in files[kind].items()},
        settings={kind: list(paths) for kind, paths in files.items()},
        summary=lambda folder: stage.read_info(folder, ReportInfo),
        is_folder=True,
    )


def _write_report(
    job: Job, merged: Paths, models: Paths, experts: Paths, fisher: Paths
) -> ReportInfo:
    from fmn.fisher.files import read_fisher
    from fmn.report import card, figures, page, results

    evaluated = {name: results.read_evaluated(path) for name, path in merged.items()}
    table = results.tabulate(
        {t: results.read_evaluated(path) for t, path in experts.items()}, evaluated
    )
    recipes = {}
    for name, folder in models.items():
        if evaluated[name].metrics.model != job.inputs[f"models {name}"]:
            raise UserError(f"{merged[name]}: not the metrics of {folder}; evaluate that model")
        recipes[name] = read_recipe(folder)
    if recipe := recipes.get(table.headline):
        _check_fisher(job, recipe, table.headline, fisher)
    values = {task: read_fisher(path)[0] for task, path in fisher.items()}
    costs = results.read_costs(fisher, models, experts, merged)
    content = results.Report(table, recipes, values, costs)

    numbers = results.results(table)
    header, body = results.text_table(table)
    (job.path / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (job.path / "table.md").write_text(results.markdown(header, body))
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
        text = card.card(recipe, evaluated[name].metrics)
        (job.path / "cards" / f"{name}.md").write_text(text)
    return ReportInfo(header=header, body=body, notes=results.notes(table), results=numbers)


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
    from fmn.report import comparison, figures, page, results

    cells: dict[str, dict[str, Cell]] = {}
    for name, path in paths.items():
        experts, _, method = name.partition("/")
        cells.setdefault(experts, {})[method] = read_record(path, Cell)
    content = comparison.compare(cells)
    numbers = comparison.numbers(cells, content)
    stage.write_record(folder / "results.json", numbers)
    header, body = comparison.text_table(content)
    methods = results.markdown(header, body)
    tables = page.render("table.md", comparison=content, methods=methods)
    (folder / "table.md").write_text(tables.rstrip() + "\n")
    pictures = figures.draw(figures.COMPARISON_PICTURES, content)
    html = page.render("comparison.html", comparison=content, pictures=pictures)
    _write_page(folder, html, pictures)
    notes = comparison.notes(content)
    return ReportInfo(header=header, body=body, notes=notes, results=numbers.methods)
