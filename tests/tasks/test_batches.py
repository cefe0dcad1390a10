"""Sampling and padding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmn.errors import UserError
from fmn.tasks.batches import (
    MULTIPLE,
    Examples,
    by_length,
    halved,
    pad_batch,
    random_order,
    select,
)


def examples_of(lengths: list[int]) -> Examples:
    """Examples of these lengths, with tokens that tell where they stand."""
    ids = [[10 * row + place + 1 for place in range(length)] for row, length in enumerate(lengths)]
    types = [[1] * length for length in lengths]
    inputs = {"input_ids": ids, "token_type_ids": types}
    return Examples(inputs, np.arange(len(lengths)), {"input_ids": 7, "token_type_ids": 0})


lists_of_lengths = st.lists(st.integers(1, 20), min_size=1, max_size=30)


@given(lists_of_lengths, st.integers(1, 80), st.integers(0, 9))
def test_by_length_yields_every_example_once_within_its_limit(
    lengths: list[int], tokens: int, done: int
) -> None:
    examples = examples_of(lengths)
    seen: list[int] = []
    widths: list[int] = []
    batches = list(by_length(examples, tokens))
    for batch in batches:
        count, width = batch.inputs["input_ids"].shape
        assert count == 1 or count * width <= tokens
        assert width % MULTIPLE == 0 or width == max(lengths)
        for place, row in enumerate(batch.rows):
            ids, types, mask = (
                batch.inputs[name][place].tolist()
                for name in ("input_ids", "token_type_ids", "attention_mask")
            )
            padding = width - lengths[row]
            assert ids == [*examples.inputs["input_ids"][row], *[7] * padding]
            assert types == mask == [1] * lengths[row] + [0] * padding
        assert batch.labels.tolist() == batch.rows.tolist()
        seen += batch.rows.tolist()
        widths.append(width)
    assert sorted(seen) == list(range(len(lengths)))
    assert widths == sorted(widths, reverse=True)
    start = sum(len(batch.rows) for batch in batches[:done])  # it goes on after earlier batches
    for batch, again in zip(batches[done:], by_length(examples, tokens, start), strict=True):
        assert torch.equal(batch.inputs["input_ids"], again.inputs["input_ids"])


def test_inputs_without_padding_value_are_stacked() -> None:
    pixels = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    labels = np.array([0.5, 1.5], dtype=np.float32)
    (batch,) = by_length(Examples({"pixel_values": list(pixels)}, labels, {}))
    assert torch.equal(batch.inputs["pixel_values"], torch.from_numpy(pixels))
    assert set(batch.inputs) == {"pixel_values"}
    assert batch.labels.dtype == torch.float32


def test_a_batch_is_halved_for_lack_of_memory_alone() -> None:
    batch = pad_batch(examples_of([4, 4, 4]), np.arange(3))  # as wide as the longest
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory")):  # fmt: skip
        assert halved(batch, error) == 4
    with pytest.raises(ZeroDivisionError):
        halved(batch, ZeroDivisionError())
    with pytest.raises(UserError, match="for one example"):
        halved(pad_batch(examples_of([4]), np.arange(1)), MemoryError())


@given(st.integers(1, 60), st.integers(1, 80), st.integers(0, 5), st.booleans())
def test_select_draws_without_replacement_and_a_smaller_sample_begins_a_larger_one(
    total: int, samples: int, seed: int, stratified: bool
) -> None:
    labels = np.arange(total) % 3
    rows = select(labels, samples, seed, stratified).tolist()
    assert len(set(rows)) == len(rows) == min(samples, total)
    if samples >= total:
        assert rows == select(labels, None, seed).tolist() == list(range(total))
    elif samples > 1:
        assert rows[:-1] == select(labels, samples - 1, seed, stratified).tolist()


def test_a_stratified_sample_keeps_proportions_and_a_seed_its_sample() -> None:
    labels = np.array([0] * 90 + [1] * 9 + [2] * 1)
    for samples in (10, 20, 50):
        counts = np.bincount(labels[select(labels, samples, seed=3, stratified=True)], minlength=3)
        assert np.all(np.abs(counts - samples * np.array([0.9, 0.09, 0.01])) <= 1)
    assert select(labels, 10, seed=0).tolist() != select(labels, 10, seed=1).tolist()
    with pytest.raises(UserError, match="at least 1"):
        select(labels, 0, seed=0)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 3))
def test_sets_of_labels_are_stratified_as_the_classes_that_they_are(
    classes: list[int], seed: int
) -> None:
    sets = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=np.float32)
    order = random_order(np.array(classes), seed, stratified=True)
    assert random_order(sets[classes], seed, stratified=True).tolist() == order.tolist()
    assert sorted(order.tolist()) == list(range(len(classes)))
    for label in set(classes):  # the k-th of m members stands at (k + 1/2) / m of the way
        places = np.flatnonzero(np.array(classes)[order] == label)
        expected = (np.arange(len(places)) + 0.5) / len(places) * len(classes)
        assert np.all(np.abs(places + 0.5 - expected) <= len(set(classes)))
    assert random_order(np.zeros((0, 2)), seed, stratified=True).tolist() == []
