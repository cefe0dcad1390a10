"""The stage that writes a run's report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmn.errors import UserError
from fmn.merge import recipe
from fmn.report import results as report
from fmn.store import artifacts, stage
from fmn.store import records as formats
from fmn.store.stage import Outcome

REPORT = 3

# The stages that a report says the cost of, in their order.
COSTED = (
    "fetch",
    "data",
    "finetune",
    "fisher",
    "full-fisher",
    "gram",
    "search",
    "merge",
    "realign",
    "evaluate",
)


def realigned(folder: Path, merged_models: Mapping[str, Path]) -> dict[str, Path]:
    """The metrics files in ``folder``, by name, of models that are one of the merged ones with its heads re-aligned."""
    shown = {artifacts.read_json(stage.there(file)).get("model") for file in merged_models.values()}
    found = {
        file.stem: file
        for file in sorted(folder.glob("*.json"))
        if file not in merged_models.values()
    }
    return {
        name: file
        for name, file in found.items()
        if artifacts.read_json(file).get("realigned from") in shown
    }


def write_report(
    experts: Mapping[str, Path],
    merged_models: Mapping[str, Path],
    fisher_files: Mapping[str, Path],
    out: Path,
    work: Path | None = None,
) -> Outcome:
    """Tables, pictures and a page of them in the folder ``out``.

    Args:
        experts: metrics files of the experts by task.
        merged_models: metrics files of the merged models by the name that the table gives them.
        fisher_files: Fisher artifacts by task.
        work: the run's folder, which tells how the models were merged and what the stages took.
    """
    if not merged_models:
        raise UserError("--merged NAME=FILE: at least one metrics file of a merged model is needed")
    if report.EXPERT in merged_models:
        raise UserError(
            f"--merged {report.EXPERT}=FILE: the experts' column has that name; choose another"
        )
    files = {"expert": experts, "merged": merged_models, "fisher": fisher_files}
    inputs = {
        f"{kind} {name}": artifacts.digest_file(stage.there(file))
        for kind, named in files.items()
        for name, file in named.items()
    }
    metrics = {
        name: artifacts.read_json(file, formats.Metrics) for name, file in merged_models.items()
    }
    folders = _merged_below(work, metrics) if work else {}
    recipes = {
        name: recipe.read_recipe(folder).model_dump(mode="json", by_alias=True)
        for name, folder in folders.items()
    }
    # What a recipe says is in the metrics' digest of it; what the stages took is no part of what a report is.
    key = artifacts.content_key(
        "report", REPORT, {"order": list(inputs), "recipes": list(recipes)}, inputs
    )
    for task, stated in recipes.get(report.headline(metrics), {}).get("fisher", {}).items():
        if task in fisher_files and stated["digest"] != inputs[f"fisher {task}"]:
            raise UserError(
                f"{fisher_files[task]}: not the Fisher that {report.headline(metrics)} was merged with"
            )

    def fill(folder: Path) -> Mapping[str, Any]:
        alone = {task: evaluated(file) for task, file in experts.items()}
        table = report.tabulate(
            alone, {name: evaluated(file) for name, file in merged_models.items()}
        )
        fisher = {task: artifacts.read_fisher(file)[0] for task, file in fisher_files.items()}
        names = {name: name for name in table.tasks} | {
            path.name: name for name, path in folders.items()
        }
        return report.write(folder, table, fisher, recipes, _costs(work, names) if work else [])

    return stage.run_folder("report", out, key, fill)


def evaluated(metrics: Path) -> report.Evaluated:
    """What a metrics file says, and the predictions beside it."""
    return report.Evaluated(
        artifacts.read_json(metrics, formats.Metrics), artifacts.read_predictions(metrics)
    )


def _merged_below(work: Path, metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Path]:
    """The folders of merged models in the run's folder, by the name of the metrics that are of them."""
    there = {
        artifacts.digest_file(path): path.parent for path in sorted(work.glob(f"*/{recipe.RECIPE}"))
    }
    return {
        name: there[content["model"]]
        for name, content in metrics.items()
        if content.get("model") in there
    }


def _costs(work: Path, names: Mapping[str, str]) -> list[report.Cost]:
    """What the stages before a report took, in their order, by the names that the report gives their outputs."""
    shown = {"base": "base", **names}
    found = [
        report.Cost(made_by, shown[name], seconds)
        for path, (made_by, seconds) in artifacts.read_costs(work).items()
        if made_by in COSTED and (name := path.name.split(".")[0]) in shown
    ]
    order = list(shown.values())
    return sorted(found, key=lambda one: (COSTED.index(one.stage), order.index(one.name)))


COMPARISON = 2


def write_comparison(cells: Mapping[str, Mapping[str, Path]], out: Path) -> Outcome:
    """The tables of a comparison in the folder ``out``, from its cells' files by set and method."""
    inputs = {
        f"{name}/{method}": artifacts.digest_file(stage.there(path))
        for name, row in cells.items()
        for method, path in row.items()
    }
    key = artifacts.content_key("comparison", COMPARISON, {"order": list(inputs)}, inputs)

    def fill(target: Path) -> Mapping[str, Any]:
        from fmn.report import comparison

        read = {
            name: {method: artifacts.read_json(path, formats.Cell) for method, path in row.items()}
            for name, row in cells.items()
        }
        return comparison.write(target, read)

    return stage.run_folder("comparison", out, key, fill)
