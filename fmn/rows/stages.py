"""The stage that writes a task's rows and its definition."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field, field_validator

import fmn
from fmn.errors import UserError, hint, redacted
from fmn.rows import sources
from fmn.store.records import Settings
from fmn.store.stage import Job, Outcome, read_info, run_stage
from fmn.store.yaml_file import read_yaml
from fmn.tasks import dataset
from fmn.tasks.dataset import DataInfo
from fmn.tasks.kinds import KindName
from fmn.tasks.task import (
    TASKS,
    ColumnSettings,
    DatasetSettings,
    ScoringSettings,
    Task,
    TaskSettings,
    get_task,
    load_task,
    make_task,
    problems_explained,
    read_task,
    task_folder,
    task_settings,
)

if TYPE_CHECKING:
    from fmn.rows.prepare import Prepared

DATA = 5

MINIATURE = "data/miniature_glue"


class DataSettings(Settings):
    source: str = Field(
        "hub",
        description="hub (nyu-mll/glue), embedded (the miniature GLUE), or a folder of one task or"
        " of several tasks; $NAME is read from the environment",
    )
    revision: str = Field("main", description="revision of the Hub's data set")

    @field_validator("source")
    @classmethod
    def _from_environment(cls, source: str) -> str:
        if not source.startswith("$"):
            return source
        if folder := os.environ.get(source[1:]):
            return folder
        raise ValueError(f"{source[1:]} is not set in the environment; it names a folder of data")


class TaskOptions(ScoringSettings):
    """The user's own task, as options of a command."""

    definition: Path | None = Field(
        None, description="a YAML file: the task, or a section `tasks` with it"
    )
    dataset: str | None = Field(
        None, description="the rows: a file, a folder, a URL, or a data set on the Hub (ORG/NAME)"
    )
    validation: str | None = Field(None, description="the validation rows, in a file of their own")
    validation_size: float | None = Field(
        None, gt=0, description="rows to split off for validation: a share below 1, or a number"
    )
    seed: int = Field(0, ge=0, description="seed of that split")
    name: str | None = Field(None, description="configuration of a data set on the Hub")
    kind: KindName | None = Field(
        None, description="the Hub's name of the kind of task; default: as the columns say"
    )
    text: str | None = Field(None, description="the column of the text")
    text_pair: str | None = Field(None, description="the column of the second text of a pair")
    image: str | None = Field(None, description="the column of the image")
    prompt: str | None = Field(None, description="the column of what a text goes on from")
    completion: str | None = Field(None, description="the column of the text to generate")
    tokens: str | None = Field(
        None, description="the column of the words, for token-classification"
    )
    label: str | None = Field(None, description="the column of the label")
    labels: list[str] = Field(
        default_factory=list, description="names in the order of ids, or VALUE=NAME ..."
    )
    metric: list[str] = Field(
        default_factory=list, description="the score of the task is their mean"
    )


COLUMNS = (
    "text",
    "text_pair",
    "tokens",
    "image",
    "prompt",
    "completion",
    "label",
)  # options that name one


def definition_of(task: str, options: TaskOptions, settings: DataSettings) -> TaskSettings | None:
    """The task that options of a command describe; None without such options.

    Raises:
        UserError: options contradict one another, or the file defines no such task.
    """
    values = options.model_dump(exclude_unset=True, exclude_none=True)
    if file := values.pop("definition", None):
        if values:
            raise UserError(f"--definition {file}: it says all of the task; give it alone")
        return read_definition(file, task)
    if not values:
        return None
    if "dataset" in values and "source" in settings.model_fields_set:
        raise UserError("--dataset and --source contradict each other; give one")
    columns = {name: values.pop(name) for name in COLUMNS if name in values}
    rows: dict[str, Any] = {
        name: values.pop(name) for name in ("validation_size", "seed", "name") if name in values
    }
    path, validation = values.pop("dataset", None), values.pop("validation", None)
    if path or validation or rows:
        rows |= {"path": path or "", "revision": settings.revision}
        if validation:  # separate files for validation
            rows |= {"path": path and ".", "data_files": {"train": path, "validation": validation}}
        values["dataset"] = rows
    values |= {"metrics": values.pop("metric", []), "task": values.pop("kind", None)}
    pairs = [item.partition("=") for item in options.labels]
    if pairs and all(value and name for value, _, name in pairs):
        values["labels"] = {value: name for value, _, name in pairs}
    with problems_explained(f"task {task}"):
        return TaskSettings.model_validate({**values, "columns": columns})


def read_definition(path: Path, task: str) -> TaskSettings:
    """A task's definition in a YAML file: its keys, or a section `tasks` with the task in it.

    Raises:
        UserError: the file cannot be read, or holds no such task.
    """
    content = read_yaml(path, "--definition")
    if isinstance(content, dict) and "tasks" in content:
        tasks = content["tasks"] or {}
        if task not in tasks:
            known = ", ".join(tasks)
            raise UserError(f"{path}: no task {task}; there are {known}{hint(task, tasks)}")
        content = tasks[task]
    with problems_explained(str(path)):
        return TaskSettings.model_validate(content or {})


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
        task: the task.
        out: the folder to write.
        settings: where the rows come from, if the definition does not say it.
        definition: what the task is; default: GLUE's task of this name, or the source folder's.

    Raises:
        UserError: the rows cannot be read, or are not as the definition says.
    """
    source = find_source(task, settings, definition)

    def compute(job: Job) -> DataInfo:
        rows = source.read()
        dataset.write_rows(job.path, rows.task, rows.tables)
        return DataInfo(
            task=task,
            source=source.name,
            revision=source.revision,
            rows={split: table.num_rows for split, table in rows.tables.items()},
            notes=[redacted(note) for note in rows.notes],
            warnings=rows.warnings,
        )

    return run_stage(
        "data",
        DATA,
        out,
        compute,
        reads=source.files,
        settings={**source.about, "revision": source.revision},
        summary=partial(read_info, record=DataInfo),
        is_folder=True,
    )


class Source(NamedTuple):
    """Where a task's rows come from.

    Attributes:
        name: what users call it: hub, embedded, a path, a URL, or a data set's name.
        files: what the stage's key has of the files, by split.
        revision: the commit of a data set on the Hub.
        about: what else the rows depend on.
        read: reads and checks them.
    """

    name: str
    files: Mapping[str, Any]
    revision: str | None
    about: Mapping[str, Any]
    read: "Callable[[], Prepared]"


def find_source(task: str, settings: DataSettings, definition: TaskSettings | None) -> Source:
    """The origin of a task's rows: the data set in its definition, or the source in `settings`.

    Raises:
        UserError: there is nothing, or nothing says what the task is.
    """
    if definition and definition.dataset:
        return _own_source(task, definition, definition.dataset)
    folder, revision = _source_folder(task, settings, is_defined=definition is not None)
    here = task_folder(folder, task)
    checked = read_task(here) or TASKS.get(task)
    is_described = definition and (
        definition.columns != ColumnSettings() or not checked or definition.kind != checked.task
    )
    if definition and is_described:
        rows = DatasetSettings(path=str(here))
        return _own_source(task, definition.model_copy(update={"dataset": rows}), rows)
    full = load_task(folder, task)
    if definition:
        changes = definition.model_dump(exclude_unset=True, exclude={"task", "dataset", "columns"})
        full = make_task(**{**dict(full), **changes})
    validation = [split for split in full.validation if dataset.has_split(folder, full, split)]
    if full.has_labels and not validation:
        dataset.validation_splits(folder, full)  # says which files are missing
    splits = ("train", *validation)
    return Source(
        name=settings.source,
        files={split: dataset.split_files(folder, full, split) for split in splits},
        revision=revision,
        about={"task": full},
        read=partial(_read_checked, folder, full, splits),
    )


def _read_checked(folder: Path, task: Task, splits: Sequence[str]) -> "Prepared":
    """Read rows that already have the schema of fmn: GLUE's rows, or rows that fmn wrote."""
    from fmn.rows.prepare import Prepared, odd_rows

    tables = {split: dataset.read_split(folder, task, split) for split in splits}
    return Prepared(task, tables, [], odd_rows(task, tables))


def _own_source(task: str, definition: TaskSettings, rows: DatasetSettings) -> Source:
    hub, commit = sources.hub_name(rows), None
    files: sources.Splits = {}
    if hub:
        commit = sources.pin(rows, hub)
    else:
        files = sources.find_files(rows)
    about = json.loads(redacted(definition.model_dump_json()))  # no password of a URL

    def read() -> "Prepared":
        from fmn.rows.prepare import prepare

        each = files
        if hub and commit:
            each = sources.hub_files(rows, sources.download(rows, hub, commit))
        return prepare(task, definition, each, rows.path)

    first = next((name for split in files.values() for name, *_ in split), rows.path)
    return Source(
        name=redacted(first if rows.path == "." else rows.path),
        files={split: [file.digest() for file in each] for split, each in files.items()},
        revision=commit,
        about={"task": task, "definition": about},
        read=read,
    )


def _source_folder(task: str, settings: DataSettings, is_defined: bool) -> tuple[Path, str | None]:
    """The folder that the rows are read from, and the commit of the Hub's data set."""
    source = settings.source
    if source not in ("hub", "embedded"):
        if "://" in source or not Path(source).is_dir():
            raise UserError(f"data {source}: not a folder; name one, or embedded, or hub")
        return Path(source), None
    if is_defined and not task_settings(task):
        raise UserError(f"task {task}: nothing says where its rows are; name its dataset")
    splits = ("train", *get_task(task).validation)
    if source == "embedded":
        return _miniature_glue(task), None
    patterns = [f"{task}/{split}-*.parquet" for split in splits]
    rows = DatasetSettings(path=dataset.HUB, revision=settings.revision, data_files=patterns)
    folder = sources.download(rows, rows.path, rows.revision)
    return folder, folder.name


def quickstart_files() -> Path:
    """The folder of the quick start's `params.yaml` and data: the package's, or the checkout."""
    package = Path(fmn.__file__).parent
    packaged = package / "quickstart"  # pyproject.toml puts it into the wheel
    return packaged if packaged.is_dir() else package.parent


def _miniature_glue(task: str) -> Path:
    """The folder of miniature GLUE; UserError if it lacks the task."""
    here = Path(os.environ.get("FMN_MINIATURE_GLUE", MINIATURE))
    for folder in (here, quickstart_files() / MINIATURE):
        if (folder / task).is_dir():
            return folder
    remedy = f"set FMN_MINIATURE_GLUE to {MINIATURE} of a checkout, or use another --source"
    raise UserError(f"data embedded: there is no {task} in {here} or in the package; {remedy}")
