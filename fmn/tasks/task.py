"""The GLUE tasks as data, as the Hub's data set `nyu-mll/glue` has them (Wang et al. 2019, arXiv 1804.07461)."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fmn.errors import UserError


@dataclass(frozen=True)
class Task:
    """One task: which columns hold its texts, what its label ids mean, and how it is scored.

    `labels` are the label names by id, empty for a regression task. The score of a task is the mean of its `metrics`
    (GLUE's own rule). `validation` names the splits it is scored on.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)

    @property
    def regression(self) -> bool:
        return not self.labels

    @property
    def num_outputs(self) -> int:
        """Width of the task's head: a score, or a logit per label."""
        return len(self.labels) or 1

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that fmn reads; GLUE's test splits carry no labels."""
        return ("train", *self.validation)

    def suffix(self, split: str) -> str:
        """What a validation split adds to the names of its metrics; nothing for the first."""
        return "" if split == self.validation[0] else split.removeprefix("validation")


_ENTAILMENT = ("entailment", "not_entailment")

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        one.name: one
        for one in (
            Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
            Task("sst2", ("sentence",), ("negative", "positive")),
            Task(
                "mrpc",
                ("sentence1", "sentence2"),
                ("not_equivalent", "equivalent"),
                ("accuracy", "f1"),
            ),
            Task("stsb", ("sentence1", "sentence2"), (), ("pearson", "spearmanr")),
            Task(
                "qqp",
                ("question1", "question2"),
                ("not_duplicate", "duplicate"),
                ("accuracy", "f1"),
            ),
            Task(
                "mnli",
                ("premise", "hypothesis"),
                ("entailment", "neutral", "contradiction"),
                validation=("validation_matched", "validation_mismatched"),
            ),
            Task("qnli", ("question", "sentence"), _ENTAILMENT),
            Task("rte", ("sentence1", "sentence2"), _ENTAILMENT),
            Task("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment")),
        )
    }
)


def task(name: str) -> Task:
    """The task of this name; `UserError` with the nearest name where there is none."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), TASKS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(TASKS)}."
    raise UserError(f"There is no GLUE task {name!r}: {hint}")
