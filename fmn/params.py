"""The settings file, ``params.yaml``: its sections, read and checked as a whole.

Each section is a model that stands beside the stage that it is for; with the same names, its
fields are the options of that stage's command. Here they come together.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, SecretStr, ValidationError, field_validator, model_validator

from fmn.errors import UserError, hint, redacted
from fmn.evaluate.stages import EvaluateSettings
from fmn.experiments.stages import SETS, CompareSettings
from fmn.fisher.stages import FisherSettings, FullFisherSettings, GramSettings
from fmn.merge.methods import METHODS
from fmn.merge.stages import MergeSettings, RealignSettings
from fmn.models.stages import FinetuneSettings
from fmn.registry.stages import RegistrySettings
from fmn.store.records import Settings
from fmn.store.stage import Job, Outcome, run_stage
from fmn.store.yaml_file import read_yaml
from fmn.tasks.stages import DataSettings
from fmn.tasks.task import TASKS, TaskSettings

SETTINGS = 1  # version of the stage
WEBHOOK = "FMN_WEBHOOK"  # environment variable of the webhook's address


class ExpertsSettings(Settings):
    tasks: list[str] = Field(..., min_length=1, description="the tasks whose experts are merged")

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, tasks: list[str]) -> list[str]:
        for name in tasks:
            if name not in TASKS:
                raise ValueError(f"unknown task {name!r}{hint(name, TASKS)}")
            if tasks.count(name) > 1:
                raise ValueError(f"task {name!r} is listed twice")
        return tasks


class NotifySettings(Settings):
    webhook: SecretStr | None = Field(
        None,
        description="address that takes messages in Slack's JSON: of a new champion and of a"
        f" failure; $NAME is read from the environment; default: ${WEBHOOK}, if that is set",
    )

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
    experts: ExpertsSettings
    tasks: dict[str, TaskSettings] = Field(
        default_factory=dict, description="TASK: what it is, if it is not one of GLUE's"
    )
    sources: dict[str, str] = Field(
        default_factory=dict, description="TASK: where its published expert comes from"
    )
    finetune: dict[str, FinetuneSettings] = Field(
        default_factory=dict,
        description="TASK: how its expert is fine-tuned from the base, if none is published",
    )
    data: DataSettings = DataSettings()
    fisher: FisherSettings = FisherSettings()
    gram: dict[str, GramSettings] = Field(
        default_factory=dict,
        description="TASK: how its expert's Gram matrices are computed; for regmean and"
        " fisher-regmean",
    )
    merge: MergeSettings = MergeSettings()
    realign: dict[str, RealignSettings] = Field(
        default_factory=dict,
        description="NAME, realigned or realigned-...: another model, the merged one with its heads"
        " re-aligned",
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
    def _check_cluster(self) -> "Params":
        if self.runner == "dask":
            if self.address is None:
                raise ValueError(
                    "runner dask needs `address`, the scheduler's, such as tcp://host:8786"
                )
            if self.storage is None or "://" not in self.storage:
                raise ValueError(
                    "runner dask needs `storage`, a URL such as s3://bucket/fmn or file:///mnt/fmn"
                )
        return self

    @model_validator(mode="after")
    def _check_tasks(self) -> "Params":
        tasks = self.experts.tasks
        for name in tasks:
            if (name in self.sources) == (name in self.finetune):
                raise ValueError(f"task {name!r} must be under either `sources` or `finetune`")
        rows = [
            name
            for comparison in self.compare.values()
            if isinstance(comparison.rows, dict)
            for name in comparison.rows
        ]
        coefficients = self.merge.coefficients
        for name in [*self.sources, *self.finetune, *self.gram, *coefficients, *rows]:
            if name not in tasks:
                raise ValueError(
                    f"{name!r} is not one of experts.tasks ({', '.join(tasks)}){hint(name, tasks)}"
                )
        return self

    @model_validator(mode="after")
    def _check_names(self) -> "Params":
        for name in self.compare:  # also the name of a folder
            if not re.fullmatch(r"\w[\w. -]*", name):
                raise ValueError(
                    f"compare: {name!r} must be of letters, digits, dots, dashes and spaces"
                )
        for name in self.realign:
            if not re.fullmatch(r"realigned(-[\w-]+)?", name):
                raise ValueError(f"realign: {name!r} must be realigned, or begin with realigned-")
        tasks = self.experts.tasks
        for comparison in self.compare.values():
            for members in comparison.sets:
                unknown = [name for name in members.split("+") if name not in tasks]
                if members not in SETS and (unknown or "+" not in members):
                    raise ValueError(
                        f"compare: {members!r} is neither one of {', '.join(SETS)} nor a set of"
                        " experts.tasks, TASK+TASK"
                    )
        return self

    @model_validator(mode="after")
    def _check_method(self) -> "Params":
        needs, method = METHODS[self.merge.method], self.merge.method
        if needs.fisher == "parameters":
            raise ValueError(
                f"method {method} is for `fmn merge` alone; choose another method for a pipeline"
            )
        lacking = [name for name in self.experts.tasks if name not in self.gram]
        if needs.gram and lacking:
            raise ValueError(
                f"method {method} needs Gram matrices of every expert: add {lacking[0]!r} to `gram`"
            )
        return self


def load(path: Path) -> Params:
    """Read and check a settings file.

    Raises:
        UserError: names the file, the setting and what is wrong with it.
    """
    return validate(read_yaml(path), str(path))


def write_settings(params: Path, *, out: Path) -> Outcome[Params]:
    """Write the settings with every default filled in, as JSON.

    Secrets are left out, and so are the settings that only say where stages run.

    Args:
        params: the settings file
        out: the JSON file
    """
    settings = load(params)
    content = settings.model_dump(mode="json", exclude={"notify", "runner", "address", "storage"})
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


def validate(content: Any, place: str) -> Params:
    """Settings from plain data; UserError names `place` and the setting."""
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{place}: {explain(error, Params)}") from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem that a validation met, in one line."""
    first = error.errors()[0]
    setting = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *section, name = first["loc"]
        return f"{setting}: unknown setting{hint(str(name), _fields(model, section))}"
    if first["type"] == "missing":
        return f"{setting}: missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{setting}: {message}" if setting else message


def _fields(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """The names of the settings in a section."""
    section = model
    for part in path:
        field = section.model_fields.get(str(part))
        inner = field.annotation if field else FinetuneSettings
        section = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else section
    return list(section.model_fields)
