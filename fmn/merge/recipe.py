"""The settings of a merge, and its recipe (``merge.json``). Does not import PyTorch.

A merged model is a folder::

    merge.json     the recipe
    README.md      a short model card
    encoder/       loads with AutoModel.from_pretrained
    tasks/TASK/    loads with AutoModelForSequenceClassification.from_pretrained

A task's folder is a sharded checkpoint whose first shards are hard links to files of the encoder,
so that shared bytes are on the disk once. The last shard has the task's head and, if heads are
re-aligned, the tensors that replace parts of the encoder. The merged values of these parts are in
the last shard of the encoder, which no task links to.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from fmn import __version__
from fmn.errors import UserError, hint
from fmn.merge.methods import AUTO, METHODS, needs_of
from fmn.models.provenance import Lineage
from fmn.models.stages import Device, Dtype
from fmn.store.records import Record, Settings, at_least_one, pairs
from fmn.store.stage import read_record
from fmn.tasks.kinds import KINDS
from fmn.tasks.task import Task

RECIPE = "merge.json"
CARD = "README.md"
NodeMapping = Literal["structured", "paper"]


def _known(method: str) -> str:
    if method not in METHODS:
        remedy = hint(method, METHODS) or f"; choose one of {', '.join(METHODS)}"
        raise ValueError(f"unknown method {method!r}{remedy}")
    return method


def _known_or_auto(method: str) -> str:
    return method if method == AUTO.name else _known(method)


class MergeSettings(Settings):
    method: str = Field(
        "mask-fisher",
        description=f"one of {', '.join(METHODS)}; or auto: the one that agrees best with the"
        " experts on training texts without labels",
    )
    mapping: NodeMapping = Field(
        "structured",
        description="which parameters a mask node weighs; paper: as in the paper's released code",
    )
    coefficient: list[str] = Field(
        default_factory=list, description="TASK=X: the weight lambda of a task's expert, else 1"
    )
    normalise: Literal["auto", "none", "expert", "kind", "site"] = Field(
        "auto",
        description="divisor of an expert's Fisher: none, its mean over all nodes (expert), over a"
        " kind of nodes (kind), or over a kind in one layer (site); auto: the method's own",
    )
    exponent: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="power of the Fisher; auto: the method's own"
    )
    damping: float = Field(
        0.9, ge=0, le=1, description="factor of the off-diagonal entries of Gram matrices"
    )
    scale: float | Literal["auto"] = Field(
        "auto",
        description="factor of the merged task vector; needs the base; auto: the method's own",
    )
    density: float | None = Field(
        None, gt=0, le=1, description="share of a task vector that stays; default: the method's"
    )
    seed: int = Field(
        0, ge=0, description="seed of the methods that draw at random, and of the texts of auto"
    )
    auto_heads: Literal["refitted", "own"] = Field(
        "refitted",
        description="heads that auto measures merges with: refitted as `fmn realign` does, or the"
        " experts' own",
    )
    device: Device = Field(
        "auto",
        description="where auto measures, and equations are solved: auto, cpu, cuda, cuda:1, ...",
    )
    dtype: Dtype = Field("auto", description="of auto's matrix products; auto: bfloat16 if it pays")

    _is_known = field_validator("method")(_known_or_auto)

    @field_validator("coefficient")
    @classmethod
    def _are_numbers(cls, coefficient: list[str]) -> list[str]:
        for task, value in _by_task(coefficient).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{task}={value}: not a finite number, zero or more")
        return coefficient

    @model_validator(mode="after")
    def _has_density(self) -> Self:
        if self.density and not self.is_auto and not needs_of(self.method).density:
            raise ValueError(f"density: method {self.method} has none; leave it out")
        return self

    @property
    def is_auto(self) -> bool:
        """Whether the method is "auto"."""
        return self.method == AUTO.name

    @property
    def coefficients(self) -> dict[str, float]:
        """The coefficients by task; tasks that are left out have 1."""
        return _by_task(self.coefficient)

    def used(self, *without: str) -> dict[str, Any]:
        """The settings that the method depends on, without some."""
        method, unused = needs_of(self.method), set(self.runtime)
        unused |= set() if self.is_auto else {"auto_heads", "dtype"}
        unused |= set() if method.fisher == "nodes" else {"mapping", "normalise", "exponent"}
        unused |= set() if method.gram else {"damping"}
        unused |= set() if method.density else {"density"}
        unused |= set() if method.random else {"seed"}
        return self.model_dump(mode="json", exclude={*unused, *without})


def _by_task(coefficient: list[str]) -> dict[str, float]:
    try:
        texts = pairs(coefficient, "coefficient")
    except UserError as error:
        raise ValueError(str(error)) from error
    numbers = {}
    for task, text in texts.items():
        try:
            numbers[task] = float(text)
        except ValueError as error:
            raise ValueError(f"{task}={text!r}: not a number") from error
    return numbers


class RefitSettings(Settings):
    texts: int | Literal["all"] = Field(
        1024, description="unlabeled training texts; those that the expert was not tuned on first"
    )
    ridge: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="strength of the pull to the old head; auto: by leave-one-out error"
    )
    seed: int = Field(0, ge=0, description="seed of the texts' draw")
    own_pooler: bool = Field(
        True,
        description="give each task its expert's own pooler, if there is one; =false: the merged"
        " pooler",
    )
    own_layers: int = Field(
        0,
        ge=0,
        description="number of last layers that each task has from its own expert",
    )

    _at_least_one = field_validator("texts")(at_least_one)


class CalibrationSettings(Settings):
    texts: int = Field(
        256,
        ge=1,
        description="unlabeled training texts; those that the expert was not tuned on first",
    )
    ridge: float = Field(2.0, gt=0, description="strength of the pull to the old map")
    target: Literal["outputs", "weights"] = Field(
        "outputs",
        description="fit a map to the outputs of the expert's map in the expert (outputs), or in"
        " the merged model, as RegMean++ does (weights)",
    )
    seed: int = Field(0, ge=0, description="seed of the texts' draw")


class Checkpoint(Lineage):
    """A merged checkpoint, and the settings of its fine-tuning, if fmn did that."""

    digest: str
    settings: dict[str, int | float | str] = Field(default_factory=dict)
    data_digest: str = ""
    threads: int = 0


class Statistic(Record):
    """A statistic that the merge used: digests of its file and of its values, and its settings."""

    digest: str = ""
    values: str = ""
    estimator: str = ""
    samples: int
    seed: int = 0
    stratified: bool = False
    dtype: str = ""
    data_digest: str = ""
    threads: int = 1
    key: str = ""


class Search(Record):
    """The search for coefficients: digest of its file, its score, that of equal coefficients."""

    digest: str
    score: float
    uniform: float


class Fit(Record):
    """How well a head was re-aligned (`fmn.merge.heads`).

    Attributes:
        texts: number of texts.
        ridge: the ridge.
        before: mean squared difference of the outputs from the expert's with the old head, divided
            by the variance of the expert's.
        after: the same with the new head, by leave-one-out: each text is answered by the head that
            is fitted to the others. None if it is undefined, as without a ridge and with fewer
            texts than features.
    """

    texts: int
    ridge: float
    before: float
    after: float | None


class Realigned(Record):
    """How heads were re-aligned: the settings, the fits, and digests of the model and the texts.

    Attributes:
        merged: digest of the model before.
        own_pooler, own_layers: the parts of the encoder that each task has from its own expert.
    """

    merged: str
    texts: int | Literal["all"]
    ridge: float | Literal["auto"]
    seed: int
    own_pooler: bool = False
    own_layers: int = 0
    dtype: str
    data: dict[str, str] = Field(default_factory=dict)
    tasks: dict[str, Fit]


class Calibrated(Record):
    """How an encoder was calibrated: the settings, and digests of the model and the texts.

    Attributes:
        merged: digest of the model before.
        errors: by task, mean squared difference of the last layer's states from the expert's, over
            the variance of the expert's; without tasks of whose expert all states are the same.
    """

    merged: str
    texts: int
    ridge: float
    target: str
    seed: int
    dtype: str
    data: dict[str, str] = Field(default_factory=dict)
    errors: dict[str, float]


class Candidate(Record):
    """A merge that `auto` tried: its error by task, and their mean (`fmn.merge.auto`)."""

    method: str
    scale: float
    error: float
    tasks: dict[str, float]


class Auto(Record):
    """How `auto` chose a merge.

    Attributes:
        heads: the heads that merges were measured with: "refitted", or the experts' "own".
        texts: the number of texts of each task.
        data: digests of their files.
        candidates: in the order of the trials; the plain average is the first.
    """

    heads: str
    seed: int
    dtype: str
    texts: dict[str, int]
    data: dict[str, str] = Field(default_factory=dict)
    candidates: Annotated[list[Candidate], Field(min_length=1)]

    @property
    def chosen(self) -> Candidate:
        """The first candidate with the smallest error."""
        return min(self.candidates, key=lambda candidate: candidate.error)

    @property
    def in_words(self) -> str:
        """A description of the choice, for cards and reports."""
        numbers = sorted({min(self.texts.values()), max(self.texts.values())})
        texts, count = " to ".join(map(str, numbers)), len(self.candidates)
        errors = f"error {self.chosen.error:.3g}; the average {self.candidates[0].error:.3g}"
        return f"chosen by auto among {count} merges on {texts} texts a task ({errors})"

    def applied(self, settings: MergeSettings) -> MergeSettings:
        """Put the chosen method and scale into the settings."""
        chosen = {"method": self.chosen.method, "scale": self.chosen.scale}
        return settings.model_copy(update=chosen)


class Recipe(Record):
    """How a model was merged, and its inputs; settings that its method does not use are None."""

    format: Literal[2] = 2
    fmn: str = __version__
    tasks: Annotated[list[str], Field(min_length=1)]
    method: str
    coefficients: dict[str, float]
    scale: float = 1
    mapping: str | None = None
    normalise: str | None = None
    exponent: float | None = None
    damping: float | None = None
    density: float | None = None
    seed: int | None = None
    experts: dict[str, Checkpoint] = Field(default_factory=dict)
    base: Checkpoint | None = None
    fisher: dict[str, Statistic] = Field(default_factory=dict)
    gram: dict[str, Statistic] = Field(default_factory=dict)
    definitions: dict[str, Task] = Field(default_factory=dict)
    search: Search | None = None
    auto: Auto | None = None
    calibrate: Calibrated | None = None
    realign: Realigned | None = None
    notes: list[str] = Field(default_factory=list)

    _is_known = field_validator("method")(_known)

    @property
    def messages(self) -> list[str]:
        """Notes about the experts, for the user."""
        return self.notes


class SearchedCoefficients(Record):
    """The part of the output of `fmn search` that a merge reads.

    `experts` (digests by task) and `merge` (settings) identify the merge that it is for.
    """

    coefficients: dict[str, float]
    scale: float
    score: float
    uniform: float
    experts: dict[str, str]
    merge: dict[str, Any]


def is_merged(folder: Path) -> bool:
    """Whether a folder holds a merged model, not a single checkpoint."""
    return (folder / RECIPE).is_file()


def read_recipe(folder: Path) -> Recipe:
    """Read the recipe of a merged model.

    Raises:
        UserError: the folder has no recipe, or this version of fmn cannot read it.
    """
    return read_record(folder / RECIPE, Recipe, "`fmn merge` makes a merged model")


def task_folder(folder: Path, task: str) -> Path:
    """The folder of a task's checkpoint in a merged model; UserError if there is no such task."""
    tasks = read_recipe(folder).tasks
    if task not in tasks:
        raise UserError(f"{folder}: has no task {task!r}; choose one of {', '.join(tasks)}")
    return folder / "tasks" / task


def card(recipe: Recipe) -> str:
    """A short model card, without scores."""
    paper = METHODS[recipe.method].paper
    source = f" (arXiv {paper})" if paper else ""
    heads = "re-aligned with it" if recipe.realign else "the expert's own"
    if recipe.realign and (layers := recipe.realign.own_layers):
        heads += f", above the expert's own last {f'{layers} layers' if layers > 1 else 'layer'}"
    how = f" It was {recipe.auto.in_words}." if recipe.auto else ""
    if calibrated := recipe.calibrate:
        how += f" The encoder was calibrated on {calibrated.texts} texts of each task."
    tasks = {name: recipe.definitions.get(name) for name in recipe.tasks}
    has_heads = any(task is None or task.kind.has_head for task in tasks.values())
    what = f" Each task's head is {heads}." if has_heads else ""
    return f"""---
library_name: {library(tasks.values())}
tags: [fmn, model-merging]
---

# One encoder for {", ".join(recipe.tasks)}

Merged from an expert for each task with the method {recipe.method}{source}; `{RECIPE}` says from
what.{how}{what} A task loads without fmn:

```python
{loading(recipe.tasks[0], tasks[recipe.tasks[0]])}
```

`fmn report` writes the model card with scores.
"""


def library(tasks: Iterable[Task | None]) -> str:
    """The library that loads all of these tasks, as the Hub calls it."""
    are_embeddings = {task is not None and task.loss == "embedding" for task in tasks}
    return "sentence-transformers" if are_embeddings == {True} else "transformers"


def loading(name: str, task: Task | None) -> str:
    """Code that loads a task's part of a merged model; by default, a classifier of texts."""
    kind = task.task if task else "text-classification"
    if kind == "sentence-similarity":
        imported, call = "sentence_transformers import SentenceTransformer", "SentenceTransformer"
    else:
        auto = KINDS[kind].auto_class
        imported, call = f"transformers import {auto}", f"{auto}.from_pretrained"
    return f'from {imported}\n\nmodel = {call}("tasks/{name}")'
