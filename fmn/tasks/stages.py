"""The stage that writes a task's rows and its definition."""

import os
from functools import partial
from pathlib import Path

from pydantic import Field, field_validator

import fmn
from fmn.errors import UserError
from fmn.store.records import Settings
from fmn.store.stage import Job, Outcome, read_info, run_stage
from fmn.tasks import dataset
from fmn.tasks.dataset import DataInfo
from fmn.tasks.sources import local_files
from fmn.tasks.task import Task, TaskSettings, get_task, load_task

DATA = 2

MINIATURE = "data/miniature_glue"  # in a checkout; it is no part of the package


class DataSettings(Settings):
    source: str = Field(
        "hub",
        description="hub (nyu-mll/glue), embedded (the miniature GLUE), or a folder of one task or"
        " of several tasks; $NAME is read from the environment",
    )
    revision: str = Field("main", description="revision of the Hub's data set")
    seed: int = Field(
        0, ge=0, le=0, description="of the miniature GLUE: 0; its script writes rows of others"
    )

    @field_validator("source")
    @classmethod
    def _from_environment(cls, source: str) -> str:
        if not source.startswith("$"):
            return source
        if folder := os.environ.get(source[1:]):
            return folder
        raise ValueError(f"{source[1:]} is not set in the environment; it names a folder of data")


def data(
    task: str,
    *,
    out: Path,
    settings: DataSettings = DataSettings(),  # noqa: B008
    definition: TaskSettings | None = None,
) -> Outcome[DataInfo]:
    """Write a task's rows as Parquet files, one for each split, and its definition as task.json.

    All rows are checked before any is written. The same rows make the same bytes.

    Args:
        task: one of GLUE's tasks, or one that is defined in the source folder's task.json.
        out: the folder to write.
        settings: where the rows come from.
    """
    if definition and definition.dataset:
        return _own(task, out, definition)
    folder, revision = _source_folder(task, settings)
    resolved = load_task(folder, task)
    splits = ("train", *dataset.validation_splits(folder, resolved))

    def compute(job: Job) -> DataInfo:
        tables = {split: dataset.read_split(folder, resolved, split) for split in splits}
        dataset.write_rows(job.path, resolved, tables)
        return DataInfo(
            task=task,
            source=settings.source,
            revision=revision,
            rows={split: table.num_rows for split, table in tables.items()},
        )

    return run_stage(
        "data",
        DATA,
        out,
        compute,
        reads={split: dataset.split_files(folder, resolved, split) for split in splits},
        settings={"task": resolved, "revision": revision},
        summary=partial(read_info, record=DataInfo),
        is_folder=True,
    )


def _own(task: str, out: Path, settings: TaskSettings) -> Outcome[DataInfo]:
    """A stand-in for branch s3-tasks: CSV files with names of classes."""
    import pyarrow as pa
    import pyarrow.csv

    files = local_files(settings)
    tables = dict(zip(("train", "validation"), map(pyarrow.csv.read_csv, files), strict=True))
    columns = settings.columns
    texts = [name for name in (columns.text, columns.text_pair) if name]
    names: list[str] = []
    if columns.label:
        names = list(settings.labels) or sorted(set(tables["train"][columns.label].to_pylist()))
    definition = Task.model_validate(
        {
            "name": task,
            "columns": columns.model_dump(),
            "labels": tuple(names),
            "metrics": tuple(settings.metrics) or ("accuracy",),
            "problem_type": "single_label_classification" if names else None,
            "max_length": settings.max_length,
        }
    )

    def compute(job: Job) -> DataInfo:
        rows = {}
        for split, table in tables.items():
            parts = {name: table[name] for name in texts}
            if columns.label:
                ids = [names.index(name) for name in table[columns.label].to_pylist()]
                parts["label"] = pa.array(ids, pa.int64())
            rows[split] = pa.table({**parts, "idx": pa.array(range(table.num_rows), pa.int32())})
        dataset.write_rows(job.path, definition, rows)
        return DataInfo(
            task=task, source="own", rows={split: table.num_rows for split, table in rows.items()}
        )

    return run_stage(
        "data", DATA, out, compute,
        reads={"files": files}, settings={"task": definition},
        summary=partial(read_info, record=DataInfo), is_folder=True,
    )  # fmt: skip


def _source_folder(task: str, settings: DataSettings) -> tuple[Path, str | None]:
    """The folder that the rows are read from, and the commit of the Hub's data set."""
    source = settings.source
    if source == "hub":
        return dataset.download_glue(get_task(task), settings.revision)
    if source == "embedded":
        return _miniature_glue(get_task(task).name), None
    if "://" in source or not Path(source).is_dir():
        raise UserError(f"data {source}: not a folder; name one, or embedded, or hub")
    return Path(source), None


def _miniature_glue(task: str) -> Path:
    """The folder of the miniature GLUE, if it has this task."""
    here = Path(os.environ.get("FMN_MINIATURE_GLUE", MINIATURE))
    for folder in (here, Path(fmn.__file__).parent.parent / MINIATURE):
        if (folder / task).is_dir():
            return folder
    remedy = f"set FMN_MINIATURE_GLUE to {MINIATURE} of a checkout, or use another --source"
    raise UserError(f"data embedded: there is no {task} in {here} or in a checkout; {remedy}")
