"""The settings: each has its name, default and meaning here and nowhere else.

A group of settings is a section of ``params.yaml`` and, with the same names, the options of a command; DVC hands a
section over whole (``${fisher}`` in ``dvc.yaml`` becomes ``--estimator empirical --samples 1024 ...``).
"""

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from fmn.errors import UserError, hint
from fmn.evaluate.stages import EvaluateSettings
from fmn.experiments.stages import SETS, CompareSettings
from fmn.fisher.stages import FisherSettings, FullFisherSettings, GramSettings
from fmn.merge.methods import NEEDS
from fmn.merge.stages import MergeSettings, RealignSettings
from fmn.models.stages import FinetuneSettings
from fmn.registry.stages import RegistrySettings
from fmn.store.records import Settings
from fmn.store.yaml_file import read_yaml
from fmn.tasks.stages import DataSettings
from fmn.tasks.task import TASKS

WEBHOOK = "FMN_WEBHOOK"  # the environment variable of the webhook's address


class ExpertsSettings(Settings):
    tasks: list[str] = Field(
        default_factory=list, description="the tasks whose experts are merged; default: all found"
    )

    @field_validator("tasks")
    @classmethod
    def _known_once(cls, tasks: list[str]) -> list[str]:
        for name in tasks:
            if name not in TASKS:
                raise ValueError(f"unknown task {name!r}{hint(name, TASKS)}")
            if tasks.count(name) > 1:
                raise ValueError(f"task {name!r} stands there twice")
        return tasks


class NotifySettings(Settings):
    webhook: SecretStr | None = Field(
        None,
        description="address that takes a notice, Slack's JSON, of a new champion and of a failure; $NAME is read from"
        f" the environment; default: ${WEBHOOK}, nobody where that is not set",
    )

    @property
    def address(self) -> str | None:
        """The webhook's address, which is a secret; None when nobody is to be told."""
        stated = self.webhook.get_secret_value() if self.webhook else f"${WEBHOOK}"
        return os.environ.get(stated[1:]) if stated.startswith("$") else stated


class Params(Settings):
    """``params.yaml``."""

    work: str = Field("data/work", description="folder of everything that a run makes")
    base: str = Field(..., description="the model that the experts were fine-tuned from")
    experts: ExpertsSettings
    sources: dict[str, str] = Field(
        default_factory=dict, description="TASK: where its published expert comes from"
    )
    finetune: dict[str, FinetuneSettings] = Field(
        default_factory=dict,
        description="TASK: how its expert is made from the base; for tasks without a published one",
    )
    data: DataSettings = DataSettings()
    fisher: FisherSettings = FisherSettings()
    gram: dict[str, GramSettings] = Field(
        default_factory=dict,
        description="TASK: how its expert's Gram matrices are made; for regmean, fisher-regmean",
    )
    merge: MergeSettings = MergeSettings()
    realign: dict[str, RealignSettings] = Field(
        default_factory=dict,
        description="NAME, realigned or realigned-...: one model more, the merged one with its heads re-aligned",
    )
    evaluate: EvaluateSettings = EvaluateSettings()
    full_fisher: FullFisherSettings = FullFisherSettings()
    compare: dict[str, CompareSettings] = Field(
        default_factory=dict, description="NAME: what `fmn compare` compares"
    )
    registry: RegistrySettings = Field(..., description="where the merged model is registered")
    notify: NotifySettings = NotifySettings()
    runner: Literal["local", "dask"] = Field(
        "local",
        description="where experts are computed: on this machine, or on the workers of a Dask cluster",
    )
    address: str | None = Field(
        None, description="of the Dask scheduler, such as tcp://host:8786; for runner dask"
    )
    storage: str | None = Field(
        None,
        description="URL of a folder that this machine and all workers read and write, such as s3://bucket/fmn, or"
        " file:///mnt/fmn for one that all mount; for runner dask",
    )

    @model_validator(mode="after")
    def _a_cluster_has_address_and_storage(self) -> "Params":
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
    def _every_task_has_one_expert(self) -> "Params":
        tasks = self.experts.tasks
        if not tasks:
            raise ValueError("experts.tasks names no task")
        for name in tasks:
            if (name in self.sources) == (name in self.finetune):
                raise ValueError(f"task {name!r} must stand under either `sources` or `finetune`")
        rows = [
            name for one in self.compare.values() if isinstance(one.rows, dict) for name in one.rows
        ]
        for name in [*self.sources, *self.finetune, *self.gram, *self.merge.coefficients, *rows]:
            if name not in tasks:
                raise ValueError(
                    f"{name!r} is not one of experts.tasks ({', '.join(tasks)}){hint(name, tasks)}"
                )
        for name in self.compare:  # which is a folder's
            if not re.fullmatch(r"\w[\w. -]*", name):
                raise ValueError(
                    f"compare: {name!r} must be of letters, digits, dots, dashes and spaces"
                )
        for name in self.realign:
            if not re.fullmatch(r"realigned(-[\w-]+)?", name):
                raise ValueError(f"realign: {name!r} must be realigned, or begin with realigned-")
        for comparing in self.compare.values():
            for chosen in comparing.sets:
                wrong = [name for name in chosen.split("+") if name not in tasks]
                if chosen not in SETS and (wrong or "+" not in chosen):
                    raise ValueError(
                        f"compare: {chosen!r} is neither {', '.join(SETS)} nor of experts.tasks, TASK+TASK"
                    )
        needs = NEEDS[self.merge.method]
        if needs.fisher == "parameters":
            raise ValueError(
                f"method {self.merge.method} is for `fmn merge` alone; a pipeline merges with another"
            )
        if needs.gram and (without := [name for name in tasks if name not in self.gram]):
            raise ValueError(
                f"method {self.merge.method} needs Gram matrices of every expert: add {without[0]!r} to `gram`"
            )
        return self


def load(path: Path) -> Params:
    """Read and check ``params.yaml``. Raises UserError naming the file, the setting and what is wrong with it."""
    return validate(read_yaml(path), str(path))


def validate(content: Any, where: str) -> Params:
    """Settings from plain data; UserError naming ``where`` and the setting."""
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, Params)}") from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first thing that a validation found wrong, in one line."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown setting{hint(str(first['loc'][-1]), _siblings(model, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"{place}: missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def _siblings(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    fields: type[BaseModel] = model
    for part in place:
        found = next((f for name, f in fields.model_fields.items() if part == name), None)
        inner = found.annotation if found else FinetuneSettings
        fields = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else fields
    return list(fields.model_fields)
