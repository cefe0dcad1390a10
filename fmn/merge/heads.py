"""Re-align heads with a merged encoder: fit each head's last linear map to its expert's answers.

A head was trained on the features of its expert's encoder, and the features of a merged encoder
differ. For texts x without labels, let g(x) be the input of the head's last linear map W, b in the
expert, and h(x) its input in the merged model. Ridge regression around W, b gives the map whose
answers from h are nearest to the expert's answers from g:

    min over W', b' of   mean_x |W' h(x) + b' - (W g(x) + b)|^2
                         + ridge * E * (|W' - W|^2 + |b' - b|^2)

E is the mean second moment of the features, with a constant feature 1 for b, so that `ridge` has no
unit. If both encoders are the same, or if `ridge` is very large, the head does not change. "auto"
chooses the ridge in `RIDGES` with the smallest leave-one-out error, which needs no other texts
(PRESS: Allen 1974, "The Relationship between Variable Selection and Data Augmentation and a Method
for Prediction").
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fmn.errors import UserError
from fmn.fisher.loss import uniform_draws
from fmn.merge.calibrate import calibrated_encoder
from fmn.merge.recipe import CalibrationSettings, Fit, RefitSettings
from fmn.models import loading
from fmn.models.checkpoints import last_linear as last_linear
from fmn.models.predict import predict
from fmn.tasks import dataset
from fmn.tasks.batches import IGNORED, Batch, Examples, random_order, select
from fmn.tasks.encoding import encode
from fmn.tasks.task import Task

RIDGES = tuple(10 ** (half / 2) for half in range(-12, 9))
"""The ridges that "auto" chooses from."""
MOST = 2**15  # words that a head is fitted to at most, so that memory is bounded
OWN_TEXTS = 256  # texts that an expert's own layers are calibrated on
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
    """The input of the head's last linear map, float32 [N, n], in the examples' order.

    N is the number of examples; for taggers, of words (`answering`): a word is read at its first
    token. Labels are not read. Other arguments as for `fmn.models.predict.predict`.
    """
    path = last_linear(model)
    linear = model.get_submodule(path)
    model.set_submodule(path, nn.Identity())  # the model then returns this map's input
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
    """The outputs of a model without a head of its own, float32 [N, D], in the examples' order.

    For an embedding model, the embeddings. For a generative model, the logits of one token of each
    completion, minus their mean; the draw of the token has a fixed seed. Arguments as for
    `features`.
    """
    reduce = _logits_of_a_token if model.can_generate() else None
    return predict(model, examples, device=device, dtype=dtype, reduce=reduce)


def _logits_of_a_token(logits: Tensor, batch: Batch) -> Tensor:
    """Select one labelled token of each example, [B, C], from the logits of all, [M, C]."""
    counts = (batch.labels != IGNORED).sum(1)  # [B]
    places = (torch.from_numpy(uniform_draws(0, batch.rows)[:, 0]) * counts).long()
    places = (counts.cumsum(0) - counts + places).clamp(max=len(logits) - 1)
    chosen = logits[places.to(logits.device)].float()
    return chosen - chosen.mean(1, keepdim=True)


def answering(examples: Examples) -> np.ndarray:
    """The number of the example that each row of `features` belongs to, int64 [N]."""
    if examples.has_token_labels:
        return np.nonzero(examples.labels != IGNORED)[0]
    return np.arange(len(examples))


def bounded(examples: Examples) -> Examples:
    """The first examples, at least one, that give at most `MOST` rows of `features`."""
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
    """Fit a head's last linear map to the merged model's features (the module's equation).

    Args:
        own, merged: [N, n], the map's input in the expert and in the merged model, for the same N
            texts.
        weight, bias: [C, n] and [C], the map before.
        ridge: at least 0, or "auto" (see above).

    Returns:
        the new weight and bias, float64, and how well they fit.
    """
    old = np.asarray(weight, np.float64)
    lacking = (np.asarray(own, np.float64) - merged) @ old.T  # [N, C]; the bias cancels
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
        if rest.min() < 1e-9:  # the answer to a text depends on that text alone
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
    """A head's new last map as tensors, with the model's names and dtypes."""
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
    """Re-align a task's head with the merged encoder, after the task got its own parts of that.

    Args:
        expert: the expert's folder.
        merged: the folder of its task in the merged model.
        own_parts: names, in the base model, of the encoder's tensors that the task does not share.
        examples: unlabeled texts.
        settings: how to fit the head, and the number of own layers.

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


def own_part(
    expert: PreTrainedModel,
    encoder: Mapping[str, Tensor],
    names: Collection[str],
    layers: int,
    examples: Examples,
    *,
    seed: int,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Tensor]:
    """The tensors of an expert that replace parts of a merged encoder for its task.

    If last layers are among them, these are calibrated to the merged layers below.

    Args:
        encoder: the merged encoder's tensors by names in the base model.
        names: the tensors that are replaced.
        layers: the number of last layers among them.
        examples: unlabeled texts; OWN_TEXTS of them are used, drawn by `seed`.

    Returns:
        the expert's tensors by names in the base model.
    """
    state = expert.base_model.state_dict()
    names = [name for name in names if name in state]  # a tagger has no pooler
    own = {name: state[name].detach().clone() for name in names}
    if layers:
        texts = examples.take(select(examples.labels, OWN_TEXTS, seed))
        tensors, _ = calibrated_encoder(
            {"": expert}, {**encoder, **own}, {"": texts}, settings=CalibrationSettings(seed=seed),
            last=layers, device=device, dtype=dtype,
        )  # fmt: skip
        own = {name: tensors[name] for name in names}
    return own


def unseen_first(
    total: int, seed: int, tuned_on: tuple[int | None, int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """A split's rows in random order: those that the expert was not tuned on, and the others.

    Args:
        total: the number of rows.
        tuned_on: how many of them (None: all), and the seed that drew them; None: it was on none.
    """
    rows = np.zeros(total)  # the draw depends on the number of rows alone
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

    Texts that the expert was not tuned on come first, as its answers to new texts are less certain.

    Args:
        texts: how many (None: all), drawn by `seed`.
        tuned_on: as for `unseen_first`.
        without: rows to leave out.

    Raises:
        UserError: no text is left.
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
