"""Trying a merged encoder out in memory: each expert's classifier and texts are loaded once, and lend their head."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from fmn.merge import heads
from fmn.models import checkpoints, labels
from fmn.models.predict import predict, score
from fmn.tasks import dataset as data
from fmn.tasks.batches import Examples
from fmn.tasks.task import Task


@dataclass(frozen=True)
class Contender:
    """A task's expert and the texts that encoders are tried on.

    `rows`: their places in the split, int64 [N]; `logits`: the expert's own, float32 [N, C]; `score`: what it scores
    with them.
    """

    task: Task
    model: PreTrainedModel
    rows: np.ndarray
    examples: Examples
    logits: np.ndarray
    score: float


def contender(
    checkpoint: Path,
    task: Task,
    folder: Path,
    split: str,
    rows: int | None,
    seed: int,
    device: str,
    dtype: str,
    tuned_on: tuple[int | None, int] = (None, 0),
) -> Contender:
    """An expert with `rows` rows of a split below `folder`, drawn by `seed` (all when None), and its score there.

    `tuned_on`: how many rows of the training split the expert was fine-tuned on, and the seed that drew them; of that
    split only other rows are taken, where there are any.
    """
    model = labels.ordered(
        checkpoints.load_classifier(checkpoint), labels.decide(checkpoint, task, folder, device)
    )
    table = data.read(folder, task, split)
    unseen, seen = heads.unseen_first(table.num_rows, seed, tuned_on if split == "train" else None)
    taken = np.sort((unseen if len(unseen) else seen)[:rows])
    examples = data.tokenize(checkpoints.load_tokenizer(checkpoint), task, table.take(taken))
    own = predict(model, examples, device=device, dtype=dtype)
    return Contender(task, model, taken, examples, own, score(task, own, examples.labels)["score"])


def logits(
    one: Contender,
    encoder: Mapping[str, Tensor],
    device: str,
    dtype: str,
    head: Mapping[str, Tensor] | None = None,
) -> np.ndarray:
    """What the expert's head says with another encoder below it, float32 [N, C]; `head`: tensors of it to change."""
    with _in_place(one.model.base_model, encoder), _in_place(one.model, head or {}):
        return predict(one.model, one.examples, device=device, dtype=dtype)


def realigned(
    one: Contender,
    encoder: Mapping[str, Tensor],
    examples: Examples,
    own: np.ndarray,
    ridge: float | str,
    device: str,
    dtype: str,
) -> dict[str, Tensor]:
    """The tensors of the expert's head re-aligned with another encoder below it (`fmn.heads`).

    Args:
        examples: unlabeled texts.
        own: `heads.features` of the expert for them.
    """
    with _in_place(one.model.base_model, encoder):
        read = heads.features(one.model, examples, device=device, dtype=dtype)
    return heads.tensors(one.model, heads.refit(own, read, *heads.last_map(one.model), ridge))


def relative_scores(
    contenders: Mapping[str, Contender], encoder: Mapping[str, Tensor], device: str, dtype: str
) -> dict[str, float]:
    """What every expert's head scores with another encoder below it, relative to the expert's score, by task."""
    return {
        name: score(one.task, logits(one, encoder, device, dtype), one.examples.labels)["score"]
        / one.score
        for name, one in contenders.items()
    }


@contextmanager
def _in_place(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model's parameters and buffers of these names have these values meanwhile."""
    mine = model.state_dict()
    before = {name: mine[name].clone() for name in tensors}
    model.load_state_dict(dict(tensors), strict=False)
    try:
        yield
    finally:
        model.load_state_dict(before, strict=False)
