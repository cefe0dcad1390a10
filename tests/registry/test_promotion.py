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

OLD = Standing("3", {"sst2": 0.9, "cola": 0.7}, (), "data")
PRICES = Standing("3", {"sst2": 0.9, "price": 200.0}, ("price",), "data")


def new(sst2: float | None, cola: float | None, **changes: object) -> Standing:
    standing = Standing("4", {"sst2": sst2, "cola": cola}, (), "data")
    return standing._replace(**changes)  # type: ignore[arg-type]


def priced(sst2: float | None, price: float | None) -> Standing:
    return PRICES._replace(version="4", tasks={"sst2": sst2, "price": price})


def test_the_first_version_is_the_champion() -> None:
    assert decide(OLD, None, 0.01) == (CHAMPION, "the first version")


@pytest.mark.parametrize(
    ("candidate", "champion", "alias", "reason"),
    [
        (new(0.91, 0.71), OLD, CHAMPION, "mean score 81.00 %, version 3 has 80.00 %; no task is"),
        (new(0.9, 0.7), OLD, CHAMPION, "mean score 80.00 %, version 3 has 80.00 %; no task is"),
        (new(0.895, 0.72), OLD, CHAMPION, "; sst2 is worse by 0.50, tolerance 1.00"),
        (new(0.88, 0.8), OLD, CHALLENGER, "; sst2 is worse by 2.00, tolerance 1.00"),
        (new(0.9, 0.695), OLD, CHALLENGER, "mean score 79.75 %, version 3 has 80.00 %"),
        (new(1, 1, data="other"), OLD, CHALLENGER, "not comparable: version 3 was evaluated on o"),
        (new(1, 1, tasks={"sst2": 1}), OLD, CHALLENGER, "3 is of other tasks (cola, sst2)"),
        # What is undefined before does not count; a score that is lost does.
        (new(0.91, None), OLD, CHALLENGER, "its score on cola is undefined, version 3 has one"),
        (
            new(0.91, 0.1),
            new(0.9, None, version="3"),
            CHAMPION,
            "mean score 91.00 %, version 3 has",
        ),
        (new(None, None), OLD, CHALLENGER, "not comparable: no task has a score in it and in ver"),
        # Of an error, less is better.
        (priced(0.9, 180), PRICES, CHAMPION, "price has an error of 180, version 3 of 200; no ta"),
        (priced(0.9, 201), PRICES, CHALLENGER, "; price is worse by 0.50, tolerance 1.00"),
        (priced(0.92, 201), PRICES, CHAMPION, "mean score 92.00 %, version 3 has 90.00 %; price"),
        (priced(1, 204), PRICES, CHALLENGER, "; price is worse by 2.00, tolerance 1.00"),
        (priced(None, 200), PRICES, CHALLENGER, "its score on sst2 is undefined, version 3 has"),
    ],
)
def test_a_version_takes_over_that_is_as_good_in_the_mean_and_on_no_task_much_worse(
    candidate: Standing, champion: Standing, alias: str, reason: str
) -> None:
    decision = decide(candidate, champion, 0.01)
    assert (decision.alias, reason in decision.reason) == (alias, True), decision


def test_from_an_error_of_zero_there_is_no_way_up() -> None:
    perfect = priced(0.9, 0)
    assert decide(perfect, perfect, 0.01).alias == CHAMPION
    assert decide(priced(0.9, 1e-9), perfect, 0.01).alias == CHALLENGER


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
