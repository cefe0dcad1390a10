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
from fmn.tasks.task import get_task, load_task

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
) -> Outcome[DataInfo]:
    """Write a task's rows as Parquet files, one for each split, and its definition as task.json.

    All rows are checked before any is written. The same rows make the same bytes.

    Args:
        task: one of GLUE's tasks, or one that is defined in the source folder's task.json.
        out: the folder to write.
        settings: where the rows come from.
    """
    folder, revision = _source_folder(task, settings)
    definition = load_task(folder, task)
    splits = ("train", *dataset.validation_splits(folder, definition))

    def compute(job: Job) -> DataInfo:
        tables = {split: dataset.read_split(folder, definition, split) for split in splits}
        dataset.write_rows(job.path, definition, tables)
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
        reads={split: dataset.split_files(folder, definition, split) for split in splits},
        settings={"task": definition, "revision": revision},
        summary=partial(read_info, record=DataInfo),
        is_folder=True,
    )


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
