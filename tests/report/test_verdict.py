"""The verdict says what the numbers say, and a remedy that is at hand."""

from dataclasses import replace
from typing import Any

import pytest

from fmn.report.results import Report, Table, tabulate
from fmn.report.verdict import verdict
from tests import reports

TASKS = ("cola", "mrpc", "sst2")
HEADS = {"merged": "01", "texts": 8, "ridge": 1.0, "seed": 0, "dtype": "float32", "tasks": {}}


def report(qualities: dict[str, float], headline: str = "", **more: Any) -> Report:
    """A report on models that answer so well; `more` are sizes, and `recipes` by model."""
    experts = {
        task: reports.evaluated([task], 0.9, 7, 400 + place) for place, task in enumerate(TASKS)
    }
    models = {name: reports.evaluated(TASKS, right, 50, 400) for name, right in qualities.items()}
    plain = dict.fromkeys(qualities, reports.recipe(TASKS))
    recipes = plain | more.pop("recipes", {})
    return Report(tabulate(experts, models, headline), recipes, {}, [], more)


def text(table: Table, name: str) -> str:
    share = table.columns[name]["mean"].share
    assert share is not None
    return share.text


def test_it_says_what_is_kept_and_what_it_is_better_than() -> None:
    content = report({"base": 0.5, "average": 0.6, "merged": 0.86})
    first, *others = verdict(content)
    table = content.table
    share = table.columns["merged"]["mean"].share
    assert share is not None
    assert first == (
        f"The model merged keeps {share.text} % of the experts' scores (mean of 3 tasks, 95 %"
        f" interval {share.span}), the best of 2 models; the plain average would keep"
        f" {text(table, 'average')} %."
    )
    gain = 100 * (table.differences["average"]["mean"].difference or 0)
    assert others[0] == f"Better than average by {gain:.1f} points.", "not a word of the base"
    shares = {task: reports.value(table.columns["merged"][task].share) for task in TASKS}
    least = min(shares, key=shares.__getitem__)
    assert f"{100 * shares[least]:.1f} %" in others[1]
    assert least in others[1]


def test_what_is_within_chance_is_called_so() -> None:
    words = verdict(report({"average": 0.85, "merged": 0.85}, "merged"))
    assert "Not better, beyond chance, than average (+0.0 points)." in words
    assert not [line for line in words if "better here" in line]


@pytest.mark.parametrize(
    ("better", "remedy"),
    [
        ("average", "Try `merge: {method: average}` to have the average."),
        ("paper", "paper does better here: try the settings of paper under `merge`."),
        ("merged", "merged does better here: leave out what follows it, `realign: {}`."),
    ],
)
def test_where_another_model_is_better_it_says_so_and_what_to_do(better: str, remedy: str) -> None:
    qualities = {"average": 0.5, "paper": 0.5, "merged": 0.5, "realigned": 0.6} | {better: 0.85}
    ties = reports.recipe(TASKS, "ties")
    recipes = {
        "average": reports.recipe(TASKS, "average"), "paper": ties,
        "realigned": reports.recipe(TASKS, realign=HEADS),
    }  # fmt: skip
    words = verdict(report(qualities, "realigned", recipes=recipes))
    assert any(line.startswith(f"Worse than {better} by ") for line in words)
    assert remedy in words
    table = report(qualities, "realigned").table
    best = text(table, better)
    start = f"The plain average does better here: it keeps {best} % of the experts' scores; the"
    assert words[0].startswith(start) == (better == "average")
    assert words[0].endswith(
        f"of 4 models, {better} is the best with {best} %; the plain"
        f" average would keep {text(table, 'average')} %."
    ) == (better != "average")


def test_a_larger_model_that_keeps_more_is_an_offer_and_no_rival() -> None:
    qualities, sizes = {"realigned": 0.6, "own": 0.85}, {"realigned": 1.0, "own": 1.61}
    words = verdict(report(qualities, "realigned", **sizes))
    assert not [line for line in words if line.startswith("Worse")]
    (offer,) = [line for line in words if line.endswith("to have it.")]
    assert offer.startswith("own keeps ")
    assert "with the parameters of 1.61 encoders instead of 1.00; put it first" in offer


def test_a_task_that_loses_much_is_named_with_a_remedy() -> None:
    content = report({"merged": 0.6})
    words = verdict(content)
    shares = {t: reports.value(content.table.columns["merged"][t].share) for t in TASKS}
    order = sorted(TASKS, key=shares.__getitem__)
    least = ", ".join(f"{t} ({100 * shares[t]:.1f} %)" for t in order)
    assert f"Least is kept of {' and '.join(least.rsplit(', ', 1))}." in words
    assert words[-1].endswith("try re-aligned heads: `realign: {realigned: {}}`.")
    again = verdict(replace(content, recipes={"merged": reports.recipe(TASKS, realign=HEADS)}))
    assert again[-1].endswith("try `merge: {method: auto}` or `own_layers: 1` under `realign`.")
    assert verdict(replace(content, recipes={})) == words[:-1], "a recipe tells what was tried"


def test_a_task_that_another_model_keeps_better_is_named_with_it() -> None:
    content = report({"other": 0.85, "merged": 0.6}, "merged")
    share = reports.value(content.table.columns["other"]["mrpc"].share)
    assert f"other keeps more of mrpc ({100 * share:.1f} %)." in verdict(content)


def test_a_task_whose_expert_guesses_is_no_reason_to_change_anything() -> None:
    content = report({"merged": 0.6})
    table = replace(content.table, guessing=TASKS)
    assert verdict(replace(content, table=table)) == verdict(content)[:1]


def test_without_experts_there_is_a_score_and_no_share() -> None:
    models = {"only": reports.evaluated(("sst2",), 0.8, count=100)}
    (line,) = verdict(Report(tabulate({}, models), {}, {}, []))
    assert line.startswith("The model only scores ")
    assert "(sst2, 95 % interval" in line
