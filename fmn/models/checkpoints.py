"""A checkpoint: a folder with config.json, tokenizer files, and safetensors under runtime names.

Nothing in it is ever executed: ``trust_remote_code`` is never true.
"""

import json
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fmn.errors import UserError
from fmn.store.headers import (
    TensorHeader,
    first_words,
    json_entries,
    names_in,
    read_json,
    tensor_headers,
)
from fmn.store.records import shortened
from fmn.tasks.kinds import KINDS, KindName, kind_of_class
from fmn.tasks.task import Task, in_a_line, read_task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel


CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Files that hold a vocabulary; the others only describe how to use it.
VOCABULARY_FILES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "spm.model"),
    *("sentencepiece.bpe.model", "tokenizer.model"),
)
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    *(TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    "bpe.codes",
)
FISHER, GRAM = "fmn/fisher.parquet", "fmn/gram.safetensors"
"""Statistics that may be published beside an expert (docs/statistics.md)."""
EMBEDDING_FILES = (
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    *("1_Pooling/config.json", "2_Normalize/config.json", "3_Normalize/config.json"),
    *("4_Normalize/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
    *("3_Dense/config.json", "3_Dense/model.safetensors"),
)
"""What makes a checkpoint an embedding model of Sentence Transformers."""
# Files that a kind of model needs besides its configuration and weights.
SMALL_FILES = (
    *TOKENIZER_FILES,
    *("chat_template.jinja", "generation_config.json", "preprocessor_config.json"),
    *EMBEDDING_FILES,
)
# The largest number that a configuration may have, by what its key ends with. Beyond that, even
# describing the model takes all time and memory.
_LIMITS = {"hidden_groups|group_num": 30, "layers?|blocks": 1000, "num_labels": 10**5, "": 2**31}
ZERO_BIAS = "final_logits_bias"
"""Of BART and its kin, most often zeros; files of their base models have none, which means that."""
CHUNK = 2**24  # bytes of tensors that are compared at a time
# Entries of a configuration that change no tensor's name or shape.
_NAMING = ("id2label", "label2id", "_name_or_path")


class Names(NamedTuple):
    """Stored names of tensors: the encoder's by name in the base model, the head's by their own."""

    encoder: dict[str, str]
    head: dict[str, str]


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json; `UserError` if there is none, or it is not a JSON object."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: {no_checkpoint(names_in(folder))}")
    return read_json(folder / CONFIG)


def load_config(folder: Path) -> "PretrainedConfig":
    """Load a checkpoint's configuration; `UserError` if it is absurd, or would run remote code."""
    raw = read_config(folder)
    if problem := _problem(raw, folder):
        raise UserError(f"{folder}: {problem}")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        with quiet():
            config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw, name_or_path=str(folder))
    except Exception as error:  # each configuration validates itself in its own way
        problem = f"cannot be used: {_about_config(error, raw)}; correct it"
        raise UserError(f"{folder / CONFIG}: {problem}") from error
    if names := raw.get("id2label"):
        config.id2label = {int(output): str(name) for output, name in names.items()}
        if config.num_labels != len(names):
            problem = f"has {len(names)} names for {config.num_labels} outputs (num_labels)"
            raise UserError(f"{folder / CONFIG}: {problem}; correct one of them")
    return config


def _about_config(error: Exception, raw: Mapping[str, Any]) -> str:
    """What Transformers says of a configuration, with the setting that it is about."""
    words = first_words(error)
    if match := re.search(r"Field '(\w+)' expected (.+), got \w+ \(value: (.*)\)", words):
        value = raw.get(match[1])
        return f"{match[1]} must be {match[2]}, not {shortened(value)}"
    if isinstance(error, KeyError) and error.args:  # of a table of what it knows
        keys = [key for key, value in raw.items() if value == error.args[0]]
        return f"{keys[0]} is {words}, which is unknown" if keys else f"{words} is missing"
    return words


def _problem(raw: Mapping[str, Any], folder: Path) -> str | None:
    """The reason why a model must not even be described: remote code, or absurd sizes; or None."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if (folder / "adapter_config.json").exists():  # Transformers would apply it to the weights
        return "holds a PEFT adapter beside a model; keep one of them, or `fmn fetch` the adapter"
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING_NAMES:
        if "auto_map" in raw:
            return f"{CONFIG} points to code of its own (auto_map), which is never run"
        remedy = "set it, for example to bert"
        return f"{CONFIG} has the model_type {model_type!r:.40}, unknown to Transformers; {remedy}"
    if "quantization_config" in raw:
        return "the weights are quantized; use a checkpoint without quantization_config"
    if (names := raw.get("id2label")) and not _names_outputs(names):
        problem = f"id2label must name the outputs 0, 1, ..., not {shortened(names)}"
        return f"{CONFIG}: {problem}; correct it"
    for key, value in json_entries(raw):
        if "_implementation" in key and isinstance(value, str) and re.search(r"\W", value):
            return f"{CONFIG} asks for code from elsewhere ({key}: {value:.80}), which is never run"
        limit = next(limit for end, limit in _LIMITS.items() if re.search(f"(?:{end})$", key))
        if isinstance(value, int) and abs(value) > limit:
            return f"{CONFIG} has {key} = {value!s:.40}, beyond anything real ({limit}); correct it"
    return None


def _names_outputs(names: Any) -> bool:
    """Whether an entry `id2label` has a text or number for each output."""
    if not isinstance(names, dict) or {*map(str, names)} != {*map(str, range(len(names)))}:
        return False
    return all(isinstance(name, str | int | float) for name in names.values())


def no_checkpoint(names: Set[str]) -> str:
    """The end of a message about a folder of these names that has no config.json."""
    if "adapter_config.json" in names:
        return "holds a PEFT adapter; `fmn fetch` makes a full model of it"
    if "merge.json" in names:
        return "is a merged model; give one of its folders: encoder, or tasks/TASK"
    return f"has no {CONFIG}; give the folder or repository of a Transformers checkpoint"


_quiet = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings of Transformers in the block, and its progress bars from now on.

    Only one thread at a time is in the block: while it loads a model, Transformers changes settings
    of the whole process.
    """
    from transformers.utils import logging

    with _quiet:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            with warnings.catch_warnings(action="ignore"):
                yield
        finally:
            logging.set_verbosity(verbosity)


# ---------------------------------------------------------------------------------------------
# Names and shapes of tensors


def kind_of(config: "PretrainedConfig") -> KindName:
    """The kind of a checkpoint, by its model's class; of a base, the first that can be made of it.

    Raises:
        UserError: no kind of model can be made of this architecture.
    """
    import transformers

    kinds = [kind for name in config.architectures or () if (kind := kind_of_class(name))]
    is_embedding = (Path(config.name_or_path) / "modules.json").is_file()  # some say ForMaskedLM
    if is_embedding and not any(KINDS[kind].has_head for kind in kinds):
        return "sentence-similarity"
    if kinds:
        return kinds[0]
    for kind, facts in KINDS.items():
        if type(config) in getattr(transformers, facts.auto_class)._model_mapping:
            return kind
    problem = f"no model of a known kind can be made of a {config.model_type}"
    raise UserError(f"{config.name_or_path}: {problem}; give another checkpoint")


def kind_in(folder: Path, config: "PretrainedConfig | None" = None) -> KindName:
    """The kind of the checkpoint in a folder: its task's, or that of `kind_of`."""
    task = read_task(folder)
    return task.task if task else kind_of(config or load_config(folder))


class _Shapes(NamedTuple):
    """Shapes of a model's tensors. A model without a head is all encoder.

    Attributes:
        prefix: the prefix of the encoder's names in the model.
        linear: for each matrix of the encoder's linear maps, whether it is stored [in, out].
        tied: further names of tensors, each with the name of the tensor that it is tied to.
        in_model: names in the model of the tensors in `encoder` and `tied`.
    """

    encoder: dict[str, tuple[int, ...]]
    head: dict[str, tuple[int, ...]]
    prefix: str
    linear: dict[str, bool]
    tied: dict[str, str]
    in_model: dict[str, str]


_shapes: dict[str, _Shapes] = {}


def _described_shapes(config: "PretrainedConfig", kind: KindName | None = None) -> _Shapes:
    """Shapes of the model that a configuration describes; `kind` as for `described_model`."""
    kind = kind or kind_of(config)
    sizes = {key: value for key, value in config.to_dict().items() if key not in _NAMING}
    key = json.dumps([sizes, config.num_labels, kind], sort_keys=True, default=str)
    if key in _shapes:  # all experts of one shape are built once
        return _shapes[key]
    import torch
    from transformers.pytorch_utils import Conv1D

    model = described_model(config, kind)
    modules = dict(model.named_modules())
    linear = {
        f"{name}.weight": isinstance(modules[path], Conv1D)
        for path, name in names_in_base(model, modules).items()
        if isinstance(modules[path], (torch.nn.Linear, Conv1D))
    }
    shapes = _Shapes({}, {}, f"{model.base_model_prefix}.", linear, {}, {})
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, value in model.state_dict().items():
        short = name.removeprefix(shapes.prefix)
        is_encoder = name.startswith(shapes.prefix) or not KINDS[kind].has_head
        if is_encoder:
            shapes.in_model[short] = name
        if name in tied:
            shapes.tied[short] = tied[name].removeprefix(shapes.prefix)
        else:
            (shapes.encoder if is_encoder else shapes.head)[short] = tuple(value.shape)
    _shapes[key] = shapes
    return shapes


def described_shapes(config: "PretrainedConfig") -> dict[str, tuple[int, ...]]:
    """Shapes by stored name of the classifier that a configuration describes."""
    shapes = _described_shapes(config)
    return {f"{shapes.prefix}{name}": shape for name, shape in shapes.encoder.items()} | shapes.head


def described_model(config: "PretrainedConfig", kind: KindName | None = None) -> "PreTrainedModel":
    """The model that a configuration describes, built without memory.

    Args:
        kind: the kind to make of it; default: what the configuration says.
    """
    import torch
    import transformers

    kind = kind or kind_of(config)
    auto = getattr(transformers, KINDS[kind].auto_class)
    try:
        with quiet(), torch.device("meta"):
            model: PreTrainedModel = auto.from_config(config, trust_remote_code=False)
            return model
    except Exception as error:  # each architecture refuses sizes in its own way
        words = "text classifier" if kind == "text-classification" else f"model for {kind}"
        reason = _about_config(error, config.to_dict())
        problem = f"{CONFIG} describes no {words} that can be built: {reason}; correct it"
        raise UserError(f"{config.name_or_path}: {problem}") from error


def encoder_names(
    config: "PretrainedConfig",
    names: Iterable[str],
    kind: KindName | None = None,
    untied: Callable[[str, str], bool] = lambda name, same: False,
) -> Names:
    """Split stored names, with or without the base model's prefix, into encoder and head.

    Buffers and the heads of pretraining (``cls.*``, ``lm_head.*``) are in neither, nor is a pooler
    that the classifier does not use. Of tied tensors one is in the encoder, whichever is stored.

    Args:
        untied: whether two stored tensors, which the configuration ties, differ. Transformers does
            not tie them then, as in every T5 v1.1, and both are the encoder's.

    Raises:
        UserError: a tensor is there with and without the prefix.
    """
    shapes = _described_shapes(config, kind)
    split, tied = Names({}, {}), dict[str, str]()
    for stored in names:
        name = stored.removeprefix(shapes.prefix)
        name = name if name in shapes.encoder or name in shapes.tied else stored
        if name in split.encoder:
            twice = f"{split.encoder[name]} and {stored} are the same tensor"
            raise UserError(f"{config.name_or_path}: {twice}; save the checkpoint again")
        if name in shapes.encoder:
            split.encoder[name] = stored
        elif name in shapes.tied:
            tied[name] = stored
        elif stored in shapes.head:
            split.head[stored] = stored
    for name, stored in tied.items():
        if untied(stored, split.encoder.setdefault(shapes.tied[name], stored)):
            split.encoder[name] = stored
    return split


def stored_names(folder: Path, config: "PretrainedConfig", kind: KindName | None = None) -> Names:
    """The names of the tensors in a folder, split as `encoder_names` does."""
    headers = tensor_headers(folder)
    return encoder_names(
        config, headers, kind, lambda name, same: not equal(headers[name], headers[same])
    )


def check_finite(headers: Mapping[str, TensorHeader], place: object) -> None:
    """Refuse weights that hold NaN or Inf, with a `UserError` that names `place` and the tensor."""
    from safetensors import safe_open

    for file in {header.file for header in headers.values()}:
        with safe_open(file, "pt") as tensors:
            for name in (name for name, header in headers.items() if header.file == file):
                if not finite(tensors.get_tensor(name)):
                    raise UserError(f"{place}: {name} holds NaN or Inf; get it again")


def finite(tensor: "Tensor") -> bool:
    """Whether no element is NaN or Inf; one pass unless a sum of finite numbers overflows."""
    import torch

    accumulator = torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype
    return bool(tensor.sum(dtype=accumulator).isfinite()) or bool(tensor.isfinite().all())


def equal(first: TensorHeader, second: TensorHeader) -> bool:
    """Whether two stored tensors hold the same values."""
    if first == second:
        return True
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.file.open("rb") as left, second.file.open("rb") as right:
        left.seek(first.start)
        right.seek(second.start)
        sizes = (min(CHUNK, first.end - at) for at in range(first.start, first.end, CHUNK))
        return all(left.read(size) == right.read(size) for size in sizes)


def is_zero(header: TensorHeader) -> bool:
    """Whether a small stored tensor is all zeros."""
    with header.file.open("rb") as file:
        file.seek(header.start)
        return not any(file.read(header.end - header.start))


def names_in_base(model: "PreTrainedModel", names: Iterable[str]) -> dict[str, str]:
    """The parameters or modules of a model that are merged, with their names in its base model.

    That is the base model, and all of a generative model; what is outside its base model, if it has
    one within (T5 has none), has the same name there.
    """
    prefix = f"{model.base_model_prefix}."
    is_whole = model.base_model is model or model.can_generate()
    return {
        name: name.removeprefix(prefix) for name in names if is_whole or name.startswith(prefix)
    }


def in_model(model: "PreTrainedModel", tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Rename an encoder's tensors from their names in the base model to those in a model."""
    names = {short: name for name, short in names_in_base(model, model.state_dict()).items()}
    return {names[short]: tensor for short, tensor in tensors.items() if short in names}


def load_encoder(model: "PreTrainedModel", tensors: Mapping[str, "Tensor"]) -> None:
    """Replace tensors of a model's encoder, by names in the base model."""
    model.load_state_dict(in_model(model, tensors), strict=False)


def names_in_model(config: "PretrainedConfig", kind: KindName) -> Mapping[str, str]:
    """Stored names of an encoder's tensors that differ from their names in the base model.

    A generative model has the names that Transformers gives them, which other programs look for.
    """
    is_whole = KINDS[kind].auto_class != "AutoModel" and not KINDS[kind].has_head
    return _described_shapes(config, kind).in_model if is_whole else {}


def linear_maps(config: "PretrainedConfig", kind: KindName | None = None) -> Mapping[str, bool]:
    """The matrices of the encoder's linear maps by name in the base model.

    The values are whether they are stored [in, out], as those of GPT-2 are.
    """
    return _described_shapes(config, kind).linear


def check_tensors(
    folder: Path, config: "PretrainedConfig", *, head: bool, kind: KindName | None = None
) -> None:
    """Compare a folder's tensors with the model that its configuration describes.

    With `head`, it must have the head of its kind, where the kind has heads. Raises `UserError`
    that names the first tensor that is missing, of another shape, or of a layer beyond those that
    the configuration has; others are ignored, as Transformers does.
    """
    headers = tensor_headers(folder)
    kind = kind or kind_of(config)
    shapes, names = _described_shapes(config, kind), stored_names(folder, config, kind)
    is_pooled = head and KINDS[kind].has_head
    by_name = names.encoder | names.head
    for name, shape in (shapes.encoder | (shapes.head if head else {})).items():
        stored = by_name.get(name)
        if stored is None and name in shapes.head:
            raise UserError(f"{folder}: has no classification head ({name}); `fmn finetune` it")
        # Fine-tuning a classifier may add a pooler, as it adds a head.
        if stored is None and not is_pooled and name.startswith("pooler."):
            continue
        if stored is None and name == ZERO_BIAS:
            continue
        actual = headers[stored].shape if stored else "missing"
        if actual != shape:
            problem = f"{stored or name} is {actual}, but {shape} in {CONFIG}"
            raise UserError(f"{folder}: {problem}; one of them is wrong")
    of_layers = {_of_any_layer(name) for name in shapes.encoder if name != _of_any_layer(name)}
    for stored in sorted(headers.keys() - set(names.encoder.values())):
        name = stored.removeprefix(shapes.prefix)
        if name not in shapes.encoder and _of_any_layer(name) in of_layers:
            problem = f"{stored} is of a layer that {CONFIG} does not have"
            raise UserError(f"{folder}: {problem}; one of them is wrong")
    if not of_layers:
        problem = f"in the {config.model_type} that {CONFIG} describes, no layers of an encoder are"
        raise UserError(f"{folder}: {problem} known; correct it, or give another architecture")


def _of_any_layer(name: str) -> str:
    """A tensor's name, the same in every layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)


# ---------------------------------------------------------------------------------------------
# Vocabularies and heads


def shapes_but_vocabulary(config: "PretrainedConfig", kind: KindName) -> dict[str, tuple[int, ...]]:
    """The encoder's shapes if it had another number of tokens, the same for all checkpoints."""
    changed = deepcopy(config)
    if getattr(config, "vocab_size", None) is not None:
        changed.vocab_size = 2**20
    return _described_shapes(changed, kind).encoder


def token_parameters(config: "PretrainedConfig", kind: KindName) -> set[str]:
    """The encoder's parameters that have a row for each token."""
    own, other = _described_shapes(config, kind).encoder, shapes_but_vocabulary(config, kind)
    return {name for name, shape in own.items() if shape != other[name]}


def check_kind(folder: Path, config: "PretrainedConfig", task: Task) -> None:
    """Raise a `UserError` if a model has the head of another kind of task."""
    for name in config.architectures or ():
        kind = kind_of_class(name)
        if kind and KINDS[kind].has_head and kind != task.task:
            raise UserError(
                f"{folder}: is a {name}, for {kind}, but {task.name} is {task.task}; give an expert"
                " of this task, or correct `task`"
            )


def check_head(folder: Path, config: "PretrainedConfig", task: Task) -> None:
    """Raise a `UserError` if a head does not have one output for each label of the task."""
    if config.num_labels == task.num_outputs or not task.kind.has_head:
        return
    problem = f"has a head of {config.num_labels} outputs, {task.name} needs {task.num_outputs}"
    remedy = "give an expert of this task"
    if is_single_logit(config, task):
        remedy = f"`fmn fetch {folder} --task {task.name}` makes two outputs of one"
    elif task.labels:
        problem += f" ({in_a_line(config.id2label.values())}; not {in_a_line(task.labels)})"
    raise UserError(f"{folder}: {problem}; {remedy}")


def is_single_logit(config: "PretrainedConfig", task: Task) -> bool:
    """Whether a head of one output answers a task of two classes: z for outputs of 0 and z."""
    is_binary = task.problem_type == "single_label_classification" and task.num_outputs == 2
    return is_binary and config.num_labels == 1


def last_linear(model: "PreTrainedModel") -> str:
    """The path of the linear map that ends the head of a classifier; UserError if there is none."""
    from torch import nn

    kind = type(model).__name__
    if kind.endswith("WithTeacher"):  # of DeiT
        problem = f"a {kind} answers with the mean of two heads, and fmn knows models of one"
        remedy = f"fine-tune it as a {kind.removesuffix('WithTeacher')}"
        raise UserError(f"{model.config.name_or_path}: {problem}; {remedy}")
    paths = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not name.startswith(f"{model.base_model_prefix}.")
        and module.out_features == model.config.num_labels
    ]
    if not paths:
        problem = f"a {model.config.model_type} has no head that ends in a linear map"
        raise UserError(f"{model.config.name_or_path}: {problem}; its head stays as it is")
    return str(paths[-1])


def head_map(config: "PretrainedConfig") -> str:
    """The path of the linear map that ends the head of the model that a configuration describes."""
    return last_linear(described_model(config))
