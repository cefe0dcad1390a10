"""The settings file, ``params.yaml``: its sections, read and checked as a whole.

Each section is a pydantic model, defined beside its stage. Its fields are also the options of the
stage's command. This module combines the sections.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field, SecretStr, ValidationError, field_validator, model_validator

from fmn.errors import UserError, hint, redacted
from fmn.evaluate.stages import EvaluateSettings
from fmn.experiments.stages import SETS, CompareSettings
from fmn.fisher.stages import FisherSettings, FullFisherSettings, GramSettings
from fmn.merge.methods import needs_of
from fmn.merge.stages import CalibrateSettings, MergeSettings, RealignSettings
from fmn.models.stages import FinetuneSettings
from fmn.registry.stages import RegistrySettings
from fmn.rows.sources import find_files, hub_name, local_files, pin
from fmn.rows.stages import DataSettings
from fmn.sources import origin
from fmn.sources.stages import ArchitectureSettings, ExpertSource
from fmn.store import artifacts
from fmn.store.records import Settings, in_words, shortened
from fmn.store.stage import Job, Outcome, run_stage
from fmn.store.yaml_file import line_of, read_yaml
from fmn.tasks.dataset import HUB
from fmn.tasks.task import (
    DEFINITION,
    TASKS,
    DatasetSettings,
    TaskSettings,
    task_folder,
    task_settings,
)

SETTINGS = 5  # version of the stage
WEBHOOK = "FMN_WEBHOOK"  # environment variable of the webhook's address
MERGED, CALIBRATED, REALIGNED = "merged", "calibrated", "realigned"
BOUNDS = {
    "base": MergeSettings(method="average", scale=0),
    "average": MergeSettings(method="average"),
}
"""Merges that stand beside every run: nothing merged, and what everybody tries first."""
TAKEN = (*BOUNDS, MERGED, CALIBRATED, "expert", "mean")  # what tables have by these names


class ExpertsSettings(Settings):
    tasks: list[str] = Field(..., min_length=1, description="the tasks whose experts are merged")

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, tasks: list[str]) -> list[str]:
        if twice := [name for name in tasks if tasks.count(name) > 1]:
            raise ValueError(f"task {twice[0]!r} is listed twice")
        return tasks


class DividedFisherSettings(FisherSettings):
    """As for one stage, and how many stages share the work, on which the result hardly depends."""

    runtime: ClassVar[set[str]] = {*FisherSettings.runtime, "parts"}
    parts: int = Field(
        1,
        ge=1,
        le=64,
        description="stages that share an expert's examples and run side by side; the sum differs"
        " only in rounding",
    )


class NotifySettings(Settings):
    webhook: SecretStr | None = Field(
        None,
        description="address that takes messages in Slack's JSON: of a new champion and of a"
        f" failure; $NAME is read from the environment; default: ${WEBHOOK}, if that is set",
    )

    @field_validator("webhook")
    @classmethod
    def _check_webhook(cls, webhook: SecretStr | None) -> SecretStr | None:
        if webhook and not re.match(r"https?://.|\$\w", webhook.get_secret_value()):
            raise ValueError("must be an address, https://..., or $NAME of an environment variable")
        return webhook

    @property
    def address(self) -> str | None:
        """The webhook's address, which is a secret; None when nobody is to be notified."""
        address = self.webhook.get_secret_value() if self.webhook else f"${WEBHOOK}"
        return os.environ.get(address[1:]) if address.startswith("$") else address


class Params(Settings):
    """``params.yaml``."""

    work: str = Field(
        "data/work", min_length=1, description="folder of everything that a run writes"
    )
    base: str = Field(..., description="the model that the experts were fine-tuned from")
    tasks: dict[str, TaskSettings] = Field(
        default_factory=dict, description="TASK: what it is, unless it is one of GLUE's"
    )
    architecture: ArchitectureSettings | None = Field(
        None, description="where the base's mask nodes are, if its architecture is not known"
    )
    experts: ExpertsSettings
    sources: dict[str, ExpertSource] = Field(
        default_factory=dict, description="TASK: where its published expert comes from"
    )
    finetune: dict[str, FinetuneSettings] = Field(
        default_factory=dict,
        description="TASK: how its expert is fine-tuned from the base, if none is published",
    )
    data: DataSettings = DataSettings()
    fisher: DividedFisherSettings = DividedFisherSettings()
    gram: dict[str, GramSettings] = Field(
        default_factory=dict,
        description="TASK: how its expert's Gram matrices are computed, if not by the defaults;"
        " they are computed for methods that take them, and for the tasks that stand here",
    )
    merge: MergeSettings = Field(
        MergeSettings(), description="the first step from the experts to the run's model"
    )
    calibrate: CalibrateSettings | None = Field(
        None, description="the second step: calibration of the merged encoder; default: none"
    )
    realign: dict[str, RealignSettings] = Field(
        {REALIGNED: RealignSettings()},
        description="NAME, realigned or realigned-...: the last step, heads that are re-aligned"
        " with the encoder; the first entry is the run's model, the others are columns beside it;"
        " {}: heads stay as they are",
    )
    baselines: dict[str, MergeSettings] = Field(
        default_factory=dict, description="NAME: another merge, a column beside the run's model"
    )
    evaluate: EvaluateSettings = EvaluateSettings()
    full_fisher: FullFisherSettings = FullFisherSettings()
    compare: dict[str, CompareSettings] = Field(
        default_factory=dict, description="NAME: what `fmn compare NAME` compares"
    )
    registry: RegistrySettings = Field(..., description="where the merged model is registered")
    notify: NotifySettings = NotifySettings()
    runner: Literal["local", "dask"] = Field(
        "local", description="where experts are computed: here, or on the workers of a Dask cluster"
    )
    address: str | None = Field(
        None, description="address of the Dask scheduler, such as tcp://host:8786"
    )
    storage: str | None = Field(
        None,
        description="URL of a folder that this machine and all workers read and write, such as"
        " s3://bucket/fmn, or file:///mnt/fmn for one that all mount; for runner dask",
    )

    @model_validator(mode="after")
    def _check_work(self) -> "Params":
        work = os.path.normpath(self.work)
        if {*Path(work).parts} <= {"..", os.sep} or re.match("[~$]", work):
            raise ValueError(
                f"work: {shortened(self.work)} is no folder of a run's own; name one, such as"
                " data/work, by its whole path if it is not in this folder"
            )
        for source in (self.base, *(each.source for each in self.sources.values())):
            own = os.path.normpath(source)
            if work == own or work.startswith(own + os.sep):
                raise ValueError(
                    f"work: {shortened(self.work)} is in {own}, which is read; name another folder"
                )
        return self

    @model_validator(mode="after")
    def _check_cluster(self) -> "Params":
        if self.runner != "dask" and (self.address or self.storage):
            name = "address" if self.address else "storage"
            raise ValueError(f"{name}: is for runner dask; add `runner: dask`, or remove it")
        if self.runner == "dask":
            if self.address is None:
                raise ValueError(
                    "runner: runner dask needs `address`, the scheduler's, such as tcp://host:8786"
                )
            if self.storage is None or "://" not in self.storage:
                raise ValueError(
                    "runner: runner dask needs `storage`, a URL such as s3://bucket/fmn or"
                    " file:///mnt/fmn"
                )
        return self

    @field_validator("realign", mode="before")
    @classmethod
    def _check_realign(cls, realign: Any) -> Any:
        if isinstance(realign, dict) and any(isinstance(each, int) for each in realign.values()):
            raise ValueError("holds models by name; write `realign: {realigned: {texts: 256}}`")
        return realign

    @field_validator("tasks")
    @classmethod
    def _check_task_names(cls, tasks: dict[str, TaskSettings]) -> dict[str, TaskSettings]:
        for name in tasks:  # also the name of a folder, of a DVC stage and of MLflow's metrics
            if not re.fullmatch(r"\w[\w-]{0,99}", name):
                raise ValueError(f"{name!r} must be of letters, digits, underscores and dashes")
            if name == "mean":
                raise ValueError("'mean' is what tables call the mean over tasks; choose another")
        return tasks

    @model_validator(mode="after")
    def _check_tasks(self) -> "Params":
        names = self.experts.tasks
        for name in names:
            if name not in self.tasks and name not in TASKS:
                raise ValueError(
                    f"experts.tasks: there is no task {name!r} in `tasks`, and GLUE has none"
                    f"{hint(name, [*self.tasks, *TASKS]).rstrip('?')}; describe it under `tasks:`"
                )
            if (name in self.sources) == (name in self.finetune):
                raise ValueError(
                    f"experts.tasks: task {name!r} must be under either `sources` or `finetune`;"
                    " move it"
                )
        for place, name in self._named_tasks():
            if name not in names:
                listed = ", ".join(names)
                raise ValueError(
                    f"{place}: {name!r} is not one of experts.tasks ({listed}){hint(name, names)}"
                )
        return self

    def _named_tasks(self) -> Iterator[tuple[str, str]]:
        """The tasks that sections name, each with its place."""
        for section in ("sources", "finetune", "gram"):
            yield from ((f"{section}.{name}", name) for name in getattr(self, section))
        merges = {f"baselines.{name}": each for name, each in self.baselines.items()}
        for section, merge in {"merge": self.merge, **merges}.items():
            yield from ((f"{section}.coefficient", name) for name in merge.coefficients)
        for title, comparison in self.compare.items():
            if isinstance(comparison.rows, dict):
                yield from ((f"compare.{title}.rows", name) for name in comparison.rows)

    @property
    def merges(self) -> dict[str, MergeSettings]:
        """Every merge of the run, by the name of its model: bounds, baselines, the first step."""
        return {**BOUNDS, **self.baselines, MERGED: self.merge}

    @property
    def calibrations(self) -> dict[str, CalibrateSettings]:
        """The calibration by the name of its model, if there is one."""
        return {CALIBRATED: self.calibrate} if self.calibrate else {}

    @property
    def grams(self) -> dict[str, GramSettings]:
        """The tasks whose experts' Gram matrices are computed, and how."""
        has_gram = bool(self.gram)
        takes = any(needs_of(m.method, has_gram=has_gram).gram for m in self.merges.values())
        names = self.experts.tasks if takes else list(self.gram)
        return {name: self.gram.get(name, GramSettings()) for name in names}

    @property
    def models(self) -> list[str]:
        """The models of the run, in the order of its table."""
        return [*self.merges, *self.calibrations, *self.realign]

    @property
    def encoder(self) -> str:
        """The model whose encoder the run's model has: the calibrated or else the merged one."""
        return CALIBRATED if self.calibrate else MERGED

    @property
    def model(self) -> str:
        """The run's model, that of its last step: it is registered, and the report is about it."""
        return next(iter(self.realign), self.encoder)

    @property
    def labelled(self) -> list[str]:
        """The tasks whose rows have labels, so that they can be scored."""
        tasks = self.tasks
        return [
            name
            for name in self.experts.tasks
            if name not in tasks or tasks[name].columns.label is not None
        ]

    @model_validator(mode="after")
    def _check_labels(self) -> "Params":
        if not self.labelled:
            raise ValueError(
                "experts.tasks: none of experts.tasks has labels, so no model can be scored;"
                " add a task with labels, or use `fmn merge`, which needs none"
            )
        for name in self.experts.tasks:
            if name in self.labelled:
                continue
            if self.fisher.estimator in ("empirical", "batch"):
                raise ValueError(
                    f"fisher.estimator: {self.fisher.estimator} needs labels, which {name} does"
                    " not have; write `fisher: {estimator: expected}`"
                )
            if name in self.finetune:
                raise ValueError(
                    f"finetune.{name}: its rows have no labels; name an expert under `sources`"
                )
        return self

    @model_validator(mode="after")
    def _check_names(self) -> "Params":
        for name in self.compare:  # also the name of a folder
            if not re.fullmatch(r"\w[\w. -]{0,99}", name):
                raise ValueError(
                    f"compare: {name!r} must be of letters, digits, dots, dashes and spaces"
                )
        for name in self.realign:
            if not re.fullmatch(rf"{REALIGNED}(-[\w-]+)?", name):
                raise ValueError(f"realign: {name!r} must be realigned, or begin with realigned-")
        tasks = self.experts.tasks
        for name in self.baselines:  # also the name of a folder, and of a column of the table
            if not re.fullmatch(r"\w[\w-]{0,99}", name):
                raise ValueError(
                    f"baselines: {name!r} must be of letters, digits, underscores and dashes"
                )
            if name in (*TAKEN, *self.realign):
                raise ValueError(f"baselines: {name!r} is another column's name; choose another")
        if clash := [name for name in (*self.baselines, *self.realign) if name in tasks]:
            section = "baselines" if clash[0] in self.baselines else "realign"
            raise ValueError(
                f"{section}.{clash[0]}: {clash[0]!r} is a task and a model; give the model another"
                " name"
            )
        for title, comparison in self.compare.items():
            for name in comparison.methods:  # also the name of a file
                if name in ("", "expert") or len(name) > 60:
                    raise ValueError(
                        f"compare.{title}.methods: {shortened(name)} is"
                        f" {'the name of another column' if len(name) < 60 else 'too long'}; choose"
                        " another name"
                    )
            for members in comparison.sets:
                unknown = [name for name in members.split("+") if name not in tasks]
                if members not in SETS and (unknown or "+" not in members):
                    raise ValueError(
                        f"compare: {members!r} is neither one of {', '.join(SETS)} nor a set of"
                        " experts.tasks, TASK+TASK"
                    )
        return self

    @model_validator(mode="after")
    def _check_methods(self) -> "Params":
        own = {"merge": self.merge} | {f"baselines.{n}": m for n, m in self.baselines.items()}
        for place, merge in own.items():
            if needs_of(merge.method).fisher == "parameters":
                raise ValueError(
                    f"{place}.method: method {merge.method} is for `fmn merge` alone;"
                    " choose another method for a pipeline"
                )
        return self


def project_of(path: Path) -> Path:
    """The folder that the paths in a settings file are relative to.

    It is the working folder, if the file lies in it or below it. Otherwise it is the file's own
    folder; or the one above, if that is a project (with dvc.yaml or .git) and this is not. So the
    same files are meant wherever a command is given.
    """
    file = Path(os.path.normpath(path.absolute()))
    if file.is_relative_to(Path.cwd()):
        return Path.cwd()
    own, above = file.parents[:2]
    marks = ("dvc.yaml", ".git")
    is_project = [any((each / mark).exists() for mark in marks) for each in (own, above)]
    return above if is_project == [False, True] else own


def load(path: Path) -> Params:
    """Read and check a settings file.

    Raises:
        UserError: names the file, the setting and what is wrong with it.
    """
    content = read_yaml(path)
    if content is None:
        raise UserError(f"{path}: is empty; write settings, or let `fmn init` write them")
    return validate(content, str(path), partial(line_of, path))


def write_settings(params: Path, *, versions: Mapping[str, int], out: Path) -> Outcome[Params]:
    """Write the settings with every default filled in, and the stages' versions, as JSON.

    Each task of the experts is there in full, GLUE's too, with the digests of the files that its
    rows come from. Sources and data sets that may float stand beside it, with what they name now.
    Secrets are left out, and so are the settings that only say where stages
    run.

    Args:
        params: the settings file
        versions: of the stages, by name
        out: the JSON file
    """
    settings = load(params)
    where = dict.fromkeys(("notify", "runner", "address", "storage"), True)
    content = settings.model_dump(mode="json", exclude={**where, "fisher": {"parts"}})
    content["tasks"] = {name: _described(name, settings) for name in settings.experts.tasks}
    content["pins"] = _pins(settings)
    content["versions"] = dict(versions)
    text = redacted(json.dumps(content, indent=1))

    def compute(job: Job) -> None:
        job.path.write_text(text + "\n")

    return run_stage(
        "settings",
        SETTINGS,
        out,
        compute,
        reads={},
        settings=json.loads(text),
        summary=lambda _: settings,
    )


def _described(name: str, settings: Params) -> dict[str, Any]:
    """A task as settings describe it, and the sha256 of every file that its rows are in."""
    own = settings.tasks.get(name)
    if own and own.dataset:
        digests = {} if hub_name(own.dataset) else _file_digests(own)
    else:
        folder = task_folder(Path(settings.data.source), name)
        files = [*sorted(folder.glob("*.parquet")), folder / DEFINITION]
        digests = {str(file): artifacts.digest_file(file) for file in files if file.is_file()}
    definition = own or task_settings(name) or TaskSettings()
    return {**definition.model_dump(mode="json"), "files": digests}


def _file_digests(definition: TaskSettings) -> dict[str, str]:
    """The sha256 of each file of a definition's rows, here or at a URL."""
    digests = {str(file): artifacts.digest_file(file) for file in local_files(definition)}
    if definition.dataset:
        for split in find_files(definition.dataset).values():
            digests |= {file.name: str(file.digest()) for file in split if file.local is None}
    return digests


def _pins(settings: Params) -> dict[str, Any]:
    """What sources, and data sets on the Hub, stand for now.

    Of a folder, these are its files with their sha256. What cannot be reached is None: the stage
    that needs it says why.
    """
    sources = {name: each.source for name, each in settings.sources.items()}
    data: dict[str, str | None] = dict.fromkeys(settings.experts.tasks)
    for name in data:
        own = settings.tasks.get(name)
        rows = own.dataset if own else None
        if rows is None and settings.data.source == "hub":
            rows = DatasetSettings(path=HUB, revision=settings.data.revision)
        if rows and (hub := hub_name(rows)):
            with suppress(UserError):
                data[name] = pin(rows, hub)
    return {"base": _pin_of(settings.base), "sources": {n: _pin_of(s) for n, s in sources.items()},
            "data": data}  # fmt: skip


def _pin_of(source: str) -> dict[str, Any] | None:
    with suppress(UserError):
        files = {str(file): artifacts.digest_file(file) for file in origin.folder_files(source)}
        return {"source": origin.pin(source), "files": files}
    return None


def validate(
    content: Any, place: str, line: Callable[[Sequence[str]], int | None] = lambda keys: None
) -> Params:
    """Settings from plain data; UserError names `place`, the line and the setting."""
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise UserError(problems(error, place, line)[0]) from error


def problems(
    error: ValidationError, place: str, line: Callable[[Sequence[str]], int | None]
) -> list[str]:
    """Every problem of settings that a validation met, a line each.

    An unknown setting comes first, as it may be the reason that another is missing.

    Args:
        place: the settings file.
        line: gives the line of a setting there, if it is known.
    """
    ordered = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    messages: dict[tuple[str, str], str] = {}
    for setting, message in map(_problem, ordered):
        wanted, _, value = message.partition(", not ")
        key = setting, value or message
        if value and key in messages:  # an error for each type that the value could have
            before = messages[key].partition(", not ")[0]
            message = f"{before} or {wanted.removeprefix('must be ')}, not {value}"
        messages[key] = message
    lines = []
    for (setting, _), message in messages.items():
        number = line(setting.split("."))
        lines.append(": ".join(filter(None, (f"{place}:{number}" if number else place, setting,
                                             message))))  # fmt: skip
    return list(dict.fromkeys(lines))


def _problem(problem: Any) -> tuple[str, str]:
    """A setting, or "" where several do not fit one another, and what is wrong with it."""
    place = [str(part) for part in problem["loc"]]
    if place[-1:] == ["[key]"] and problem["type"] != "extra_forbidden":
        place.pop()  # pydantic's mark for the name in a section
    path, known, about = _walk(Params, place)
    setting = ".".join(path)
    if problem["type"] == "extra_forbidden":
        near = hint(path[-1], known) or f"; known here are {', '.join(known)}"
        return setting, f"unknown setting{near}"
    if problem["type"] == "missing":
        return setting, f"missing; add it: {about}" if about else "missing; add it"
    message = in_words(problem)
    if not setting and (match := re.match(r"([a-z]\w*(?:\.[^.:]+)*): (.*)", message)):
        return match[1], match[2]  # a check of several settings names the first itself
    return setting, message


def _walk(kind: Any, place: Sequence[str]) -> tuple[list[str], list[str], str]:
    """A place in the settings without what pydantic adds to it; what is known there; what it is.

    Pydantic adds which type of several it tried, such as `int` of `int | str`.
    """
    if get_origin(kind) in (Union, UnionType):
        kinds = [option for option in get_args(kind) if option is not type(None)]
        kind = kinds[0] if len(kinds) == 1 else None
    if not place or kind is None:
        return [], [], ""
    first, *rest = place
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(first)
        path, known, about = _walk(field.annotation if field else None, rest)
        own = field.description if field and not rest else None
        return [first, *path], known or list(kind.model_fields), about or own or ""
    inner = get_args(kind)[-1] if get_origin(kind) in (dict, list) else None
    path, known, about = _walk(inner, rest)
    return [first, *path], known, about
