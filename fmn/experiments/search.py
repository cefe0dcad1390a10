"""Coefficients lambda_j by search: which ones to try, and the trials, kept in an Optuna study.

The coefficients of m experts are m - 1 ratios to the first one's, searched on a log scale, and scaled to sum to m. What
is tried next depends on nothing but the seed and the trials before it, and a trial is stored when it is done, at once:
a search that was killed goes on, and tries what an unbroken one would have tried.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, create_trial

RATIO = 30.0  # of a coefficient to the first expert's, at most, either way
SCALE = "scale"
SCORES = "scores"

optuna.logging.set_verbosity(optuna.logging.ERROR)

Attempt = Callable[[Mapping[str, float], float], Mapping[str, float]]
"""Coefficients by task, and the scale, to every task's score relative to its expert's."""


@dataclass(frozen=True)
class Trial:
    """What was tried, and every task's score relative to its expert's."""

    coefficients: Mapping[str, float]
    scale: float
    scores: Mapping[str, float]

    @property
    def score(self) -> float:
        """The objective: the mean over tasks."""
        return mean(self.scores)


def mean(scores: Mapping[str, float]) -> float:
    """Over the tasks."""
    return sum(scores.values()) / len(scores)


def space(
    tasks: Sequence[str], scale_range: tuple[float, float] | None
) -> dict[str, FloatDistribution]:
    """What is searched: a ratio for every task but the first, and the scale where it has a range."""
    ratios = {
        _ratio(task, tasks[0]): FloatDistribution(1 / RATIO, RATIO, log=True) for task in tasks[1:]
    }
    return ratios if scale_range is None else {**ratios, SCALE: FloatDistribution(*scale_range)}


def _ratio(task: str, first: str) -> str:
    return f"{task}/{first}"


def coefficients(tasks: Sequence[str], params: Mapping[str, float]) -> dict[str, float]:
    """The coefficients by task that the ratios stand for; their sum is the number of tasks."""
    ratios = [1.0, *(params[_ratio(task, tasks[0])] for task in tasks[1:])]
    return {
        task: len(tasks) * ratio / sum(ratios) for task, ratio in zip(tasks, ratios, strict=True)
    }


def suggest(
    done: Sequence[FrozenTrial], searched: Mapping[str, FloatDistribution], scale: float, seed: int
) -> dict[str, float]:
    """What to try after these trials: first equal coefficients and the scale nearest to `scale`, then TPE's proposal.

    TPE: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization", with all that is searched in one model.
    """
    if not done:
        first = {name: scale if name == SCALE else 1.0 for name in searched}
        return {
            name: min(max(value, searched[name].low), searched[name].high)
            for name, value in first.items()
        }
    seeds = np.random.SeedSequence([seed, len(done)])
    sampler = TPESampler(
        seed=int(seeds.generate_state(1)[0]), multivariate=True, constant_liar=False
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials(done)
    fixed: dict[str, BaseDistribution] = {**searched}
    return study.ask(fixed).params


def search(
    attempt: Attempt,
    tasks: Sequence[str],
    scale_range: tuple[float, float] | None,
    *,
    scale: float = 1.0,
    trials: int,
    seed: int,
    file: Path,
    name: str,
    report: Callable[[Sequence[Trial]], None] = lambda done: None,
) -> list[Trial]:
    """Try coefficients until there are so many trials, and return them in order, the one of equal coefficients first.

    Args:
        attempt: computes a trial.
        tasks: of the experts, in order of name.
        scale_range: lowest and highest scale, where it is searched.
        scale: where it is not searched, and else of the first trial, or the nearest in range.
        trials: the budget, with those that are there already.
        seed: of the suggestions.
        file: Optuna's journal, whose study ``name`` holds the trials; nobody else may write there meanwhile.
        name: must differ between searches whose trials score differently.
        report: called with the trials so far, at once and after each.
    """
    searched = space(tasks, scale_range)
    study = _study(file, name)

    def done() -> list[FrozenTrial]:
        return study.get_trials()[:trials]

    def read() -> list[Trial]:
        return [
            Trial(
                coefficients(tasks, trial.params),
                trial.params.get(SCALE, scale),
                trial.user_attrs[SCORES],
            )
            for trial in done()
        ]

    report(read())
    while len(before := done()) < trials:
        params = suggest(before, searched, scale, seed)
        scores = dict(attempt(coefficients(tasks, params), params.get(SCALE, scale)))
        stated: dict[str, BaseDistribution] = {**searched}
        study.add_trial(
            create_trial(
                params=params, distributions=stated, value=mean(scores), user_attrs={SCORES: scores}
            )
        )
        report(read())
    return read()


def _study(file: Path, name: str) -> optuna.Study:
    """The study in Optuna's journal, without the half line and the lock of a kill; begun anew where that is damaged."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{file}.lock").unlink(missing_ok=True)
    if file.is_file():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)

    def load() -> optuna.Study:
        storage = JournalStorage(JournalFileBackend(str(file)))
        return optuna.create_study(
            storage=storage, study_name=name, direction="maximize", load_if_exists=True
        )

    try:
        return load()
    except (ValueError, KeyError, TypeError):
        file.unlink()
        return load()
