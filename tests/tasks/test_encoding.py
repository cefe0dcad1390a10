"""Rows become a model's inputs, and each label stands where the model answers it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fmn.errors import UserError
from fmn.tasks.batches import IGNORED, Examples
from fmn.tasks.encoding import encode
from fmn.tasks.task import Columns, Task

NOTHING = "\u200b"  # the tokenizer leaves nothing of it
LONG = "counterrevolutionaries"


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


def tagger(max_length: int = 128) -> Task:
    columns, labels = Columns(tokens="tokens"), ("B", "I", "O")
    return Task(
        name="ner", task="token-classification", columns=columns, labels=labels,
        max_length=max_length,
    )  # fmt: skip


def table_of(rows: list[list[str]], labelled: bool = True) -> pa.Table:
    """Rows of words; the n-th word of a row has the tag n modulo 3."""
    tags = {"label": [[place % 3 for place in range(len(row))] for row in rows]}
    return pa.table({"tokens": rows, **(tags if labelled else {})})


def encoded(tokenizer: Any, rows: list[list[str]], most: int = 128, **options: Any) -> Examples:
    return encode(tokenizer, tagger(most), table_of(rows), **options)


words = st.sampled_from(["a", LONG, NOTHING, "U.S.", "don't", "😀", "Zürich"])


@given(st.lists(st.lists(words, max_size=8), min_size=1, max_size=4), st.integers(2, 30))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_first_token_of_each_word_answers_its_tag(
    tokenizer: Any, rows: list[list[str]], most: int
) -> None:
    examples = encoded(tokenizer, rows, most)
    for row, own in enumerate(rows):
        ids, expected = [tokenizer.cls_token_id], [IGNORED]
        for place, word in enumerate(own):
            tokens = tokenizer(word, add_special_tokens=False)["input_ids"]
            if len(ids) + len(tokens) + 1 > most:  # this word and all behind it are cut off
                break
            ids += tokens
            expected += [place % 3, *[IGNORED] * (len(tokens) - 1)][: len(tokens)]
        assert examples.inputs["input_ids"][row] == [*ids, tokenizer.sep_token_id]
        labels = examples.labels[row].tolist()
        assert labels[: len(expected)] == expected
        assert set(labels[len(expected) :]) <= {IGNORED}


def test_examples_to_score_hold_every_word_and_the_position_that_answers_it(tokenizer: Any) -> None:
    rows = [["a", NOTHING, LONG, "a"], ["a"], []]
    whole = encoded(tokenizer, rows, scored=True).labels
    tokens = len(tokenizer(LONG, add_special_tokens=False)["input_ids"])
    assert whole[0].tolist() == [[0, 1], [1, -1], [2, 2], [0, 2 + tokens]]
    assert whole[1].tolist() == [[0, 1], *[[IGNORED, IGNORED]] * 3]
    assert (whole[2] == IGNORED).all()
    cut = encoded(tokenizer, rows, 2 + tokens, scored=True).labels
    assert cut[0].tolist() == [[0, 1], [1, -1], [2, -1], [0, -1]]


def test_words_without_tags_are_marked_and_rows_that_are_not_wanted_are_empty(
    tokenizer: Any,
) -> None:
    rows = [["a", "a"], [LONG, "a"]]
    plain = encode(tokenizer, tagger(), table_of(rows, labelled=False))
    tagged = encoded(tokenizer, rows)
    assert np.array_equal(plain.labels == 0, tagged.labels != IGNORED)
    one = encode(tokenizer, tagger(), table_of(rows), np.array([1]))
    assert one.inputs["input_ids"] == [[], tagged.inputs["input_ids"][1]]
    assert np.array_equal(one.labels[1], tagged.labels[1])
    assert (one.labels[0] == IGNORED).all()


def test_a_tokenizer_that_does_not_tell_words_apart_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match=r"ner: the tokenizer, Slow, .* tokenizer.json"):
        encode(Slow(), tagger(), table_of([["a"]]))
