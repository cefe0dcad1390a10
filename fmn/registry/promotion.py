"""Which version of a registered model is the champion. Knows no MLflow."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

CHAMPION = "champion"
CHALLENGER = "challenger"
_MAX_CHAMPIONS = 200  # of a history, which has to fit into a tag


class Standing(NamedTuple):
    """What a version scored: the mean over tasks, and each task, as shares of one.

    `data` is the digest of the evaluation data.
    """

    version: str
    score: float
    tasks: Mapping[str, float]
    data: str


class Decision(NamedTuple):
    """The alias that a new version gets, and why."""

    alias: str
    reason: str


def decide(new: Standing, champion: Standing | None, tolerance: float) -> Decision:
    """Whether a new version becomes the champion or the challenger.

    It becomes the champion if its mean score is at least the champion's and no task's score is
    lower by more than `tolerance`, a share of one, on the same tasks and data.
    """
    if champion is None:
        return Decision(CHAMPION, "the first version")
    name = f"version {champion.version}"
    if not champion.tasks:
        return Decision(CHALLENGER, f"not comparable: {name} does not say what it scored")
    if set(new.tasks) != set(champion.tasks):
        tasks = ", ".join(sorted(champion.tasks))
        return Decision(CHALLENGER, f"not comparable: {name} is of other tasks ({tasks})")
    if new.data != champion.data:
        return Decision(CHALLENGER, f"not comparable: {name} was evaluated on other data")
    means = f"mean score {_percent(new.score)} %, {name} has {_percent(champion.score)} %"
    if new.score < champion.score:
        return Decision(CHALLENGER, means)
    losses = {task: champion.tasks[task] - score for task, score in new.tasks.items()}
    task = max(losses, key=losses.__getitem__)
    if losses[task] <= 0:
        return Decision(CHAMPION, f"{means}; no task scores less")
    loss = f"{task} scores {_percent(losses[task])} less, tolerance {_percent(tolerance)}"
    # 1e-9: differences of decimal scores are not exact in binary.
    alias = CHAMPION if losses[task] <= tolerance + 1e-9 else CHALLENGER
    return Decision(alias, f"{means}; {loss}")


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
