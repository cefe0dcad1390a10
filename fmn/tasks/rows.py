"""The schema of a task's rows, and the check that rows have it."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fmn.errors import UserError
from fmn.tasks.kinds import REGRESSION
from fmn.tasks.task import Task

INPUTS = {"tokens": pa.list_(pa.string()), "image": pa.binary()}
"""The types of columns that are not texts, by role."""


_INPUT_TYPES = {"tokens": ("list", "lists of words"), "image": ("binary", "the bytes of images")}


def schema(task: Task) -> pa.Schema:
    """The schema of checked rows: the inputs, `label`, and `idx`, the number of the row."""
    inputs = [(name, INPUTS.get(key, pa.string())) for key, name in task.input_columns.items()]
    label = [("label", label_type(task))] if task.columns.label else []
    return pa.schema([*inputs, *label, ("idx", pa.int32())])


def label_type(task: Task) -> pa.DataType:
    """The type of the label of checked rows."""
    if task.problem_type == REGRESSION:
        return pa.float32()
    has_several = task.multi_label or task.task == "token-classification"
    return pa.list_(pa.int64()) if has_several else pa.int64()


def check_rows(table: pa.Table, task: Task, place: str, labelled: bool = True) -> pa.Table:
    """Convert the rows of a file to the schema of their task.

    Args:
        table: the rows.
        task: their task.
        place: the file, for messages.
        labelled: False: only the inputs are checked and returned.

    Raises:
        UserError: a column is missing, or has a wrong value.
    """
    sources = {name: name for name in task.input_columns.values()}
    if labelled and task.columns.label:
        sources["label"] = task.columns.label
    if missing := [name for name in sources.values() if name not in table.column_names]:
        raise UserError(
            f"{place}: no column {', '.join(missing)}; {task.name} needs"
            f" {', '.join(sources.values())} and here are {', '.join(table.column_names)}"
        )
    if not table.num_rows:
        raise UserError(f"{place}: there are no rows; write it again")
    keys = {name: key for key, name in task.input_columns.items()}
    for name, source in sources.items():
        key = keys.get(name, "label")
        if problem := _problem(table[source], task, key):
            raise UserError(f"{place}: column {source} {problem}")
    columns = {name: table[source] for name, source in sources.items()}
    if task.task == "token-classification" and "label" in columns:
        words, tags = (pc.list_value_length(columns[n]) for n in (*keys, "label"))
        if not (is_same := np.equal(words.to_numpy(), tags.to_numpy())).all():
            row = int(np.argmin(is_same))
            raise UserError(f"{place}: row {row} has {words[row]} words and {tags[row]} tags")
    if labelled:
        has_numbers = "idx" in table.column_names
        columns["idx"] = table["idx"] if has_numbers else pa.array(range(table.num_rows))
    try:
        rows = pa.table(columns).cast(pa.schema([schema(task).field(name) for name in columns]))
        rows.validate(full=True)  # finds texts that are not UTF-8
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{place}: not rows of {task.name} ({reason}); write it again") from error
    return rows.combine_chunks()


def _problem(column: pa.ChunkedArray, task: Task, key: str) -> str:
    """Describe the problem of a column of inputs or labels; "" if there is none."""
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        return f"has no value in row {row}; fill it or drop the row"
    if key != "label":
        word, what = _INPUT_TYPES.get(key, ("string", "text"))  # string, large_string, ...
        if word not in str(column.type):
            return f"is of type {column.type}; it must hold {what}"
        has_null = key == "tokens" and pc.list_flatten(column).null_count
        return "holds a list without a word; fill it in" if has_null else ""
    ids = ", ".join(f"{label} ({name})" for label, name in enumerate(task.labels))
    is_number = task.problem_type == REGRESSION
    meaning = "finite numbers" if is_number else f"the ids {ids}"
    kind, is_list = column.type, pa.types.is_list(label_type(task))
    if is_list:
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            return f"is of type {kind}; it must hold lists of {meaning}"
        ends = np.cumsum(pc.list_value_length(column).to_numpy())
        column = pc.list_flatten(column)
        kind = kind.value_type
    is_float = pa.types.is_floating(kind) and is_number
    if not (pa.types.is_integer(kind) or is_float or (pa.types.is_null(kind) and not len(column))):
        return f"is of type {column.type}; it must hold {meaning}"
    values = column.to_numpy()
    if not is_number and len(values) and (values == -1).all():
        return "is -1 in every row, as in GLUE's test splits; use a split that has labels"
    is_valid = np.isfinite(values) if is_number else np.isin(values, range(len(task.labels)))
    if is_valid.all():
        return ""
    item = int(np.argmin(is_valid))
    row = int(np.searchsorted(ends, item, side="right")) if is_list else item
    return f"is {values[item]} in row {row}; the labels of {task.name} are {meaning}"
