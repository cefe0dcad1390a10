"""Which version of a registered model is the champion. Knows no MLflow."""

from collections.abc import Collection, Mapping
from math import inf
from statistics import fmean
from typing import NamedTuple

CHAMPION = "champion"
CHALLENGER = "challenger"
NOT_COMPARABLE = "not comparable"  # begins the reason of a decision between such versions
_MAX_CHAMPIONS = 200  # of a history, which has to fit into a tag


class Standing(NamedTuple):
    """What a version scored on each task, as a share of one; None if that is undefined.

    `errors` are the tasks where less is better. `data` is the digest of the evaluation data.
    """

    version: str
    tasks: Mapping[str, float | None]
    errors: Collection[str]
    data: str


class Decision(NamedTuple):
    """The alias that a new version gets, and why."""

    alias: str
    reason: str


def decide(new: Standing, champion: Standing | None, tolerance: float) -> Decision:
    """Whether a new version becomes the champion or the challenger.

    It becomes the champion if in the mean over tasks it is at least as good, and on no task worse
    by more than `tolerance`, a share of one, on the same tasks and data. Of an error, where less is
    better, the share is that of the champion's error. What the champion has no score on does not
    count; a version without a score where the champion has one does not become it.
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
    """How much worse a score is than before, as a share of one; of an error, of that before."""
    if not is_error:
        return before - score
    return (score - before) / before if before > 0 else (inf if score > before else 0.0)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def add_champion(history: str, version: str) -> str:
    """The champions in turn, with one more; one that comes back has those after it forgotten.

    >>> add_champion("1 3 4", "5")
    '1 3 4 5'
    >>> add_champion("1 3 4", "3")
    '1 3'
    """
    champions = [*history.split(), version]
    return " ".join(champions[: champions.index(version) + 1][-_MAX_CHAMPIONS:])


def previous_champion(history: str, champion: str | None, versions: Collection[str]) -> str | None:
    """The champion before the present one, among the versions that still exist, if any."""
    champions = history.split()
    if champion in champions:
        champions = champions[: champions.index(champion)]
    return next((version for version in reversed(champions) if version in versions), None)
