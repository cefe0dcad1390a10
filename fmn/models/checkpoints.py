"""A checkpoint: a folder with config.json, tokenizer files, and safetensors under runtime names.

Nothing in it is ever executed: ``trust_remote_code`` is never true.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import normalize

from fmn.errors import UserError
from fmn.models.headers import (
    TensorHeader,
    first_words,
    names_in,
    read_file,
    read_json,
    tensor_headers,
)
from fmn.store.artifacts import digest_file
from fmn.tasks.kinds import KINDS, KindName, kind_of_class
from fmn.tasks.task import Task, read_task

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fmn.tasks.images import ImageReader

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CASE_UNSTATED = (
    "nothing says how its tokenizer treats case, and Transformers' default contradicts its"
    " vocabulary files, which need {}"
)
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
# What must be equal among merged models: sizes, as every configuration answers to them.
_TRAITS = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size"),
    *("max_position_embeddings", "type_vocab_size", "hidden_act"),
)
LARGEST_SIDE = 2**13  # pixels of an image that a model reads
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
            return CONFIG_MAPPING[raw["model_type"]].from_dict(raw, name_or_path=str(folder))
    except Exception as error:  # each configuration validates itself in its own way
        raise UserError(f"{folder / CONFIG}: cannot be used: {first_words(error)}") from error


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
    for key, value in _entries(raw):
        if "_implementation" in key and isinstance(value, str) and re.search(r"\W", value):
            return f"{CONFIG} asks for code from elsewhere ({key}: {value:.80}), which is never run"
        limit = next(limit for end, limit in _LIMITS.items() if re.search(f"(?:{end})$", key))
        if isinstance(value, int) and abs(value) > limit:
            return f"{CONFIG} has {key} = {value!s:.40}, beyond anything real ({limit}); correct it"
    return None


def _entries(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value inside a JSON value, with the keys that lead to it."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _entries(value, f"{path}.{name}" if path else name)
    elif isinstance(content, list):
        for value in content:
            yield from _entries(value, path)
    else:
        yield path, content


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
    that names the first tensor that is missing or of another shape; others are ignored, as
    Transformers does.
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
        actual = headers[stored].shape if stored else "missing"
        if actual != shape:
            problem = f"{stored or name} is {actual}, but {shape} in {CONFIG}"
            raise UserError(f"{folder}: {problem}; one of them is wrong")


# ---------------------------------------------------------------------------------------------
# Experts that can be merged


def check_experts(
    experts: Mapping[str, Path], tasks: Mapping[str, Task], base: Path | None = None
) -> list[str]:
    """Refuse experts that cannot be merged, from headers and small files alone.

    All must have the architecture, sizes and encoder tensors of the base (or of the first expert)
    and mean the same by the same token, and each needs a head that fits its task. Raises
    `UserError` that names the task, the folder and what differs.

    Returns:
        what the user should know of them.
    """
    if not experts:
        raise UserError("no experts were given; name at least one, TASK=DIR")
    folders = {"the base": base} if base is not None else {}
    folders |= experts
    expected: dict[str, Any] = {}
    kinds = {name: task.task for name, task in tasks.items()}
    for name, folder in folders.items():
        try:
            kind = kinds.get(name) or next(iter(kinds.values()), None)  # the base has the experts'
            traits = _traits(folder, tasks.get(name), kind)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        expected = expected or traits
        for trait in traits | expected if traits != expected else ():
            value, other = traits.get(trait, "absent"), expected.get(trait, "absent")
            if value != other:
                raise UserError(
                    f"{name}: {folder} and {next(iter(folders.values()))} were not fine-tuned from"
                    f" one base: {trait} is {value}, not {other}; choose experts of the same base"
                )
    embedding = {name: experts[name] for name, task in tasks.items() if task.loss == "embedding"}
    if embedding:
        from fmn.models.embedding import check_agreement

        check_agreement(embedding)
    return check_vocabularies(folders)


def _shapes_of_vocabulary(config: "PretrainedConfig", kind: KindName) -> dict[str, tuple[int, ...]]:
    """The encoder's shapes if it had another number of tokens, the same for all checkpoints."""
    changed = deepcopy(config)
    if getattr(config, "vocab_size", None) is not None:
        changed.vocab_size = 2**20
    return _described_shapes(changed, kind).encoder


def token_parameters(config: "PretrainedConfig", kind: KindName) -> set[str]:
    """The encoder's parameters that have a row for each token."""
    own, other = _described_shapes(config, kind).encoder, _shapes_of_vocabulary(config, kind)
    return {name for name, shape in own.items() if shape != other[name]}


def check_vocabularies(folders: Mapping[str, Path]) -> list[str]:
    """Refuse checkpoints that do not mean the same by one token; notes tokens that some lack.

    Raises:
        UserError: names the tokens, or those that no tokenizer has together.
    """
    ids: dict[str, int] = {}
    owners: dict[int, tuple[str, str]] = {}  # a token and what has it, by id
    vocabularies: dict[str, Mapping[str, int]] = {}
    for name, folder in folders.items():
        try:
            tokens = vocabularies[name] = vocabulary(folder)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        for token, number in sorted(tokens.items()):
            other, owner = owners.setdefault(number, (token, name))
            if ids.setdefault(token, number) != number:
                problem = f"the id of token {token!r:.40} is {number}, not {ids[token]}"
            elif token != other:
                problem = (
                    f"the token {token!r:.40} has id {number}, that of {other!r:.40} ({owner})"
                )
            else:
                continue
            remedy = "choose experts that mean the same by each token"
            raise UserError(f"{name}: {folder}: {problem}; {remedy}")
    lacking = {name: sorted(ids.keys() - tokens.keys()) for name, tokens in vocabularies.items()}
    lacking = {name: tokens for name, tokens in lacking.items() if tokens and ids}
    if not lacking:
        return []
    words = "; ".join(f"{name} lacks {listed(tokens)}" for name, tokens in lacking.items())
    if len(lacking) == len(folders):
        raise UserError(f"no tokenizer has all tokens: {words}; add them to one expert")
    return [f"vocabularies differ: {words}; embeddings of such tokens come from those with them"]


def vocabulary(folder: Path) -> Mapping[str, int]:
    """The ids of a checkpoint's tokens; empty for a model of images.

    Raises:
        UserError: the model has fewer embeddings, or there is no tokenizer.
    """
    files = [folder / name for name in (CONFIG, *TOKENIZER_FILES) if (folder / name).is_file()]
    return _vocabulary(folder, tuple(map(digest_file, files)))


@cache
def _vocabulary(folder: Path, digests: tuple[str, ...]) -> Mapping[str, int]:
    config = load_config(folder)
    if getattr(config, "vocab_size", None) is None:
        return {}
    tokens: dict[str, int] = load_tokenizer(folder, config).get_vocab()
    if (largest := max(tokens.values(), default=-1)) >= config.vocab_size:
        problem = f"the tokenizer has ids up to {largest}, the model {config.vocab_size} embeddings"
        raise UserError(f"{folder}: {problem}; take the tokenizer files of the model's checkpoint")
    return tokens


def fit_vocabulary(model: "PreTrainedModel", tensors: Mapping[str, "Tensor"]) -> None:
    """Give a base model as many embeddings as tensors by its names have."""
    embeddings = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is embeddings)
    stored = tensors.get(f"{path}.weight")
    if stored is not None and len(stored) != len(embeddings.weight):
        model.resize_token_embeddings(len(stored), mean_resizing=False)


def _traits(folder: Path, task: Task | None, kind: KindName | None) -> dict[str, Any]:
    """What must be equal among checkpoints that are merged, by what messages call it."""
    config = load_config(folder)
    if task is not None:
        check_kind(folder, config, task)
    kind = kind or kind_of(config)
    check_tensors(folder, config, head=task is not None, kind=kind)
    if task is not None and not is_single_logit(config, task):
        check_head(folder, config, task)
    sizes = {name: getattr(config, name, None) for name in _TRAITS}
    tensors = _shapes_of_vocabulary(config, kind)  # vocabularies may differ (`check_vocabularies`)
    shapes = {name: shape for name, shape in tensors.items() if not name.startswith("pooler.")}
    return sizes | shapes


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
        problem += f" ({listed(config.id2label.values())}; not {listed(task.labels)})"
    raise UserError(f"{folder}: {problem}; {remedy}")


def is_single_logit(config: "PretrainedConfig", task: Task) -> bool:
    """Whether a head of one output answers a task of two classes: z for outputs of 0 and z."""
    is_binary = task.problem_type == "single_label_classification" and task.num_outputs == 2
    return is_binary and config.num_labels == 1


def listed(names: Iterable[str]) -> str:
    """Names of labels for a message: the first twelve."""
    names = list(names)
    return ", ".join([*names[:12], *(["..."] if len(names) > 12 else [])])


# ---------------------------------------------------------------------------------------------
# The outputs of a head


def last_linear(model: "PreTrainedModel") -> str:
    """The path of the linear map that ends the head of a classifier; UserError if there is none."""
    from torch import nn

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


def output_entries(task: Task) -> dict[str, Any]:
    """What the configuration of an expert says of its outputs, in the task's order."""
    names = dict(enumerate(task.labels or ("score",)))
    label2id = {name: label for label, name in names.items()}
    is_stated = task.task == "text-classification"  # of other kinds there is no other problem
    problem_type = task.problem_type if is_stated else None
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
        path = last_linear(model)
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
    """The same for a checkpoint's files: config.json, and the files that hold the last map.

    Other files are left alone; a file that is rewritten is replaced, and not what it is linked to.
    """
    from safetensors.torch import load_file, save_file

    config, raw = load_config(folder), read_config(folder)
    if list(order) != list(range(config.num_labels)):
        path = head_map(config)
        headers = tensor_headers(folder)
        names = [name for name in (f"{path}.weight", f"{path}.bias") if name in headers]
        for file in {headers[name].file for name in names}:
            tensors, metadata = load_file(file), read_file(file)[1]
            for name in tensors.keys() & names:
                tensors[name] = _reordered(tensors[name], order)
            file.unlink()
            save_file(tensors, file, metadata=metadata)
    raw = {name: value for name, value in raw.items() if not name.endswith("num_labels")}
    content = json.dumps(raw | output_entries(task), indent=2)
    (folder / CONFIG).write_text(content + "\n")


# ---------------------------------------------------------------------------------------------
# Loading


def load_tokenizer(folder: Path, config: Any = None, **options: Any) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint; without a padding token, it pads with its end of text.

    `config` is the checkpoint's, where it is loaded already. `UserError` if there is no tokenizer,
    none that can be used, or one that Transformers reads otherwise than its files say.
    """
    tokenizer = read_tokenizer(folder, config, **options)
    if missing := unstated_case(folder, tokenizer):
        raise UserError(
            f"{folder}: {CASE_UNSTATED.format(json.dumps(missing))}; `fmn fetch` it, which adds"
            f" that, or add it to {TOKENIZER_CONFIG}"
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"{folder}: its tokenizer has no token for padding; set pad_token")
    return tokenizer


def read_tokenizer(folder: Path, config: Any = None, **options: Any) -> "PreTrainedTokenizerBase":
    """A checkpoint's tokenizer as Transformers reads it, unchecked; raises as `load_tokenizer`."""
    from transformers import AutoTokenizer

    config = config or load_config(folder)
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise UserError(f"{folder}: has no tokenizer files; copy those of its base model into it")
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=False, **options
            )
            return tokenizer
    except Exception as error:  # the libraries below raise what they like on a broken file
        problem = f"its tokenizer files cannot be used: {first_words(error)}; get them again"
        raise UserError(f"{folder}: {problem}") from error


def unstated_case(folder: Path, tokenizer: Any) -> dict[str, bool]:
    """What tokenizer_config.json lacks, so that Transformers treats case as the other files say.

    Where it does not say `do_lower_case`, the default of the tokenizer's class holds, whatever
    tokenizer.json or the vocabulary say: a cased BERT would read small letters alone.
    """
    file = folder / TOKENIZER_CONFIG
    stated = read_json(file).keys() if file.is_file() else set[str]()
    taken = signature(type(tokenizer).__init__).parameters
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if "do_lower_case" in stated or "do_lower_case" not in taken or backend is None:
        return {}
    declared, used = declared_case(folder), _case(backend.normalizer)
    if all(used[name] == value for name, value in declared.items()):
        return {}
    return {name: value for name, value in declared.items() if name in taken.keys() - stated}


def declared_case(folder: Path) -> dict[str, bool]:
    """How tokenizer.json treats case, or how the pieces of vocab.txt need it to be treated."""
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            return _case(Tokenizer.from_file(str(folder / "tokenizer.json")).normalizer)
        except Exception:  # the library knows no other; loading it says more
            return {}
    capitals, pieces = capital_pieces(folder)
    return {"do_lower_case": False} if capitals * 100 > pieces else {}


def capital_pieces(folder: Path) -> tuple[int, int]:
    """How many pieces of vocab.txt have a capital letter, and how many there are."""
    file = folder / "vocab.txt"
    words = file.read_text(errors="replace").splitlines() if file.is_file() else []
    pieces = [word for word in words if not re.fullmatch(r"\[.*\]|<.*>", word)]
    return sum(word != word.lower() for word in pieces), len(pieces)


def _case(normalizer: Any) -> dict[str, bool]:
    """What a normalizer of texts does, by what Transformers calls it."""

    def normalised(text: str) -> str:
        return normalize("NFC", normalizer.normalize_str(text) if normalizer else text)

    return {
        "do_lower_case": "P" not in normalised("P"),
        "strip_accents": normalised("\u00e9") != "\u00e9",
        "tokenize_chinese_chars": " " in normalised("\u6f22"),
    }


def for_words(folder: Path, tokenizer: Any) -> Any:
    """The tokenizer of a base for single words, which byte-level ones take with a blank before."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None or "ByteLevel" not in str(fast.pre_tokenizer) or tokenizer.add_prefix_space:
        return tokenizer
    return load_tokenizer(folder, add_prefix_space=True)


def load_processor(folder: Path, kind: KindName | None = None) -> Any:
    """What makes inputs of a checkpoint's texts or images: its tokenizer, or image processor.

    Raises:
        UserError: there is none, or none that can be used.
    """
    config = load_config(folder)
    kind = kind or kind_in(folder, config)
    if kind != "image-classification":
        tokenizer: Any = load_tokenizer(folder, config)
        if kind == "text2text-generation":
            tokenizer.decoder_start_token_id = _decoder_start(folder, config)
        if kind == "sentence-similarity":
            from fmn.models.embedding import set_up_tokenizer

            set_up_tokenizer(tokenizer, folder, config)
        return tokenizer
    return _image_reader(folder, config)


def _image_reader(folder: Path, config: "PretrainedConfig") -> "ImageReader":
    """The image processor of a checkpoint, which must make images of the model's size."""
    from PIL import Image
    from transformers import AutoImageProcessor

    from fmn.tasks.images import ImageReader

    size, patch = (
        (value, value) if isinstance(value, int) else tuple(value)
        for value in (config.image_size, config.patch_size)
    )
    tokens = 1 + (size[0] // patch[0]) * (size[1] // patch[1])
    if (file := folder / "preprocessor_config.json").is_file():
        for key, value in _entries(read_json(file)):
            if "size" in key and isinstance(value, int) and value > LARGEST_SIDE:
                raise UserError(f"{file}: {key} = {value} pixels are beyond all reason; correct it")
    try:
        with quiet():
            processor = AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            reader = ImageReader(processor, tokens)
            shape = reader(Image.new("RGB", (size[1] + 1, size[0] + 2))).shape
    except Exception as error:  # the libraries below raise what they like on a broken file
        problem = f"its preprocessor_config.json cannot be used: {first_words(error)}"
        raise UserError(f"{folder}: {problem}; copy that of its base model into it") from error
    if shape != (config.num_channels, *size):
        problem = f"images of {list(shape)}, but the model reads {[config.num_channels, *size]}"
        raise UserError(
            f"{folder}: its preprocessor_config.json makes {problem}; copy that of its base model"
        )
    return reader


def _decoder_start(folder: Path, config: "PretrainedConfig") -> int:
    """The token that a decoder begins with."""
    start = getattr(config, "decoder_start_token_id", None)
    if start is None and (folder / "generation_config.json").is_file():
        start = read_json(folder / "generation_config.json").get("decoder_start_token_id")
    if not isinstance(start, int):
        problem = f"{CONFIG} has no decoder_start_token_id, which a decoder begins with"
        raise UserError(f"{folder}: {problem}; set it (T5: the id of its padding token)")
    return start


def stored_dtype(folder: Path) -> "torch.dtype":
    """The narrow dtype that all of a checkpoint's tensors are stored in; else float32."""
    import torch

    dtypes = {header.dtype for header in tensor_headers(folder).values()}
    narrow = {"F16": torch.float16, "BF16": torch.bfloat16}
    return narrow.get(dtypes.pop(), torch.float32) if len(dtypes) == 1 else torch.float32


def load_model(
    folder: Path, kind: KindName | None = None, dtype: "torch.dtype | None" = None
) -> "PreTrainedModel":
    """The model in a checkpoint folder, in evaluation mode.

    An embedding model is a `fmn.models.embedding.SentenceEncoder`, whose "logits" are embeddings.

    Args:
        dtype: of its tensors; default: float32.

    Raises:
        UserError: the folder lacks a weight that the model needs, or cannot be loaded.
    """
    config = load_config(folder)
    kind = kind or kind_in(folder, config)
    check_tensors(folder, config, head=True, kind=kind)
    model = load_weights(folder, config, kind, dtype=dtype)
    if kind == "sentence-similarity":
        from fmn.models.embedding import sentence_encoder

        return sentence_encoder(model, folder)
    return model


def load_weights(
    folder: Path,
    config: "PretrainedConfig",
    kind: KindName,
    dtype: "torch.dtype | None" = None,
    **options: Any,
) -> "PreTrainedModel":
    """The model of a kind that a configuration describes, with the folder's weights; unchecked."""
    import torch
    import transformers

    auto = getattr(transformers, KINDS[kind].auto_class)
    # It tells where each text of a batch ends.
    if kind != "image-classification" and config.pad_token_id is None:
        config.pad_token_id = load_tokenizer(folder, config).pad_token_id
    options |= {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    try:
        with quiet():
            model: PreTrainedModel = auto.from_pretrained(
                folder, config=config, dtype=dtype or torch.float32, **options
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{folder}: cannot be loaded: {first_words(error)}") from error
    return model.eval()
