"""The comparison of merge methods over sets of experts: which sets, and the tables over their cells.

A cell is a set of experts merged with one method and tried on every task of the set (`fmn.merge_stages.compare`).
"""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from fmn.intervals import Answers, Difference, compare
from fmn.report import markdown

Cell = Mapping[str, Any]
SIZES = {"pairs": 2, "triples": 3}


def sets(tasks: Sequence[str], kinds: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The sets of experts to merge, by name ("mrpc+rte"); `kinds`: "pairs", "triples", "all", or such names."""
    chosen = [pick for kind in kinds if kind in SIZES for pick in combinations(tasks, SIZES[kind])]
    chosen += [tuple(kind.split("+")) for kind in kinds if "+" in kind]
    chosen += [tuple(tasks)] if "all" in kinds else []
    return {"+".join(pick): pick for pick in dict.fromkeys(chosen)}


def relative(cell: Cell) -> float:
    """The mean over a cell's tasks of the score relative to the expert's; a task whose expert scores 0 is left out."""
    shares = [entry["relative"] for entry in cell["tasks"].values() if entry["relative"] is not None]
    return sum(shares) / len(shares) if shares else 0.0


def summary(cells: Mapping[str, Mapping[str, Cell]]) -> dict[str, dict[str, float]]:
    """By method: the mean of `relative` over the sets of each size, and the mean seconds that a merge took.

    Args:
        cells: by set and method.
    """
    methods = dict.fromkeys(method for row in cells.values() for method in row)
    largest = max(name.count("+") + 1 for name in cells)
    names = {2: "pairs", 3: "triples", largest: "all"}
    found: dict[str, dict[str, float]] = {}
    for method in methods:
        by_size: dict[str, list[float]] = {}
        seconds = []
        for name, row in cells.items():
            by_size.setdefault(names[name.count("+") + 1], []).append(relative(row[method]))
            seconds.append(row[method]["seconds"])
        found[method] = {kind: _mean(values) for kind, values in by_size.items()}
        found[method]["mean"] = _mean(list(found[method].values()))
        found[method]["seconds"] = _mean(seconds)
    return found


def answers(cell: Cell) -> dict[str, dict[str, Answers]]:
    """What the merged model of a cell answered, by task, as `fmn.intervals` takes it."""
    return {
        task: {"tried": Answers(np.array(entry["predictions"]), np.array(entry["labels"]))}
        for task, entry in cell["tasks"].items()
    }


def differences(row: Mapping[str, Cell]) -> dict[str, Difference]:
    """How every method's mean score over the tasks of a set differs from the first method's, on the same examples."""
    given = {method: answers(cell) for method, cell in row.items()}
    first = next(iter(given.values()))
    return {method: compare(one, first) for method, one in list(given.items())[1:]}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _points(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"


def write(out: Path, cells: Mapping[str, Mapping[str, Cell]]) -> dict[str, Any]:
    """Fill the folder ``out`` with ``results.json`` and ``table.md``; returns the first table's (header, rows)."""
    means = summary(cells)
    kinds = [kind for kind in ("pairs", "triples", "all", "mean") if kind in next(iter(means.values()))]
    header = ["method", *kinds, "seconds"]
    body = [
        [method, *(f"{100 * row[kind]:.1f}" for kind in kinds), f"{row['seconds']:.1f}"]
        for method, row in means.items()
    ]
    last = list(cells)[-1]
    tasks = list(cells[last][next(iter(means))]["tasks"])
    by_task = [
        [method, *(f"{100 * cells[last][method]['tasks'][task]['score']:.1f}" for task in tasks)] for method in means
    ]
    experts = cells[last][next(iter(means))]["tasks"]
    by_task.append(["expert", *(f"{100 * experts[task]['expert']:.1f}" for task in tasks)])
    first, *_ = means
    against = [
        [method, f"{100 * one.difference:+.1f}", _points(one.interval), f"{one.p_value:.3f}"]
        for method, one in differences(cells[last]).items()
    ]
    by_set = [[name, *(f"{100 * relative(row[method]):.1f}" for method in means)] for name, row in cells.items()]
    kept = {
        name: {
            method: {
                task: {key: entry[key] for key in ("score", "expert", "relative")}
                for task, entry in cell["tasks"].items()
            }
            for method, cell in row.items()
        }
        for name, row in cells.items()
    }
    (out / "results.json").write_text(json.dumps({"methods": means, "sets": kept}, indent=1) + "\n")
    text = [
        "Mean of the score relative to the expert, in percent, over the sets of experts; seconds that a merge takes.",
        "",
        markdown(header, body),
        f"Scores in percent of {last}:",
        "",
        markdown(["method", *tasks], by_task),
        f"Mean score of {last}, its difference from {first} in points, the 95 % interval of that and the p-value of the"
        " paired bootstrap on the same examples:",
        "",
        markdown(["method", "difference", "interval", "p"], against),
        "Mean of the score relative to the expert, in percent:",
        "",
        markdown(["experts", *means], by_set),
    ]
    (out / "table.md").write_text("\n".join(text))
    return {"table": [header, body], "methods": means}
