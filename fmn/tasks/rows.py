"""What the rows of a task must look like, and the check that they do."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fmn.errors import UserError
from fmn.tasks.task import Task


def schema(task: Task) -> pa.Schema:
    """The columns of checked rows: the texts, `label`, and `idx`, the number of the row."""
    kind = pa.list_(pa.int64()) if task.multi_label else pa.int64()
    label = [("label", pa.float32() if task.regression else kind)] if task.has_labels else []
    texts = [(name, pa.string()) for name in task.text_columns]
    return pa.schema([*texts, *label, ("idx", pa.int32())])


def check_rows(table: pa.Table, task: Task, place: str, labelled: bool = True) -> pa.Table:
    """The rows of a file in the schema of their task, or without `labelled` their texts alone.

    Raises:
        UserError: a column is missing, or holds something that it must not; begins with `place`.
    """
    sources = {name: name for name in task.text_columns}
    if labelled and task.columns.label:
        sources["label"] = task.columns.label
    if missing := [name for name in sources.values() if name not in table.column_names]:
        raise UserError(
            f"{place}: no column {', '.join(missing)}; {task.name} needs"
            f" {', '.join(sources.values())} and here are {', '.join(table.column_names)}"
        )
    if not table.num_rows:
        raise UserError(f"{place}: there are no rows; write it again")
    for name, source in sources.items():
        if problem := _problem(table[source], task, is_text=name in task.text_columns):
            raise UserError(f"{place}: column {source} {problem}")
    columns = {name: table[source] for name, source in sources.items()}
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


def _problem(column: pa.ChunkedArray, task: Task, is_text: bool) -> str:
    """What is wrong with a column of texts or labels; "" if nothing is."""
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        return f"has no value in row {row}; fill it or drop the row"
    if is_text:  # string, large_string, dictionary<values=string, ...>
        is_string = "string" in str(column.type)
        return "" if is_string else f"is of type {column.type}; it must hold text"
    ids = ", ".join(f"{label} ({name})" for label, name in enumerate(task.labels))
    meaning = "finite numbers" if task.regression else f"the ids {ids}"
    kind = column.type
    if task.multi_label:
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            return f"is of type {kind}; it must hold lists of {meaning}"
        ends = np.cumsum(pc.list_value_length(column).to_numpy())
        column = pc.list_flatten(column)
        kind = kind.value_type
    is_float = pa.types.is_floating(kind) and task.regression
    if not (pa.types.is_integer(kind) or is_float or (pa.types.is_null(kind) and not len(column))):
        return f"is of type {column.type}; it must hold {meaning}"
    values = column.to_numpy()
    if not task.regression and len(values) and (values == -1).all():
        return "is -1 in every row, as in GLUE's test splits; use a split that has labels"
    is_valid = np.isfinite(values) if task.regression else np.isin(values, range(len(task.labels)))
    if is_valid.all():
        return ""
    item = int(np.argmin(is_valid))
    row = int(np.searchsorted(ends, item, side="right")) if task.multi_label else item
    return f"is {values[item]} in row {row}; the labels of {task.name} are {meaning}"
