"""Tokenised examples in memory, random samples of them, and padded batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from fmn.errors import UserError, system_error
from fmn.tasks.images import Pixels

if TYPE_CHECKING:
    import torch

IGNORED = -100  # as Transformers has it
DECODER = "decoder_"  # begins the names of a decoder's inputs
MULTIPLE = 8  # widths of batches are rounded up to a multiple, which GPUs multiply fastest


@dataclass(frozen=True)
class Examples:
    """N tokenised examples.

    Attributes:
        inputs: N values for each input of the model. Inputs named in `pad` are sequences of
            integers, one for each token; others, such as `pixel_values`, have one shape. Names that
            begin with `decoder_` are the decoder's sequence, which has its own length, and the
            labels of tokens.
        labels: class ids, int64 [N]; values, float32 [N]; zeros and ones, float32 [N, C]; or the
            right answer at each position, int64 [N, T], IGNORED at positions without an answer.
        pad: the padding value of sequences, which are padded on the right.
        width: tokens of an example that is not a sequence, such as an image.
    """

    inputs: Mapping[str, Sequence[Any]]
    labels: np.ndarray
    pad: Mapping[str, int]
    width: int = 1

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sequences(self) -> dict[str, np.ndarray]:
        """The number of tokens of each example, int64 [N], by the prefix of a sequence's inputs.

        The prefix is "", or "decoder_" for a decoder. Examples without tokens have no sequence.
        """
        lengths: dict[str, np.ndarray] = {}
        for name in self.pad.keys() & self.inputs.keys():
            counts = map(len, self.inputs[name])
            lengths[_sequence(name)] = np.fromiter(counts, dtype=np.int64, count=len(self))
        return lengths

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each example, in all its sequences, int64 [N]."""
        lengths = list(self.sequences.values()) or [np.full(len(self), self.width)]
        total: np.ndarray = np.sum(lengths, axis=0)
        return total

    @property
    def longest(self) -> int:
        """The tokens of the longest sequence; 0 if there are no sequences."""
        return max((int(each.max(initial=0)) for each in self.sequences.values()), default=0)

    @property
    def has_token_labels(self) -> bool:
        """Whether there is a label for each token."""
        return self.labels.ndim == 2 and self.labels.dtype == np.int64

    def take(self, rows: np.ndarray) -> "Examples":
        """The examples at `rows`, in that order."""
        inputs = {
            name: values.take(rows) if isinstance(values, Pixels) else [values[row] for row in rows]
            for name, values in self.inputs.items()
        }
        return Examples(inputs, self.labels[rows], self.pad, self.width)


@dataclass(frozen=True)
class Batch:
    """B examples, padded to T tokens."""

    rows: np.ndarray  # int64 [B], their positions in the examples that they came from
    inputs: "dict[str, torch.Tensor]"  # [B, T] int64, with `attention_mask`; or [B, ...]
    labels: "torch.Tensor"  # [B], [B, C], or of tokens [B, T]
    tokens: int = 1  # of each example, with padding


def select(
    labels: np.ndarray, samples: int | None, seed: int, stratified: bool = False
) -> np.ndarray:
    """Draw rows without replacement, int64 [min(samples, N)].

    With `samples` None, or at least N, the result is every row once, in file order. Otherwise the
    rows are in random order, and a smaller sample with the same seed is the beginning of a larger
    one. If `stratified`, every beginning has each label (for several labels [N, C], each set of
    labels) in its proportion, up to rounding.

    Raises:
        UserError: `samples` is less than 1.
    """
    if samples is not None and samples < 1:
        raise UserError(f"samples is {samples}; it must be at least 1")
    if samples is None or samples >= len(labels):
        return np.arange(len(labels), dtype=np.int64)
    return random_order(labels, seed, stratified)[:samples]


def random_order(labels: np.ndarray, seed: int, stratified: bool = False) -> np.ndarray:
    """All rows in the order in which `select` draws them, int64 [N]."""
    order = np.random.default_rng(seed).permutation(len(labels)).astype(np.int64)
    is_of_tokens = labels.ndim == 2 and labels.dtype == np.int64  # almost all rows differ
    if stratified and len(labels) and not is_of_tokens:
        _, group = np.unique(labels[order], axis=0, return_inverse=True)
        sizes, members = np.bincount(group), np.argsort(group, kind="stable")
        # The rank of each member in its group, from 0 to 1.
        rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        place = np.empty(len(labels))
        place[members] = (rank + 0.5) / np.repeat(sizes, sizes)
        order = order[np.argsort(place, kind="stable")]
    return order


def pad_batch(examples: Examples, rows: np.ndarray, multiple: int = 1) -> Batch:
    """Make a batch of the examples at `rows`, padded on the right to the longest of them.

    Widths are rounded up to a `multiple`, but not beyond the longest of all examples. The widths of
    an encoder and its decoder differ, so that the shape of an activation identifies its sequence.
    """
    import torch  # sampling needs none of it

    sequences = examples.sequences
    widths = {
        name: min(-(-int(lengths[rows].max()) // multiple) * multiple, int(lengths.max()))
        for name, lengths in sequences.items()
    }
    if len(widths) > 1 and widths[""] == widths[DECODER]:
        widths[""] += 1
    inputs: dict[str, torch.Tensor] = {}
    for name, values in examples.inputs.items():
        chosen = [values[row] for row in rows]
        if name not in examples.pad:
            inputs[name] = torch.as_tensor(np.stack(chosen))
            continue
        sequence = _sequence(name)
        lengths = sequences[sequence][rows]
        is_token = np.arange(widths[sequence]) < lengths[:, None]  # [B, T]
        tokens = np.full(is_token.shape, examples.pad[name], dtype=np.int64)
        tokens[is_token] = np.fromiter(chain.from_iterable(chosen), np.int64, int(lengths.sum()))
        inputs[name] = torch.from_numpy(tokens)
        inputs[f"{sequence}attention_mask"] = torch.from_numpy(is_token.astype(np.int64))
    labels = examples.labels[rows]
    if examples.has_token_labels:
        labels = labels[:, : widths.get(DECODER, widths.get(""))]
    size = sum(widths.values()) or examples.width
    return Batch(np.asarray(rows, dtype=np.int64), inputs, torch.as_tensor(labels), size)


def _sequence(name: str) -> str:
    """The sequence of an input (see `Examples.sequences`)."""
    return DECODER if name.startswith(DECODER) else ""


def by_length(
    examples: Examples, tokens: int | None = None, start: int = 0, multiple: int = MULTIPLE
) -> Iterator[Batch]:
    """Batches of examples of similar length, the longest first, with little padding.

    Args:
        examples: the examples.
        tokens: most tokens of a batch, padding included; a batch has at least one example.
        start: number of examples to skip, which were in the batches of an earlier call.
        multiple: as for `pad_batch`.
    """
    order = np.argsort(-examples.lengths, kind="stable")
    sequences = list(examples.sequences.values())
    while start < len(order):
        rest = order[start:]
        count = len(rest)
        if tokens is not None:
            widest = [np.maximum.accumulate(lengths[rest]) for lengths in sequences]
            limits = [int(lengths.max()) for lengths in sequences]
            widths = [
                np.minimum(-(-longest // multiple) * multiple, limit)  # of the first 1, 2, ...
                for longest, limit in zip(widest, limits, strict=True)
            ]
            width = np.sum(widths, axis=0) if widths else examples.width
            sizes = np.arange(1, count + 1) * np.maximum(width, 1)
            count = max(1, int(np.searchsorted(sizes, tokens, side="right")))
        yield pad_batch(examples, rest[:count], multiple)
        start += count


def halved(batch: Batch, error: Exception) -> int:
    """The number of tokens of half a batch, after the whole batch ran out of memory.

    Raises:
        UserError: the batch is a single example.
        Exception: `error` itself, if it is not about memory.
    """
    if system_error(error) is None:
        raise error
    if len(batch.rows) == 1:
        raise UserError(
            "memory does not suffice for one example; use a larger device or shorter texts"
        ) from error
    return len(batch.rows) // 2 * batch.tokens
