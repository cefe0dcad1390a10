"""Match the outputs of an expert with the labels of its task, and check the match.

Published checkpoints permute labels. The order comes from the user's list, if there is one; else
from the names in the checkpoint's configuration, if these are meaningful; else from a slice of the
training data; else it is the task's own order. If there are training data, they check the order.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from fmn.errors import UserError
from fmn.models import checkpoints, loading
from fmn.models.evidence import weigh
from fmn.store.headers import read_file, tensor_headers, write_json
from fmn.store.records import Record
from fmn.tasks import dataset
from fmn.tasks.batches import IGNORED
from fmn.tasks.encoding import encode
from fmn.tasks.task import (
    DEFINITION,
    TASKS,
    Columns,
    ColumnSettings,
    Task,
    in_a_line,
    read_task,
    write_task,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

ROWS, SEED = 512, 0  # training rows that are read at most, and the seed that draws them
# Other names of labels, in lower-case letters and digits.
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
    """The match of an expert's outputs with the labels of its task.

    Attributes:
        order: the output for each label, in the task's order. A single logit of a binary task
            counts as two outputs.
        origin: what decided the order; "identity": it is the task's own, without evidence.
        rows: number of training rows (for taggers, words) that decided or checked it.
        score: the score of this order on them: the share of right rows; for several labels at once
            the share of right labels (R-precision); for regression the Pearson correlation, None
            if it is undefined.
        notes: notes for the user.
    """

    order: list[int]
    origin: Literal["settings", "names", "training data", "identity"]
    rows: int = 0
    score: float | None = 0
    notes: list[str] = Field(default_factory=list)


# ---- names ----


def output_names(folder: Path) -> list[str]:
    """The names of the outputs in a checkpoint's config.json, in order; empty if there are none."""
    try:
        id2label = checkpoints.read_config(folder)["id2label"]
        names = {int(output): str(name) for output, name in id2label.items()}
    except (UserError, KeyError, ValueError, AttributeError):  # loading says what is wrong
        return []
    return [names.get(output, "") for output in range(len(names))]


def by_names(task: Task, names: Sequence[str]) -> Labels | None:
    """The order of the outputs from their names; None unless they name each label once.

    The one output of a regression task needs no name. One name alone is that of a single logit.
    """
    identity = list(range(task.num_outputs))
    if task.regression:
        return Labels(order=identity, origin="names") if len(names) == 1 else None
    for form in (str.strip, _plain):  # first letter for letter, then loosely
        meaning = {form(name): label for label, name in enumerate(task.labels)}
        if len(meaning) < task.num_outputs:
            continue
        for name, label in list(meaning.items()):
            meaning = dict.fromkeys(SYNONYMS.get(name, ()), label) | meaning
        labels = [meaning.get(form(name), -1) for name in names]
        if len(names) == 1 and task.num_outputs == 2 and not task.multi_label and labels[0] >= 0:
            labels = [1 - labels[0], labels[0]]
        if sorted(labels) == identity:
            return Labels(order=[labels.index(label) for label in identity], origin="names")
    return None


def names_by_output(task: Task, labels: Labels) -> list[str]:
    """The task's own names in the order of the model's outputs, as its configuration has them."""
    names = task.labels or ("score",)
    return [names[labels.order.index(output)] for output in range(task.num_outputs)]


def as_they_stand(task: Task) -> Labels:
    """The task's own order, if there are neither names nor data."""
    return Labels(order=list(range(task.num_outputs)), origin="identity")


def _without_head(task: Task, folder: Path) -> Labels:
    """The result for an expert without a head, which has no outputs to order."""
    notes: list[str] = []
    if task.loss == "embedding":
        from fmn.models import embedding

        notes = [f"{task.name}: {note}" for note in embedding.notes(folder)]
    return Labels(order=[], origin="identity", notes=notes)


def _plain(name: str) -> str:
    """A name in lower case without punctuation; a number without trailing zeros."""
    try:
        return f"{float(name):g}"
    except ValueError:
        return "".join(letter for letter in name.casefold() if letter.isalnum()) or name


def _mean_something(task: Task, names: Sequence[str]) -> bool:
    """Whether names of outputs are words, not LABEL_0; False if the task's labels are numbers."""
    is_wordless = all(re.fullmatch(r"[-+\d.]+", name) for name in task.labels)
    unnamed = (rf"(?i)label_\d+|{output}|\s*" for output in range(len(names)))
    return bool(names) and not (is_wordless or any(map(re.fullmatch, unnamed, names)))


def _remedy(task: Task, names: Sequence[str]) -> str:
    """The end of a message: how to name the labels of the outputs."""
    entry = f"{{source: ..., labels: {json.dumps(list(names), ensure_ascii=False)}}}"
    return f"`sources: {{{task.name}: {entry}}}` or `--labels {shlex.join(names)}`"


# ---- data ----


def by_data(
    task: Task, labels: Labels | None, logits: np.ndarray, truth: np.ndarray, place: str
) -> Labels:
    """Check the order of the outputs on training rows; without `labels`, decide it there.

    Another order is taken only if it is clearly better than the outputs as they stand.

    Args:
        logits: [N, C], in the order of the outputs.
        truth: the labels of the same rows, as in `Examples.labels`.
        place: names the task and the expert in messages.

    Raises:
        UserError: the rows contradict the names; or there are no names, and even in the best
            order the expert is no better than chance.
    """
    is_named, labels = labels is not None, labels or as_they_stand(task)
    evidence = weigh(task, logits, truth, labels.order)
    if not is_named and evidence.is_telling:
        order = evidence.best if evidence.contradicts else labels.order
        labels = Labels(order=order, origin="training data")
        evidence = weigh(task, logits, truth, order)
    score, best = evidence.scores
    rows = f"{'labels of ' if task.multi_label else ''}{len(truth)} {_unit(task)}"
    figures = f"it has {score:.1%} of {rows} right, guessing {evidence.guess:.1%}"
    if task.regression:
        figures = f"its correlation with {rows} is {score:.2f}"
    notes = []
    if np.isnan(score):
        sides = {"its values": logits, "the labels": truth}
        same = [name for name, side in sides.items() if len(np.unique(side)) == 1]
        reason = f"{same[0]} are all the same" if same else "there are too few"
        words = f"NOTHING IS KNOWN of how good the expert is: {reason} on {rows}"
        return labels.model_copy(update={"rows": len(truth), "score": None, "notes": [words]})
    if evidence.contradicts and task.regression:
        raise UserError(
            f"{place}: its values fall where the labels rise: {figures}; give an expert of this"
            " task, or turn the sign of its head or of the labels"
        )
    if evidence.contradicts:
        turned = names_by_output(task, Labels(order=evidence.best, origin="training data"))
        name = "turned round" if len(turned) == 2 else f"as {in_a_line(turned)}"
        how = "listed" if labels.origin == "settings" else "named"
        contradiction = f"as {how} {score:.1%}, {name} {best:.1%} of {rows} are right"
        if labels.origin == "names":
            raise UserError(
                f"{place}: the names of its outputs contradict the data: {contradiction}; if the"
                f" data are right, say {_remedy(task, turned)}"
            )
        notes.append(f"THE DATA CONTRADICT the list in the settings: {contradiction}")
    elif evidence.is_chance and not is_named:
        raise UserError(
            f"{place} is no better than chance in any order of its labels: at best {best:.1%} of"
            f" {rows} are right, guessing {evidence.guess:.1%}; give an expert of this task, or say"
            f" what its outputs stand for: {_remedy(task, task.labels)}"
        )
    elif evidence.is_chance:
        notes.append(f"the expert is NO BETTER THAN CHANCE: {figures}")
    return labels.model_copy(update={"rows": len(truth), "score": score, "notes": notes})


# ---- experts ----


class Expert(NamedTuple):
    """An expert in memory, whose logits [N, C] are in the order of the task's labels.

    `processor` is the tokenizer, or the image processor.
    """

    model: "PreTrainedModel"
    processor: Any
    task: Task
    labels: Labels


def load_expert(
    checkpoint: Path,
    task: Task,
    data: Path | None,
    device: str = "auto",
    dtype: "torch.dtype | None" = None,
) -> Expert:
    """Load an expert for a task; raises as `decide` does.

    Args:
        checkpoint: the expert's folder.
        task: the definition beside the rows that it is to answer; the expert completes it.
        data: the folder of these rows, whose training split decides or checks the labels.
        device: where the model runs for that.
        dtype: of its tensors; default: float32.
    """
    config = checkpoints.load_config(checkpoint)
    checkpoints.check_kind(checkpoint, config, task)
    task, processor = complete(task, config), loading.load_processor(checkpoint, task.task)
    if not task.kind.has_head:
        model = loading.load_model(checkpoint, task.task, dtype)
        return Expert(model, processor, task, _without_head(task, checkpoint))
    labels = decide(checkpoint, task, data, device=device)
    model = loading.load_model(checkpoint, task.task, dtype)
    align_model(model, task, labels.order)
    return Expert(model, processor, task, labels)


def align(folder: Path, task: Task, data: Path | None, names: Sequence[str] = ()) -> Labels:
    """Put the outputs of an expert into the task's order, in its files; raises as `decide` does.

    Args:
        folder: the expert's folder, which is changed and gets the task's definition, `task.json`.
        data: the folder of the task's rows.
        names: what the outputs stand for, as the user says.
    """
    config = checkpoints.load_config(folder)
    checkpoints.check_kind(folder, config, task)
    checkpoints.check_tensors(folder, config, head=True, kind=task.task)
    task = complete(task, config, names)
    if not task.kind.has_head:
        write_task(folder, task)
        return _without_head(task, folder)
    labels = decide(folder, task, data, names=names)
    align_folder(folder, task, labels.order)
    write_task(folder, task)
    return labels


def can_check(data: Path, task: Task) -> bool:
    """Whether there are training rows with labels, which check how outputs stand for them."""
    return task.has_labels and dataset.has_split(data, task, "train")


def decide(
    checkpoint: Path,
    task: Task,
    data: Path | None,
    *,
    names: Sequence[str] = (),
    device: str = "auto",
) -> Labels:
    """How an expert's outputs stand for the labels of a complete task: the one place that decides.

    An expert that fmn aligned or fine-tuned is known by its names, without a look at the data. The
    same checkpoint and data give the same answer.

    Args:
        checkpoint: the expert's folder.
        data: the folder of the task's rows, whose training split is read if it is there.
        names: what the outputs stand for, as the user says.
        device: where it answers the training rows, in float32.

    Raises:
        UserError: the head or its problem type is another than the task's, the names are of
            another task, or as `by_data` does.
    """
    config, place = checkpoints.load_config(checkpoint), f"{task.name}: {checkpoint}"
    if not checkpoints.is_single_logit(config, task):
        checkpoints.check_head(checkpoint, config, task)
    own = output_names(checkpoint)
    labels = by_names(task, names or own)
    if labels is None and names:
        raise UserError(
            f"{task.name}: labels {in_a_line(names)}: they must be the task's, each once, in the"
            f" order of the outputs: {in_a_line(task.labels)}; correct the list"
        )
    if not names and (twice := [name for name in own if own.count(name) > 1 and name]):
        raise UserError(
            f"{place}: several of its outputs are named {twice[0]!r:.40}; say what each output"
            f" stands for, in their order: {_remedy(task, task.labels)}"
        )
    if labels is None and _mean_something(task, own):
        raise UserError(
            f"{place}: its outputs are named {in_a_line(own)}, but the task's labels are"
            f" {in_a_line(task.labels)}; give an expert of this task, or say what each output"
            f" stands for, in their order: {_remedy(task, task.labels)}"
        )
    if labels and names:
        labels = labels.model_copy(update={"origin": "settings"})
    notes = _kind_notes(config, task, place)
    is_aligned = (checkpoint / DEFINITION).is_file() and own == list(task.labels or own)
    if data and not is_aligned and can_check(data, task):
        logits, truth = _answers(checkpoint, task, data, device)
        labels = by_data(task, labels, logits, truth, place)
    labels = labels or as_they_stand(task)
    notes = [f"{task.name}: {note}" for note in (*_how(task, labels), *notes, *labels.notes)]
    return labels.model_copy(update={"notes": notes})


def _answers(
    checkpoint: Path, task: Task, data: Path, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """An expert's logits [N, C] on a slice of the training split, and the labels of its rows.

    Of tags, N are the words.
    """
    from fmn.models.predict import predict
    from fmn.tasks import batches

    table = dataset.read_split(data, task, "train")
    table = table.take(batches.select(np.zeros(table.num_rows), ROWS, SEED))
    examples = encode(loading.load_processor(checkpoint, task.task), task, table)
    model = loading.load_model(checkpoint, task.task)
    logits = predict(model, examples, device=device, dtype="float32")
    if examples.has_token_labels:  # [N, T, C] -> [words, C]
        is_labelled = examples.labels != IGNORED
        return logits[:, : is_labelled.shape[1]][is_labelled], examples.labels[is_labelled]
    if logits.shape[1] < task.num_outputs:  # a single logit
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    return logits, examples.labels


def _unit(task: Task) -> str:
    """The noun for the number of examples in messages."""
    return "words of training rows" if task.task == "token-classification" else "training rows"


def _kind_notes(config: "PretrainedConfig", task: Task, place: str) -> list[str]:
    """Notes about an expert's problem type; UserError if it contradicts the task's."""
    kind = config.problem_type
    is_logit = checkpoints.is_single_logit(config, task) and kind != "regression"
    if is_logit or kind in (None, task.problem_type):
        return []
    if (kind, task.problem_type) == ("multi_label_classification", "single_label_classification"):
        return ["the expert was fine-tuned for several labels at once; its largest output answers"]
    raise UserError(
        f"{place}: is an expert of {kind} (problem_type in config.json), but the task"
        f" is {task.problem_type}; give an expert of this task, or correct what is wrong"
    )


def _how(task: Task, labels: Labels) -> list[str]:
    """What decided the order; "" if the outputs name the task's labels in the task's order."""
    if labels.origin == "names" and labels.order == sorted(labels.order):
        return []
    no_data = "too few training rows" if labels.rows else "no data"
    share = f"{labels.score:.1%} of {labels.rows} {_unit(task)} are right so"
    reason = {
        "settings": "as the settings say",
        "names": "as the names in config.json say",
        "identity": f"NOT NAMED in config.json, and {no_data} to find them; taken as they stand",
        "training data": f"not named; {share}",
    }[labels.origin]
    return [f"the outputs are {in_a_line(names_by_output(task, labels))}: {reason}"]


def complete(task: Task, config: "PretrainedConfig", names: Sequence[str] = ()) -> Task:
    """The task with labels and problem type, from an expert's configuration where rows have none.

    Args:
        names: what the outputs stand for, as the user says.
    """
    if task.has_labels or not task.kind.has_head:
        return task
    labels = task.labels or tuple(names)
    kind = task.problem_type or config.problem_type
    if kind is None or (kind == "regression" and labels):
        is_value = config.num_labels == 1 and not labels
        kind = "regression" if is_value else "single_label_classification"
    if kind != "regression":
        labels = labels or tuple(config.id2label[output] for output in range(config.num_labels))
    return task.model_copy(update={"problem_type": kind, "labels": labels})


def expert_task(checkpoint: Path, name: str) -> Task:
    """The definition of an expert's task, from its own files alone.

    It is that in the expert's folder, which `fmn fetch` and `fmn finetune` write; else GLUE's of
    this name; else what the expert's configuration says.
    """
    if task := read_task(checkpoint) or TASKS.get(name):
        return task
    config = checkpoints.load_config(checkpoint)
    kind = checkpoints.kind_of(config)
    columns = Columns(**ColumnSettings().of_kind(kind), label=None)
    return complete(Task(name=name, task=kind, problem_type=None, columns=columns), config)


# ---- the outputs of a head in the order of its task's labels ----


def output_entries(task: Task) -> dict[str, Any]:
    """The entries of an expert's configuration about its outputs, in the task's order."""
    names = dict(enumerate(task.labels or ("score",)))
    label2id = {name: label for label, name in names.items()}
    problem_type = task.problem_type if task.task == "text-classification" else None
    return {"id2label": names, "label2id": label2id, "problem_type": problem_type}


def _reordered(rows: "Tensor", order: Sequence[int]) -> "Tensor":
    """Rows of a head's last linear map in another order; of one row z, the rows 0 and z."""
    import torch

    if len(rows) < len(order):
        rows = torch.cat([torch.zeros_like(rows), rows])
    return rows[list(order)].contiguous()


def align_model(model: "PreTrainedModel", task: Task, order: Sequence[int]) -> None:
    """Put the outputs of a model into the task's order; `order` has the output of each label.

    One logit z becomes the two outputs 0 and z, which `order` counts.
    """
    from torch import nn

    if list(order) != list(range(model.config.num_labels)):
        path = checkpoints.last_linear(model)
        old = model.get_submodule(path)
        tensors = {
            name: _reordered(value.detach(), order) for name, value in old.named_parameters()
        }
        like = {"device": tensors["weight"].device, "dtype": tensors["weight"].dtype}
        new = nn.Linear(tensors["weight"].shape[1], len(order), bias="bias" in tensors, **like)
        new.load_state_dict(tensors)
        model.set_submodule(path, new.requires_grad_(old.weight.requires_grad).eval())
    for name, value in output_entries(task).items():
        setattr(model.config, name, value)
    model.num_labels = len(order)


def align_folder(folder: Path, task: Task, order: Sequence[int]) -> None:
    """Put the outputs in a checkpoint's files into the task's order: config.json and the last map.

    Other files are left alone; a file that is rewritten is replaced, and not what it is linked to.
    """
    from safetensors.torch import load_file, save_file

    config, raw = checkpoints.load_config(folder), checkpoints.read_config(folder)
    if list(order) != list(range(config.num_labels)):
        path = checkpoints.head_map(config)
        headers = tensor_headers(folder)
        names = [name for name in (f"{path}.weight", f"{path}.bias") if name in headers]
        for file in {headers[name].file for name in names}:
            tensors, metadata = load_file(file), read_file(file)[1]
            for name in tensors.keys() & names:
                tensors[name] = _reordered(tensors[name], order)
            file.unlink()
            save_file(tensors, file, metadata=metadata)
    raw = {name: value for name, value in raw.items() if not name.endswith("num_labels")}
    write_json(folder / checkpoints.CONFIG, raw | output_entries(task))
