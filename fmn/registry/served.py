"""The model that MLflow serves: one encoder, and for each task its own parts. Needs no fmn.

MLflow runs this file as it is ("models from code"). The artifact ``merged`` is a folder::

    encoder/         config, weights, tokenizer
    tasks/TASK/      task.json (the definition), config.json, head.safetensors (the head, and what
                     the task has in place of parts of the encoder)
    tokenizers.json  by task, the folder of its tokenizer: encoder, or tasks/TASK
"""

import copy
import json
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

ALL = "*"  # in place of a task: every task that takes as many texts as the row has
TOKENS = 2048  # of a batch, padding included
COLUMNS = ("label", "labels", "score", "probabilities")


# ---------------------------------------------------------------------------------------------
# Tasks


class Memory:
    """What the modules that several models share gave for the current batch, for each thread."""

    def __init__(self) -> None:
        self.local = threading.local()

    def forget(self) -> None:
        """Begin a new batch."""
        self.local.outputs = {}

    def share(self, module: torch.nn.Module) -> None:
        """Let a module compute once what all models ask of it for a batch.

        It computes again for other inputs, as it has above parts that models have for themselves.
        """
        forward = module.forward

        def remembered(*args: Any, **kwargs: Any) -> Any:
            values = (*args, *kwargs.values())
            inputs = [value for value in values if isinstance(value, torch.Tensor)]
            before, output = self.local.outputs.get(module, (None, None))
            if before is None or not _are_equal(before, inputs):
                output = forward(*args, **kwargs)
                self.local.outputs[module] = inputs, output
            return output

        module.forward = remembered


def _are_equal(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    pairs = zip(left, right, strict=False)
    return len(left) == len(right) and all(a is b or torch.equal(a, b) for a, b in pairs)


def shared_modules(
    module: torch.nn.Module, own: Collection[str], path: str = ""
) -> Iterator[torch.nn.Module]:
    """The largest modules in `module`, which has this path, without a parameter named in `own`."""
    is_list = isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict)  # is not called
    if not is_list and all(name not in own for name, _ in module.named_parameters(path)):
        yield module
        return
    for name, child in module.named_children():
        yield from shared_modules(child, own, f"{path}.{name}".lstrip("."))


class Task(NamedTuple):
    """A task: its classifier, which shares modules with others, and how its texts are read.

    `labels` are the names of its outputs; `tokenizer_folder` tells tokenizers apart.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokenizer_folder: str
    max_length: int
    text_count: int
    problem_type: str
    threshold: float
    labels: list[str]


def load_tasks(folder: Path) -> tuple[dict[str, Task], Memory]:
    """The tasks by name, and the memory of the modules that they share."""
    tokenizers: dict[str, str] = json.loads((folder / "tokenizers.json").read_text())
    loaded = {name: _load_tokenizer(folder / name) for name in set(tokenizers.values())}
    models, memory = load_models(folder)
    tasks = {}
    for name, model in models.items():
        config, tokenizer = model.config, loaded[tokenizers[name]]
        if config.pad_token_id is None:  # tells where each text of a batch ends
            config.pad_token_id = tokenizer.pad_token_id
        definition = json.loads((folder / "tasks" / name / "task.json").read_text())
        labels = [config.id2label[output] for output in range(config.num_labels)]
        kind = "regression" if len(labels) == 1 else "single_label_classification"
        tasks[name] = Task(
            name=name,
            model=model,
            tokenizer=tokenizer,
            tokenizer_folder=tokenizers[name],
            max_length=definition["max_length"],
            text_count=2 if definition["columns"]["text_pair"] else 1,
            problem_type=definition["problem_type"] or config.problem_type or kind,
            threshold=definition["threshold"],
            labels=labels,
        )
    return tasks, memory


def load_models(folder: Path) -> tuple[dict[str, PreTrainedModel], Memory]:
    """The classifiers by task, whose encoders have all but a task's own parts in common."""
    weights: dict[str, torch.Tensor] = {}
    for file in (folder / "encoder").glob("*.safetensors"):
        weights |= load_file(file)
    paths = sorted((folder / "tasks").iterdir())
    own = {path: load_file(path / "head.safetensors") for path in paths}
    in_common: dict[int, Any] = {}  # modules and parameters by id, which copies of the encoder keep
    models, memory, encoder = {}, Memory(), None
    for path, tensors in own.items():
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        # Experts are evaluated in float32, whatever their files hold.
        with torch.device("cpu" if encoder is None else "meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        prefix = model.base_model_prefix
        if encoder is None:
            encoder = model.base_model
            missing = encoder.load_state_dict(weights, strict=False).missing_keys
            if lost := [n for n in missing if f"{prefix}.{n}" not in model.all_tied_weights_keys]:
                raise ValueError(f"{folder / 'encoder'}: has no {lost}")
            names = {name for each in own.values() for name in each}
            for module in shared_modules(encoder, names):
                in_common[id(module)] = module
                if any(True for _ in module.parameters()):
                    memory.share(module)
            shared = {n: tensor for n, tensor in encoder.named_parameters() if n not in names}
            in_common |= {id(tensor): tensor for tensor in shared.values()}
        setattr(model, prefix, copy.deepcopy(encoder, dict(in_common)))
        in_encoder = encoder.state_dict().keys()
        renamed = {n: f"{prefix}.{n}" if n in in_encoder else n for n in tensors}
        missing, unexpected = model.load_state_dict(
            {renamed[n]: tensor.float() for n, tensor in tensors.items()}, strict=False, assign=True
        )
        lost = [name for name in missing if not name.startswith(f"{prefix}.")]
        if lost or unexpected:
            raise ValueError(f"{path}: head and configuration differ: {[*lost, *unexpected]}")
        models[path.name] = model.eval()
    return models, memory


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, local_files_only=True
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def answers(task: Task, logits: torch.Tensor) -> list[dict[str, Any]]:
    """An answer for each row of a task's `logits` [N, C], in the words of its labels."""
    if task.problem_type == "regression":
        words: dict[str, Any] = {"label": "score", "labels": [], "probabilities": {}}
        return [{**words, "score": value} for value in logits[:, 0].tolist()]
    is_multi_label = task.problem_type == "multi_label_classification"
    shares = logits.sigmoid() if is_multi_label else logits.softmax(-1)
    rows = []
    for row in shares.tolist():
        probabilities = dict(zip(task.labels, row, strict=True))
        best = max(probabilities, key=probabilities.__getitem__)
        labels = [best]
        if is_multi_label:
            labels = [name for name, share in probabilities.items() if share >= task.threshold]
        words = {"label": ", ".join(labels) or "none", "labels": labels}
        rows.append({**words, "score": probabilities[best], "probabilities": probabilities})
    return rows


# ---------------------------------------------------------------------------------------------
# Rows


class Row(NamedTuple):
    """One or two texts, and the names of the tasks that answer them."""

    texts: tuple[str, ...]
    tasks: tuple[str, ...]


def read_rows(table: pd.DataFrame, default: str, tasks: Mapping[str, Task]) -> list[Row]:
    """The rows of a table with columns ``text`` and perhaps ``text_pair`` and ``task``.

    Args:
        table: a text is a string, or a list with the one or two texts of its row.
        default: the task of rows that name none.
        tasks: the tasks by name.

    Raises:
        MlflowException: INVALID_PARAMETER_VALUE (HTTP 400), naming the row and the remedy.
    """
    if "text" not in table and len(table):
        _refuse(f"there is no column text, but {', '.join(map(str, table))}; add it")
    rows = []
    for label, row in zip(table.index, table.to_dict("records"), strict=True):
        texts = _texts(label, row)
        name = row.get("task")
        names = _names(label, default if _is_missing(name) else name, len(texts), tasks)
        rows.append(Row(texts, names))
    return rows


def unfolded(table: pd.DataFrame, default: str, tasks: Mapping[str, Task]) -> pd.DataFrame:
    """A row for each text again, where MLflow made one row of ``{"text": ["a", "b"]}``.

    It does so with a dictionary of lists of strings. Two texts for a task of pairs are a pair.
    """
    if len(table) != 1 or "text" not in table or not isinstance(table["text"].iloc[0], list):
        return table
    row: dict[Any, Any] = table.to_dict("records")[0]
    name = default if _is_missing(row.get("task")) else row["task"]
    takes_pairs = any(task.text_count == 2 and name in (ALL, task.name) for task in tasks.values())
    lists = [column for column, value in row.items() if isinstance(value, list)]
    if lists == ["text"] and (len(row["text"]) < 2 or (len(row["text"]) == 2 and takes_pairs)):
        return table
    counts = {len(row[column]) for column in lists}
    if len(counts) > 1:
        _refuse(f"the lists in {', '.join(map(str, lists))} are not equally long; make them so")
    columns = {
        column: value if column in lists else [value] * max(counts) for column, value in row.items()
    }
    return pd.DataFrame(columns, dtype=object)


def _texts(label: Any, row: Mapping[Any, Any]) -> tuple[str, ...]:
    """The texts of the row with this label in the table's index."""
    text, pair = (_plain(row.get(name)) for name in ("text", "text_pair"))
    places = [("text", each) for each in (text if isinstance(text, list | tuple) else [text])]
    places += [] if _is_missing(pair) else [("text_pair", pair)]
    if not 1 <= len(places) <= 2:
        remedy = "give a string, or [text, text_pair]"
        _refuse(f"row {label}: holds {len(places)} texts; {remedy}")
    for place, value in places:
        if not isinstance(value, str):
            remedy = "give a string" + ", or [text, text_pair]" * (place == "text")
            _refuse(f"row {label}: {place} is {_kind(value)}, not a text; {remedy}")
    return tuple(value for _, value in places)


def _names(label: Any, name: Any, count: int, tasks: Mapping[str, Task]) -> tuple[str, ...]:
    """The tasks that a row with so many texts asks for."""
    if name == ALL:
        if names := tuple(task.name for task in tasks.values() if task.text_count == count):
            return names
        _refuse(
            f"row {label}: no task takes {('one text', 'pairs')[count - 1]}; see the model card"
        )
    _check_known(name, tasks)
    if tasks[name].text_count > count:
        _refuse(f"row {label}: task {name} takes pairs: every row needs text and text_pair")
    if tasks[name].text_count < count:
        _refuse(f"row {label}: task {name} takes one text: leave out text_pair")
    return (name,)


def _check_known(name: Any, tasks: Mapping[str, Task]) -> None:
    if name != ALL and (not isinstance(name, str) or name not in tasks):
        known = ", ".join(tasks)
        remedy = "pass params={'task': ...}, or a column task; '*' stands for all"
        _refuse(f"task {name!r} is not one of {known}; {remedy}")


def _is_missing(value: Any) -> bool:
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _kind(value: Any) -> str:
    if _is_missing(value):
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", dict: "an object"}
    kinds |= {list: "a list", tuple: "a list"}
    return kinds.get(type(value), type(value).__name__)


def _refuse(message: str) -> NoReturn:
    raise MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


# ---------------------------------------------------------------------------------------------
# The model


class MergedModel(PythonModel):
    """Answers texts for one task, for a task of each row's own, or for all tasks."""

    def load_context(self, context: PythonModelContext) -> None:
        self.tasks, self.memory = load_tasks(Path(context.artifacts["merged"]))
        self.lock = threading.Lock()  # a tokenizer serves one thread at a time
        self.groups: dict[tuple[str, int, int], list[Task]] = {}
        for task in self.tasks.values():  # tasks of a group read their texts alike
            key = (task.tokenizer_folder, task.max_length, task.text_count)
            self.groups.setdefault(key, []).append(task)

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: Mapping[str, Any] | None = None,
    ) -> pd.DataFrame:
        """An answer for each row, with the caller's index and in the caller's order.

        Columns: ``label``, ``labels`` (a list), ``score`` (the probability of the most probable
        label, or the value of a regression task) and ``probabilities`` by label. In multi-label
        classification ``labels`` are those at or above the task's threshold, and ``label`` is these
        joined by ", ", or "none". If rows name their tasks there is a column ``task`` too, and for
        "*" an answer for each row and task, with ``row``, the position of the row.

        Args:
            context: not used.
            model_input: columns ``text`` (a string, or the texts in a list) and, if need be,
                ``text_pair`` and ``task``.
            params: ``task``, for rows that name none; "*" stands for all tasks that take as many
                texts as the row has.
        """
        default = str((params or {}).get("task") or "")
        table = unfolded(model_input, default, self.tasks)
        rows = read_rows(table, default, self.tasks)
        by_row: list[dict[str, dict[str, Any]]] = [{} for _ in rows]
        for tasks in self.groups.values():
            for number, task, answer in self._answers(tasks, rows, table.index):
                by_row[number][task] = answer
        pairs = [(number, task) for number, row in enumerate(rows) for task in row.tasks]
        lines = [{"row": number, "task": task, **by_row[number][task]} for number, task in pairs]
        for_all = default == ALL or ("task" in table and bool((table["task"] == ALL).any()))
        named = for_all or "task" in table
        columns = ["row"] * for_all + ["task"] * named + list(COLUMNS)
        index = table.index.take(np.array([number for number, _ in pairs], dtype=int))
        return pd.DataFrame(lines, columns=columns, index=index)

    def _answers(
        self, tasks: Sequence[Task], rows: Sequence[Row], index: "pd.Index[Any]"
    ) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """The answers of tasks that read their texts alike: row, task and answer.

        Modules that the tasks share compute each batch once for all of them.
        """
        names = {task.name for task in tasks}
        numbers = [number for number, row in enumerate(rows) if names.intersection(row.tasks)]
        if not numbers:
            return
        with self.lock:
            tokens: Mapping[str, list[list[int]]] = tasks[0].tokenizer(
                *map(list, zip(*(rows[number].texts for number in numbers), strict=True)),
                truncation="longest_first",
                max_length=tasks[0].max_length,
            )
        lengths = [len(each) for each in tokens["input_ids"]]
        if 0 in lengths:
            _refuse(f"row {index[numbers[lengths.index(0)]]}: text is empty; give one with words")
        for batch in _batches(lengths):
            inputs = _padded(tokens, batch, tasks[0].tokenizer)
            self.memory.forget()
            for task in tasks:
                places = [
                    n for n, place in enumerate(batch) if task.name in rows[numbers[place]].tasks
                ]
                if places:
                    with torch.inference_mode():
                        logits = task.model(**inputs).logits[places].float()  # [B, C]
                    for place, answer in zip(places, answers(task, logits), strict=True):
                        yield numbers[batch[place]], task.name, answer


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Batches of positions by falling length, of at most `TOKENS` tokens or one text."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    start = 0
    while start < len(order):
        stop = start + max(1, TOKENS // lengths[order[start]])
        yield order[start:stop]
        start = stop


def _padded(
    tokens: Mapping[str, list[list[int]]], batch: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """The inputs of a batch [B, T], padded on the right, as in evaluation."""
    pad = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    return {
        name: pad_sequence(
            [torch.tensor(values[place]) for place in batch],
            batch_first=True,
            padding_value=pad.get(name, 0),
        )
        for name, values in tokens.items()
    }


mlflow.models.set_model(MergedModel())
