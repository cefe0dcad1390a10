"""From the rows of a task to a model's inputs."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fmn.errors import UserError
from fmn.tasks.batches import IGNORED, Examples
from fmn.tasks.dataset import label_array
from fmn.tasks.task import Task

if TYPE_CHECKING:
    import pyarrow as pa


def encode(
    processor: Any,
    task: Task,
    table: "pa.Table",
    rows: np.ndarray | None = None,
    *,
    scored: bool = False,
) -> Examples:
    """The rows of a table of `read_split` as a model's inputs, with labels; zeros without labels.

    Args:
        processor: the tokenizer, or the image processor.
        rows: only these rows are encoded, and the others are empty; default: all.
        scored: the examples are to be scored (`fmn.evaluate.metrics.answers`), which may take more
            of them than there are rows.
    """
    return _ENCODE[task.task](processor, task, table, rows, scored)


def _of_texts(
    tokenizer: Any, task: Task, table: "pa.Table", rows: np.ndarray | None, _scored: bool
) -> Examples:
    """One or two texts; the longer text of an example of too many tokens loses its end."""
    wanted = _wanted(table, rows)
    encoded: Mapping[str, list[list[int]]] = tokenizer(
        *(table[name].take(wanted).to_pylist() for name in task.text_columns),
        truncation="longest_first",
        max_length=task.max_length,
        padding=False,
        return_attention_mask=False,
    )
    inputs = {name: _at(wanted, values, table.num_rows) for name, values in encoded.items()}
    pad = padding(tokenizer)
    return Examples(inputs, label_array(task, table), {name: pad[name] for name in inputs})


def _of_words(
    tokenizer: Any, task: Task, table: "pa.Table", rows: np.ndarray | None, scored: bool
) -> Examples:
    """Words and their tags: a tag belongs to the first token of its word.

    A text of too many tokens loses its last words, each as a whole. Where rows are to be scored,
    labels are of words, int64 [N, W, 2]: the position that answers the word, or -1 for a word that
    has none as it was cut off; and its tag, IGNORED behind a text's last word.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer does not say which word a token is of; save"
            " it as tokenizer.json (use_fast=True)"
        )
    wanted = _wanted(table, rows)
    words = table[task.columns.tokens].take(wanted).to_pylist()
    tags = table["label"].take(wanted).to_pylist() if "label" in table.column_names else None
    encoded = tokenizer(
        words, is_split_into_words=True, padding=False, return_attention_mask=False, verbose=False
    )
    inputs: dict[str, list[list[int]]] = {name: [] for name in encoded}
    positions: list[dict[int, int]] = []  # of the first token, by word
    for number in range(len(wanted)):
        places = _fitting(encoded.word_ids(number), task.max_length)
        for name, values in encoded.items():
            inputs[name].append([values[number][place] for place, _ in places])
        first: dict[int, int] = {}
        for position, (_, word) in enumerate(places):
            if word is not None:
                first.setdefault(word, position)
        positions.append(first)
    width = max((len(ids) for ids in inputs["input_ids"]), default=0)
    labels = np.full((table.num_rows, width), IGNORED, np.int64)
    if scored:
        most = max(map(len, words), default=0)
        labels = np.full((table.num_rows, most, 2), IGNORED, np.int64)
    for number, row in enumerate(wanted):
        own = tags[number] if tags else [0] * len(words[number])
        if scored:
            labels[row, : len(own), 0] = [positions[number].get(w, -1) for w in range(len(own))]
            labels[row, : len(own), 1] = own
        else:
            for word, position in positions[number].items():
                labels[row, position] = own[word]
    pad = padding(tokenizer)
    every = {name: _at(wanted, values, table.num_rows) for name, values in inputs.items()}
    return Examples(every, labels, {name: pad[name] for name in inputs})


def _fitting(words: list[int | None], most: int) -> list[tuple[int, int | None]]:
    """The places of the tokens of a text that fit, each with its word, or None."""
    own = [word for word in words if word is not None]
    room = max(most - (len(words) - len(own)), 0)
    cut = own[room] if len(own) > room else None  # the first word that does not fit whole
    return [
        (place, word)
        for place, word in enumerate(words)
        if word is None or cut is None or word < cut
    ]


def _wanted(table: "pa.Table", rows: np.ndarray | None) -> list[int]:
    return list(range(table.num_rows)) if rows is None else [int(row) for row in rows]


def _at(rows: list[int], values: list[Any], count: int) -> list[Any]:
    """Values at these rows of `count` rows; the others are empty."""
    by_row = dict(zip(rows, values, strict=True))
    return [by_row.get(row, []) for row in range(count)]


def padding(tokenizer: Any) -> dict[str, int]:
    """What inputs are padded with; without a padding token any will do, as a mask covers it."""
    return {
        "input_ids": tokenizer.pad_token_id or 0,
        "token_type_ids": tokenizer.pad_token_type_id,
    }


_ENCODE: Mapping[str, Callable[..., Examples]] = {
    "text-classification": _of_texts,
    "token-classification": _of_words,
}
