"""Task data: from its source to Parquet files in the schema of `nyu-mll/glue`, and from there to tokens."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fmn.errors import UserError
from fmn.store import machine
from fmn.store.artifacts import digest_bytes, digest_file, read_manifest, whole_file
from fmn.tasks import embedded
from fmn.tasks.task import Task

if TYPE_CHECKING:
    from fmn.tasks.batches import Examples

HUB = "nyu-mll/glue"
MAX_LENGTH = 128  # tokens; longer texts are cut


def schema(task: Task) -> pa.Schema:
    """The columns of a task's files: its texts, `label`, `idx`."""
    label = pa.float32() if task.regression else pa.int64()
    return pa.schema(
        [*((name, pa.string()) for name in task.columns), ("label", label), ("idx", pa.int32())]
    )


def prepare(
    task: Task, source: str, out: Path, *, seed: int = 0, revision: str = "main"
) -> dict[str, int]:
    """Write `out/SPLIT.parquet` for the training and validation splits; returns the rows of each.

    `source` is "hub" (`nyu-mll/glue` at `revision`), "embedded" (made here, from `seed`), or a folder laid out as
    `read` wants it. Everything is checked before the first file is written, and the same rows make the same bytes.
    Splits that a folder lacks are left out, but it must have `train` and one to validate on.
    """
    if source == "embedded":
        tables = _embedded(task, seed)
    elif source == "hub":
        tables = _hub(task, revision)
    else:
        folder = Path(source)
        if not folder.is_dir():
            raise UserError(
                f"There is no folder {source!r} to take data from: use hub, embedded or a folder."
            )
        tables = {
            split: read(folder, task, split)
            for split in ("train", *validation_splits(folder, task))
        }
    for split, table in tables.items():
        with whole_file(out / f"{split}.parquet") as file:
            pq.write_table(
                table, file, compression="zstd", row_group_size=1 << 20, store_schema=False
            )
    return {split: table.num_rows for split, table in tables.items()}


def validation_splits(folder: Path, task: Task) -> tuple[str, ...]:
    """Those of the task's validation splits that the folder has; `UserError` where it has none."""
    found = tuple(split for split in task.validation if _files(folder, task, split))
    if not found:
        raise UserError(
            f"{_home(folder, task)} has no {' or '.join(task.validation)}.parquet to score {task.name} on."
        )
    return found


def read(folder: Path, task: Task, split: str, labelled: bool = True) -> pa.Table:
    """A split of a task, checked, in the columns and types of `schema`; other columns are left out.

    `folder` holds `SPLIT.parquet`, or `TASK/SPLIT.parquet` (the Hub's shards, `SPLIT-*.parquet`, are read too).
    `UserError` says which file is missing or what is wrong in it. Not `labelled`: the texts alone.
    """
    files = _files(folder, task, split)
    if not files:
        raise _missing(folder, task, split)
    try:
        table = pa.concat_tables([pq.read_table(file, partitioning=None) for file in files])
    except (pa.ArrowException, OSError) as error:
        told = f"{files[0]} cannot be read as Parquet: {str(error).splitlines()[0]}"
        raise machine.refusal(error, files[0]) or UserError(told) from error
    return (
        checked(table, task, str(files[0])) if labelled else _only_texts(table, task, str(files[0]))
    )


def checked(table: pa.Table, task: Task, where: str) -> pa.Table:
    """`table` in the task's schema; `UserError`, which names the place `where`, if it does not hold what it must."""
    _needs(table, task, where, "label")
    columns = {name: _texts(table[name], f"{where}: column {name}") for name in task.columns}
    columns["label"] = _labels(table["label"], task, f"{where}: column label")
    index = (
        table["idx"]
        if "idx" in table.column_names
        else pa.array(np.arange(table.num_rows, dtype=np.int32))
    )
    try:
        columns["idx"] = index.cast(pa.int32())
    except pa.ArrowException:
        raise UserError(
            f"{where}: column idx is not of 32-bit integers; it may be left out."
        ) from None
    return pa.table(columns, schema=schema(task)).combine_chunks()


def tokenize(
    tokenizer: Any,
    task: Task,
    table: pa.Table,
    max_length: int = MAX_LENGTH,
    rows: "np.ndarray | None" = None,
) -> "Examples":
    """The texts of a table that `read` gave, as tokens, and its labels; zeros where it has none.

    Where a text or a pair has more than `max_length` tokens, special ones included, the longer text is cut first.
    `rows`: the only ones that are wanted; the others have no tokens.
    """
    from fmn.tasks.batches import Examples

    texts = [
        (table[name] if rows is None else table[name].take(rows)).to_pylist()
        for name in task.columns
    ]
    inputs: Mapping[str, list[list[int]]] = tokenizer(
        *texts,
        truncation="longest_first",
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
    )
    padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    if tokenizer.pad_token_id is None:
        padding["input_ids"] = 0  # any token will do: the attention mask covers it
    if rows is not None:
        wanted = {
            name: dict(zip(rows.tolist(), values, strict=True)) for name, values in inputs.items()
        }
        inputs = {
            name: [found.get(row, []) for row in range(table.num_rows)]
            for name, found in wanted.items()
        }
    return Examples(
        inputs={name: inputs[name] for name in inputs},
        labels=table["label"].to_numpy()
        if "label" in table.column_names
        else np.zeros(table.num_rows, np.int64),
        pad={name: padding[name] for name in inputs},
    )


def origin(folder: Path, task: Task) -> dict[str, str]:
    """Where a task's files come from: the source, and its revision or seed, as `fmn data` was told."""
    manifest = read_manifest(_home(folder, task))
    info = manifest["info"] if manifest else {"source": "a folder"}
    return {name: str(info[name]) for name in ("source", "revision", "seed") if name in info}


def digests(folder: Path, task: Task, splits: Iterable[str]) -> dict[str, str]:
    """The sha256 of each of `splits` by its name; `UserError` for one that is not there."""
    found = {}
    for split in splits:
        files = _files(folder, task, split)
        if not files:
            raise _missing(folder, task, split)
        found[split] = digest_bytes("".join(digest_file(file) for file in files).encode())
    return found


def stated(folder: Path, task: Task) -> dict[str, Any]:
    """Where a task's rows come from, as its manifest says: source, revision or seed, rows by split; else empty."""
    manifest = read_manifest(_home(folder, task))
    return dict(manifest["info"]) if manifest and manifest["stage"] == "data" else {}


def has(folder: Path, task: Task, split: str) -> bool:
    """Whether the folder holds this split."""
    return bool(_files(folder, task, split))


def _missing(folder: Path, task: Task, split: str) -> UserError:
    file = _home(folder, task) / f"{split}.parquet"
    return UserError(f"{file} is missing: write it with `fmn data {task.name}`, or check --data.")


def _home(folder: Path, task: Task) -> Path:
    return folder / task.name if (folder / task.name).is_dir() else folder


def _files(folder: Path, task: Task, split: str) -> list[Path]:
    home = _home(folder, task)
    whole = home / f"{split}.parquet"
    return [whole] if whole.is_file() else sorted(home.glob(f"{split}-*.parquet"))


def _only_texts(table: pa.Table, task: Task, where: str) -> pa.Table:
    _needs(table, task, where)
    return pa.table(
        {name: _texts(table[name], f"{where}: column {name}") for name in task.columns}
    ).combine_chunks()


def _needs(table: pa.Table, task: Task, where: str, *more: str) -> None:
    """Refuse a table without rows, or without a column of the task's texts or of `more`."""
    needed = (*task.columns, *more)
    if missing := [name for name in needed if name not in table.column_names]:
        raise UserError(
            f"{where}: no column {', '.join(missing)}; {task.name} needs {', '.join(needed)}"
            f" and here are {', '.join(table.column_names)}."
        )
    if not table.num_rows:
        raise UserError(f"{where}: there are no rows.")


def _texts(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not any(
        test(kind)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    ):
        raise UserError(f"{where} is of type {column.type} and must hold text.")
    _no_nulls(column, where)
    texts = column.cast(pa.string())
    try:
        texts.validate(full=True)
    except pa.ArrowException:
        raise UserError(
            f"{where} holds bytes that are not UTF-8: write the texts again as UTF-8."
        ) from None
    return texts


def _labels(column: pa.ChunkedArray, task: Task, where: str) -> pa.ChunkedArray:
    _no_nulls(column, where)
    fits = pa.types.is_integer(column.type) or (
        task.regression and pa.types.is_floating(column.type)
    )
    if not fits:
        wanted = "numbers from 0 to 5" if task.regression else f"the ids {_ids(task)}"
        raise UserError(f"{where} is of type {column.type} and must hold {wanted}.")
    values = column.to_numpy()
    if (values == -1).all():
        raise UserError(
            f"{where} is -1 in every row, as in GLUE's test splits: use a split that has labels."
        )
    low, high = (0.0, 5.0) if task.regression else (0, len(task.labels) - 1)
    wrong = np.flatnonzero(~((values >= low) & (values <= high)))  # NaN is neither
    if len(wrong):
        meaning = "numbers from 0 to 5" if task.regression else f"ids: {_ids(task)}"
        raise UserError(
            f"{where} is {values[wrong[0]]} in row {wrong[0]}; the labels of {task.name} are {meaning}."
        )
    return column.cast(pa.float32() if task.regression else pa.int64(), safe=False)


def _ids(task: Task) -> str:
    return ", ".join(f"{label} ({name})" for label, name in enumerate(task.labels))


def _no_nulls(column: pa.ChunkedArray, where: str) -> None:
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise UserError(f"{where} has no value in row {row}: fill it or take the row out.")


def _embedded(task: Task, seed: int) -> dict[str, pa.Table]:
    tables = {}
    for split, rows in embedded.generate(task, seed).items():
        columns: dict[str, list[Any]] = {
            name: [texts[place] for texts, _ in rows] for place, name in enumerate(task.columns)
        }
        columns["label"] = [label for _, label in rows]
        columns["idx"] = list(range(len(rows)))
        tables[split] = pa.table(columns).cast(schema(task))
    return tables


def _hub(task: Task, revision: str) -> dict[str, pa.Table]:
    import datasets

    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        found = {
            split: datasets.load_dataset(
                HUB, task.name, revision=revision, split=split
            ).with_format("arrow")[:]
            for split in task.splits
        }
    except (OSError, ValueError) as error:  # not found, no network, a broken answer
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise machine.refusal(error) or UserError(
            f"{task.name} of {HUB} at {revision} did not come from the Hub ({reason}): check the network and the"
            " revision, or use --source embedded or a folder."
        ) from error
    finally:
        if not shown:
            datasets.enable_progress_bars()
    return {
        split: checked(table, task, f"{HUB}/{task.name} {split}") for split, table in found.items()
    }
