"""Which registered version is the champion: when a new one takes its place, and which held it before."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

CHAMPION = "champion"
CHALLENGER = "challenger"
PROMOTED = "promoted"
RESTORED = "restored"
_KEPT = 60  # events; a registry's tags are bounded


class Standing(NamedTuple):
    """What a version scored.

    Attributes:
        version: its number.
        score: mean over the tasks.
        tasks: the score of each task.
        data: digest of the evaluation data.
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
    """The champion's place for a version that scores at least as much in the mean, and on no task much less.

    Args:
        new: the version that was just registered.
        champion: the version that holds the place.
        tolerance: how much less a task may score, as a share of one.
    """
    if champion is None:
        return Decision(CHAMPION, "the first version")
    before = f"version {champion.version}"
    if not champion.tasks:
        return Decision(CHALLENGER, f"not comparable: {before} does not say what it scored")
    if set(new.tasks) != set(champion.tasks):
        return Decision(
            CHALLENGER,
            f"not comparable: {before} is of other tasks ({', '.join(sorted(champion.tasks))})",
        )
    if new.data != champion.data:
        return Decision(CHALLENGER, f"not comparable: {before} was evaluated on other data")
    means = f"mean score {_percent(new.score)} %, {before} has {_percent(champion.score)} %"
    if new.score < champion.score:
        return Decision(CHALLENGER, means)
    losses = {task: champion.tasks[task] - score for task, score in new.tasks.items()}
    task = max(losses, key=losses.__getitem__)
    if losses[task] <= 0:
        return Decision(CHAMPION, f"{means}; no task scores less")
    worst = f"{means}; {task} scores {_percent(losses[task])} less, tolerance {_percent(tolerance)}"
    return Decision(CHAMPION if losses[task] <= tolerance + 1e-9 else CHALLENGER, worst)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def add(history: str, version: str, how: str, when: str) -> str:
    """The history of the champion's place with one event more: ``1 promoted 2026-11-01T02:00Z; 3 promoted ...``."""
    events = [*filter(None, history.split("; ")), f"{version} {how} {when}"]
    return "; ".join(events[-_KEPT:])


def before(history: str, champion: str | None, there: Collection[str]) -> str | None:
    """The version that held the place before `champion`, among those that are still there; None without one.

    What a rollback took the place from does not count, so that rolling back twice goes two versions back.
    """
    held: list[str] = []
    for event in filter(None, history.split("; ")):
        version, how, _ = event.split(" ")
        if how == RESTORED and version in held:
            held = _up_to(held, version)
        else:
            held.append(version)
    if champion in held:
        held = _up_to(held, champion)[:-1]
    return next(
        (version for version in reversed(held) if version in there and version != champion), None
    )


def _up_to(held: list[str], version: str) -> list[str]:
    return held[: len(held) - held[::-1].index(version)]
