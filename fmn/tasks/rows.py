"""What the rows of a task must look like, and the check that they do."""

import numpy as np
import pyarrow as pa

from fmn.errors import UserError
from fmn.tasks.task import Task


def schema(task: Task) -> pa.Schema:
    """The columns of checked rows: the texts, `label`, and `idx`, the number of the row."""
    label = pa.float32() if task.regression else pa.int64()
    texts = [(name, pa.string()) for name in task.text_columns]
    return pa.schema([*texts, ("label", label), ("idx", pa.int32())])


def check_rows(table: pa.Table, task: Task, place: str, labelled: bool = True) -> pa.Table:
    """The rows of a file in the schema of their task; other columns are left out.

    Args:
        table: the rows as they were read.
        task: the task.
        place: the file, for messages.
        labelled: False leaves out `label` and `idx`.

    Raises:
        UserError: a column is missing, or holds something that it must not.
    """
    needed = [*task.text_columns, *([task.columns.label] if labelled else [])]
    if missing := [name for name in needed if name not in table.column_names]:
        raise UserError(
            f"{place}: no column {', '.join(missing)}; {task.name} needs {', '.join(needed)}"
            f" and here are {', '.join(table.column_names)}"
        )
    if not table.num_rows:
        raise UserError(f"{place}: there are no rows; write it again")
    for name in needed:
        column, column_place = table[name], f"{place}: column {name}"
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise UserError(f"{column_place} has no value in row {row}; fill it or drop the row")
        if name in task.text_columns:
            if "string" not in str(column.type):  # string, large_string, dictionary<string>, ...
                raise UserError(f"{column_place} is of type {column.type}; it must hold text")
        else:
            _check_labels(column, task, column_place)
    columns = {name: table[name] for name in task.text_columns}
    if labelled:
        has_numbers = "idx" in table.column_names
        numbers = pa.array(range(table.num_rows), pa.int32())
        columns |= {
            "label": table[task.columns.label],
            "idx": table["idx"] if has_numbers else numbers,
        }
    try:
        rows = pa.table(columns)
        rows = rows.cast(pa.schema([schema(task).field(name) for name in columns]))
        rows.validate(full=True)  # texts of bytes that are not UTF-8
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{place}: not rows of {task.name} ({reason}); write it again") from error
    return rows.combine_chunks()


def _check_labels(column: pa.ChunkedArray, task: Task, place: str) -> None:
    ids = ", ".join(f"{label} ({name})" for label, name in enumerate(task.labels))
    meaning = "finite numbers" if task.regression else f"the ids {ids}"
    is_float = pa.types.is_floating(column.type)
    if not (pa.types.is_integer(column.type) or (is_float and task.regression)):
        raise UserError(f"{place} is of type {column.type}; it must hold {meaning}")
    values = column.to_numpy()
    if (values == -1).all():
        raise UserError(
            f"{place} is -1 in every row, as in GLUE's test splits; use a split that has labels"
        )
    is_valid = np.isfinite(values) if task.regression else np.isin(values, range(len(task.labels)))
    if not is_valid.all():
        row = int(np.argmin(is_valid))
        raise UserError(
            f"{place} is {values[row]} in row {row}; the labels of {task.name} are {meaning}"
        )
