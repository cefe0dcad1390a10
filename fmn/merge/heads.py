"""Heads re-aligned with a merged encoder: each head's last linear map, fitted to its expert.

A merged encoder hands a head other features than the expert's encoder, which the head was trained
on. For texts x without labels, let g(x) be what the head's last linear map W, b reads in the
expert, and h(x) what it reads in the merged model. The map that answers from h as the expert does
from g is found by ridge regression about W, b itself:

    min over W', b' of   mean_x |W' h(x) + b' - (W g(x) + b)|^2
                         + ridge * E * (|W' - W|^2 + |b' - b|^2)

E is the mean over features (1, which b multiplies, is one) of their second moment, so that `ridge`
has no unit. The head stays as it is where both encoders are the same, and as `ridge` grows. "auto"
is the one of `RIDGES` with the least leave-one-out error, which needs no other texts (PRESS: Allen
1974, "The Relationship between Variable Selection and Data Augmentation and a Method for
Prediction").
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fmn.errors import UserError
from fmn.fisher.loss import uniform_draws
from fmn.merge.calibrate import own_part
from fmn.merge.recipe import Fit, RefitSettings
from fmn.models import loading
from fmn.models.checkpoints import last_linear as last_linear
from fmn.models.predict import predict
from fmn.tasks import dataset
from fmn.tasks.batches import IGNORED, Batch, Examples, random_order, select
from fmn.tasks.encoding import encode
from fmn.tasks.task import Task

RIDGES = tuple(10 ** (half / 2) for half in range(-12, 9))
"""What "auto" chooses from: two a decade."""
MOST = 2**15  # words that a head is fitted to, so that memory is bounded
_CHUNK = 128


def last_map(model: PreTrainedModel) -> tuple[np.ndarray, np.ndarray | None]:
    """Weight [C, n] and bias [C], or None, of the head's last linear map, float64."""
    linear = model.get_submodule(last_linear(model))
    arrays = {
        name: value.detach().double().cpu().numpy() for name, value in linear.named_parameters()
    }
    return arrays["weight"], arrays.get("bias")


def features(
    model: PreTrainedModel, examples: Examples, *, device: str = "auto", dtype: str = "auto"
) -> np.ndarray:
    """What the last linear map of the head reads, float32 [N, n], in the examples' order.

    Of tags, N are the first tokens of words, which answer (`answering`). What the labels are is not
    looked at. Other arguments as for `fmn.models.predict.predict`.
    """
    path = last_linear(model)
    linear = model.get_submodule(path)
    # So the model gives, of every token's features, those that it answers from.
    model.set_submodule(path, nn.Identity())
    try:
        if not examples.has_token_labels:
            return predict(model, examples, device=device, dtype=dtype)
        parts = []
        for start in range(0, len(examples), _CHUNK):  # all positions of few texts at a time
            chunk = examples.take(np.arange(start, min(start + _CHUNK, len(examples))))
            states = predict(model, chunk, device=device, dtype=dtype)  # [texts, T, n]
            is_answer = (chunk.labels != IGNORED)[:, : states.shape[1]]
            parts.append(states[:, : is_answer.shape[1]][is_answer])
        return np.concatenate(parts)
    finally:
        model.set_submodule(path, linear)


def outputs(
    model: PreTrainedModel, examples: Examples, *, device: str = "auto", dtype: str = "auto"
) -> np.ndarray:
    """What a model without a head of its own answers, float32 [N, D], in the examples' order.

    Of an embedding model the embeddings. Of a generative one the logits, less their mean, of one
    token of each completion, always the same. Arguments as for `features`.
    """
    reduce = _logits_of_a_token if model.can_generate() else None
    return predict(model, examples, device=device, dtype=dtype, reduce=reduce)


def _logits_of_a_token(logits: Tensor, batch: Batch) -> Tensor:
    """From the logits of all labelled tokens, [M, C], those of one of each example, [B, C]."""
    counts = (batch.labels != IGNORED).sum(1)  # [B]
    places = (torch.from_numpy(uniform_draws(0, batch.rows)[:, 0]) * counts).long()
    places = (counts.cumsum(0) - counts + places).clamp(max=len(logits) - 1)
    chosen = logits[places.to(logits.device)].float()
    return chosen - chosen.mean(1, keepdim=True)


def answering(examples: Examples) -> np.ndarray:
    """The example that each row of `features` is of, int64 [N]."""
    if examples.has_token_labels:
        return np.nonzero(examples.labels != IGNORED)[0]
    return np.arange(len(examples))


def bounded(examples: Examples) -> Examples:
    """The first examples, of at most `MOST` rows of `features`, but at least one example."""
    if not examples.has_token_labels:
        return examples
    counts = (examples.labels != IGNORED).sum(1).cumsum()
    return examples.take(np.arange(max(1, int((counts <= MOST).sum()))))


def refit(
    own: np.ndarray,
    merged: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    ridge: float | str = "auto",
) -> tuple[np.ndarray, np.ndarray | None, Fit]:
    """The map that answers from the merged model's features as the expert does from its own.

    Args:
        own, merged: [N, n], what the map reads in the expert and in the merged model, of the same
            N texts.
        weight, bias: [C, n] and [C], the map as it is.
        ridge: at least 0, or "auto" (see above).

    Returns:
        the new weight and bias, float64, and how well they fit.
    """
    old = np.asarray(weight, np.float64)
    lacking = (np.asarray(own, np.float64) - merged) @ old.T  # [N, C]; the bias is on both sides
    read = np.asarray(merged, np.float64)
    if bias is not None:
        read = np.concatenate([read, np.ones((len(read), 1))], 1)  # [N, n + 1]
    left, spread, right = np.linalg.svd(read, full_matrices=False)
    is_signal = spread > spread[0] * max(read.shape) * np.finfo(np.float64).eps
    left, spread, right = left[:, is_signal], spread[is_signal], right[is_signal]
    energy = float((spread**2).sum()) / read.shape[1]
    turned = left.T @ lacking  # [k, C]

    def error(ridge: float) -> float:
        shrunk = spread**2 / (spread**2 + ridge * energy)
        rest = 1 - (left**2 @ shrunk)  # [N], one minus each text's leverage
        if rest.min() < 1e-9:  # a text alone decides what the map answers to it
            return np.inf
        return float((((lacking - left @ (shrunk[:, None] * turned)) / rest[:, None]) ** 2).mean())

    chosen = min(reversed(RIDGES), key=error) if isinstance(ridge, str) else ridge
    step = right.T @ ((spread / (spread**2 + chosen * energy))[:, None] * turned)  # [n or n + 1, C]
    variance = float((own @ old.T).var(0).mean()) or 1.0
    left_out = error(chosen)
    fit = Fit(
        texts=len(read),
        ridge=chosen,
        before=float((lacking**2).mean()) / variance,
        after=left_out / variance if np.isfinite(left_out) else None,
    )
    new_bias = None if bias is None else bias + step[-1]
    return old + step[: old.shape[1]].T, new_bias, fit


def tensors(
    model: PreTrainedModel, weight: np.ndarray, bias: np.ndarray | None
) -> dict[str, Tensor]:
    """A new last map of a model's head as tensors, by their names and in their dtypes there."""
    path = last_linear(model)
    return {
        f"{path}.{name}": torch.from_numpy(value).to(model.get_parameter(f"{path}.{name}").dtype)
        for name, value in {"weight": weight, "bias": bias}.items()
        if value is not None
    }


def realigned_head(
    expert: Path,
    merged: Path,
    own_parts: Collection[str],
    examples: Examples,
    settings: RefitSettings,
    device: str,
    dtype: str,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Fit]:
    """A task's own parts, its head re-aligned with the merged encoder below, and how well it fits.

    Args:
        expert: the expert's folder.
        merged: the folder of its task in the merged model.
        own_parts: the encoder's tensors, by names in the base model, that are to be the task's own.
        examples: unlabeled texts.
        settings: how to fit the head, and how many own layers there are.

    Returns:
        the changed tensors of the head by names in the classifier, the own parts by names in the
        base model, and the fit.
    """
    model, merged_model = loading.load_model(expert), loading.load_model(merged)
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    encoder = merged_model.base_model.state_dict()
    own = own_part(
        model, encoder, own_parts, settings.own_layers, examples, seed=settings.seed, **options
    )
    merged_model.base_model.load_state_dict(own, strict=False)
    wanted = features(model, examples, **options)
    read = features(merged_model, examples, **options)
    weight, bias, fit = refit(wanted, read, *last_map(model), settings.ridge)
    fit = fit.model_copy(update={"texts": len(examples)})
    return tensors(model, weight, bias), own, fit


def unseen_first(
    total: int, seed: int, tuned_on: tuple[int | None, int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """A split's rows in random order: those that the expert was not tuned on, and the others.

    Args:
        total: the number of rows.
        tuned_on: how many of them (None: all), and the seed that drew them; None: it was on none.
    """
    rows = np.zeros(total)  # which rows are drawn depends on nothing but how many there are
    order = random_order(rows, seed)
    is_seen = np.isin(order, select(rows, *tuned_on) if tuned_on else [])
    return order[~is_seen], order[is_seen]


def unlabeled(
    checkpoint: Path,
    task: Task,
    folder: Path,
    texts: int | None,
    seed: int,
    tuned_on: tuple[int | None, int],
    without: Collection[int] = (),
) -> Examples:
    """Texts of the training split below `folder` to re-align a head on; labels are not read.

    Those that the expert was not tuned on come first: what it says of new texts is less sure.

    Args:
        texts: how many (None: all), drawn by `seed`.
        tuned_on: as for `unseen_first`.
        without: rows that must not be among them.
    """
    table = dataset.read_split(folder, task, "train", labelled=False)
    order = np.concatenate(unseen_first(table.num_rows, seed, tuned_on))
    rows = order[~np.isin(order, list(without))][:texts]
    if not len(rows):
        raise UserError(
            f"{task.name}: no training text is left to re-align its head on; score fewer rows"
        )
    processor = loading.load_processor(checkpoint, task.task)
    examples = bounded(encode(processor, task, table.take(np.sort(rows))))
    if examples.has_token_labels and not (examples.labels != IGNORED).any():
        raise UserError(f"{task.name}: its training texts have no words; give some that have")
    return examples
