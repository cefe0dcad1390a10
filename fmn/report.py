"""What a run found: the table of scores, the pictures, the model card."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fmn import artifacts, recipe
from fmn.tasks import TASKS

if TYPE_CHECKING:
    from fmn.architectures import NodeValues

MACRO = "mean"
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2")


@dataclass(frozen=True)
class Row:
    """A task's scores: its expert's, each merged model's, and those relative to the expert's."""

    task: str
    metric: str
    examples: int
    expert: float | None
    merged: Mapping[str, float]

    def relative(self, name: str) -> float | None:
        """The share of the expert's score that a merged model keeps; None without an expert that scores above zero."""
        return self.merged[name] / self.expert if self.expert and self.expert > 0 else None


def rows(experts: Mapping[str, Mapping[str, Any]], merged: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Rows of the table, one a task, in the first merged model's order of tasks.

    Args:
        experts: metrics of each expert (the content of its metrics file), by task.
        merged: metrics of each merged model, by its name.
    """
    first = next(iter(merged.values()))["tasks"]
    return [
        Row(
            task,
            " + ".join(TASKS[task].metrics),
            sum(int(count) for name, count in entry.items() if name.startswith("examples")),
            experts[task]["tasks"][task]["score"] if task in experts else None,
            {name: content["tasks"][task]["score"] for name, content in merged.items()},
        )
        for task, entry in first.items()
    ]


class Measured(NamedTuple):
    """A metric of a validation split, and its 95 % interval where the metrics file has one."""

    split: str
    metric: str
    value: float
    examples: int
    interval: Sequence[float] | None = None


def measured(task: str, entry: Mapping[str, Any]) -> list[Measured]:
    """What was measured on a task."""
    ends = entry.get("interval", {})
    suffixes = {split: TASKS[task].suffix(split) for split in TASKS[task].validation}
    return [
        Measured(split, metric, entry[metric + suffix], entry["examples" + suffix], ends.get(metric + suffix))
        for split, suffix in suffixes.items()
        for metric in TASKS[task].metrics
        if metric + suffix in entry
    ]


def macro(table: Sequence[Row]) -> dict[str, Any]:
    """Means over the tasks: of the experts' scores, the merged models', and theirs relative to the experts'."""
    experts = [row.expert for row in table if row.expert is not None]
    names = list(table[0].merged)
    relative = {name: [share for row in table if (share := row.relative(name)) is not None] for name in names}
    return {
        "expert": _mean(experts),
        "merged": {name: _mean([row.merged[name] for row in table]) for name in names},
        "relative": {name: _mean(relative[name]) for name in names},
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def results(table: Sequence[Row]) -> dict[str, Any]:
    """The table as numbers, for machines and for `dvc metrics`."""
    return {
        "tasks": {
            row.task: {
                "expert": row.expert,
                **{name: {"score": score, "relative": row.relative(name)} for name, score in row.merged.items()},
            }
            for row in table
        },
        MACRO: macro(table),
    }


def cells(table: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table as text: scores in percent, in brackets their share of the expert's."""
    names = list(table[0].merged)
    header = ["task", "metric", "examples", "expert", *names]
    body = [
        [row.task, row.metric, str(row.examples), _percent(row.expert)]
        + [_with_share(row.merged[name], row.relative(name)) for name in names]
        for row in table
    ]
    means = macro(table)
    last = [MACRO, "", "", _percent(means["expert"])]
    last += [_with_share(means["merged"][name], means["relative"][name]) for name in names]
    return header, [*body, last]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def span(interval: Sequence[float] | None) -> str:
    """An interval in percent."""
    return "" if interval is None else f"{_percent(interval[0])} to {_percent(interval[1])}"


def _with_share(value: float, share: float | None) -> str:
    return _percent(value) if share is None else f"{_percent(value)} ({_percent(share)})"


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *body)) + "\n"


def write(
    out: Path,
    experts: Mapping[str, Mapping[str, Any]],
    merged: Mapping[str, Mapping[str, Any]],
    fisher: "Mapping[str, NodeValues]",
) -> dict[str, Any]:
    """Fill the folder ``out`` with ``results.json``, ``table.md`` and the pictures.

    Returns the numbers under ``results`` and the table's (header, rows) under ``table``.

    Args:
        experts, merged: as for `rows`.
        fisher: float64 [nodes] by site, by task; may be empty.
    """
    table = rows(experts, merged)
    found = {"results": results(table), "table": cells(table)}
    (out / "results.json").write_text(json.dumps(found["results"], indent=1) + "\n")
    (out / "table.md").write_text(markdown(*cells(table)))
    scores_picture(table, out / "scores.svg")
    if fisher:
        fisher_picture(fisher, out / "fisher.svg")
    return found


def _figure(columns: int, rows: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Text stays text, and the file is the same each time.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fmn", "font.size": 9})
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})


def scores_picture(table: Sequence[Row], path: Path) -> None:
    """A group of bars a task: the expert, then each merged model."""
    names = list(table[0].merged)
    figure, axes = _figure(1, 1, 1.6 + 1.1 * len(table), 3.2)
    axis = axes[0][0]
    width = 0.8 / (1 + len(names))
    series = {"expert": [row.expert or 0.0 for row in table]}
    series |= {name: [row.merged[name] for row in table] for name in names}
    for place, (name, values) in enumerate(series.items()):
        positions = [task + (place - len(names) / 2) * width for task in range(len(table))]
        bars = axis.bar(positions, [100 * value for value in values], width, label=name, color=COLOURS[place % 7])
        axis.bar_label(bars, fmt="%.0f", fontsize=7)
    axis.set_xticks(range(len(table)), [row.task for row in table])
    axis.set_ylabel("score, %")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(series), frameon=False)
    _save(figure, path)


def fisher_picture(fisher: "Mapping[str, NodeValues]", path: Path) -> None:
    """A map a task of the heads' Fisher information, layers down and heads across, each relative to its largest."""
    import numpy as np

    figure, axes = _figure(len(fisher), 1, 2.1 * len(fisher), 2.6)
    for axis, (task, values) in zip(axes[0], fisher.items(), strict=True):
        heads = [nodes for site, nodes in sorted(values.items()) if site.node == "head"]
        grid = np.full((len(heads), max(map(len, heads))), np.nan)  # [layers, heads]
        for line, nodes in enumerate(heads):
            grid[line, : len(nodes)] = nodes
        image = axis.imshow(
            grid / max(np.nanmax(grid), np.finfo(float).tiny), cmap="cividis", vmin=0, vmax=1, aspect="auto"
        )
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("head")
    axes[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes[0]), label="Fisher / largest", shrink=0.8)
    _save(figure, path)


def card(recipe: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> str:
    """The model card of a merged model, as the Hub reads it: front matter, then what it is and how it was made.

    Args:
        recipe: the content of ``merge.json``.
        metrics: the content of its metrics file, where it was evaluated.
    """
    from huggingface_hub import EvalResult, ModelCardData

    experts = recipe["experts"]
    evaluated = metrics["tasks"] if metrics else {}
    front = ModelCardData(
        model_name=f"fmn {recipe['method']}",
        library_name="transformers",
        pipeline_tag="text-classification",
        base_model=[entry["revision"] for entry in experts.values() if entry["revision"].startswith("hf://")] or None,
        datasets=["nyu-mll/glue"],
        tags=["fmn", "merge", recipe["method"], *experts],
        metrics=sorted({metric for task in experts for metric in TASKS[task].metrics}),
        eval_results=[
            EvalResult(
                task_type="text-classification",
                dataset_type="nyu-mll/glue",
                dataset_name=f"GLUE {task}",
                dataset_config=task,
                dataset_split=split,
                metric_type=metric,
                metric_value=round(value, 6),
            )
            for task, entry in evaluated.items()
            for split, metric, value, *_ in measured(task, entry)
        ]
        or None,
    )
    lines = [
        "---",
        front.to_yaml(),
        "---",
        "",
        f"# {', '.join(experts)}: one model, merged with {recipe['method']}",
        "",
        "Made by fmn from the experts below, without training. `encoder/` loads with `AutoModel.from_pretrained`,"
        " `tasks/TASK/` with `AutoModelForSequenceClassification.from_pretrained`.",
        "",
        markdown(
            ["task", "expert", "coefficient"],
            [
                [
                    task,
                    f"`{entry.get('revision') or entry.get('source') or 'a local folder'}`",
                    f"{recipe['coefficients'][task]:g}",
                ]
                for task, entry in experts.items()
            ],
        ),
    ]
    if evaluated:
        body = [
            [task, split, metric, str(examples), _percent(value), span(interval)]
            for task, entry in evaluated.items()
            for split, metric, value, examples, interval in measured(task, entry)
        ]
        header = ["task", "split", "metric", "examples", "score", "95 % interval"]
        lines += ["## Scores on the validation splits, in percent", "", markdown(header, body)]
    lines += [
        "## Limits",
        "",
        "Each task's head is its expert's own"
        + (", re-aligned to answer as the expert does to unlabeled training texts" if recipe.get("realign") else "")
        + "; only the encoder is merged, so a task can lose against its expert."
        " `merge.json` holds the whole recipe: experts and their digests, method, mapping, coefficients, versions.",
        "",
    ]
    return "\n".join(lines)


def write_card(folder: Path, metrics: Mapping[str, Any] | None) -> None:
    """The card of the merged model in `folder`, written anew where it says something else."""
    text = card(recipe.read_recipe(folder), metrics)
    path = folder / recipe.CARD
    if not path.is_file() or path.read_text() != text:
        with artifacts.whole_file(path) as file:
            file.write_text(text)
