"""Metrics, tags and page of a registered version. This module does not import MLflow."""

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fmn.evaluate.files import Metrics
from fmn.evaluate.metrics import higher_is_better
from fmn.merge.recipe import Recipe
from fmn.models.labels import output_names
from fmn.registry.promotion import Decision, Standing
from fmn.report.page import settings
from fmn.report.results import AVERAGE, EXPERT, MACRO
from fmn.report.stages import ReportInfo
from fmn.report.wording import escaped, listed, markdown, points, short_list, shown, span
from fmn.store import stage
from fmn.tasks.task import Task

BASELINES = (EXPERT, AVERAGE, "base")
EXAMPLE = ("A warm and funny film.", "The film is funny.")
TAKES = {"token-classification": ["words"], "image-classification": ["image"]}
ANSWERS = {  # by kind, where they are not labels
    "token-classification": "`labels` of words, and `spans`: {}",
    "sentence-similarity": "`embedding`; for two texts `score`, their cosine",
    "text-generation": "`text` that follows",
    "text2text-generation": "`text`",
}


@dataclass(frozen=True)
class Baselines:
    """Numbers that a report adds to the scores of its model; each may be empty.

    Attributes:
        scores: scores of the experts, the average and the base, by BASELINES, then by task or
            MACRO.
        retained: the share of the experts' scores that the model keeps, by task or MACRO.
        seconds: run time by stage.
        verdict: the report's verdict, in sentences.
    """

    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    retained: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    verdict: tuple[str, ...] = ()


def read_baselines(report: Path | None, metrics: Metrics) -> Baselines:
    """Read the baselines from a report; all are empty if its model has other metrics."""
    sidecar = stage.read_sidecar(report) if report else None
    if not report or not sidecar or sidecar.stage != "report":
        return Baselines()
    info = stage.read_info(report, ReportInfo)
    rows: dict[str, Any] = {**info.results["tasks"], MACRO: info.results[MACRO]}
    own = {task: row.get(info.headline, {}) for task, row in rows.items()}
    if any(own.get(task, {}).get("score") != each.score for task, each in metrics.tasks.items()):
        return Baselines()
    seconds: dict[str, float] = {}
    with (report / "costs.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + float(row["seconds"])
    return Baselines(
        scores={name: _defined(rows, name, "score") for name in BASELINES},
        retained=_defined(rows, info.headline, "relative"),
        seconds=seconds,
        verdict=tuple(info.verdict),
    )


def _defined(rows: Mapping[str, Any], name: str, number: str) -> dict[str, float]:
    """A number of a column by row, without undefined ones."""
    numbers = {task: row.get(name, {}).get(number) for task, row in rows.items()}
    return {task: value for task, value in numbers.items() if value is not None}


# ---- metrics and tags ----


def grouped_metrics(metrics: Metrics, baselines: Baselines) -> dict[str, float]:
    """The metrics of a run, by ``GROUP/TASK``; undefined ones are left out.

    The groups ``score``, ``retained``, ``expert``, ``average`` and ``base`` have a number for each
    task and the mean; ``task`` has the metrics of tasks with several; ``time`` has the seconds of
    each stage.
    """
    scores = {MACRO: metrics.score} | {n: each.score for n, each in metrics.tasks.items()}
    groups: dict[str, Mapping[str, float | None]] = {"score": scores, **baselines.scores}
    groups |= {"retained": baselines.retained, "time": baselines.seconds, "task": {}}
    for name, entry in metrics.tasks.items():
        task = metrics.definitions[name]
        values = entry.model_dump(include={m + task.suffix(s) for m in task.metrics
                                           for s in task.validation})  # fmt: skip
        if len(values) > 1:
            groups["task"] = {**groups["task"], **{f"{name}.{n}": x for n, x in values.items()}}
    return {
        f"{group}/{name}": value
        for group, values in groups.items()
        for name, value in values.items()
        if value is not None
    }


def version_tags(
    metrics: Metrics, recipe: Recipe, definitions: Mapping[str, Task], baselines: Baselines
) -> dict[str, str]:
    """Short tags of a version, for MLflow's list of versions."""
    tags = {
        "tasks": short_list(list(definitions), most=12),
        "method": recipe.method,
        "score": "undefined" if metrics.score is None else f"{100 * metrics.score:.2f} %",
    }
    if MACRO in baselines.retained:
        tags["retained"] = f"{100 * baselines.retained[MACRO]:.1f} %"
    return tags


# ---- the page ----


def page(
    uri: str,
    model: Path,
    recipe: Recipe,
    metrics: Metrics,
    definitions: Mapping[str, Task],
    baselines: Baselines,
    decision: Decision,
    before: Standing | None,
) -> str:
    """Write the page of a version, in Markdown.

    Args:
        uri: the version's address, ``models:/NAME/VERSION``.
        model: the merged model's folder.
        recipe, metrics: its recipe and scores.
        definitions: its tasks.
        baselines: numbers from a report.
        decision: its alias, with the reason.
        before: the champion that it was compared with, if any.
    """
    parts = [
        f"**{decision.alias.capitalize()}**: {escaped(decision.reason)}.",
        "\n".join(f"- {escaped(line)}" for line in baselines.verdict),
        markdown(*_score_table(metrics, baselines, before)),
        "## Use",
        _usage(uri, definitions),
        markdown(*_task_table(model, definitions)),
        "## How it was merged",
        f"`{recipe.method}` of {escaped(listed(recipe.tasks))}; {escaped(settings(recipe))}."
        f" `fmn reproduce {uri}` shows what it was made from. Its run has the report"
        " (`report/report.html`), the model card (`README.md`) and the lineage among its"
        " artifacts.",
    ]
    return spaced("\n\n".join(part.strip() for part in parts if part.strip()))


def _score_table(
    metrics: Metrics, baselines: Baselines, before: Standing | None
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: scores, beside those of the experts, the average and the last champion."""
    experts, average = (baselines.scores.get(name) or {} for name in (EXPERT, AVERAGE))
    header = ["task", "score", "95 % interval", "expert", "% of expert", "average"]
    header.append(f"less version {before.version}'s" if before else "")
    body = []
    scores = {name: entry.score for name, entry in metrics.tasks.items()}
    for name, score in [*scores.items(), *[(MACRO, metrics.score)][: len(scores) > 1]]:
        is_percent = name == MACRO or higher_is_better(metrics.definitions[name])
        interval = metrics.interval if name == MACRO else metrics.tasks[name].interval.get("score")
        share, old = baselines.retained.get(name), before.tasks.get(name) if before else None
        row = [name, shown(score, is_percent), span(interval, is_percent)]
        row += [
            shown(experts[name], is_percent) if name in experts else "",
            shown(share) if share is not None else "",
            shown(average[name], is_percent) if name in average else "",
            points(score - old, is_percent) if score is not None and old is not None else "",
        ]
        body.append(row)
    filled = [place for place in range(len(header)) if any(row[place] for row in body)]
    return [header[n] for n in filled], [[row[n] for n in filled] for row in body]


def takes(task: Task) -> list[str]:
    """The columns of a task's inputs."""
    return TAKES.get(task.task, ["text"] + ["text_pair"] * bool(task.columns.text_pair))


def _usage(uri: str, definitions: Mapping[str, Task]) -> str:
    """Example code that asks a version for an answer."""
    name, task = next(iter(definitions.items()))
    note, columns = "", takes(task)
    row = json.dumps(dict(zip(["text", *columns[1:]], EXAMPLE, strict=False)))
    if columns == ["image"]:
        row, note = '{"image": image}', 'image = open("picture.png", "rb").read()\n'
    code = (
        f"import mlflow\nimport pandas as pd\n\n{note}"
        f'model = mlflow.pyfunc.load_model("{uri}")\n'
        f"table = pd.DataFrame([{row}])\n"
        f'model.predict(table, params={{"task": "{name}"}})'
    )
    words = (
        f'Each row is answered for the task in `params` or in a column `task`; `"*"` stands for all'
        f" tasks. `mlflow models serve -m {uri} --env-manager local` answers over HTTP."
    )
    return f"```python\n{code}\n```\n\n{words}"


def _task_table(model: Path, definitions: Mapping[str, Task]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the inputs and the answers of each task."""
    rows = []
    for name, task in definitions.items():
        names = short_list(output_names(model / "tasks" / name), most=20)
        answer = ANSWERS.get(task.task, "{}").format("a number" if task.regression else names)
        tokens = "" if task.task == "image-classification" else str(task.max_length)
        rows.append([name, " and ".join(takes(task)), answer, tokens])
    return ["task", "columns", "answers", "tokens at most"], rows


def spaced(text: str) -> str:
    """Remove front matter from Markdown, and widen the columns of tables, which MLflow sets close.

    >>> spaced("---\\ntags: [fmn]\\n---\\n| task | score |")
    '| task&emsp;| score |'
    """
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL).strip()
    return re.sub(r"(?m)(?<=\S) \|(?=.*\|$)", "&emsp;|", text).replace("---&emsp;", "---")
