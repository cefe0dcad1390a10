"""The stages that write a run's report and the tables of a comparison."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn.errors import UserError
from fmn.evaluate import files as evaluate_files
from fmn.evaluate.files import Metrics
from fmn.experiments.files import Cell
from fmn.fisher import files as fisher_files
from fmn.merge.recipe import Recipe
from fmn.report import results
from fmn.store import stage
from fmn.store.records import Record
from fmn.store.stage import Job, Outcome, read_record

if TYPE_CHECKING:
    from fmn.report.figures import Picture

REPORT = 4
COMPARISON = 3
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
    if results.EXPERT in merged:
        raise UserError("--merged expert=FILE: the experts' column is called so; choose another")
    if unknown := [name for name in models if name not in merged]:
        raise UserError(f"--model {unknown[0]}=DIR: no metrics of it; give --merged too")
    files = {"merged": merged, "models": models, "experts": experts, "fisher": fisher}
    return stage.run_stage(
        "report",
        REPORT,
        out,
        lambda job: _write_report(job, **files),
        # Predictions lie beside their metrics file, which holds their digest.
        reads={f"{kind} {name}": path for kind in files for name, path in files[kind].items()},
        settings={kind: list(paths) for kind, paths in files.items()},
        summary=lambda folder: stage.read_info(folder, ReportInfo),
        is_folder=True,
    )


def _write_report(
    job: Job, merged: Paths, models: Paths, experts: Paths, fisher: Paths
) -> ReportInfo:
    from fmn.report import card, figures, page

    evaluated = {name: read_evaluated(path) for name, path in merged.items()}
    table = results.tabulate({t: read_evaluated(path) for t, path in experts.items()}, evaluated)
    recipes = {}
    for name, folder in models.items():
        if evaluated[name].metrics.model != job.inputs[f"models {name}"]:
            raise UserError(f"{merged[name]}: not the metrics of {folder}; evaluate that model")
        recipes[name] = read_record(folder / "merge.json", Recipe, "merge again")
    if recipe := recipes.get(table.headline):
        for task in fisher.keys() & recipe.fisher:
            if recipe.fisher[task].digest != job.inputs[f"fisher {task}"]:
                raise UserError(
                    f"{fisher[task]}: not the Fisher that {table.headline} was merged with;"
                    " give that one"
                )
    values = {task: fisher_files.read_fisher(path)[0] for task, path in fisher.items()}
    costs = _costs(fisher, models, experts, merged)
    content = results.Report(table, recipes, values, costs)

    numbers = results.results(table)
    wide = results.text_table(table, width=1 << 10)
    (job.path / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (job.path / "table.md").write_text(results.markdown(*wide))
    _write_csv(job.path / "scores.csv", results.score_rows(table))
    _write_csv(job.path / "costs.csv", [cost._asdict() for cost in costs])
    pictures = figures.draw(figures.RUN_PICTURES, content)
    _write_page(job.path, page.run_page(content, pictures), pictures)
    for name, recipe in recipes.items():
        path = job.path / "cards" / f"{name}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(card.card(recipe, evaluated[name].metrics))
    header, body = results.text_table(table)
    return ReportInfo(header=header, body=body, notes=results.notes(table), results=numbers)


def read_evaluated(metrics: Path) -> results.Evaluated:
    """A metrics file, and the predictions beside it."""
    content = read_record(metrics, Metrics, "make it again with `fmn evaluate`")
    return results.Evaluated(content, evaluate_files.read_predictions(metrics))


def _costs(*inputs: Paths) -> list[results.Cost]:
    """The run times of the stages that wrote these inputs, if their sidecars tell; by stage."""
    sidecars = [(name, stage.read_sidecar(path)) for each in inputs for name, path in each.items()]
    costs = [results.Cost(one.stage, name, one.seconds) for name, one in sidecars if one]
    stages = list(dict.fromkeys(cost.stage for cost in costs))
    return sorted(costs, key=lambda cost: stages.index(cost.stage))


def _write_page(folder: Path, page: str, pictures: "Mapping[str, Sequence[Picture]]") -> None:
    """Write ``report.html``, and its pictures as files of their own."""
    (folder / "report.html").write_text(page)
    (folder / "pictures").mkdir()
    for picture in (picture for section in pictures.values() for picture in section):
        (folder / "pictures" / f"{picture.name}.svg").write_text(picture.svg + "\n")


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV; no file if there are none."""
    if rows:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


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
    from fmn.report import comparison, figures, page

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
    _write_page(folder, page.comparison_page(content, pictures), pictures)
    return ReportInfo(header=header, body=body, notes=[], results=numbers.methods)
