"""Scores of tags against seqeval and scikit-learn, also in resamples of the sentences."""

import warnings
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import f1_score
from sklearn.metrics import accuracy_score

from fmn.evaluate.bootstrap import at_chance
from fmn.evaluate.metrics import COMPUTE, Answers, answers, listed_answers
from fmn.tasks.batches import IGNORED
from fmn.tasks.task import Task, make_task

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def tagger(labels: tuple[str, ...] = NAMES, *metrics: str) -> Task:
    return make_task(
        "ner",
        task="token-classification",
        columns={"tokens": "tokens", "label": "label"},
        labels=labels,
        metrics=metrics or ("seqeval_f1", "accuracy"),
    )


def random_answers(seed: int) -> Answers:
    """Tags that are right in three of four words."""
    random = np.random.default_rng(seed)
    labels = [random.integers(0, 5, length).tolist() for length in random.integers(0, 9, 12)]
    predicted = [[t if random.random() < 0.75 else int(random.integers(5)) for t in text]
                 for text in labels]  # fmt: skip
    return listed_answers(tagger(), predicted, labels)


def named(side: Any, rows: Any) -> list[list[str]]:
    return [[NAMES[tag] for tag in side[row]] for row in rows]


@given(st.integers(0, 2**32 - 1))
def test_resampled_scores_are_the_librarys_of_the_repeated_sentences(seed: int) -> None:
    each, random = random_answers(seed), np.random.default_rng(seed)
    samples = [np.arange(12), *random.integers(12, size=(4, 12))]
    weights = np.stack([np.bincount(rows, minlength=12).astype(float) for rows in samples])
    for number, rows in enumerate(samples):
        predicted, labels = (named(side, rows) for side in each[:2])
        with warnings.catch_warnings(action="ignore"):  # of resamples without spans
            f1 = f1_score(labels, predicted)
        accuracy = accuracy_score(*([*chain(*side)] for side in (labels, predicted)))
        assert COMPUTE["seqeval_f1"](weights, each)[number] == pytest.approx(f1)
        assert COMPUTE["accuracy"](weights, each)[number] == pytest.approx(accuracy)


@pytest.mark.parametrize(("labels", "answer"), [(NAMES, 0), (("NOUN", "VERB"), -1)])
def test_a_word_that_was_cut_off_is_no_entity_or_wrong(
    labels: tuple[str, ...], answer: int
) -> None:
    logits = np.zeros((2, 3, len(labels)))
    logits[:, 1, 1] = 1
    # Position and tag of each word; the second text has one word less.
    words = np.array([[[1, 1], [-1, 1]], [[1, 0], [IGNORED, IGNORED]]])
    scored = answers(tagger(labels, "accuracy"), logits, words)
    assert scored.predicted.tolist() == [[1, answer], [1]]
    assert scored.labels.tolist() == [[1, 1], [0]]


def test_constant_tags_are_no_better_than_chance() -> None:
    each, task = random_answers(0), tagger()
    assert not at_chance(task, {"validation": each})
    nothing = listed_answers(task, [[0] * len(text) for text in each.labels], [*each.labels])
    assert at_chance(task, {"validation": nothing})
