"""The model that MLflow serves: one encoder, and each task's own parts. It does not import fmn.

MLflow runs a copy of this file ("models from code"). The artifact ``merged`` is a folder::

    encoder/         config, weights, tokenizer or image processor
    tasks/TASK/      task.json (the definition of the task), config.json, small files of its kind
                     such as 1_Pooling/config.json, and, unless the task shares all weights,
                     head.safetensors (its head, and tensors that replace parts of the encoder)
    processors.json  by task, the folder of its tokenizer or image processor: encoder, or tasks/TASK
"""

import base64
import copy
import io
import json
import os
import re
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import mlflow
import numpy as np
import pandas as pd
import torch
import transformers
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import scoring_server
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

ALL = "*"  # in place of a task's name: every task that accepts the row
TOKENS = 2048  # most tokens in a batch, with padding
IMAGES = 16  # most images in a batch
PIXELS = 89_478_485  # most pixels of an image, Pillow's own limit
SERVER = "__pyfunc_model_path__"  # environment variable that only MLflow's scoring server sets
TIMEOUT = "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"
BATCH = "mlflow models predict -m models:/NAME/VERSION --env-manager local -i FILE -t json"
PATIENCE = 2  # seconds before the run time of a request is estimated
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
DEEP_MODES = ("I", "F")  # Pillow's modes of 32 bits a channel
AUTO_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
    "sentence-similarity": "AutoModel",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
}
GENERATORS = ("text-generation", "text2text-generation")
_OF_CLASSES = ("label", "labels", "score", "probabilities")
COLUMNS = {
    "text-classification": _OF_CLASSES,
    "token-classification": ("labels", "spans"),
    "image-classification": _OF_CLASSES,
    "sentence-similarity": ("score", "embedding"),
    **dict.fromkeys(GENERATORS, ("text",)),
}
"""The columns of answers, by kind of task."""
FORMS = {
    "text": "one text",
    "pair": "pairs",
    "words": "a text, or its words in the column words",
    "image": "an image in the column image",
}
"""The forms of a row's content, as messages describe them."""


# ---------------------------------------------------------------------------------------------
# Tasks


class Memory:
    """The outputs of shared modules for the current batch, for each thread.

    Models of several tasks share modules. Each shared module computes once for a batch, and the
    other models reuse its output.
    """

    def __init__(self) -> None:
        self.local = threading.local()

    def forget(self) -> None:
        """Forget all outputs, at the start of a batch."""
        self.local.outputs = {}

    def pause(self) -> None:
        """Store no outputs until the next batch: generation calls a module many times."""
        self.local.outputs = None

    def share(self, module: torch.nn.Module) -> None:
        """Replace a module's `forward`: called again with equal inputs, it returns its output.

        The inputs differ between tasks if a layer below the module is a task's own.
        """
        forward = module.forward

        def remembered(*args: Any, **kwargs: Any) -> Any:
            outputs = getattr(self.local, "outputs", None)
            if outputs is None:
                return forward(*args, **kwargs)
            values = (*args, *kwargs.values())
            inputs = [value for value in values if isinstance(value, torch.Tensor)]
            before, output = outputs.get(module, (None, None))
            if before is None or not _are_equal(before, inputs):
                output = forward(*args, **kwargs)
                outputs[module] = inputs, output
            return output

        module.forward = remembered


def _are_equal(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    pairs = zip(left, right, strict=False)
    return len(left) == len(right) and all(a is b or torch.equal(a, b) for a, b in pairs)


def shared_modules(
    module: torch.nn.Module, own: Collection[str], path: str = ""
) -> Iterator[torch.nn.Module]:
    """The largest modules in `module` that have no parameter named in `own`.

    Args:
        module: an encoder, or a part of it.
        own: names of parameters of the encoder.
        path: the module's path in the encoder.
    """
    is_list = isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict)  # is not called
    if not is_list and all(name not in own for name, _ in module.named_parameters(path)):
        yield module
        return
    for name, child in module.named_children():
        yield from shared_modules(child, own, f"{path}.{name}".lstrip("."))


class Task(NamedTuple):
    """A task: its model, which shares modules with other tasks' models, and how it reads inputs.

    Attributes:
        name, kind: the task's name, and the kind of task by the Hub's name.
        model, processor: the model, and its tokenizer or image processor.
        processor_folder: identifies the processor.
        forms: the forms of rows that it accepts, from `FORMS`.
        max_length: most tokens of an input.
        prompt: a text that is put before every text.
        problem_type: as in the model's configuration.
        threshold: probability from which on a label of several is predicted.
        labels: the names of the outputs.
        chat: whether a text is a user's message, or a list of messages as JSON, of which the
            tokenizer's chat template makes the prompt.
    """

    name: str
    kind: str
    model: Any
    processor: Any
    processor_folder: str
    forms: tuple[str, ...]
    max_length: int
    prompt: str
    problem_type: str
    threshold: float
    labels: list[str]
    chat: bool = False


def load_tasks(folder: Path) -> tuple[dict[str, Task], Memory]:
    """Load the tasks by name, and the memory of the modules that they share."""
    processors: dict[str, str] = json.loads((folder / "processors.json").read_text())
    paths = sorted((folder / "tasks").iterdir())
    definitions = {path.name: json.loads((path / "task.json").read_text()) for path in paths}
    kinds = {name: definition["task"] for name, definition in definitions.items()}
    loaded: dict[str, Any] = {}
    for name, kind in kinds.items():
        if (place := processors[name]) not in loaded:
            loaded[place] = _load_processor(folder / place, kind)
    models, memory = load_models(folder, kinds)
    tasks = {}
    for name, model in models.items():
        config, definition, kind = model.config, definitions[name], kinds[name]
        processor = loaded[processors[name]]
        if kind != "image-classification" and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = processor.pad_token_id  # tells where each text of a batch ends
        labels = [config.id2label[output] for output in range(config.num_labels)]
        longest, prompt = definition["max_length"], ""
        if kind == "sentence-similarity":
            limit, prompt = _text_settings(folder / "tasks" / name, processor, config)
            longest = min(longest, limit)
        problem = "regression" if len(labels) == 1 else "single_label_classification"
        tasks[name] = Task(
            name=name,
            kind=kind,
            model=model,
            processor=processor,
            processor_folder=processors[name],
            forms=_forms(definition),
            max_length=longest,
            prompt=prompt,
            problem_type=definition["problem_type"] or config.problem_type or problem,
            threshold=definition["threshold"],
            labels=labels,
            chat=definition.get("chat", False),
        )
    return tasks, memory


def _forms(definition: Mapping[str, Any]) -> tuple[str, ...]:
    """The forms of rows that a task accepts, from `FORMS`."""
    kind = definition["task"]
    if kind == "text-classification":
        return ("pair",) if definition["columns"]["text_pair"] else ("text",)
    others = {
        "token-classification": ("words", "text"),
        "image-classification": ("image",),
        "sentence-similarity": ("text", "pair"),
    }
    return others.get(kind, ("text",))


class Embedder(torch.nn.Module):
    """An encoder whose output `logits` has the embeddings of SentenceTransformer, [B, D]."""

    def __init__(self, encoder: PreTrainedModel, folder: Path) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        pooling = _content_of(folder / "1_Pooling" / "config.json")
        flags = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value]
        modes = pooling.get("pooling_mode") or [
            flag.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
            for flag in flags
        ]
        self.modes = [modes] if isinstance(modes, str) else modes or ["mean"]
        paths = [each["path"] for each in _content_of(folder / "modules.json", [])]
        self.normalises = any(path.endswith("_Normalize") for path in paths)
        self.dense = torch.nn.Sequential(
            *(_dense(folder / path) for path in paths if path.endswith("_Dense"))
        )

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **others: torch.Tensor
    ) -> Any:
        # The arguments have the order of classifiers, so that `Memory` recognises equal inputs.
        states = self.encoder(input_ids, attention_mask=attention_mask, **others).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)  # [B, T, 1]
        embedding = torch.cat([_pooled(states, mask, mode) for mode in self.modes], -1)
        embedding = self.dense(embedding)
        if self.normalises:
            embedding = torch.nn.functional.normalize(embedding, dim=-1)
        return SimpleNamespace(logits=embedding)


def _dense(folder: Path) -> torch.nn.Module:
    """A dense layer of Sentence Transformers: a linear map and its activation."""
    settings, tensors = _content_of(folder / "config.json"), load_file(folder / "model.safetensors")
    weight, bias = tensors["linear.weight"].float(), tensors.get("linear.bias")
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    activation = settings.get("activation_function", "Tanh").rpartition(".")[2]
    return torch.nn.Sequential(linear, getattr(torch.nn, activation)())


def _pooled(states: torch.Tensor, mask: torch.Tensor, mode: str) -> torch.Tensor:
    """Pool the tokens' states [B, T, D] to embeddings [B, D], as Sentence Transformers does."""
    if mode == "cls":
        return states[:, 0]
    if mode == "max":
        return states.masked_fill(mask == 0, float("-inf")).amax(1)
    if mode == "lasttoken":
        return states[torch.arange(len(states)), mask[..., 0].sum(1).long() - 1]
    if mode == "weightedmean":
        mask = mask * torch.arange(1, mask.shape[1] + 1)[:, None]
    power = {"mean": 1.0, "weightedmean": 1.0}.get(mode, 0.5)  # mean_sqrt_len
    return (states * mask).sum(1) / mask.sum(1) ** power


def _content_of(file: Path, default: Any = {}) -> Any:  # noqa: B006 - it is not changed
    return json.loads(file.read_text()) if file.is_file() else default


def _text_settings(folder: Path, tokenizer: Any, config: Any) -> tuple[int, str]:
    """The maximum number of tokens of an embedding model, and the prompt before every text."""
    settings = _content_of(folder / "config_sentence_transformers.json")
    prompt = (settings.get("prompts") or {}).get(settings.get("default_prompt_name") or "", "")
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or -1]
    longest = _content_of(folder / "sentence_bert_config.json").get("max_seq_length")
    return int(longest or min(limit for limit in limits if limit > 0)), prompt


def load_models(folder: Path, kinds: Mapping[str, str]) -> tuple[dict[str, Any], Memory]:
    """Load the tasks' models; their encoders share everything except a task's own parts.

    Models with the same class of encoder share its modules. Models with different classes (one T5
    generates, another classifies) share only its weights.
    """
    files = {name: folder / "tasks" / name / "head.safetensors" for name in kinds}
    own = {name: load_file(file) if file.is_file() else {} for name, file in files.items()}
    own_names = {name for tensors in own.values() for name in tensors}
    described = {name: _describe(folder / "tasks" / name, kind) for name, kind in kinds.items()}
    prefixes = {_prefix(model) for model in described.values()}
    weights: dict[str, torch.Tensor] = {}
    for file in (folder / "encoder").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            prefix = next((each for each in prefixes if each and name.startswith(each)), "")
            # Experts are evaluated in float32, whatever dtype their files have.
            weights[name.removeprefix(prefix)] = tensor.float()
    encoders: dict[type, tuple[PreTrainedModel, dict[int, Any]]] = {}
    models, memory = {}, Memory()
    # Models with a pooler come first; taggers have none.
    for name in sorted(kinds, key=lambda name: -len(described[name].base_model.state_dict())):
        model, path = described[name], folder / "tasks" / name
        kind = type(model.base_model)
        if kind not in encoders:
            encoder = _load_encoder(
                path, kinds[name], weights, _needs_pooler(described, kinds, kind)
            )
            encoders[kind] = encoder, _share(encoder, own_names, memory)
        encoder, in_common = encoders[kind]
        part = copy.deepcopy(encoder, dict(in_common))
        prefix = _prefix(model)
        if prefix:
            setattr(model, model.base_model_prefix, part)
        model = model if prefix else part
        _load_own(model, prefix, encoder, own[name], weights, path)
        embeds = kinds[name] == "sentence-similarity"
        if (path / "generation_config.json").is_file() and kinds[name] in GENERATORS:
            model.generation_config = GenerationConfig.from_pretrained(path)
        models[name] = (Embedder(model, path) if embeds else model).eval()
    return {name: models[name] for name in kinds}, memory


def _prefix(model: PreTrainedModel) -> str:
    """The prefix of the encoder's tensors in a model; "" if the model is only an encoder."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _describe(path: Path, kind: str, device: str = "meta") -> PreTrainedModel:
    """The model of a folder's configuration, without memory for its weights.

    Models that generate do get memory, for the buffers above their encoder.
    """
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    with torch.device("cpu" if kind in GENERATORS else device):
        auto = getattr(transformers, AUTO_CLASSES[kind])
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    return model


def _needs_pooler(
    described: Mapping[str, PreTrainedModel], kinds: Mapping[str, str], encoder: type
) -> bool:
    """Whether a task with this class of encoder uses its pooler; embedding models do not."""
    return any(
        isinstance(model.base_model, encoder) and getattr(model.base_model, "pooler", None)
        for name, model in described.items()
        if kinds[name] != "sentence-similarity"
    )


def _load_encoder(
    path: Path, kind: str, weights: Mapping[str, torch.Tensor], needs_pooler: bool
) -> PreTrainedModel:
    """The encoder of a task's model with these weights, which are not copied."""
    model = _describe(path, kind, "cpu")
    encoder: PreTrainedModel = model.base_model
    if not needs_pooler and "pooler.dense.weight" not in weights and hasattr(encoder, "pooler"):
        encoder.pooler = None
    missing = {*encoder.load_state_dict(weights, strict=False, assign=True).missing_keys}
    # It removes tied weights from `missing`.
    encoder.tie_weights(missing_keys=missing, recompute_mapping=False)
    if missing:
        raise ValueError(f"{path.parents[1] / 'encoder'}: has no {sorted(missing)}")
    encoder.requires_grad_(False)
    return encoder


def _share(encoder: PreTrainedModel, own: Collection[str], memory: Memory) -> dict[int, Any]:
    """The modules and parameters by id that all copies of the encoder share."""
    in_common: dict[int, Any] = {}
    for module in shared_modules(encoder, own):
        in_common[id(module)] = module
        if any(True for _ in module.parameters()):
            memory.share(module)
    shared = (tensor for name, tensor in encoder.named_parameters() if name not in own)
    return in_common | {id(tensor): tensor for tensor in shared}


def _load_own(
    model: PreTrainedModel,
    prefix: str,
    encoder: PreTrainedModel,
    own: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    path: Path,
) -> None:
    """Load a model's tensors above its encoder, and those that replace parts of the encoder."""
    in_encoder = encoder.state_dict().keys()
    above = {name for name in model.state_dict() if not name.startswith(prefix)} if prefix else {}
    tensors = {name: weights[name] for name in weights.keys() & above}
    tensors |= {prefix + n if n in in_encoder else n: tensor.float() for n, tensor in own.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    lost = {name for name in missing if not name.startswith(prefix)} if prefix else set()
    model.tie_weights(missing_keys=lost, recompute_mapping=False)  # removes tied weights from it
    if lost or unexpected:
        raise ValueError(f"{path}: head and configuration differ: {[*lost, *unexpected]}")


def _load_processor(folder: Path, kind: str) -> Any:
    """The tokenizer or image processor in a folder."""
    if kind == "image-classification":
        return transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


# ---------------------------------------------------------------------------------------------
# Answers


def answers(task: Task, logits: torch.Tensor) -> list[dict[str, Any]]:
    """Turn a task's logits [N, C] into an answer for each row, with the names of the labels."""
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


def tag_answer(task: Task, words: "Words", shares: torch.Tensor, places: Sequence[int]) -> Any:
    """Label each word of a text, and join the labels to spans.

    Args:
        task: the task.
        words: the words.
        shares: the probabilities of each token's labels, [T, C].
        places: the first token of each word; -1 for a word without tokens or beyond the limit.
    """
    best = shares.max(-1)
    labels = [None if place < 0 else task.labels[int(best.indices[place])] for place in places]
    scores = [0.0 if place < 0 else float(best.values[place]) for place in places]
    spans = []
    for group in _groups(labels, "O" in task.labels):
        start, end = words.spots[group[0]][0], words.spots[group[-1]][1]
        entity = _split(labels[group[0]])[1]
        score = sum(scores[word] for word in group) / len(group)
        text = words.text[start:end]
        spans.append({"entity": entity, "text": text, "start": start, "end": end, "score": score})
    return {"labels": labels, "spans": spans}


def _groups(labels: Sequence[str | None], has_outside: bool) -> list[list[int]]:
    """The words of each span, as seqeval and CoNLL's own script count them.

    Labels follow BIO or a similar scheme, or are plain names. Consecutive words with the same plain
    label are one span; in tasks without the label O (parts of speech) each word is a span.
    """
    groups: list[list[int]] = []
    before, before_entity = "O", ""
    for word, label in enumerate(labels):
        mark, entity = _split(label)
        if mark != "O":
            is_new = mark in {*"BSU"} or before in {*"OESLU"} or entity != before_entity
            if is_new or not (mark or has_outside):
                groups.append([])
            groups[-1].append(word)
        before, before_entity = mark, entity
    return groups


def _split(label: str | None) -> tuple[str, str]:
    """Split a label into its mark, such as "B", "O" or "", and its entity."""
    if label in (None, "O"):
        return "O", ""
    mark, dash, entity = label.partition("-")
    return (mark, entity) if dash and mark in {*"BIESLU"} else ("", label)


# ---------------------------------------------------------------------------------------------
# Rows


class Words(NamedTuple):
    """A text, and the start and end of each of its words."""

    text: str
    spots: Sequence[tuple[int, int]]

    @property
    def words(self) -> list[str]:
        """The words."""
        return [self.text[start:end] for start, end in self.spots]


class Row(NamedTuple):
    """A row's form, its content (texts, words, or an image), and the tasks that answer it."""

    form: str
    content: tuple[Any, ...]
    tasks: tuple[str, ...]


def read_rows(table: pd.DataFrame, default: str, tasks: Mapping[str, Task]) -> list[Row]:
    """Read the rows of a table with the columns that `MergedModel.predict` describes.

    Args:
        table: the column text has strings, or lists of the one or two texts of a row.
        default: the task of rows without a task.
        tasks: the tasks by name.

    Raises:
        MlflowException: INVALID_PARAMETER_VALUE (HTTP 400), naming the row and the remedy.
    """
    forms = {form for task in tasks.values() for form in task.forms}
    takes = [
        *["text"] * bool(forms & {"text", "pair"}),
        *(name for name in ("words", "image") if name in forms),
    ]
    if len(table) and not {*takes} & {*table}:
        wanted = " or ".join(takes)
        _refuse(f"there is no column {wanted}, but {', '.join(map(str, table))}; add it")
    rows = []
    for label, row in zip(table.index, table.to_dict("records"), strict=True):
        form, content = _content(label, row, takes)
        name = row.get("task")
        names = _names(label, default if _is_missing(name) else name, form, tasks)
        rows.append(Row(form, content, names))
    return rows


def unfolded(table: pd.DataFrame, default: str, tasks: Mapping[str, Task]) -> pd.DataFrame:
    """Divide the single row that MLflow makes of ``{"text": ["a", "b"]}`` into a row for each text.

    Two texts for a task of pairs stay one row, and so does a list of words.
    """
    if len(table) != 1:
        return table
    row: dict[Any, Any] = table.to_dict("records")[0]
    lists = [name for name, value in row.items() if name != "words" and isinstance(value, list)]
    words = row.get("words")
    if isinstance(words, list) and any(isinstance(each, list) for each in words):
        lists.append("words")
    if not {"text", "words", "image"} & {*lists}:
        return table
    name = default if _is_missing(row.get("task")) else row["task"]
    takes_pairs = any("pair" in task.forms and name in (ALL, task.name) for task in tasks.values())
    if lists == ["text"] and (len(row["text"]) < 2 or (len(row["text"]) == 2 and takes_pairs)):
        return table
    counts = {len(row[column]) for column in lists}
    if len(counts) > 1:
        _refuse(f"the lists in {', '.join(map(str, lists))} are not equally long; make them so")
    columns = {
        column: value if column in lists else [value] * max(counts) for column, value in row.items()
    }
    return pd.DataFrame(columns, dtype=object)


def _content(
    label: Any, row: Mapping[Any, Any], takes: Sequence[str]
) -> tuple[str, tuple[Any, ...]]:
    """The form and content of the row with this label in the table's index."""
    columns = [name for name in takes if not _is_missing(row.get(name))] or takes[:1]
    if len(columns) > 1:
        _refuse(f"row {label}: holds {' and '.join(columns)}; give one of them")
    value = _plain(row.get(columns[0]))
    if columns == ["image"]:
        return "image", (_image(label, value),)
    if columns == ["words"]:
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            _refuse(f"row {label}: words is no list of words; give one, or the column text")
        ends = np.cumsum([len(word) + 1 for word in value], dtype=int) - 1
        spots = [(int(end) - len(word), int(end)) for word, end in zip(value, ends, strict=True)]
        return "words", (Words(" ".join(value), spots),)
    texts = _texts(label, row)
    return ("text", "pair")[len(texts) - 1], texts


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


def _image(label: Any, value: Any) -> Any:
    """Decode the image in a row: the bytes of its file, as base64 text or in a data: URL.

    Paths and addresses are never read, as callers must not see the server's files.
    """
    from PIL import Image, ImageOps

    place = f"row {label}: image"
    if isinstance(value, str):
        head, _, data = value.partition(",") if value.startswith("data:") else ("", "", value)
        try:
            value = base64.b64decode("".join(data.split()), validate=True)
        except ValueError:
            value = None
        if value is None or (head and not head.endswith(";base64")):
            problem = "is neither base64 text nor a data: URL in base64"
            _refuse(f"{place} {problem}; paths and addresses are not read, give the file's content")
    if not isinstance(value, bytes):
        _refuse(f"{place} is {_kind(value)}; give the file's content as base64 text")
    try:
        image = Image.open(io.BytesIO(value), formats=FORMATS)
        if image.width * image.height > PIXELS:
            size = f"{image.width} x {image.height}"
            _refuse(f"{place} has {size} pixels, more than {PIXELS}; give a smaller one")
        if image.mode in DEEP_MODES:
            _refuse(f"{place} has the mode {image.mode}; give one of 8 or 16 bits a channel")
        if image.mode.startswith("I;16"):
            upright = np.asarray(ImageOps.exif_transpose(image))
            return Image.fromarray((upright >> 8).astype(np.uint8)).convert("RGB")
        return ImageOps.exif_transpose(image).convert("RGB")
    except MlflowException:
        raise
    except Exception as error:  # Pillow raises any exception on a broken file
        _refuse(f"{place} is no {', '.join(FORMATS)} that can be read ({type(error).__name__})")


def _chat_prompt(tokenizer: Any, text: str, place: str) -> str:
    """The text that a chat template makes of a user's message, or of messages in JSON."""
    messages = [{"role": "user", "content": text}]
    try:
        read = json.loads(text)
        if isinstance(read, list) and read and all({"role", "content"} <= {*each} for each in read):
            messages = read
    except (TypeError, ValueError):
        pass
    try:
        prompt: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template raises any exception
        _refuse(f"{place}: the chat template does not take this ({error!s:.100}); change it")
    return prompt


def _words_of(text: str) -> Words:
    """Divide a text into words: runs of letters and digits, and every other sign by itself."""
    return Words(text, [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)])


def _names(label: Any, name: Any, form: str, tasks: Mapping[str, Task]) -> tuple[str, ...]:
    """The tasks that a row of this form is for."""
    if name == ALL:
        if names := tuple(task.name for task in tasks.values() if form in task.forms):
            return names
        _refuse(f"row {label}: no task takes {FORMS[form]}; see the model card")
    if not isinstance(name, str) or name not in tasks:
        known = ", ".join(tasks)
        remedy = "pass params={'task': ...}, or a column task; '*' stands for all"
        _refuse(f"task {name!r} is not one of {known}; {remedy}")
    forms = tasks[name].forms
    if form not in forms:
        remedy = f"{FORMS[forms[0]]}; give that"
        if form == "text" and forms == ("pair",):
            remedy = "pairs: every row needs text and text_pair"
        elif form == "pair" and "text" in forms:
            remedy = "one text: leave out text_pair"
        _refuse(f"row {label}: task {name} takes {remedy}")
    return (name,)


def _is_missing(value: Any) -> bool:
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def _plain(value: Any) -> Any:
    """A NumPy array as a list; any other value as it is."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def _kind(value: Any) -> str:
    """The kind of a value, for a message."""
    if _is_missing(value):
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", dict: "an object"}
    kinds |= {list: "a list", tuple: "a list"}
    return kinds.get(type(value), type(value).__name__)


class Pace:
    """Estimates the run time of a request from the pace of its answers.

    Args:
        rows: the number of rows.
        wanted: the number of answers.
    """

    def __init__(self, rows: int, wanted: int) -> None:
        self.rows, self.wanted, self.started = rows, wanted, time.monotonic()
        self.first = self.started, 0  # time of the first answers, and their number

    def check(self, answers: int) -> None:
        """Refuse a request that MLflow's scoring server would end before all answers are ready."""
        if SERVER not in os.environ:
            return
        now, limit = time.monotonic(), float(os.environ.get(TIMEOUT) or 60)
        before, done = self.first
        if not done:
            self.first = now, answers
        elif now - before > min(PATIENCE, limit / 10) and answers > done:
            each = (now - before) / (answers - done)
            whole = before - self.started + each * self.wanted
            if whole > limit:
                most = max(1, int(0.8 * self.rows * limit / whole))
                _refuse(
                    f"{self.rows} rows would take about {whole:.0f} s, and the server ends a"
                    f" request after {limit:g} s; send at most {most} rows at once, set {TIMEOUT},"
                    f" or answer them in a batch, without a server: `{BATCH}`, or in Python"
                    " mlflow.pyfunc.load_model(URI).predict(table, params=...)"
                )


def read_csv(csv_input: Any, schema: Any = None) -> pd.DataFrame:
    """The rows of a request of CSV: texts, and null where a field is empty.

    In place of MLflow's own function, which knows no columns of any type.
    """
    try:
        return pd.read_csv(csv_input, dtype=str, keep_default_na=False, na_values=[""])
    except ValueError as error:  # of pandas' parsers too
        _refuse(f"no CSV with a line of column names ({error}); write text, text_pair and task")


def _refuse(message: str) -> NoReturn:
    raise MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


# ---------------------------------------------------------------------------------------------
# The model


class Example(NamedTuple):
    """One input of a model: the number of its row, its part of the row, and the content."""

    row: int
    part: int
    content: tuple[Any, ...]


def _with_none(answers: pd.DataFrame) -> pd.DataFrame:
    """Replace missing values of a table by None, which is null in JSON."""
    for column in answers.columns[answers.isna().any()]:
        filled = answers[column].astype(object)
        answers[column] = filled.where(filled.notna(), None)
    return answers


class MergedModel(PythonModel):
    """Answers rows for one task, for the task that each row names, or for all tasks that fit."""

    def load_context(self, context: PythonModelContext) -> None:
        if SERVER in os.environ:
            scoring_server.parse_csv_input = read_csv
        self.tasks, self.memory = load_tasks(Path(context.artifacts["merged"]))
        self.lock = threading.Lock()  # tokenizers are not thread-safe

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: Mapping[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Answer each row; answers have the caller's index and order.

        Columns, by kind of task:

        - text and image classification: ``label``, ``labels`` (a list), ``score`` (the probability
          of the most probable label, or the value of a regression task) and ``probabilities`` by
          label. In multi-label classification ``labels`` are those at or above the task's
          threshold, and ``label`` is these joined by ", ", or "none".
        - token classification: ``labels``, one for each word (null for a word beyond the task's
          `max_length`), and ``spans``, a list of objects: ``entity``, ``text``, ``start`` and
          ``end`` in the text, ``score`` (the mean probability of its words' labels).
        - sentence similarity: ``embedding``, a list of numbers as SentenceTransformer gives; for
          two texts ``score``, their cosine, instead.
        - text generation: ``text``, the completion, which takes the most probable token each time.

        If rows name their tasks, there is a column ``task`` too. For "*" there is an answer for
        each row and task, with ``row``, the position of the row. Other columns are null.

        Args:
            context: not used.
            model_input: columns ``text`` (a string, or the texts in a list; for generation, the
                prompt) and, if needed, ``text_pair`` and ``task``. For token classification, the
                words of a text may be in ``words`` (a list) instead; positions then refer to the
                words joined by blanks. A text is divided into runs of letters and digits, and
                other signs. For images, ``image``: the file's content as base64 text, a data: URL,
                or bytes.
            params: ``task``, for rows without one; "*" stands for all tasks that accept the row.
                ``max_new_tokens``: most tokens to generate; the task's `max_length` (for a causal
                model, prompt included) is the limit.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE (HTTP 400), naming the row and the remedy.
        """
        settings = params or {}
        default = str(settings.get("task") or "")
        limit = int(settings.get("max_new_tokens") or 0)
        if limit < 0:
            _refuse(f"max_new_tokens is {limit}; give a number of tokens")
        table = unfolded(model_input, default, self.tasks)
        rows = read_rows(table, default, self.tasks)
        parts: dict[tuple[int, str], list[dict[str, Any]]] = {}
        pace = Pace(len(rows), sum(len(row.tasks) for row in rows))
        for tasks, examples in self._grouped(rows):
            for number, task, answer in self._answers(tasks, rows, examples, table.index, limit):
                parts.setdefault((number, task), []).append(answer)
                pace.check(len(parts))
        pairs = [(number, task) for number, row in enumerate(rows) for task in row.tasks]
        lines = [{"row": n, "task": task, **_together(parts[n, task])} for n, task in pairs]
        for_all = default == ALL or ("task" in table and bool((table["task"] == ALL).any()))
        named = for_all or "task" in table
        columns = ["row"] * for_all + ["task"] * named + self._columns(default, pairs)
        index = table.index.take(np.array([number for number, _ in pairs], dtype=int))
        return _with_none(pd.DataFrame(lines, columns=columns, index=index))

    def _columns(self, default: str, pairs: Sequence[tuple[int, str]]) -> list[str]:
        """The columns of the answers, by the kinds of the tasks that answer."""
        names = {task for _, task in pairs} or {default} & {*self.tasks}
        kinds = {self.tasks[name].kind for name in names} or {"text-classification"}
        return list(dict.fromkeys(c for kind in COLUMNS if kind in kinds for c in COLUMNS[kind]))

    def _grouped(self, rows: Sequence[Row]) -> Iterator[tuple[list[Task], list[Example]]]:
        """Group tasks that read their rows in the same way; yields each group and its inputs."""
        groups: dict[Any, tuple[list[Task], dict[tuple[int, int], Example]]] = {}
        for number, row in enumerate(rows):
            for task in (self.tasks[name] for name in row.tasks):
                reading, parts = _reading(task, row)
                key = (reading, task.processor_folder, task.max_length, task.prompt)
                tasks, examples = groups.setdefault(key, ([], {}))
                if task not in tasks:
                    tasks.append(task)
                for part, content in enumerate(parts):
                    examples[number, part] = Example(number, part, content)
        for tasks, examples in groups.values():
            yield tasks, list(examples.values())

    def _answers(
        self,
        tasks: Sequence[Task],
        rows: Sequence[Row],
        examples: Sequence[Example],
        index: "pd.Index[Any]",
        limit: int,
    ) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """The answers of a group of `_grouped`: row, task and answer.

        Modules that the tasks share compute each batch once.
        """
        if tasks[0].kind in GENERATORS:
            self.memory.pause()
            for example in examples:
                for task in (task for task in tasks if task.name in rows[example.row].tasks):
                    place = f"row {index[example.row]}"
                    text = self._complete(task, example.content[0], limit, place)
                    yield example.row, task.name, {"text": text}
            return
        for batch, inputs, places in self._batches(tasks[0], examples, index):
            self.memory.forget()
            for task in tasks:
                chosen = [n for n, each in enumerate(batch) if task.name in rows[each.row].tasks]
                if not chosen:
                    continue
                with torch.inference_mode():
                    logits = task.model(**inputs).logits[chosen].float()  # [B, ...]
                for n, answer in zip(
                    chosen, _in_words(task, logits, batch, chosen, places), strict=True
                ):
                    yield batch[n].row, task.name, answer

    def _batches(
        self, task: Task, examples: Sequence[Example], index: "pd.Index[Any]"
    ) -> Iterator[tuple[list[Example], dict[str, torch.Tensor], list[list[int]]]]:
        """Batches: examples, a model's inputs, and the first token of each word, if there are."""
        if task.kind == "image-classification":
            for start in range(0, len(examples), IMAGES):
                batch = list(examples[start : start + IMAGES])
                images = [example.content[0] for example in batch]
                with self.lock:
                    yield batch, dict(task.processor(images=images, return_tensors="pt")), []
            return
        with self.lock:
            if task.kind == "token-classification":
                tokens, firsts = _of_words(task, [example.content[0].words for example in examples])
            else:
                columns = zip(*(example.content for example in examples), strict=True)
                tokens, firsts = (
                    task.processor(
                        *map(list, columns), truncation="longest_first", max_length=task.max_length
                    ),
                    [],
                )
        lengths = [len(each) for each in tokens["input_ids"]]
        for place, example in enumerate(examples):
            if not lengths[place] or (firsts and not firsts[place]):
                _refuse(f"row {index[example.row]}: text is empty; give one with words")
        for places in _batches(lengths):
            batch = [examples[place] for place in places]
            own = [firsts[place] for place in places if firsts]
            yield batch, _padded(tokens, places, task.processor), own

    def _complete(self, task: Task, prompt: str, limit: int, place: str) -> str:
        """Generate the text after a prompt, always with the most probable token."""
        tokenizer, is_causal = task.processor, task.kind == "text-generation"
        with self.lock:
            cut = {} if is_causal else {"truncation": True, "max_length": task.max_length}
            if task.chat:
                prompt, cut = _chat_prompt(tokenizer, prompt, place), {"add_special_tokens": False}
            ids = tokenizer(prompt, **cut)["input_ids"]
        if is_causal and ids[-1:] == [tokenizer.eos_token_id]:
            ids = ids[:-1]  # some tokenizers add it
        if not ids:
            _refuse(f"{place}: text is empty; give one with words")
        room = task.max_length - (len(ids) if is_causal else 0)
        if room < 1:
            problem = f"the prompt has {len(ids)} tokens, task {task.name} takes {task.max_length}"
            _refuse(f"{place}: {problem} with the completion; shorten it")
        tokens = torch.tensor([ids])  # [1, T]
        own = task.model.generation_config
        config = GenerationConfig(
            max_new_tokens=min(limit or room, room),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=own.eos_token_id or tokenizer.eos_token_id,
            bos_token_id=own.bos_token_id,
            decoder_start_token_id=own.decoder_start_token_id,
        )
        with torch.inference_mode():
            output = task.model.generate(
                tokens, attention_mask=torch.ones_like(tokens), generation_config=config
            )[0]
        text: str = tokenizer.decode(output[len(ids) * is_causal :], skip_special_tokens=True)
        return text


def _reading(task: Task, row: Row) -> tuple[str, list[tuple[Any, ...]]]:
    """The form in which a task reads a row, and the inputs that the row is divided into."""
    if task.kind == "token-classification":
        content = row.content[0]
        return "words", [(_words_of(content) if row.form == "text" else content,)]
    if task.kind in GENERATORS:
        return task.kind, [row.content]
    if task.kind == "sentence-similarity":
        return "text", [(task.prompt + text,) for text in row.content]
    return row.form, [row.content]


def _in_words(
    task: Task,
    logits: torch.Tensor,
    batch: Sequence[Example],
    chosen: Sequence[int],
    firsts: Sequence[Sequence[int]],
) -> list[dict[str, Any]]:
    """Turn logits into answers to the chosen examples of a batch."""
    if task.kind == "sentence-similarity":
        return [{"embedding": embedding} for embedding in logits.tolist()]
    if task.kind == "token-classification":
        return [
            tag_answer(task, batch[n].content[0], shares, firsts[n])
            for n, shares in zip(chosen, logits.softmax(-1), strict=True)
        ]
    return answers(task, logits)


def _together(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answer to a row: the answer to its only part, or the cosine of two embeddings."""
    if len(parts) == 1:
        return parts[0]
    left, right = (np.array(part["embedding"]) for part in parts)
    return {"score": float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))}


def _of_words(
    task: Task, texts: Sequence[list[str]]
) -> tuple[dict[str, list[list[int]]], list[list[int]]]:
    """Tokenise texts that are divided into words; also returns each word's first token, or -1.

    As in evaluation, a text with too many tokens loses whole words.
    """
    inputs: dict[str, list[list[int]]] = {}
    firsts = []
    for words in texts:
        encoding = task.processor(words, is_split_into_words=True, verbose=False)
        word_ids = encoding.word_ids()
        if len(word_ids) > task.max_length:
            ends = [place for place, word in enumerate(word_ids) if word is not None]
            room = max(0, task.max_length - (len(word_ids) - len(ends)))
            words_left = words[: word_ids[ends[room]]]
            encoding = task.processor(words_left, is_split_into_words=True, verbose=False)
            word_ids = encoding.word_ids()
        places = [-1] * len(words)
        for place, word in reversed(list(enumerate(word_ids))):
            if word is not None:
                places[word] = place
        firsts.append(places)
        for name, values in encoding.items():
            inputs.setdefault(name, []).append(values)
    return inputs, firsts


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Divide positions, longest first, into batches of at most `TOKENS` tokens, or of one text."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    start = 0
    while start < len(order):
        stop = start + max(1, TOKENS // lengths[order[start]])
        yield order[start:stop]
        start = stop


def _padded(
    tokens: Mapping[str, list[list[int]]], batch: Sequence[int], tokenizer: Any
) -> dict[str, torch.Tensor]:
    """Pad the inputs of a batch on the right, as in evaluation; returns tensors [B, T]."""
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
