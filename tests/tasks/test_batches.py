"""Sampling and padding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmn.errors import UserError
from fmn.tasks.batches import Examples, by_length, in_order, select


def make(lengths: list[int]) -> Examples:
    ids = [
        [10 * row + position + 1 for position in range(length)]
        for row, length in enumerate(lengths)
    ]
    kinds = [[1] * length for length in lengths]
    return Examples(
        {"input_ids": ids, "token_type_ids": kinds},
        np.arange(len(lengths)),
        {"input_ids": 7, "token_type_ids": 0},
    )


lengths_lists = st.lists(st.integers(1, 9), min_size=1, max_size=30)


@given(lengths_lists, st.integers(1, 40), st.integers(1, 6), st.sampled_from([1, 4, 8]))
def test_by_length_yields_every_example_once_within_its_limits(
    lengths: list[int], tokens: int, size: int, multiple: int
) -> None:
    examples = make(lengths)
    seen: list[int] = []
    widths: list[int] = []
    for batch in by_length(examples, tokens=tokens, size=size, multiple=multiple):
        rows, width = batch.inputs["input_ids"].shape
        assert rows == 1 or (rows <= size and rows * width <= tokens)
        assert width % multiple == 0 or width == max(lengths)
        for row, ids, kinds, mask in zip(
            batch.rows,
            batch.inputs["input_ids"],
            batch.inputs["token_type_ids"],
            batch.inputs["attention_mask"],
            strict=True,
        ):
            real = lengths[row]
            assert ids.tolist() == [*examples.inputs["input_ids"][row], *[7] * (width - real)]
            assert kinds.tolist() == mask.tolist() == [1] * real + [0] * (width - real)
        assert batch.labels.tolist() == batch.rows.tolist()
        seen += batch.rows.tolist()
        widths.append(width)
    assert sorted(seen) == list(range(len(lengths)))
    assert widths == sorted(widths, reverse=True)


@given(lengths_lists, st.integers(1, 40), st.integers(0, 9))
def test_by_length_continues_where_it_was_left(lengths: list[int], tokens: int, done: int) -> None:
    whole = list(by_length(make(lengths), tokens=tokens))
    start = sum(len(batch.rows) for batch in whole[:done])
    rest = list(by_length(make(lengths), tokens=tokens, start=start))
    assert len(rest) == max(0, len(whole) - done)
    for batch, again in zip(whole[done:], rest, strict=True):
        assert torch.equal(batch.inputs["input_ids"], again.inputs["input_ids"])


@given(lengths_lists, st.integers(1, 6))
def test_in_order_pads_consecutive_rows_to_the_longest(lengths: list[int], size: int) -> None:
    batches = list(in_order(make(lengths), size))
    assert np.concatenate([batch.rows for batch in batches]).tolist() == list(range(len(lengths)))
    for batch in batches:
        assert batch.inputs["input_ids"].shape[1] == max(lengths[row] for row in batch.rows)
        assert len(batch.rows) == size or batch is batches[-1]


def test_inputs_without_padding_value_are_stacked() -> None:
    pixels = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    (batch,) = by_length(
        Examples({"pixel_values": list(pixels)}, np.array([0.5, 1.5], dtype=np.float32), {})
    )
    assert torch.equal(batch.inputs["pixel_values"], torch.from_numpy(pixels))
    assert set(batch.inputs) == {"pixel_values"}
    assert batch.labels.dtype == torch.float32


def test_take_keeps_the_order_asked_for() -> None:
    taken = make([1, 2, 3]).take(np.array([2, 0]))
    assert taken.lengths.tolist() == [3, 1]
    assert taken.labels.tolist() == [2, 0]


def test_examples_of_unequal_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="1 values of input_ids, 2 labels"):
        Examples({"input_ids": [[1]]}, np.zeros(2), {"input_ids": 0})


@given(st.integers(1, 60), st.integers(1, 80), st.integers(0, 5), st.booleans())
def test_select_draws_without_replacement_and_nests(
    total: int, samples: int, seed: int, stratified: bool
) -> None:
    labels = np.arange(total) % 3
    rows = select(labels, samples, seed, stratified)
    assert len(set(rows.tolist())) == len(rows) == min(samples, total)
    if samples >= total:
        assert rows.tolist() == list(range(total))
    elif samples > 1:
        assert (
            rows[: samples - 1].tolist() == select(labels, samples - 1, seed, stratified).tolist()
        )


def test_select_takes_all_rows_in_file_order_without_a_limit() -> None:
    assert select(np.zeros(4), None, seed=1).tolist() == [0, 1, 2, 3]


def test_select_by_label_keeps_proportions() -> None:
    labels = np.array([0] * 90 + [1] * 9 + [2] * 1)
    for samples in (10, 20, 50):
        counts = np.bincount(labels[select(labels, samples, seed=3, stratified=True)], minlength=3)
        assert np.all(np.abs(counts - samples * np.array([0.9, 0.09, 0.01])) <= 1)


def test_select_depends_on_the_seed_alone() -> None:
    labels = np.zeros(100)
    assert select(labels, 10, seed=0).tolist() == select(labels, 10, seed=0).tolist()
    assert select(labels, 10, seed=0).tolist() != select(labels, 10, seed=1).tolist()


def test_select_refuses_an_empty_sample() -> None:
    with pytest.raises(UserError, match="at least 1"):
        select(np.zeros(3), 0, seed=0)
