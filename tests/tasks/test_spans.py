"""The spans that labels of words make, against seqeval's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities

from fmn.tasks.spans import find_spans, groups, words_of

BIO = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


@given(st.lists(st.sampled_from(BIO), max_size=12))
def test_spans_are_those_that_seqeval_counts(labels: list[str]) -> None:
    expected = [list(range(first, last + 1)) for _, first, last in get_entities(labels)]
    assert groups(labels, has_outside=True) == expected


@given(st.lists(st.sampled_from(["O", "B-A", "I-A", "L-A", "U-A", "B-B", "L-B", "U-B"])))
def test_last_and_unit_are_other_words_for_end_and_single(labels: list[str]) -> None:
    others = [label.replace("L-", "E-").replace("U-", "S-") for label in labels]
    expected = [list(range(first, last + 1)) for _, first, last in get_entities(others)]
    assert groups(labels, has_outside=True) == expected


def test_a_span_has_its_text_its_place_and_the_mean_probability() -> None:
    text = "Ada Byron wrote, in London."
    words = words_of(text)
    assert [text[start:end] for start, end in words] == [
        *("Ada", "Byron", "wrote", ",", "in", "London", "."),
    ]
    labels = ["B-PER", "I-PER", "O", "O", "O", "B-LOC", None]
    person, place = find_spans(text, words, labels, [0.9, 0.7, 1, 1, 1, 0.5, 0], has_outside=True)
    assert (person.entity, person.text, person.start, person.end) == ("PER", "Ada Byron", 0, 9)
    assert person.score == pytest.approx(0.8)
    assert (place.entity, text[place.start : place.end]) == ("LOC", "London")


def test_without_a_label_for_the_outside_each_word_is_a_span() -> None:
    assert groups(["NOUN", "NOUN", "VERB"], has_outside=False) == [[0], [1], [2]]
    assert groups(["PER", "PER", "O"], has_outside=True) == [[0, 1]]
