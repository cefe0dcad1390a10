"""Which output of a model stands for which label of its task: read or found, never assumed.

Published checkpoints permute labels. The names in a checkpoint's configuration decide where they mean something;
otherwise a slice of the training data does. `ordered` puts the outputs of a model into the task's order, so that all
that computes with it (Fisher, evaluation, search) uses one and the same alignment.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import permutations
from math import factorial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np

from fmn.errors import UserError
from fmn.tasks import dataset as data
from fmn.tasks.task import Task, task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS, SEED = 512, 0
"""The slice of the training data that decides: so many rows at most, drawn by this seed."""

CLEARLY = 0.001
"""An order is clearly better than the task's own when McNemar's exact test, one-sided and times the number of other
orders (Bonferroni), is below this."""

CHANCE = 0.05
"""An expert is better than guessing (`guessed`) when the one-sided binomial test is below this."""

SCORE = "score"  # what the output of a regression task is called

# Other names of a task's labels, in small letters and digits alone.
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "negative": ("neg",),
    "positive": ("pos",),
    "unacceptable": ("notacceptable", "ungrammatical"),
    "acceptable": ("grammatical",),
    "notequivalent": (
        "notparaphrase",
        "nonparaphrase",
        "notaparaphrase",
        "nonequivalent",
        "inequivalent",
    ),
    "equivalent": ("paraphrase", "isparaphrase"),
    "notduplicate": ("nonduplicate", "notduplicates", "notparaphrase", "nonparaphrase"),
    "duplicate": ("duplicates", "isduplicate", "paraphrase"),
    "entailment": ("entail", "entails", "entailed"),
    "contradiction": ("contradict", "contradicts", "contradictory"),
    "notentailment": ("nonentailment", "notentail", "notentails", "notentailed"),
    SCORE: ("similarity", "similarityscore"),
}

Labels = TypedDict(
    "Labels",
    {
        "order": list[
            int
        ],  # the output that stands for each label of the task, in the task's order
        "from": str,  # "names", "training data", "identity"
        # Where the training data decided:
        "rows": NotRequired[int],
        "score": NotRequired[
            float
        ],  # share of the rows that this order has right; for regression, the correlation
        "as_is": NotRequired[float],  # the same for the outputs as they stand
    },
)


def output_names(folder: Path) -> list[str]:
    """The names in a checkpoint's config.json, by output; empty where there are none. Loads no library."""
    try:
        content = json.loads((folder / "config.json").read_bytes())
        named = {int(output): str(name) for output, name in content["id2label"].items()}
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # whoever loads the checkpoint says what is wrong
        return []
    return [named.get(output, "") for output in range(len(named))]


def by_names(one: Task, names: Sequence[str]) -> Labels | None:
    """The order that the outputs' names give; None where they do not name each label of the task once."""
    meaning: dict[str, int] = {}
    for label, name in enumerate(_names(one)):
        meaning |= dict.fromkeys((_plain(name), *SYNONYMS.get(_plain(name), ())), label)
    outputs = {meaning.get(_plain(name)): output for output, name in enumerate(names)}
    if len(names) != one.num_outputs or set(outputs) != set(range(one.num_outputs)):
        return None
    return {"order": [outputs[label] for label in range(one.num_outputs)], "from": "names"}


def by_data(one: Task, logits: np.ndarray, labels: np.ndarray, where: str) -> Labels:
    """The order in which the outputs fit the data best.

    Another than the task's own is taken only where it is clearly better (`CLEARLY`).

    Args:
        one: the task.
        logits: [N, C], the model's outputs as they stand.
        labels: [N], class ids in the task's order, or values.
        where: names the model in messages.

    Raises:
        UserError: even so the model is no better than chance (`CHANCE`); for regression: its outputs are not
            positively correlated with the values.
    """
    if one.regression:
        predicted = logits[:, 0].astype(np.float64)
        constant = np.ptp(predicted) == 0 or np.ptp(labels) == 0
        correlation = 0.0 if constant else float(np.corrcoef(predicted, labels)[0, 1])
        if not correlation > 0:
            raise UserError(
                f"{one.name}: {where} is no better than chance: the correlation of its outputs with {len(labels)}"
                f" training rows is {correlation:.2f}, that of chance 0; give an expert of this task"
            )
        return {
            "order": [0],
            "from": "training data",
            "rows": len(labels),
            "score": correlation,
            "as_is": correlation,
        }
    answers = logits.argmax(axis=1)
    right = {
        order: np.asarray(order)[labels] == answers
        for order in permutations(range(one.num_outputs))
    }
    identity = tuple(range(one.num_outputs))  # the first of the permutations, so the best of equals
    order = max(right, key=lambda each: int(right[each].sum()))
    gained, lost = (
        int((right[a] & ~right[b]).sum()) for a, b in ((order, identity), (identity, order))
    )
    if not (
        gained
        and _one_sided(gained, gained + lost, 0.5) * (factorial(one.num_outputs) - 1) < CLEARLY
    ):
        order = identity
    score, read = float(right[order].mean()), np.argsort(order)[answers]
    if not better_than_guessing(one, read, labels):
        raise UserError(
            f"{one.name}: {where} is no better than chance: in the order of labels that suits it best it has"
            f" {score:.1%} of {len(labels)} training rows right,"
            f" guessing {guessed(one, read, labels):.1%}; give an expert of this task, or name its labels in"
            " config.json (id2label)"
        )
    return {
        "order": list(order),
        "from": "training data",
        "rows": len(labels),
        "score": score,
        "as_is": float(right[identity].mean()),
    }


def guessed(one: Task, answers: np.ndarray, labels: np.ndarray) -> float:
    """The share of a classification task's rows, class ids [N], that guessing has right.

    By always answering the most frequent label; where the task's metric is a Matthews correlation, which that does not
    raise, by answering as often as these answers do each label (Cohen 1960, the expected agreement of kappa).
    """
    answered, present = (
        [np.mean(each == label) for label in range(one.num_outputs)] for each in (answers, labels)
    )
    return float(
        np.dot(answered, present) if "matthews_correlation" in one.metrics else max(present)
    )


def better_than_guessing(one: Task, answers: np.ndarray, labels: np.ndarray) -> bool:
    """Whether chance alone would hardly have so many of a classification task's rows right."""
    return (
        _one_sided(int((answers == labels).sum()), len(labels), guessed(one, answers, labels))
        < CHANCE
    )


def _one_sided(hits: int, trials: int, share: float) -> float:
    """The probability of so many hits or more, where each is as probable as `share`."""
    from scipy.stats import binomtest

    return float(binomtest(hits, trials, share, alternative="greater").pvalue)


def as_they_stand(one: Task) -> Labels:
    """The task's own order, for want of names and data."""
    return {"order": list(range(one.num_outputs)), "from": "identity"}


def decide(checkpoint: Path, one: Task, folder: Path | None, device: str = "auto") -> Labels:
    """How a checkpoint's outputs stand for the task's labels: the one place that decides it.

    By names where they mean something, which needs no data; else by a slice of the training split below `folder`, as
    the model answers it in float32; without one, as they stand. The same checkpoint and data give the same answer.
    Raises UserError for a head of another size, and as `by_data` does.
    """
    from fmn.models import checkpoints

    checkpoints.check_head(checkpoint, checkpoints.load_config(checkpoint), one)
    named = by_names(one, output_names(checkpoint))
    if named is not None:
        return named
    if folder is None or not data.has(folder, one, "train"):
        return as_they_stand(one)
    from fmn.models import predict as evaluate
    from fmn.tasks import batches

    table = data.read(folder, one, "train")
    table = table.take(batches.select(table["label"].to_numpy(), ROWS, SEED))
    examples = data.tokenize(checkpoints.load_tokenizer(checkpoint), one, table)
    logits = evaluate.predict(
        checkpoints.load_classifier(checkpoint), examples, device=device, dtype="float32"
    )
    return by_data(one, logits, examples.labels, str(checkpoint))


def ordered(model: "PreTrainedModel", found: Labels) -> "PreTrainedModel":
    """The model, whose logits [B, C] come out in the task's order from now on."""
    order = found["order"]

    def reorder(_module: Any, _args: Any, output: Any) -> None:
        output.logits = output.logits[:, order]

    if order != sorted(order):
        model.register_forward_hook(reorder)
    return model


def names_by_output(one: Task, found: Labels) -> list[str]:
    """The task's own names in the order of the model's outputs: what its configuration should say."""
    return [_names(one)[found["order"].index(output)] for output in range(one.num_outputs)]


def notes(found: Mapping[str, Labels]) -> list[str]:
    """A line for each task whose outputs do not name the task's labels in the task's order."""
    lines = []
    for name, labels in found.items():
        one = task(name)
        outputs = ", ".join(names_by_output(one, labels))
        if labels["from"] == "names":
            if labels["order"] != sorted(labels["order"]):
                lines.append(
                    f"labels of {name}: the outputs are {outputs}, as the names in config.json say"
                )
        elif labels["from"] == "identity":
            lines.append(
                f"labels of {name}: NOT NAMED in config.json, no data to find them: taken as {outputs}"
            )
        elif one.regression:
            lines.append(
                f"labels of {name}: not named; correlation {labels['score']:.2f} on {labels['rows']} rows"
            )
        else:
            lines.append(
                f"labels of {name}: not named; {labels['rows']} training rows say {outputs}"
                f" ({labels['score']:.1%} right, as they stand {labels['as_is']:.1%})"
            )
    return lines


def _names(one: Task) -> tuple[str, ...]:
    return one.labels or (SCORE,)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
