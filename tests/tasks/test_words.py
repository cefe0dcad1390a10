"""Words and their tags become tokens with labels."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fmn.errors import UserError
from fmn.tasks.batches import IGNORED
from fmn.tasks.encoding import encode
from fmn.tasks.rows import check_rows
from fmn.tasks.task import Task, make_task

# Words of several tokens, of one, and of none.
WORDS = ("film", "antidisestablishmentarianism", "unbelievably", "", "\u200b", "a-b", "U.S.")


def tagger(max_length: int = 128) -> Task:
    return make_task(
        "ner",
        task="token-classification",
        columns={"tokens": "tokens", "label": "label"},
        labels=("O", "B-X", "I-X"),
        max_length=max_length,
    )


@cache
def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def table_of(task: Task, texts: list[list[str]], labels: list[list[int]]) -> pa.Table:
    return check_rows(pa.table({"tokens": texts, "label": labels}), task, "rows")


@given(st.lists(st.lists(st.sampled_from(WORDS), min_size=1), min_size=1, max_size=4), st.data())
def test_the_first_token_of_a_word_has_its_tag_and_a_word_is_whole_or_absent(
    tiny_base: Path, texts: list[list[str]], data: st.DataObject
) -> None:
    tokenizer, task = tokenizer_of(tiny_base), tagger(data.draw(st.integers(2, 30)))
    labels = [[data.draw(st.integers(0, 2)) for _ in text] for text in texts]
    table = table_of(task, texts, labels)
    examples, scored = encode(tokenizer, task, table), encode(tokenizer, task, table, scored=True)
    assert examples.inputs == scored.inputs
    for row, (text, tags) in enumerate(zip(texts, labels, strict=True)):
        # By hand: the tokens of one word after another, while they fit.
        ids, right, places, fits = [tokenizer.cls_token_id], [IGNORED], [], True
        for word, tag in zip(text, tags, strict=True):
            own = tokenizer(word, add_special_tokens=False)["input_ids"]
            fits = fits and len(ids) + len(own) < task.max_length
            places.append(len(ids) if fits and own else -1)
            ids += own if fits else []
            right += [tag, *[IGNORED] * (len(own) - 1)] if fits and own else []
        assert examples.inputs["input_ids"][row] == [*ids, tokenizer.sep_token_id]
        assert examples.labels[row, : len(right)].tolist() == right
        assert (examples.labels[row, len(right) :] == IGNORED).all()
        words = scored.labels[row, : len(text)]
        assert words.tolist() == [list(pair) for pair in zip(places, tags, strict=True)]


def test_rows_that_are_left_out_are_empty_and_rows_without_labels_say_what_answers(
    tiny_base: Path,
) -> None:
    tokenizer, task = AutoTokenizer.from_pretrained(tiny_base), tagger()
    table = table_of(task, [["film", "unbelievably"], ["a"]], [[1, 2], [1]])
    part = encode(tokenizer, task, table, rows=np.array([1]))
    assert part.lengths.tolist() == [0, 3]
    assert part.labels.tolist() == [[IGNORED] * 3, [IGNORED, 1, IGNORED]]
    unlabeled = encode(tokenizer, task, table.drop(["label"])).labels
    assert ((unlabeled == 0) == (encode(tokenizer, task, table).labels != IGNORED)).all()


def test_rows_and_tokenizers_that_do_not_fit_are_refused(tiny_base: Path) -> None:
    task = tagger()
    with pytest.raises(UserError, match="row 1 has 2 words and 1 tags"):
        table_of(task, [["a"], ["a", "b"]], [[0], [1]])
    with pytest.raises(UserError, match="a list without a word"):
        table_of(task, [["a", None]], [[0, 1]])  # type: ignore[list-item]

    class Slow:
        is_fast, name_or_path = False, "x"

    with pytest.raises(UserError, match="does not say which word"):
        encode(Slow(), task, table_of(task, [["a"]], [[0]]))
