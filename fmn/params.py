"""The settings: each has its name, default and meaning here and nowhere else.

A group of settings is a section of ``params.yaml`` and, with the same names, the options of a command; DVC hands a
section over whole (``${fisher}`` in ``dvc.yaml`` becomes ``--estimator empirical --samples 1024 ...``).
"""

import difflib
import io
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from fmn.errors import UserError
from fmn.methods import DAMPING, NEEDS
from fmn.tasks import TASKS

_DEEPEST = 20  # sections within sections of a settings file
SETS = ("pairs", "triples", "all")
Estimator = Literal["empirical", "expected", "sampled", "batch"]
Mapping = Literal["structured", "paper"]
Device = str
Dtype = Literal["auto", "float32", "bfloat16", "float64"]
Source = str
WEBHOOK = "FMN_WEBHOOK"  # the environment variable of the webhook's address


def pairs(items: list[str], option: str) -> dict[str, str]:
    """``["a=1", "b=2"]`` as a dictionary; UserError for one without ``=`` or said twice."""
    found: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise UserError(f"{option} {item}: expected NAME=VALUE")
        if name in found:
            raise UserError(f"{option}: {name} is given twice")
        found[name] = value
    return found


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise UserError(f"coefficient {text!r} is not a number") from error
    if not math.isfinite(number):
        raise UserError(f"coefficient {text!r} is not finite")
    return number


def _hint(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _at_least_one(samples: int | str) -> int | str:
    if isinstance(samples, int) and samples < 1:
        raise ValueError("at least one example is needed")
    return samples


class Settings(BaseModel):
    """Settings do not change once read, and an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("a number of more than 64 bits")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("holds a NUL character")
        return value


class DataSettings(Settings):
    source: Source = Field(
        "hub",
        description="hub (nyu-mll/glue), embedded (the miniature GLUE that fmn makes), or a folder; $NAME is read"
        " from the environment",
    )
    revision: str = Field("main", description="revision of the Hub's data set")
    seed: int = Field(0, ge=0, description="seed of the embedded data")

    @field_validator("source")
    @classmethod
    def _from_environment(cls, source: str) -> str:
        if not source.startswith("$"):
            return source
        value = os.environ.get(source[1:])
        if not value:
            raise ValueError(f"the environment variable {source[1:]} is not set; it names the folder of the data")
        return value


class FinetuneSettings(Settings):
    epochs: float = Field(3, gt=0, description="passes over the training examples")
    learning_rate: float = Field(5e-5, gt=0, description="peak of the linear schedule")
    batch_size: int = Field(32, ge=1, description="examples a step")
    examples: int | Literal["all"] = Field("all", description="training rows used at most, drawn by the seed")
    seed: int = Field(0, ge=0, description="seed of the head, the order and the dropout")
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field("auto", description="precision of the matrix products; auto: bfloat16 where it pays")


class FisherSettings(Settings):
    estimator: Estimator = Field(
        "empirical",
        description="whose labels: the data's (empirical), the model's in exact"
        " expectation (expected) or by a draw (sampled); batch: the paper's released code",
    )
    samples: int | Literal["all", "auto"] = Field(
        1024, description="examples, drawn without replacement; auto: until the estimate has converged"
    )
    stratified: bool = Field(False, description="draw every label in its share")
    seed: int = Field(0, ge=0, description="seed of the draw")
    workers: int = Field(
        1, ge=1, description="processes that share the examples, each on a GPU of its own where there are several"
    )
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field("float32", description="precision of the matrix products; auto: bfloat16 where it pays")

    _some = field_validator("samples")(_at_least_one)

    @model_validator(mode="after")
    def _auto_is_one_run(self) -> "FisherSettings":
        if self.samples == "auto" and self.workers > 1:
            raise ValueError("samples auto looks at the result as it grows, so it cannot be shared: take workers 1")
        return self


class GramSettings(Settings):
    samples: int | Literal["all"] = Field(1024, description="examples, drawn without replacement; labels are not read")
    seed: int = Field(0, ge=0, description="seed of the draw")
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field("float32", description="precision of the matrix products; auto: bfloat16 where it pays")

    _some = field_validator("samples")(_at_least_one)


class FullFisherSettings(GramSettings):
    estimator: Literal["empirical", "expected", "sampled"] = Field("empirical", description="as for the mask Fisher")
    samples: int | Literal["all"] = Field(256, description="examples, drawn without replacement")


class ExpertsSettings(Settings):
    tasks: list[str] = Field(default_factory=list, description="the tasks whose experts are merged; default: all found")

    @field_validator("tasks")
    @classmethod
    def _known_once(cls, tasks: list[str]) -> list[str]:
        for name in tasks:
            if name not in TASKS:
                raise ValueError(f"unknown task {name!r}{_hint(name, TASKS)}")
            if tasks.count(name) > 1:
                raise ValueError(f"task {name!r} stands there twice")
        return tasks


class MergeSettings(Settings):
    method: str = Field("mask-fisher", description=f"one of {', '.join(NEEDS)}")
    mapping: Mapping = Field(
        "structured", description="how node weights spread over parameters: structured, or paper (its released code)"
    )
    coefficient: list[str] = Field(
        default_factory=list, description="TASK=X: the weight lambda of a task's expert; 1 where it is not given"
    )
    normalise: Literal["auto", "none", "expert", "kind", "site"] = Field(
        "auto",
        description="what an expert's Fisher is divided by: nothing, its mean over all nodes, over a kind of nodes, or"
        " over a kind in one layer; auto: the method's own",
    )
    exponent: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="of the Fisher; auto: the method's own"
    )
    damping: float = Field(DAMPING, ge=0, le=1, description="factor of the off-diagonal entries of Gram matrices")
    scale: float | Literal["auto"] = Field(
        "auto", description="scale of the merged task vector, 1 leaves it; auto: the method's own. Needs the base"
    )
    density: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of a task vector's entries that ties and dare-ties keep; default: the method's",
    )
    seed: int = Field(0, ge=0, description="seed of the methods that draw at random")

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in NEEDS:
            raise ValueError(
                f"unknown method {method!r}{_hint(method, NEEDS) or '; choose one of ' + ', '.join(NEEDS)}"
            )
        return method

    @property
    def coefficients(self) -> dict[str, float]:
        """lambda by task, for the tasks that state one."""
        return {task: _number(text) for task, text in pairs(self.coefficient, "--coefficient").items()}

    @model_validator(mode="after")
    def _coefficients_are_numbers(self) -> "MergeSettings":
        try:
            _ = self.coefficients
        except UserError as error:
            raise ValueError(str(error)) from error
        return self


class RefitSettings(Settings):
    texts: int | Literal["all"] = Field(
        256,
        description="unlabeled training texts that a head is fitted on, those first that its expert was not tuned on",
    )
    ridge: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="how firmly a head is held where it was, relative to what it reads; auto: by leave-one-out on the"
        " same texts",
    )
    seed: int = Field(0, ge=0, description="seed of the texts' draw")

    _some = field_validator("texts")(_at_least_one)


class RealignSettings(RefitSettings):
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field("float32", description="precision of the matrix products; auto: bfloat16 where it pays")


class EvaluateSettings(Settings):
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field("float32", description="precision of the matrix products; auto: bfloat16 where it pays")


class ComparedSettings(MergeSettings):
    estimator: Estimator | None = Field(None, description="of the mask Fisher; default: that of the section fisher")
    realign: RefitSettings | None = Field(
        None, description="re-align every head with the merged encoder, and how; default: heads stay the experts'"
    )


Rows = Literal["all"] | Annotated[int, Field(ge=1)]


class CompareSettings(Settings):
    sets: list[str] = Field(
        ["pairs", "all"], min_length=1, description="experts merged with one another: pairs, triples, all, or TASK+TASK"
    )
    split: Literal["validation", "train"] = Field(
        "validation",
        description="train: rows of the training split that the expert was not fine-tuned on, where there are some;"
        " that is where settings are chosen, the validation split is for the final table alone",
    )
    rows: Rows | dict[str, Rows] = Field(
        "all", description="rows of a task at most, drawn by the seed; or TASK: rows, and all of the tasks left out"
    )
    seed: int = Field(0, ge=0, description="seed of the draw")
    methods: dict[str, ComparedSettings] = Field(..., min_length=1, description="NAME: how to merge")
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field("float32", description="precision of the matrix products; auto: bfloat16 where it pays")

    def rows_of(self, task: str) -> int | Literal["all"]:
        """How many rows of a task are taken."""
        return self.rows.get(task, "all") if isinstance(self.rows, dict) else self.rows


class SearchSettings(Settings):
    trials: int = Field(60, ge=1, description="coefficients tried, the uniform ones among them")
    rows: int | Literal["all"] = Field(256, description="training rows of every task that a trial is scored on")
    search_seed: int = Field(0, ge=0, description="seed of the trials and of the rows' draw")
    scale_range: tuple[float, float] | None = Field(
        None, description="LOW HIGH: where the scale of the merged task vector is searched too; needs the base"
    )
    experiment: str = Field("fmn", description="MLflow experiment of the trials")
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field("float32", description="precision of the matrix products; auto: bfloat16 where it pays")

    _some = field_validator("rows")(_at_least_one)

    @field_validator("scale_range")
    @classmethod
    def _range(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends is not None and not (0 <= ends[0] < ends[1] < float("inf")):
            raise ValueError("LOW must be zero or more, and HIGH above it")
        return ends


class RegistrySettings(Settings):
    name: str = Field(..., pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$", description="name of the registered model")
    experiment: str = Field("fmn", description="MLflow experiment of the run")
    tolerance: float = Field(
        0.01,
        ge=0,
        le=1,
        description="how much less than the champion's a task's score may be for a version to take its place; the mean"
        " may not be less",
    )


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
    base: Source = Field(..., description="the model that the experts were fine-tuned from")
    experts: ExpertsSettings
    sources: dict[str, Source] = Field(default_factory=dict, description="TASK: where its published expert comes from")
    finetune: dict[str, FinetuneSettings] = Field(
        default_factory=dict,
        description="TASK: how its expert is made from the base; for tasks without a published one",
    )
    data: DataSettings = DataSettings()
    fisher: FisherSettings = FisherSettings()
    gram: dict[str, GramSettings] = Field(
        default_factory=dict, description="TASK: how its expert's Gram matrices are made; for regmean, fisher-regmean"
    )
    merge: MergeSettings = MergeSettings()
    realign: dict[str, RealignSettings] = Field(
        default_factory=dict,
        description="NAME, realigned or realigned-...: one model more, the merged one with its heads re-aligned",
    )
    evaluate: EvaluateSettings = EvaluateSettings()
    full_fisher: FullFisherSettings = FullFisherSettings()
    compare: dict[str, CompareSettings] = Field(default_factory=dict, description="NAME: what `fmn compare` compares")
    registry: RegistrySettings = Field(..., description="where the merged model is registered")
    notify: NotifySettings = NotifySettings()
    runner: Literal["local", "dask"] = Field(
        "local", description="where experts are computed: on this machine, or on the workers of a Dask cluster"
    )
    address: str | None = Field(None, description="of the Dask scheduler, such as tcp://host:8786; for runner dask")
    storage: str | None = Field(
        None,
        description="URL of a folder that this machine and all workers read and write, such as s3://bucket/fmn, or"
        " file:///mnt/fmn for one that all mount; for runner dask",
    )

    @model_validator(mode="after")
    def _a_cluster_has_address_and_storage(self) -> "Params":
        if self.runner == "dask":
            if self.address is None:
                raise ValueError("runner dask needs `address`, the scheduler's, such as tcp://host:8786")
            if self.storage is None or "://" not in self.storage:
                raise ValueError("runner dask needs `storage`, a URL such as s3://bucket/fmn or file:///mnt/fmn")
        return self

    @model_validator(mode="after")
    def _every_task_has_one_expert(self) -> "Params":
        tasks = self.experts.tasks
        if not tasks:
            raise ValueError("experts.tasks names no task")
        for name in tasks:
            if (name in self.sources) == (name in self.finetune):
                raise ValueError(f"task {name!r} must stand under either `sources` or `finetune`")
        rows = [name for one in self.compare.values() if isinstance(one.rows, dict) for name in one.rows]
        for name in [*self.sources, *self.finetune, *self.gram, *self.merge.coefficients, *rows]:
            if name not in tasks:
                raise ValueError(f"{name!r} is not one of experts.tasks ({', '.join(tasks)}){_hint(name, tasks)}")
        for name in self.compare:  # which is a folder's
            if not re.fullmatch(r"\w[\w. -]*", name):
                raise ValueError(f"compare: {name!r} must be of letters, digits, dots, dashes and spaces")
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
            raise ValueError(f"method {self.merge.method} is for `fmn merge` alone; a pipeline merges with another")
        if needs.gram and (without := [name for name in tasks if name not in self.gram]):
            raise ValueError(
                f"method {self.merge.method} needs Gram matrices of every expert: add {without[0]!r} to `gram`"
            )
        return self


def load(path: Path) -> Params:
    """Read and check ``params.yaml``. Raises UserError naming the file, the setting and what is wrong with it."""
    return validate(read_yaml(path), str(path))


def read_yaml(path: Path) -> Any:
    """Plain YAML 1.2: no aliases, tags, or keys said twice."""
    from ruamel.yaml import YAML, events
    from ruamel.yaml.error import YAMLError

    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in YAML(typ="safe", pure=True).parse(io.StringIO(text)):
            depth += isinstance(event, events.CollectionStartEvent) - isinstance(event, events.CollectionEndEvent)
            if depth > _DEEPEST:
                raise UserError(f"{path}: nested more than {_DEEPEST} deep, which no setting is")
            if isinstance(event, events.AliasEvent) or getattr(event, "anchor", None):
                raise UserError(f"{path}: anchors and aliases are not read here; write the value out")
            if getattr(event, "tag", None):
                raise UserError(f"{path}: the tag {event.tag} is not read here; write a plain value")
        return YAML(typ="safe", pure=True).load(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; --params names the settings file") from error
    except (YAMLError, ValueError, RecursionError) as error:  # of its characters, or of a number beyond all bounds
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


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
        return f"{place}: unknown setting{_hint(str(first['loc'][-1]), _siblings(model, first['loc'][:-1]))}"
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
