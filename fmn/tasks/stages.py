"""The stage that writes a task's rows and its definition."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field, ValidationError, field_validator

import fmn
from fmn.errors import UserError, hint, redacted
from fmn.store.records import Settings
from fmn.store.stage import Job, Outcome, read_info, run_stage
from fmn.store.yaml_file import read_yaml
from fmn.tasks import dataset, sources
from fmn.tasks.dataset import DataInfo
from fmn.tasks.task import (
    MAX_LENGTH,
    DatasetSettings,
    ProblemType,
    Task,
    TaskSettings,
    get_task,
    load_task,
    make_task,
    read_task,
    task_folder,
    task_settings,
)

if TYPE_CHECKING:
    from fmn.tasks.prepare import Prepared

DATA = 3

MINIATURE = "data/miniature_glue"  # in a checkout; it is no part of the package


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


class TaskOptions(Settings):
    """A task of one's own, as options of a command."""

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
    text: str | None = Field(None, description="the column of the text")
    text_pair: str | None = Field(None, description="the column of the second text of a pair")
    label: str | None = Field(None, description="the column of the label")
    problem_type: ProblemType | None = Field(
        None, description="default: from the labels; numbers with decimals, lists, or classes"
    )
    labels: list[str] = Field(
        default_factory=list, description="names in the order of ids, or VALUE=NAME ..."
    )
    metric: list[str] = Field(
        default_factory=list, description="the score of the task is their mean"
    )
    max_length: int = Field(MAX_LENGTH, ge=1, description="tokens of an example")
    threshold: float = Field(
        0.5, gt=0, lt=1, description="probability from which on a label of several is predicted"
    )


def definition_of(task: str, options: TaskOptions, settings: DataSettings) -> TaskSettings | None:
    """What the options of a command say of a task; None if they say nothing.

    Raises:
        UserError: options contradict one another, or the file defines no such task.
    """
    set_options = {name for name in options.model_fields_set if getattr(options, name) is not None}
    if not set_options:
        return None
    flags = {name: f"--{name.replace('_', '-')}" for name in TaskOptions.model_fields}
    if options.definition and (others := set_options - {"definition"}):
        listed = ", ".join(flags[name] for name in sorted(others))
        raise UserError(f"{listed}: --definition says it already; give one of them")
    has_source = "source" in settings.model_fields_set
    if has_source and (clash := set_options & {"dataset", "definition"}):
        raise UserError(f"{flags[clash.pop()]} and --source contradict each other; give one")
    of_files = set_options & {"validation", "validation_size", "seed", "name"}
    if of_files and "dataset" not in set_options:
        raise UserError(f"{flags[of_files.pop()]} needs --dataset")
    if {"validation", "validation_size"} <= of_files:
        raise UserError("--validation and --validation-size contradict each other; give one")
    if options.definition:
        return read_definition(options.definition, task)
    try:
        return TaskSettings(**_fields_of(options, set_options, settings))
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"task {task}: {reason}") from error


def _fields_of(options: TaskOptions, set_options: set[str], settings: DataSettings) -> Any:
    """The options as a section of the settings has them."""
    columns = {
        name: getattr(options, name) for name in set_options & {"text", "text_pair", "label"}
    }
    names = {"problem_type", "max_length", "threshold"}
    fields: dict[str, Any] = {name: getattr(options, name) for name in set_options & names}
    if options.labels:
        pairs = [item.partition("=") for item in options.labels]
        is_mapping = all(value and name for value, _, name in pairs)
        fields["labels"] = (
            {value: name for value, _, name in pairs} if is_mapping else options.labels
        )
    if options.dataset:
        rows: dict[str, Any] = {"path": options.dataset, "revision": settings.revision}
        if options.validation:  # files of their own, wherever they are
            rows["data_files"] = {"train": options.dataset, "validation": options.validation}
            rows["path"] = "."
        of_rows = set_options & {"validation_size", "seed", "name"}
        rows |= {name: getattr(options, name) for name in of_rows}
        fields["dataset"] = rows
    return fields | {"columns": columns, "metrics": options.metric}


def read_definition(path: Path, task: str) -> TaskSettings:
    """A task's definition in a YAML file: its keys, or a section `tasks` with the task in it.

    Raises:
        UserError: the file cannot be read, or holds no such task.
    """
    content = read_yaml(path)
    if isinstance(content, dict) and "tasks" in content:
        tasks = content["tasks"] or {}
        if task not in tasks:
            known = ", ".join(tasks)
            raise UserError(f"{path}: no task {task}; there are {known}{hint(task, tasks)}")
        content = tasks[task]
    try:
        return TaskSettings.model_validate(content or {})
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {f'{setting}: ' * bool(setting)}{message}") from error


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
    """Where a task's rows come from: its definition's data set, or what `settings` name.

    Raises:
        UserError: there is nothing, or nothing says what the task is.
    """
    if definition and definition.dataset:
        return _own_source(task, definition, definition.dataset)
    folder, revision = _source_folder(task, settings, is_defined=definition is not None)
    here = task_folder(folder, task)
    is_checked = read_task(here) is not None or task_settings(task) is not None
    if definition and (definition.columns.model_fields_set or not is_checked):
        rows = DatasetSettings(path=str(here))
        return _own_source(task, definition.model_copy(update={"dataset": rows}), rows)
    full = load_task(folder, task)
    if definition:
        names = {"problem_type", "labels", "metrics", "max_length", "threshold"}
        changes = {name: getattr(definition, name) for name in names & definition.model_fields_set}
        lists = {name: tuple(value) for name, value in changes.items() if isinstance(value, list)}
        full = make_task(**{**dict(full), **changes, **lists})
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
    """Rows that are in their task's schema already: GLUE's, or those that fmn wrote."""
    from fmn.tasks.prepare import Prepared, odd_rows

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
        from fmn.tasks.prepare import prepare

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
    if source in ("hub", "embedded"):
        glue = task_settings(task)
        if is_defined and not glue:
            raise UserError(f"task {task}: nothing says where its rows are; name its dataset")
        validation = get_task(task).validation
        if source == "embedded":
            return _miniature_glue(task), None
        patterns = [f"{task}/{split}-*.parquet" for split in ("train", *validation)]
        rows = DatasetSettings(path=dataset.HUB, revision=settings.revision, data_files=patterns)
        folder = sources.download(rows, rows.path, rows.revision)
        return folder, folder.name
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
