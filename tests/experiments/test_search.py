"""Search of coefficients: equal ones first, and resumed as if never interrupted."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmn.errors import UserError
from fmn.experiments import search
from fmn.experiments.files import Trial

NAMES = ("cola", "mrpc", "sst2")


def hill(weights: Mapping[str, float], scale: float) -> dict[str, float]:
    """Scores that are best where cola's coefficient is nine times mrpc's, and the scale is 1.5."""
    distance = (math.log(weights["cola"] / weights["mrpc"]) - math.log(9)) ** 2 + (scale - 1.5) ** 2
    return dict.fromkeys(weights, 1 - distance / 100)


def run(file: Path, trials: int = 14, seed: int = 0, attempt: search.Attempt = hill) -> list[Trial]:
    return search.search(
        attempt, NAMES, (0.5, 3.0), trials=trials, seed=seed, file=file, name="study"
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    """The trials of a search that was not interrupted."""
    return run(tmp_path_factory.mktemp("search") / "trials")


@given(st.lists(st.floats(1 / search.RATIO, search.RATIO), max_size=5))
def test_coefficients_have_the_given_ratios_and_sum_to_their_number(ratios: list[float]) -> None:
    tasks = [f"task{number}" for number in range(len(ratios) + 1)]
    values = search.coefficients(tasks, ratios)
    assert sum(values.values()) == pytest.approx(len(tasks))
    assert [values[task] / values["task0"] for task in tasks[1:]] == pytest.approx(ratios)


@pytest.mark.parametrize(
    ("ends", "nearest"), [((0.5, 3.0), 1.2), ((1.5, 3.0), 1.5), ((0.0, 0.5), 0.5), (None, 1.2)]
)
def test_equal_coefficients_come_first(
    tmp_path: Path, ends: tuple[float, float] | None, nearest: float
) -> None:
    (trial,) = search.search(
        hill, NAMES, ends, scale=1.2, trials=1, seed=0, file=tmp_path / "new" / "a?%b", name="study"
    )
    assert trial.coefficients == dict.fromkeys(NAMES, 1.0)
    assert trial.scale == nearest
    assert (tmp_path / "new" / "a?%b").is_file()


def test_it_finds_better_ones_and_repeats_exactly_with_the_seed(
    tmp_path: Path, unbroken: list[Trial]
) -> None:
    trials = run(tmp_path / "a", 30)
    best = max(trials, key=lambda trial: trial.score)
    assert 1 - best.score < 0.2 * (1 - trials[0].score)
    assert best.coefficients["cola"] > 3 * best.coefficients["mrpc"]
    assert unbroken == trials[:14]
    assert run(tmp_path / "b", 3, seed=1)[1:] != trials[1:3]


def test_a_smaller_budget_is_the_beginning_of_a_larger_one(
    tmp_path: Path, unbroken: list[Trial]
) -> None:
    few = run(tmp_path / "trials", 7)
    assert run(tmp_path / "trials") == unbroken
    assert few == unbroken[:7]
    assert run(tmp_path / "trials", 3) == few[:3]


@pytest.mark.parametrize(("done", "is_killed"), [(0, False), (0, True), (11, False), (11, True)])
def test_an_interrupted_search_goes_on_as_if_it_never_was(
    tmp_path: Path, done: int, is_killed: bool, unbroken: list[Trial]
) -> None:
    tried: list[float] = []

    def interrupted(weights: Mapping[str, float], scale: float) -> dict[str, float]:
        tried.append(scale)
        if len(tried) == done + 1:
            raise KeyboardInterrupt
        return hill(weights, scale)

    file = tmp_path / "trials"
    with pytest.raises(KeyboardInterrupt):
        run(file, attempt=interrupted)
    if is_killed:  # which leaves a trial that is running for ever
        search._open_study(file, "study", dict.fromkeys(["mrpc/cola", "sst2/cola"], 1.0)).ask()
    trials = run(file, attempt=interrupted)
    assert len(tried) == 15, "only the trial that was interrupted is repeated"
    assert trials == unbroken


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trials").write_text("years of work")
    with pytest.raises(UserError, match="not a file of trials; remove it"):
        run(tmp_path / "trials", 4)
    assert (tmp_path / "trials").read_text() == "years of work"
