"""Divide a text into words, and join the labels of words to spans."""

import re
from collections.abc import Sequence

from fmn.store.records import Record


class Span(Record):
    """What words with labels of one entity stand for.

    `start` and `end` are positions in the text, `score` is the mean probability of the labels.
    """

    entity: str
    text: str
    start: int
    end: int
    score: float


def words_of(text: str) -> list[tuple[int, int]]:
    """Start and end of each word of a text: runs of letters and digits, and every other sign.

    >>> words_of("In Bonn.")
    [(0, 2), (3, 7), (7, 8)]
    """
    return [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]


def groups(labels: Sequence[str | None], has_outside: bool) -> list[list[int]]:
    """The words of each span, as seqeval and CoNLL's own script count them.

    Labels follow BIO or a similar scheme, or are plain names. Consecutive words with the same plain
    label are one span; in tasks without the label O (parts of speech) each word is a span. A word
    without a label is not in a span.

    >>> groups(["B-PER", "I-PER", "O", "B-PER", "I-LOC"], has_outside=True)
    [[0, 1], [3], [4]]
    """
    spans: list[list[int]] = []
    before, before_entity = "O", ""
    for word, label in enumerate(labels):
        mark, entity = split_label(label)
        if mark != "O":
            is_new = mark in {*"BSU"} or before in {*"OESLU"} or entity != before_entity
            if is_new or not (mark or has_outside):
                spans.append([])
            spans[-1].append(word)
        before, before_entity = mark, entity
    return spans


def split_label(label: str | None) -> tuple[str, str]:
    """Split a label into its mark, such as "B", "O" or "", and its entity."""
    if label in (None, "O"):
        return "O", ""
    mark, dash, entity = label.partition("-")
    return (mark, entity) if dash and mark in {*"BIESLU"} else ("", label)


def find_spans(
    text: str,
    words: Sequence[tuple[int, int]],
    labels: Sequence[str | None],
    scores: Sequence[float],
    has_outside: bool,
) -> list[Span]:
    """Join the labels of a text's words to spans; a span's score is their mean probability."""
    spans = []
    for group in groups(labels, has_outside):
        start, end = words[group[0]][0], words[group[-1]][1]
        entity = split_label(labels[group[0]])[1]
        score = sum(scores[word] for word in group) / len(group)
        spans.append(Span(entity=entity, text=text[start:end], start=start, end=end, score=score))
    return spans
