"""What commands print of the results of stages."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from fmn.commands import shown
from fmn.models.stages import Completion, Embedding, Prediction, Similarity, Tags
from fmn.registry.stages import ChampionChange
from fmn.tasks.dataset import DataInfo
from fmn.tasks.spans import Span

FISHER: dict[str, Any] = dict.fromkeys(("estimator", "dtype", "precision", "device"), "x")
FISHER |= {"samples": 8, "published": None}


@pytest.mark.parametrize(
    ("show", "summary", "lines"),
    [
        (shown.facts("steps", "loss", "none"), {"steps": 7, "loss": 0.12345, "none": None},
         ["  steps: 7", "  loss: 0.123"]),
        (shown.show_fisher, FISHER | {"relative_stderr": None},
         ["  estimator: x", "  samples: 8", "  dtype: x", "  precision: x", "  device: x"]),
    ],
)  # fmt: skip
def test_entries_are_a_line_each(
    show: Callable[[Any], None],
    summary: dict[str, Any],
    lines: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    show(SimpleNamespace(**summary))
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize(
    ("error", "words"),
    [(0.05, "precise"), (0.2, "precise enough"), (0.4, "imprecise, raise --samples above 8")],
)
def test_the_precision_of_a_fisher_is_judged(
    error: float, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown.show_fisher(SimpleNamespace(**FISHER, relative_stderr=error))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"  standard error: {100 * error:.0f} % of a node's value on average: ")
    assert words in line


def test_rows_notes_and_champions_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    info = DataInfo(task="a", source="x", rows={"train": 3, "validation": 1}, warnings=["odd"])
    shown.show_data(info)
    shown.show_champion(ChampionChange(name="demo", before=None, champion="2"))
    assert capsys.readouterr().out.splitlines() == [
        "  rows: train 3, validation 1", "  warning: odd", "champion of demo: version 2, was none",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "lines"),
    [
        (Prediction(label="good", labels=["good"], score=0.9, probabilities={"good": 0.9}),
         ["good (0.900)"]),
        (Prediction(label="score", score=3.7609), ["3.761"]),
        (Tags(labels=["B-A"], spans=[Span(entity="A", text="Bo", start=0, end=2, score=0.5)]),
         ["Bo: A (0.500)"]),
        (Completion(text="and so on"), ["and so on"]),
        (Similarity(score=0.25), ["0.250"]),
        (Embedding(embedding=[0.5, -1.0]), ["0.5 -1"]),
    ],
)  # fmt: skip
def test_an_answer_is_shown_by_its_kind(answer: Any, lines: list[str]) -> None:
    assert shown.answer_lines(answer) == lines
