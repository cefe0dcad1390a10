"""Decide which version of a registered model is the champion. Does not import MLflow."""

from collections.abc import Collection, Mapping
from math import inf
from statistics import fmean
from typing import NamedTuple

CHAMPION = "champion"
CHALLENGER = "challenger"
NOT_COMPARABLE = "not comparable"  # first words of the reason if two versions cannot be compared
_MAX_CHAMPIONS = 200  # in the history, which must fit into a tag


class Standing(NamedTuple):
    """A version's scores.

    Attributes:
        version: the version's number.
        tasks: scores by task, between 0 and 1 unless they are errors; None if undefined.
        errors: the tasks whose scores are errors: less is better.
        data: digest of the evaluation data.
    """

    version: str
    tasks: Mapping[str, float | None]
    errors: Collection[str]
    data: str


class Decision(NamedTuple):
    """The alias of a new version, and the reason for it."""

    alias: str
    reason: str


def decide(new: Standing, champion: Standing | None, tolerance: float) -> Decision:
    """Decide whether a new version becomes the champion or the challenger.

    It becomes the champion if both versions were scored on the same tasks and data, its mean score
    is at least the champion's, and no task loses more than `tolerance` (0.01 is one percent point;
    for an error, one percent of the champion's error). Tasks on which the champion has no score do
    not count. If only the champion has a score on a task, the new version becomes the challenger.
    """
    if champion is None:
        return Decision(CHAMPION, "the first version")
    name = f"version {champion.version}"
    if not champion.tasks:
        return Decision(CHALLENGER, f"{NOT_COMPARABLE}: {name} does not say what it scored")
    if set(new.tasks) != set(champion.tasks):
        tasks = ", ".join(sorted(champion.tasks))
        return Decision(CHALLENGER, f"{NOT_COMPARABLE}: {name} is of other tasks ({tasks})")
    if new.data != champion.data:
        return Decision(CHALLENGER, f"{NOT_COMPARABLE}: {name} was evaluated on other data")
    pairs = {
        task: (score, before)
        for task, score in new.tasks.items()
        if score is not None and (before := champion.tasks[task]) is not None
    }
    if not pairs:
        return Decision(CHALLENGER, f"{NOT_COMPARABLE}: no task has a score in it and in {name}")
    lost = [task for task in champion.tasks if champion.tasks[task] is not None]
    if lost := [task for task in lost if new.tasks[task] is None]:
        words = f"its score on {', '.join(sorted(lost))} is undefined, {name} has one"
        return Decision(CHALLENGER, words)
    losses = {task: _loss(*pair, task in new.errors) for task, pair in pairs.items()}
    reasons = []
    if shares := [pair for task, pair in pairs.items() if task not in new.errors]:
        means = [_percent(fmean(side)) for side in zip(*shares, strict=True)]
        reasons.append(f"mean score {means[0]} %, {name} has {means[1]} %")
    for task in new.errors:
        if task in pairs:
            score, before = pairs[task]
            reasons.append(f"{task} has an error of {score:.4g}, {name} of {before:.4g}")
    worst = max(losses, key=losses.__getitem__)
    if losses[worst] > 0:
        loss = _percent(losses[worst])
        reasons.append(f"{worst} is worse by {loss}, tolerance {_percent(tolerance)}")
    else:
        reasons.append("no task is worse")
    # 1e-9: differences of decimal scores are not exact in binary.
    is_champion = fmean(losses.values()) <= 1e-9 and losses[worst] <= tolerance + 1e-9
    return Decision(CHAMPION if is_champion else CHALLENGER, "; ".join(reasons))


def _loss(score: float, before: float, is_error: bool) -> float:
    """How much worse a score is than before; for an error, relative to the error before."""
    if not is_error:
        return before - score
    return (score - before) / before if before > 0 else (inf if score > before else 0.0)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def add_champion(history: str, version: str) -> str:
    """Append a champion to the history; if it was one before, the later ones are removed.

    >>> add_champion("1 3 4", "5")
    '1 3 4 5'
    >>> add_champion("1 3 4", "3")
    '1 3'
    """
    champions = [*history.split(), version]
    return " ".join(champions[: champions.index(version) + 1][-_MAX_CHAMPIONS:])


def previous_champion(history: str, champion: str | None, versions: Collection[str]) -> str | None:
    """The latest champion before the present one that still exists; None if there is none."""
    champions = history.split()
    if champion in champions:
        champions = champions[: champions.index(champion)]
    return next((version for version in reversed(champions) if version in versions), None)
