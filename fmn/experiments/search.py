"""Search the coefficients lambda_j of a merge, with Optuna.

The coefficients of m experts are m - 1 ratios to the first expert's, searched on a log scale, and
scaled to sum to m. Each trial is stored when it finishes. The next trial depends only on the seed
and the finished trials, so a search that was killed continues with the same trials.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from fmn.errors import UserError
from fmn.experiments.files import Trial
from fmn.store.stage import Progress, no_progress

if TYPE_CHECKING:
    import optuna

RATIO = 30.0  # largest ratio of a coefficient to the first expert's, and of the first to it

Attempt = Callable[[Mapping[str, float], float], Mapping[str, float]]
"""A function of coefficients by task and a scale; returns shares of the experts' scores by task."""


def coefficients(tasks: Sequence[str], ratios: Sequence[float]) -> dict[str, float]:
    """Coefficients with these ratios to the first task's; their sum is the number of tasks.

    >>> coefficients(["mrpc", "sst2"], [3.0])
    {'mrpc': 0.5, 'sst2': 1.5}
    """
    shares = np.array([1.0, *ratios])
    return dict(zip(tasks, (len(tasks) * shares / shares.sum()).tolist(), strict=True))


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
    progress: Progress = no_progress,
) -> list[Trial]:
    """Try coefficients with TPE until there are `trials` trials; returns all of them in order.

    TPE: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization". The first trial has
    equal coefficients, and the scale `scale` or the nearest one in range.

    Args:
        attempt: computes a trial.
        tasks: the experts' tasks, in order of name.
        scale_range: lowest and highest scale; None: the scale is not searched.
        scale: the scale of the first trial, or of all.
        trials: the number of trials, those of earlier runs included.
        seed: seed of the search.
        file: SQLite file of the trials.
        name: name of the Optuna study; it must differ between searches that score differently.
        progress: called with the finished trials and all of them.

    Raises:
        UserError: `file` is not a file of trials.
    """
    from optuna.trial import TrialState

    names = [f"{task}/{tasks[0]}" for task in tasks[1:]]

    def objective(trial: "optuna.Trial") -> float:
        ratios = [trial.suggest_float(name, 1 / RATIO, RATIO, log=True) for name in names]
        tried_scale = trial.suggest_float("scale", *scale_range) if scale_range else scale
        tried = coefficients(tasks, ratios)
        scores = dict(attempt(tried, tried_scale))
        mean = sum(scores.values()) / len(scores)
        record = Trial(coefficients=tried, scale=tried_scale, score=mean, tasks=scores)
        trial.set_user_attr("trial", record.model_dump())
        return mean

    def finished() -> "list[optuna.trial.FrozenTrial]":
        return study.get_trials(states=(TrialState.COMPLETE,))[:trials]

    def prepare_next(study: "optuna.Study", _trial: Any = None) -> None:
        # A sampler's state ends with the process, so each trial gets a new sampler.
        study.sampler = _sampler(seed, len(finished()))
        progress(len(finished()), trials)

    nearest = {"scale": float(np.clip(scale, *scale_range))} if scale_range else {}
    study = _open_study(file, name, dict.fromkeys(names, 1.0) | nearest)
    prepare_next(study)
    study.optimize(objective, max(0, trials - len(finished())), callbacks=[prepare_next])
    return [Trial.model_validate(trial.user_attrs["trial"]) for trial in finished()]


def _sampler(seed: int, trials: int) -> "optuna.samplers.BaseSampler":
    """A TPE sampler that models all parameters together, seeded by the number of earlier trials."""
    from optuna.samplers import TPESampler

    (state,) = np.random.SeedSequence([seed, trials]).generate_state(1)
    return TPESampler(seed=int(state), multivariate=True)


def _open_study(file: Path, name: str, first: Mapping[str, float]) -> "optuna.Study":
    """Open the study in a file, and mark trials that were killed as failed.

    `first` has the parameters of the first trial.
    """
    import optuna
    from optuna.trial import TrialState
    from sqlalchemy.exc import DatabaseError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file.parent.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///file:{quote(str(file.resolve()))}?uri=true"
    try:
        study = optuna.create_study(
            storage=storage, study_name=name, direction="maximize", load_if_exists=True
        )
    except DatabaseError as error:
        raise UserError(f"{file}: not a file of trials; remove it and run again") from error
    for killed in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(killed.number, state=TrialState.FAIL)
    if not study.get_trials(states=(TrialState.COMPLETE, TrialState.WAITING)):
        study.enqueue_trial(dict(first))
    return study
