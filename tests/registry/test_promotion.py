"""Which version is the champion, and which one was before it."""

import pytest

from fmn.registry.promotion import (
    CHALLENGER,
    CHAMPION,
    Standing,
    add_champion,
    decide,
    previous_champion,
)

OLD = Standing("3", 0.80, {"sst2": 0.9, "cola": 0.7}, "data")


def new(sst2: float, cola: float, **changes: object) -> Standing:
    standing = Standing("4", (sst2 + cola) / 2, {"sst2": sst2, "cola": cola}, "data")
    return standing._replace(**changes)  # type: ignore[arg-type]


def test_the_first_version_is_the_champion() -> None:
    assert decide(OLD, None, 0.01) == (CHAMPION, "the first version")


@pytest.mark.parametrize(
    ("candidate", "alias", "reason"),
    [
        (new(0.91, 0.71), CHAMPION, "mean score 81.00 %, version 3 has 80.00 %; no task scores"),
        (new(0.9, 0.7), CHAMPION, "mean score 80.00 %, version 3 has 80.00 %; no task scores less"),
        (new(0.895, 0.72), CHAMPION, "; sst2 scores 0.50 less, tolerance 1.00"),
        (new(0.88, 0.8), CHALLENGER, "; sst2 scores 2.00 less, tolerance 1.00"),
        (new(0.9, 0.695), CHALLENGER, "mean score 79.75 %, version 3 has 80.00 %"),
        (new(1, 1, data="other"), CHALLENGER, "not comparable: version 3 was evaluated on other"),
        (new(1, 1, tasks={"sst2": 1}), CHALLENGER, "version 3 is of other tasks (cola, sst2)"),
    ],
)
def test_a_version_takes_over_that_is_as_good_in_the_mean_and_on_no_task_much_worse(
    candidate: Standing, alias: str, reason: str
) -> None:
    decision = decide(candidate, OLD, 0.01)
    assert decision.alias == alias
    assert reason in decision.reason


def test_a_champion_of_unknown_scores_keeps_its_place() -> None:
    reason = "not comparable: version 3 does not say what it scored"
    assert decide(new(0.9, 0.9), OLD._replace(tasks={}), 0.01) == (CHALLENGER, reason)


def test_rolling_back_twice_goes_two_champions_back() -> None:
    versions = {"1", "2", "3", "4", "5"}
    assert previous_champion("1 3 4", "4", versions) == "3"
    history = add_champion("1 3 4", "3")
    assert previous_champion(history, "3", versions) == "1"
    history = add_champion(history, "1")
    assert previous_champion(history, "1", versions) is None
    assert previous_champion(add_champion(history, "5"), "5", versions) == "1"


@pytest.mark.parametrize(
    ("history", "champion", "versions", "before"),
    [
        ("1 3 4", "4", {"1", "4"}, "1"),  # 3 was deleted
        ("1 3", "2", {"1", "2", "3"}, "3"),  # the alias was moved by hand
        ("", "2", {"1", "2"}, None),
    ],
)
def test_the_champion_before_is_the_last_known_one_that_exists(
    history: str, champion: str, versions: set[str], before: str | None
) -> None:
    assert previous_champion(history, champion, versions) == before


def test_the_history_stays_short_enough_for_a_tag() -> None:
    history = ""
    for version in range(1000, 3000):
        history = add_champion(history, str(version))
    assert len(history) < 2000
    assert previous_champion(history, "2999", {str(version) for version in range(3000)}) == "2998"
