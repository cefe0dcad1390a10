"""Read and write the rows of a task in a folder.

A folder has `SPLIT.parquet` of one task (or shards, `SPLIT-*.parquet`, as on the Hub), or such a
folder for each of several tasks. The argument `data` of functions can be either.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from fmn.errors import UserError
from fmn.store.records import Record, parse_record
from fmn.store.stage import read_sidecar, sidecar_path
from fmn.tasks.task import Task, task_folder, write_task

if TYPE_CHECKING:
    import pyarrow as pa


HUB = "nyu-mll/glue"


class DataInfo(Record):
    """The origin of a task's rows, in the sidecar of the stage `data`."""

    task: str
    source: str  # hub, embedded (the miniature GLUE), a path, a URL, or a data set's name
    revision: str | None = None  # commit of the Hub's data set
    rows: dict[str, int]  # by split
    notes: list[str] = Field(default_factory=list)  # what was inferred: splits, labels
    warnings: list[str] = Field(default_factory=list)  # what is odd in the rows


def read_data_info(data: Path, task: Task) -> DataInfo | None:
    """Read the origin of a task's rows; None if the stage `data` did not write them."""
    folder = task_folder(data, task.name)
    sidecar = read_sidecar(folder)
    if sidecar is None or sidecar.stage != "data":
        return None
    return parse_record(sidecar.info, DataInfo, sidecar_path(folder))


def has_split(data: Path, task: Task, split: str) -> bool:
    """Whether a folder has a split of a task."""
    return bool(_files(data, task, split))


def split_files(data: Path, task: Task, split: str) -> list[Path]:
    """The Parquet files of a split, in the order of its rows; UserError if there are none."""
    if files := _files(data, task, split):
        return files
    path = task_folder(data, task.name) / f"{split}.parquet"
    raise UserError(f"{path}: no such file; write it with `fmn data {task.name}`, or check --data")


def validation_splits(data: Path, task: Task) -> tuple[str, ...]:
    """The validation splits of a task in a folder; UserError if there are none."""
    if splits := tuple(split for split in task.validation if has_split(data, task, split)):
        return splits
    files = " or ".join(f"{split}.parquet" for split in task.validation) or "rows"
    folder = task_folder(data, task.name)
    raise UserError(f"{folder}: no {files} to score {task.name} on; add it, or check --data")


def read_split(data: Path, task: Task, split: str, labelled: bool = True) -> "pa.Table":
    """Read and check the rows of a split; columns are those of `fmn.tasks.rows.schema`.

    With `labelled` False, only the inputs are read.

    Raises:
        UserError: a file is missing or damaged, or its rows do not fit the task.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from fmn.tasks.rows import check_rows

    files = split_files(data, task, split)
    try:
        # Without partitioning, a folder name such as "a=1" does not become a column.
        table = pa.concat_tables([pq.read_table(file, partitioning=None) for file in files])
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{files[0]}: not Parquet ({reason}); write it again") from error
    return check_rows(table, task, str(files[0]), labelled)


def write_rows(folder: Path, task: Task, tables: "Mapping[str, pa.Table]") -> None:
    """Write `SPLIT.parquet` for each table of checked rows, and the definition, `task.json`."""
    import pyarrow.parquet as pq

    for split, table in tables.items():
        path = folder / f"{split}.parquet"
        # One row group and no Arrow schema, so that equal rows give equal bytes.
        pq.write_table(table, path, compression="zstd", row_group_size=1 << 20, store_schema=False)
    # The label's column is `label` in checked rows, whatever its name was before.
    label = "label" if task.columns.label else None
    columns = task.columns.model_copy(update={"label": label})
    write_task(folder, task.model_copy(update={"columns": columns}))


def label_array(task: Task, table: "pa.Table") -> np.ndarray:
    """The labels of a table of `read_split` as an array.

    Class ids, int64 [N]; values, float32 [N]; zeros and ones for several labels, float32 [N, C];
    zeros, int64 [N], if the table has no labels or has labels of tokens.
    """
    if "label" not in table.column_names or task.loss == "tokens":
        return np.zeros(table.num_rows, np.int64)
    if not task.multi_label:
        labels: np.ndarray = table["label"].to_numpy()
        return labels
    labels = np.zeros((table.num_rows, len(task.labels)), np.float32)  # [N, C]
    for row, ids in enumerate(table["label"].to_pylist()):
        labels[row, ids] = 1
    return labels


def _files(data: Path, task: Task, split: str) -> list[Path]:
    folder = task_folder(data, task.name)
    path = folder / f"{split}.parquet"
    return [path] if path.is_file() else sorted(folder.glob(f"{split}-*.parquet"))
