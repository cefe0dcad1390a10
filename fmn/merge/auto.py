"""Method ``auto``: try several merges in memory, and choose the best.

The error of a merge is the difference between the experts' answers to training texts and the
answers of heads on the merged encoder; labels are not read. For each task, the last map of the head
is refitted on one half of the texts (`fmn.merge.heads.refit`), and the error is measured on the
other half, and then with the halves exchanged: the mean squared difference of the logits from the
expert's, divided by the variance of the expert's. (The error on the texts that a head was fitted to
does not rank encoders.) The candidate with the smallest mean error over tasks is chosen.

For a task without a head, the error is that of its outputs (`fmn.merge.heads.outputs`).

The plain average is the first candidate, so the choice is never worse than it by this measure.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fmn.errors import UserError
from fmn.fisher.architectures import own_parts
from fmn.merge import heads, model
from fmn.merge.inputs import NO_STATISTICS, Statistics
from fmn.merge.methods import METHODS, Method
from fmn.merge.recipe import Auto, Candidate, MergeSettings
from fmn.models import checkpoints, loading
from fmn.models.devices import resolve_device, side_by_side
from fmn.store.stage import Progress, no_progress
from fmn.tasks.batches import Examples
from fmn.tasks.kinds import KINDS

TEXTS = 256  # number of texts of each task
AVERAGE = "average"
TRIED = {
    **{AVERAGE: 0.0, "mask-fisher": 0.2, "regmean": 0.2, "fisher-regmean": 0.2},
    **{"tsv-m": 0.2, "fisher-tsv-m": 0.2},
}
"""The methods, each with a power of the effective number of task vectors, which is its scale."""
WITHOUT_FISHER = ("tsv-m",)  # tried only without Fisher information, with which it is better
GROWTHS = (0.0, 0.2, 0.4)  # the best method is then tried at all of these powers
Encoder = Mapping[str, Tensor]  # tensors by names in the base model


class Choice(NamedTuple):
    """The candidates, without the digests of the texts; and the best merge's encoder."""

    auto: Auto
    encoder: Encoder


class Goal(NamedTuple):
    """An expert's answers to its texts.

    Attributes:
        expert: the expert's folder.
        examples: the texts.
        features: the input of the head's last map for them, [N, n]; without a head, the outputs.
        weight, bias: the head's last map; None without a head.
    """

    expert: Path
    examples: Examples
    features: np.ndarray
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None


def choose(
    experts: Mapping[str, Path],
    examples: Mapping[str, Examples],
    settings: MergeSettings,
    *,
    base: Path | None = None,
    statistics: Statistics = NO_STATISTICS,
    progress: Progress = no_progress,
) -> Choice:
    """Try merges of experts: every method at one scale, then the best method at other scales.

    Args:
        experts: checkpoint folders by task.
        examples: unlabeled texts of each task, at least two.
        settings: the settings of all merges, and how to measure.
        base: their base's folder; without it, what needs it is not tried, and the scale is 1.
        statistics: mask Fisher, Gram matrices, or both; methods that need others are not tried.
        progress: called with the number of measured merges, and with their largest number.

    Raises:
        UserError: a task has too few texts, or the experts cannot be merged.
    """
    device = resolve_device(settings.device)
    goals = {task: _goal(task, experts[task], examples[task], settings) for task in sorted(experts)}
    names = [name for name in TRIED if _is_tried(METHODS[name], statistics, base)]
    total = len(names) + (len(GROWTHS) if base else 0)
    tried: list[Candidate] = []

    def merged(name: str, scale: float) -> Encoder:
        chosen = settings.model_copy(update={"method": name, "scale": scale})
        return model.in_memory(experts, chosen, base, statistics)

    def attempt(name: str, encoder: Encoder, scale: float) -> None:
        tensors = _scaled(encoder, origin, scale)
        measured = side_by_side(partial(_error, tensors, settings), goals.values(), device)
        errors = dict(zip(goals, measured, strict=True))
        mean = float(np.mean(list(errors.values())))
        tried.append(Candidate(method=name, scale=scale, error=mean, tasks=errors))
        progress(len(tried), max(total, len(tried)))

    origin = merged(AVERAGE, 0.0) if base else {}
    number = model.effective_number_of(experts, base) if base else 1.0
    best: Encoder = {}
    for name in names:
        encoder = merged(name, 1.0)
        attempt(name, encoder, round(number ** TRIED[name], 3))
        best = encoder if _best(tried) is tried[-1] else best
    name = _best(tried).method
    for growth in GROWTHS:
        if (scale := round(number**growth, 3)) not in _errors(tried, name):
            attempt(name, best, scale)
    if (scale := lowest(_errors(tried, name))) not in _errors(tried, name):
        attempt(name, best, scale)
    shared: dict[str, Any] = {
        "heads": settings.auto_heads,
        "seed": settings.seed,
        "dtype": settings.dtype,
    }
    auto = Auto(**shared, texts={t: len(g.examples) for t, g in goals.items()}, candidates=tried)
    return Choice(auto, _scaled(best, origin, auto.chosen.scale))


def _scaled(encoder: Encoder, base: Encoder, scale: float) -> Encoder:
    """Scale an encoder's difference from the base."""
    if scale == 1:
        return encoder
    return {name: base[name].lerp(tensor, scale) for name, tensor in encoder.items()}


def _best(candidates: Sequence[Candidate]) -> Candidate:
    return min(candidates, key=lambda candidate: candidate.error)


def _errors(candidates: Sequence[Candidate], method: str) -> dict[float, float]:
    """The errors of a method, by scale."""
    return {each.scale: each.error for each in candidates if each.method == method}


def _is_tried(method: Method, statistics: Statistics, base: Path | None) -> bool:
    if method.name in WITHOUT_FISHER and statistics.fisher:
        return False
    needs = {"fisher": method.fisher, "gram": method.gram, "base": method.base}
    at_hand = {"fisher": statistics.fisher, "gram": statistics.grams, "base": base}
    return all(at_hand[name] for name, is_needed in needs.items() if is_needed)


def _goal(task: str, expert: Path, examples: Examples, settings: MergeSettings) -> Goal:
    if len(examples) < 2:
        raise UserError(f"{task}: method auto needs two training texts of it; add rows")
    loaded = loading.load_model(expert)
    has_head = KINDS[checkpoints.kind_in(expert)].has_head
    read = heads.features if has_head else heads.outputs
    own = read(loaded, examples, device=settings.device, dtype=settings.dtype)
    return Goal(expert, examples, own, *(heads.last_map(loaded) if has_head else ()))


def _error(encoder: Encoder, settings: MergeSettings, goal: Goal) -> float:
    """The error of a head on another encoder; with a refitted head, the pooler is the expert's."""
    loaded = loading.load_model(goal.expert)
    tensors, is_refitted = dict(encoder), settings.auto_heads == "refitted"
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in own_parts(loaded.config, shapes, pooler=is_refitted):  # as `fmn realign` has it
        del tensors[name]
    loading.fit_vocabulary(loaded.base_model, tensors)
    checkpoints.load_encoder(loaded, tensors)
    read = heads.outputs if goal.weight is None else heads.features
    answers = read(loaded, goal.examples, device=settings.device, dtype=settings.dtype)
    texts = heads.answering(goal.examples)
    return error(goal.features, answers, goal.weight, goal.bias, settings.auto_heads, texts)


def error(
    own: np.ndarray,
    merged: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    kind: str = "refitted",
    texts: np.ndarray | None = None,
) -> float:
    """The mean squared difference from the expert's answers, divided by their variance.

    Args:
        own, merged: [N, n], inputs of the head's last map in the expert and in the merged model.
        weight, bias: [C, n] and [C], that map; without it, `own` and `merged` are the answers.
        kind: "refitted": the map is refitted on every second text and answers the other texts, and
            vice versa; "own": the map does not change.
        texts: [N], the number of each row's text; default: each row is a text of its own.
    """
    if weight is None:
        return float(np.square(merged - own).mean() / (own.var(0).mean() or 1.0))
    wanted = own @ weight.T  # [N, C], without the bias
    answers = merged @ weight.T
    is_odd = (np.arange(len(own)) if texts is None else texts) % 2 == 1
    for fitted in (is_odd, ~is_odd) if kind == "refitted" else ():
        new, new_bias, _ = heads.refit(own[fitted], merged[fitted], weight, bias)
        shift = 0.0 if bias is None or new_bias is None else new_bias - bias
        answers[~fitted] = merged[~fitted] @ new.T + shift
    return float(np.square(answers - wanted).mean() / (wanted.var(0).mean() or 1.0))


def lowest(errors: Mapping[float, float]) -> float:
    """The scale at the minimum of a parabola through the errors by scale, at most 25 % outside.

    With fewer than three scales, or without a minimum, it is the best of the scales.

    >>> lowest({1.0: 0.5, 1.2: 0.34, 1.5: 0.25})
    1.5
    """
    best = min(errors, key=errors.__getitem__)
    if len(errors) < 3:
        return best
    curvature, slope, _ = np.polyfit([*errors], [*errors.values()], 2)
    if curvature <= 0:
        return best
    vertex = np.clip(-slope / (2 * curvature), 0.8 * min(errors), 1.25 * max(errors))
    return round(float(vertex), 3)
