"""From the rows of a task to a model's inputs."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fmn.tasks.batches import Examples
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


def _of_sentences(
    tokenizer: Any, task: Task, table: "pa.Table", rows: np.ndarray | None, scored: bool
) -> Examples:
    """One text of each row: the second text of every second row; or all texts, then all pairs.

    `tokenizer` is that of `load_processor`, which knows where the model cuts texts.
    """
    wanted, count = _wanted(table, rows), table.num_rows
    columns = [table[name].take(wanted).to_pylist() for name in task.text_columns]
    texts = list(columns[0])
    for place, row in enumerate(wanted):
        texts[place] = columns[row % len(columns)][place]
    labels = label_array(task, table)
    if scored:
        texts = [text for column in columns for text in column]
        wanted = [row + count * number for number in range(len(columns)) for row in wanted]
        labels = np.tile(labels, len(columns))
    encoded: Mapping[str, list[list[int]]] = tokenizer(
        [tokenizer.prompt + text for text in texts],
        truncation=True,
        max_length=min(task.max_length, tokenizer.model_max_length),
        padding=False,
        return_attention_mask=False,
    )
    inputs = {name: _at(wanted, values, len(labels)) for name, values in encoded.items()}
    pad = padding(tokenizer)
    return Examples(inputs, labels, {name: pad[name] for name in inputs})


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
    "sentence-similarity": _of_sentences,
}
