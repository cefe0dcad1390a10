"""Tokenised examples in memory, the choice of a sample, and padded batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from fmn.errors import UserError


@dataclass(frozen=True)
class Examples:
    """N tokenised examples.

    `inputs`: by input name of the model, one value an example. An input that `pad` names is a sequence of token-wise
    integers and is padded on the right with that value; any other (`pixel_values`) has one shape for all examples.
    `labels`: [N], int64 class ids, or float32 for regression.
    """

    inputs: Mapping[str, Sequence[Any]]
    labels: np.ndarray
    pad: Mapping[str, int]

    def __post_init__(self) -> None:
        for name, values in self.inputs.items():
            if len(values) != len(self.labels):
                raise ValueError(f"{len(values)} values of {name}, {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [N]; ones where no input is a sequence of tokens."""
        for name, values in self.inputs.items():
            if name in self.pad:
                return np.fromiter(map(len, values), dtype=np.int64, count=len(self))
        return np.ones(len(self), dtype=np.int64)

    def take(self, rows: np.ndarray) -> "Examples":
        """The examples at `rows`, in that order."""
        inputs = {name: [values[row] for row in rows] for name, values in self.inputs.items()}
        return Examples(inputs, self.labels[rows], self.pad)


@dataclass(frozen=True)
class Batch:
    """B examples padded to T tokens: `rows` int64 [B] are their positions in the examples they came from."""

    rows: np.ndarray
    inputs: dict[
        str, torch.Tensor
    ]  # each [B, T] int64, `attention_mask` with them; or [B, ...] as given
    labels: torch.Tensor  # [B]


def select(
    labels: np.ndarray, samples: int | None, seed: int, stratified: bool = False
) -> np.ndarray:
    """Rows of a random sample without replacement, int64 [min(samples, N)].

    With `samples` None or at least N: every row once, in file order. Otherwise in random order, and a smaller sample
    of the same seed is the beginning of a larger one. `stratified`: any beginning holds every label in its proportion,
    to rounding. The result depends on nothing but the arguments.
    """
    if samples is not None and samples < 1:
        raise UserError(f"samples is {samples}: it must be at least 1")
    total = len(labels)
    if samples is None or samples >= total:
        return np.arange(total, dtype=np.int64)
    return random_order(labels, seed, stratified)[:samples]


def random_order(labels: np.ndarray, seed: int, stratified: bool = False) -> np.ndarray:
    """All rows in the order in which `select` takes them, int64 [N]."""
    order = np.random.default_rng(seed).permutation(len(labels)).astype(np.int64)
    if stratified:
        place = np.empty(len(labels))
        for label in np.unique(labels):
            members = np.flatnonzero(labels[order] == label)
            place[members] = (np.arange(len(members)) + 0.5) / len(members)
        order = order[np.argsort(place, kind="stable")]
    return order


def pad_batch(examples: Examples, rows: np.ndarray, width: int) -> Batch:
    """The examples at `rows`, padded on the right to `width` tokens."""
    inputs: dict[str, torch.Tensor] = {}
    for name, values in examples.inputs.items():
        picked = [values[row] for row in rows]
        if name not in examples.pad:
            inputs[name] = torch.as_tensor(np.stack(picked))
            continue
        lengths = np.fromiter(map(len, picked), dtype=np.int64, count=len(rows))
        filled = np.arange(width) < lengths[:, None]  # [B, T]
        padded = np.full((len(rows), width), examples.pad[name], dtype=np.int64)
        padded[filled] = np.fromiter(
            chain.from_iterable(picked), dtype=np.int64, count=int(lengths.sum())
        )
        inputs[name] = torch.from_numpy(padded)
        inputs["attention_mask"] = torch.from_numpy(filled.astype(np.int64))
    return Batch(np.asarray(rows, dtype=np.int64), inputs, torch.as_tensor(examples.labels[rows]))


def by_length(
    examples: Examples,
    tokens: int | None = None,
    size: int | None = None,
    multiple: int = 8,
    start: int = 0,
) -> Iterator[Batch]:
    """Batches of examples of like length, the longest first, so that hardly any padding is computed.

    A batch holds at most `size` examples and at most `tokens` tokens, padding included, but at least one example.
    Lengths are rounded up to `multiple` (never past the longest example), so that few shapes occur.
    `start`: leave out that many examples, those which the first batches of an earlier call held.
    """
    lengths = examples.lengths
    order = np.argsort(-lengths, kind="stable")
    longest = int(lengths.max(initial=0))
    while start < len(order):
        width = min(-(-int(lengths[order[start]]) // multiple) * multiple, longest)
        count = len(order) if size is None else size
        if tokens is not None:
            count = max(1, min(count, tokens // max(width, 1)))
        yield pad_batch(examples, order[start : start + count], width)
        start += count


def in_order(examples: Examples, size: int) -> Iterator[Batch]:
    """Batches of `size` consecutive examples, each padded to its longest."""
    lengths = examples.lengths
    for start in range(0, len(examples), size):
        rows = np.arange(start, min(start + size, len(examples)))
        yield pad_batch(examples, rows, int(lengths[rows].max()))


def halved(batch: Batch, error: Exception) -> int:
    """Tokens for half the batch that ran out of memory. Raises any other error, and UserError for a single example."""
    signs = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(
        sign in str(error) for sign in signs
    ):
        raise error
    if len(batch.rows) == 1:
        raise UserError(
            "memory does not suffice for one example: use a larger device or shorter texts"
        ) from error
    width = next(iter(batch.inputs.values())).shape[1]
    return len(batch.rows) // 2 * width
