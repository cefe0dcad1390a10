"""Which output of a model stands for which label of its task: read or found, never assumed.

Published checkpoints permute labels. The names in a checkpoint's configuration decide where they
mean something; otherwise a slice of the training data does. `ordered` puts the outputs of a model
into the task's order, so that all that computes with it uses one and the same alignment.
"""

from collections.abc import Mapping, Sequence
from itertools import permutations
from math import factorial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import ConfigDict, Field

from fmn.errors import UserError
from fmn.models import checkpoints
from fmn.store.records import Record
from fmn.tasks import dataset
from fmn.tasks.task import TASKS, Columns, Task, get_task, read_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS, SEED = 512, 0  # at most so many rows of the training data decide, drawn by this seed
# An order is clearly better than the task's own if McNemar's exact test, one-sided and times the
# number of other orders (Bonferroni), is below this.
CLEARLY = 0.001
CHANCE = 0.05  # an expert is better than guessing if the one-sided binomial test is below this
# Other names of a task's labels, in small letters and digits alone.
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "negative": ("neg",),
    "positive": ("pos",),
    "unacceptable": ("notacceptable", "ungrammatical"),
    "acceptable": ("grammatical",),
    "notequivalent": (
        *("notparaphrase", "nonparaphrase", "notaparaphrase", "nonequivalent", "inequivalent"),
    ),
    "equivalent": ("paraphrase", "isparaphrase"),
    "notduplicate": ("nonduplicate", "notduplicates", "notparaphrase", "nonparaphrase"),
    "duplicate": ("duplicates", "isduplicate", "paraphrase"),
    "entailment": ("entail", "entails", "entailed"),
    "contradiction": ("contradict", "contradicts", "contradictory"),
    "notentailment": ("nonentailment", "notentail", "notentails", "notentailed"),
}


class Labels(Record):
    """How the outputs of a model stand for the labels of its task.

    Attributes:
        order: the output that stands for each label, in the task's order.
        origin: what decided it; "identity": nothing did, the outputs are taken as they stand.
        rows: of training data that decided.
        score: the share of them that this order has right.
        as_is: the same for the outputs as they stand.
    """

    model_config = ConfigDict(strict=True, validate_by_name=True, validate_by_alias=True)

    order: list[int]
    origin: Literal["names", "training data", "identity"] = Field(alias="from")
    rows: int = 0
    score: float = 0
    as_is: float = 0


def output_names(folder: Path) -> list[str]:
    """The names in a checkpoint's config.json, by output; empty where there are none."""
    try:
        id2label = checkpoints.read_config(folder)["id2label"]
        names = {int(output): str(name) for output, name in id2label.items()}
    except (UserError, KeyError, ValueError, AttributeError):  # loading says what is wrong
        return []
    return [names.get(output, "") for output in range(len(names))]


def by_names(task: Task, names: Sequence[str]) -> Labels | None:
    """The order that the outputs' names give; None if they do not name each label once.

    The one output of a regression task needs no name.
    """
    meaning: dict[str, int] = {}
    for label, name in enumerate(task.labels):
        meaning |= dict.fromkeys((_plain(name), *SYNONYMS.get(_plain(name), ())), label)
    outputs = {meaning.get(_plain(name)): output for output, name in enumerate(names)}
    if task.regression:
        outputs = {0: 0}
    if len(names) != task.num_outputs or set(outputs) != set(range(task.num_outputs)):
        return None
    return Labels(order=[outputs[label] for label in range(task.num_outputs)], origin="names")


def by_data(task: Task, logits: np.ndarray, labels: np.ndarray, place: str) -> Labels:
    """The order in which the outputs, logits [N, C], fit the labels [N] of training data best.

    An order other than the task's own is taken only if it is clearly better (`CLEARLY`). `place`
    names the model in messages.

    Raises:
        UserError: even so the model is no better than chance (`CHANCE`).
    """
    answers = logits.argmax(axis=1)  # [N]
    identity = tuple(range(task.num_outputs))
    # By order, whether each row is right; the identity comes first, so it is the best of equals.
    right = {order: np.asarray(order)[labels] == answers for order in permutations(identity)}
    order = max(right, key=lambda order: int(right[order].sum()))
    gained = int((right[order] & ~right[identity]).sum())
    lost = int((right[identity] & ~right[order]).sum())
    tests = factorial(task.num_outputs) - 1
    if not (gained and _one_sided(gained, gained + lost, 0.5) * tests < CLEARLY):
        order = identity
    score, answered = float(right[order].mean()), np.argsort(order)[answers]
    if not better_than_guessing(task, answered, labels):
        share = _guessed(task, answered, labels)
        raise UserError(
            f"{task.name}: {place} is no better than chance: in the best order of its labels it has"
            f" {score:.1%} of {len(labels)} training rows right, guessing {share:.1%}; give an"
            " expert of this task, or name its labels in config.json (id2label)"
        )
    scores = {"score": score, "as_is": float(right[identity].mean())}
    return Labels(order=list(order), origin="training data", rows=len(labels), **scores)


def _guessed(task: Task, answers: np.ndarray, labels: np.ndarray) -> float:
    """The share of a classification task's rows, class ids [N], that guessing has right.

    By always answering the most frequent label; if the task's metric is a Matthews correlation,
    which that does not raise, by answering each label as often as these answers do (Cohen 1960,
    the expected agreement of kappa).
    """
    answered, present = (
        [np.mean(each == label) for label in range(task.num_outputs)] for each in (answers, labels)
    )
    is_matthews = "matthews_correlation" in task.metrics
    return float(np.dot(answered, present) if is_matthews else max(present))


def better_than_guessing(task: Task, answers: np.ndarray, labels: np.ndarray) -> bool:
    """Whether chance alone would hardly have so many of a classification task's rows right."""
    hits = int((answers == labels).sum())
    return _one_sided(hits, len(labels), _guessed(task, answers, labels)) < CHANCE


def _one_sided(hits: int, trials: int, share: float) -> float:
    """The probability of so many hits or more, if each has the probability `share`."""
    from scipy.stats import binomtest

    return float(binomtest(hits, trials, share, alternative="greater").pvalue)


def as_they_stand(task: Task) -> Labels:
    """The task's own order, for want of names and data."""
    return Labels(order=list(range(task.num_outputs)), origin="identity")


def decide(checkpoint: Path, task: Task, data: Path | None, device: str = "auto") -> Labels:
    """How a checkpoint's outputs stand for the task's labels: the one place that decides it.

    By names where they mean something, which needs no data; else by a slice of the training split,
    as the model answers it in float32; without one, as they stand. The same checkpoint and data
    give the same answer.

    Raises:
        UserError: the head has another size than the task, or as `by_data` does.
    """
    checkpoints.check_head(checkpoint, checkpoints.load_config(checkpoint), task)
    named = by_names(task, output_names(checkpoint))
    if named is not None:
        return named
    if data is None or not dataset.has_split(data, task, "train"):
        return as_they_stand(task)
    from fmn.models.predict import predict
    from fmn.tasks import batches

    table = dataset.read_split(data, task, "train")
    table = table.take(batches.select(table["label"].to_numpy(), ROWS, SEED))
    examples = dataset.tokenize(checkpoints.load_tokenizer(checkpoint), task, table)
    model = checkpoints.load_classifier(checkpoint)
    logits = predict(model, examples, device=device, dtype="float32")
    return by_data(task, logits, examples.labels, str(checkpoint))


class Expert(NamedTuple):
    """An expert in memory, whose logits [N, C] are in the order of the task's labels."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    task: Task
    labels: Labels


def load_expert(checkpoint: Path, task: Task, data: Path | None, device: str = "auto") -> Expert:
    """Load an expert for a task; raises as `decide` does.

    Args:
        checkpoint: the expert's folder.
        task: the definition beside the rows that it is to answer.
        data: the folder of these rows, whose training split tells the labels of outputs that have
            no names.
        device: where the model runs for that.
    """
    labels = decide(checkpoint, task, data, device)
    model = ordered(checkpoints.load_classifier(checkpoint), labels)
    return Expert(model, checkpoints.load_tokenizer(checkpoint), task, labels)


def expert_task(checkpoint: Path, name: str) -> Task:
    """The definition of the task that an expert is for, where no rows are at hand.

    It is that in the expert's folder, which `fmn fetch` and `fmn finetune` write; else GLUE's of
    this name; else what the expert's configuration says.
    """
    if task := read_task(checkpoint) or TASKS.get(name):
        return task
    names = output_names(checkpoint)
    columns = Columns(text="text", label=None)
    if len(names) < 2:
        return Task(name=name, problem_type="regression", columns=columns, metrics=())
    return Task(name=name, columns=columns, labels=tuple(names), metrics=())


def ordered(model: "PreTrainedModel", labels: Labels) -> "PreTrainedModel":
    """The model, whose logits [B, C] come out in the task's order from now on."""

    def reorder(_module: Any, _args: Any, output: Any) -> None:
        output.logits = output.logits[:, labels.order]

    if labels.order != sorted(labels.order):
        model.register_forward_hook(reorder)
    return model


def names_by_output(task: Task, labels: Labels) -> list[str]:
    """The task's own names in the order of the model's outputs, as its configuration has them."""
    names = task.labels or ("score",)
    return [names[labels.order.index(output)] for output in range(task.num_outputs)]


def notes(labels_by_task: Mapping[str, Labels]) -> list[str]:
    """A line for each task whose outputs do not name the task's labels in the task's order."""
    lines = []
    for name, labels in labels_by_task.items():
        scores = f"{labels.score:.1%} right, as they stand {labels.as_is:.1%}"
        reason = {
            "names": "as the names in config.json say",
            "identity": "NOT NAMED in config.json, and no data to find them; taken as they stand",
            "training data": f"not named; found on {labels.rows} training rows ({scores})",
        }[labels.origin]
        if labels.origin != "names" or labels.order != sorted(labels.order):
            outputs = ", ".join(names_by_output(get_task(name), labels))
            lines.append(f"labels of {name}: the outputs are {outputs}: {reason}")
    return lines


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
