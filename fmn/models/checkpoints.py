"""A checkpoint: a folder with config.json, tokenizer files, and safetensors under runtime names.

Nothing in it is ever executed: ``trust_remote_code`` is never true.
"""

import json
import re
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
# Those that are needed beside the configuration and the weights, by the kind of model.
SMALL_FILES = (
    *TOKENIZER_FILES,
    *("chat_template.jinja", "generation_config.json", "preprocessor_config.json"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    *("1_Pooling/config.json", "2_Normalize/config.json"),
)
# The largest number that a configuration may have, by what its key ends with. Beyond that, even
# describing the model takes all time and memory.
_LIMITS = {"hidden_groups|group_num": 30, "layers?|blocks": 1000, "num_labels": 10**5, "": 2**31}
ZERO_BIAS = "final_logits_bias"
"""Of BART and its kin, most often zeros; files of their base models have none, which means that."""
CHUNK = 2**24  # bytes of tensors that are compared at a time
# What a configuration says that changes no tensor's name or shape.
_NAMING = ("id2label", "label2id", "_name_or_path")


class Names(NamedTuple):
    """Stored names of tensors: the encoder's by name in the base model, the head's by their own."""

    encoder: dict[str, str]
    head: dict[str, str]


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says; `UserError` if there is none, or it is no JSON object."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: {no_checkpoint(names_in(folder))}")
    return read_json(folder / CONFIG)


def load_config(folder: Path) -> "PretrainedConfig":
    """The configuration of a checkpoint; `UserError` if it is absurd, or asks for code to run."""
    raw = read_config(folder)
    if problem := _problem(raw, folder):
        raise UserError(f"{folder}: {problem}")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        with quiet():
            config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw, name_or_path=str(folder))
    except Exception as error:  # each configuration validates itself in its own way
        raise UserError(f"{folder / CONFIG}: cannot be used: {first_words(error)}") from error
    if names := raw.get("id2label"):
        config.id2label = {int(output): str(name) for output, name in names.items()}
        if config.num_labels != len(names):
            problem = f"has {len(names)} names for {config.num_labels} outputs (num_labels)"
            raise UserError(f"{folder / CONFIG}: {problem}; correct one of them")
    return config


def _problem(raw: Mapping[str, Any], folder: Path) -> str | None:
    """Why even describing the model would run code, or take all time and memory; or None."""
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
        shown = f"{CONFIG} has id2label = {names!s:.80}"
        return f"{shown}, which does not name the outputs 0, 1 and so on; correct it"
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


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings of Transformers from the terminal; and its progress bars, from now on."""
    from transformers.utils import logging

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
    """The kind of the checkpoint in a folder: as its task says, else as `kind_of` does."""
    task = read_task(folder)
    return task.task if task else kind_of(config or load_config(folder))


class _Shapes(NamedTuple):
    """Shapes of a model's tensors; its encoder's names begin with `prefix` in it.

    What has no head of its own is all encoder.

    `linear` are the matrices of the encoder's linear maps: whether each is stored [in, out];
    `tied` are further names of tensors, each with the name of the tensor that it stands for;
    `in_model` are the names in the model of all that is in `encoder` and `tied`.
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
        problem = f"{CONFIG} describes no {words} that can be built: {first_words(error)}"
        raise UserError(f"{config.name_or_path}: {problem}") from error


def encoder_names(
    config: "PretrainedConfig",
    names: Iterable[str],
    kind: KindName | None = None,
    untied: Callable[[str, str], bool] = lambda name, same: False,
) -> Names:
    """Split stored names into encoder and head, with or without the base model's prefix.

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
    """Those parameters or modules of a model that are merged, with their names in its base model.

    That is the base model, and all of a generative model; what is outside its base model, if it has
    one within (T5 has none), has the same name there.
    """
    prefix = f"{model.base_model_prefix}."
    is_whole = model.base_model is model or model.can_generate()
    return {
        name: name.removeprefix(prefix) for name in names if is_whole or name.startswith(prefix)
    }


def in_model(model: "PreTrainedModel", tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Those of an encoder's tensors, by names in the base model, that a model has; by its names."""
    names = {short: name for name, short in names_in_base(model, model.state_dict()).items()}
    return {names[short]: tensor for short, tensor in tensors.items() if short in names}


def load_encoder(model: "PreTrainedModel", tensors: Mapping[str, "Tensor"]) -> None:
    """Give a model other tensors of its encoder, by names in the base model; others stay."""
    model.load_state_dict(in_model(model, tensors), strict=False)


def names_in_model(config: "PretrainedConfig", kind: KindName) -> Mapping[str, str]:
    """The names under which an encoder is stored, where they are not those in the base model.

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
        # A classifier may make a pooler of its own when it is fine-tuned, as it makes a head.
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
    """Refuse a model with the head of another kind of task, with a `UserError`."""
    for name in config.architectures or ():
        kind = kind_of_class(name)
        if kind and KINDS[kind].has_head and kind != task.task:
            raise UserError(
                f"{folder}: is a {name}, for {kind}, but {task.name} is {task.task}; give an expert"
                " of this task, or correct `task`"
            )


def check_head(folder: Path, config: "PretrainedConfig", task: Task) -> None:
    """Refuse a head that has not one output for each label of the task, with a `UserError`."""
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
