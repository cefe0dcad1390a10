"""Which version of a registered model is the champion. Knows no MLflow."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

CHAMPION = "champion"
CHALLENGER = "challenger"
PROMOTED = "promoted"
RESTORED = "restored"
_MAX_EVENTS = 60  # of a history, which has to fit into a tag


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


def add_event(history: str, version: str, event: str, time: str) -> str:
    """A history of champions with one more event; the oldest events are forgotten.

    >>> add_event("1 promoted 2026-11-01T02:00Z", "3", PROMOTED, "2026-11-02T02:00Z")
    '1 promoted 2026-11-01T02:00Z; 3 promoted 2026-11-02T02:00Z'
    """
    events = [*filter(None, history.split("; ")), f"{version} {event} {time}"]
    return "; ".join(events[-_MAX_EVENTS:])


def previous_champion(history: str, champion: str | None, versions: Collection[str]) -> str | None:
    """The champion before the present one, among the versions that still exist, if any.

    A champion that was rolled back does not count, so that rolling back twice goes two back.
    """
    champions: list[str] = []
    for entry in filter(None, history.split("; ")):
        version, event, _ = entry.split(" ")
        if event == RESTORED and version in champions:
            champions = _before_last(champions, version)
        champions.append(version)
    if champion in champions:
        champions = _before_last(champions, champion)
    candidates = (version for version in reversed(champions) if version in versions)
    return next((version for version in candidates if version != champion), None)


def _before_last(champions: list[str], version: str) -> list[str]:
    """What comes before the last occurrence of a version."""
    return champions[: len(champions) - 1 - champions[::-1].index(version)]
