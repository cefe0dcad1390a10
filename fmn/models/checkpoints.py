"""A checkpoint: a local folder with config.json, tokenizer files and safetensors weights under runtime names.

Nothing in it is ever executed: ``trust_remote_code`` is never true.
"""

import contextlib
import json
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fmn.errors import UserError
from fmn.models.headers import TensorHeader, no_weights, read_json, tensor_headers
from fmn.store import machine
from fmn.tasks import task as tasks

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"
# Files that hold a vocabulary; the others only describe how to use it.
VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "bpe.codes",
)
_SUMMARY = 160  # characters of another library's error that fit into one line of ours
_MOST_LAYERS = 1000
_MOST_LABELS = 100_000
_LARGEST_SIZE = 2**31
# What a configuration says that changes no tensor's name or shape.
_NAMING = ("id2label", "label2id", "_name_or_path")
# Sizes as every configuration answers to them, whatever it calls them in its file.
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "num_labels",
)


class Names(NamedTuple):
    """The stored name of every encoder tensor by its name in the base model, and of every head tensor by its name in
    AutoModelForSequenceClassification."""

    encoder: dict[str, str]
    head: dict[str, str]


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and names


def load_config(folder: Path) -> "PretrainedConfig":
    """The configuration in a checkpoint folder; UserError where it is absurd or needs code of its own."""
    read_config(folder)
    from transformers import AutoConfig

    try:
        with quiet("transformers"):
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # each configuration validates itself in its own way
        told = f"{folder / CONFIG}: cannot be used: {_summary(error)}"
        raise machine.refusal(error, folder) or UserError(told) from error
    for name in _SIZES:
        value = getattr(config, name, None)
        # Some architectures have no segments, and say so with a size of zero.
        least = 0 if name == "type_vocab_size" else 1
        if isinstance(value, int) and value < least:
            raise UserError(f"{folder / CONFIG}: {name} is {value}; it must be at least {least}")
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands, refused where even reading it with Transformers could run code or take all memory."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if CONFIG not in names:
        raise UserError(
            f"{folder}: {no_checkpoint(names)}" if folder.is_dir() else f"{folder}: no such folder"
        )
    if "adapter_config.json" in names:  # Transformers would apply it to the weights
        raise UserError(
            f"{folder}: holds a PEFT adapter beside a model; keep only one of them, `fmn fetch` copies the model"
        )
    raw = read_json(folder / CONFIG)

    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING_NAMES:
        if "auto_map" in raw:
            raise UserError(
                f"{folder}: {CONFIG} points to code of its own (auto_map), which is never run;"
                " choose an architecture that Transformers knows"
            )
        named = (
            f"names the model_type {model_type!r:.40}, unknown to Transformers"
            if model_type
            else "has no model_type"
        )
        raise UserError(f"{folder}: {CONFIG} {named}; set it, for example to bert")
    if "quantization_config" in raw:
        raise UserError(
            f"{folder}: the weights are quantized (quantization_config); use a checkpoint in full precision"
        )
    for key, value in _items(raw):
        if "_implementation" in key and isinstance(value, str) and re.search(r"[^\w]", value):
            raise UserError(
                f"{folder}: {CONFIG} asks for code from elsewhere ({key}: {value:.80}), which is never run"
            )
        if isinstance(value, int) and not isinstance(value, bool):
            most = (
                _MOST_LAYERS
                if re.search(r"layers?$|blocks$|groups?$|inner_group_num$", key)
                else _LARGEST_SIZE
            )
            most = _MOST_LABELS if key.endswith("num_labels") else most
            if abs(value) > most:
                raise UserError(
                    f"{folder}: {CONFIG} has {key} = {value!s:.40}, beyond anything real ({most})"
                )
    layers = math.prod(
        n
        for name in ("num_hidden_groups", "inner_group_num")
        if isinstance(n := raw.get(name, 1), int)
    )
    if layers > _MOST_LAYERS:
        raise UserError(
            f"{folder}: {CONFIG} has {layers} layers in groups, beyond anything real ({_MOST_LAYERS})"
        )
    return raw


def no_checkpoint(names: Iterable[str]) -> str:
    """What a folder with these names, which has no config.json, is instead: the end of a message."""
    if "adapter_config.json" in names:
        return no_weights(names)
    if "merge.json" in names:
        return "is a merged model; give one of its folders: encoder, or tasks/TASK"
    return f"has no {CONFIG}; give the folder or repository of a Transformers checkpoint"


def _items(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value inside a JSON value, with the keys that lead to it, joined by dots."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _items(value, f"{path}.{name}" if path else name)
    elif isinstance(content, list):
        for value in content:
            yield from _items(value, path)
    else:
        yield path, content


@contextlib.contextmanager
def quiet(library: str) -> Iterator[None]:
    """Keep a library's warnings from the terminal."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Keep the progress bars of Transformers from the terminal."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _summary(error: BaseException) -> str:
    return " ".join(str(error).split())[:_SUMMARY] or type(error).__name__


def encoder_names(config: "PretrainedConfig", names: Iterable[str]) -> Names:
    """Split a checkpoint's stored names into encoder and head, whether or not they carry the base model's prefix.

    Buffers and the heads of pretraining (``cls.*``, ``lm_head.*``) are in neither, nor is a pooler that the classifier
    does not use. UserError for a tensor that is there with and without the prefix.
    """
    return _split(*_skeleton(config, config.model_type), names)


def _split(encoder: Iterable[str], head: Iterable[str], prefix: str, names: Iterable[str]) -> Names:
    known, heads = set(encoder), set(head)
    split = Names({}, {})
    for stored in names:
        name = stored.removeprefix(prefix)
        if name in known or stored in known:
            name = name if name in known else stored
            if name in split.encoder:
                raise UserError(
                    f"the checkpoint holds {split.encoder[name]} and {stored}, which are the same tensor"
                )
            split.encoder[name] = stored
        elif stored in heads:
            split.head[stored] = stored
    return split


def check_tensors(
    folder: Path, config: "PretrainedConfig", *, head: bool
) -> tuple[Names, dict[str, TensorHeader]]:
    """Compare the tensors of a folder with the model that its configuration describes; ``head``: it must have one."""
    headers = tensor_headers(folder)
    encoder, heads, prefix = _skeleton(config, str(folder))
    try:
        names = _split(encoder, heads, prefix, headers)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    for name, stored in (names.encoder | (names.head if head else {})).items():
        shape, stated = headers[stored].shape, (encoder | heads)[name]
        if shape != stated:
            raise UserError(
                f"{folder}: {stored} has shape {shape}, but {CONFIG} makes it {stated}; one of them is wrong"
            )
    used = {*names.encoder.values(), *names.head.values()}
    families = {_family(name) for name in encoder}
    for stored in headers:
        if (
            stored not in used
            and stored.removeprefix(prefix) not in encoder
            and _family(stored.removeprefix(prefix)) in families
        ):
            raise UserError(
                f"{folder}: has {stored}, but {CONFIG} describes fewer layers; one of them is wrong"
            )
    # A classifier may make a pooler of its own when it is fine-tuned, as it makes a head.
    absent = [
        name
        for name in encoder
        if name not in names.encoder and (head or not name.startswith("pooler."))
    ]
    if absent:
        raise UserError(
            f"{folder}: has no {absent[0]}, but {CONFIG} describes it; one of them is wrong"
        )
    if head and (absent := [name for name in heads if name not in names.head]):
        raise UserError(
            f"{folder}: has no classification head ({absent[0]}); fine-tune it first, `fmn finetune`"
        )
    return names, headers


_Skeleton = tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], str]
_skeletons: dict[str, _Skeleton] = {}


def _skeleton(config: "PretrainedConfig", where: str) -> _Skeleton:
    """Shapes of the encoder (base model names) and of the head of the classifier that a configuration describes, and
    the prefix that the encoder has in it. Built without memory for weights, once for experts of one shape."""
    import torch
    from transformers import AutoModelForSequenceClassification

    described = {key: value for key, value in config.to_dict().items() if key not in _NAMING}
    key = json.dumps([described, config.num_labels], sort_keys=True, default=str)
    if key in _skeletons:
        return _skeletons[key]
    try:
        with quiet("transformers"), torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except Exception as error:  # each architecture refuses sizes in its own way
        raise UserError(
            f"{where}: {CONFIG} describes no text classifier that can be built: {_summary(error)}"
        ) from error
    prefix = f"{model.base_model_prefix}."
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    shapes = {
        name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied
    }
    encoder = {
        name.removeprefix(prefix): shape
        for name, shape in shapes.items()
        if name.startswith(prefix)
    }
    head = {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}
    _skeletons[key] = encoder, head, prefix
    return _skeletons[key]


def _family(name: str) -> str:
    """A tensor's name with its layer numbers left out."""
    return re.sub(r"(?<![^.])\d+(?=\.)", "#", name)


# ---------------------------------------------------------------------------------------------------------------------
# Checking experts against each other


def check_experts(experts: Mapping[str, Path], base: Path | None = None) -> None:
    """Refuse experts that cannot be merged, before anything expensive is done, from headers and small files alone.

    All must have the architecture, sizes, encoder tensors and vocabulary of the base (or of the first expert), and each
    a head that fits its task. UserError with one line that names the task, the folder and what differs.

    Args:
        experts: checkpoint folders by task name.
        base: the folder that they were fine-tuned from, where it is known.
    """
    folders = {"the base": base} if base is not None else {}
    folders |= {tasks.task(name).name: path for name, path in experts.items()}
    if not experts:
        raise UserError("no experts were given; name at least one, TASK=DIR")
    first: _Candidate | None = None
    for who, folder in folders.items():
        try:
            config = load_config(folder)
            names, headers = check_tensors(folder, config, head=who in tasks.TASKS)
            vocabulary = load_tokenizer(folder).get_vocab()
        except UserError as error:
            raise UserError(f"{who}: {error}") from error
        if who in tasks.TASKS:
            check_head(folder, config, tasks.task(who))
        if max(vocabulary.values(), default=-1) >= config.vocab_size:
            raise UserError(
                f"{who}: {folder}: the tokenizer has token ids up to {max(vocabulary.values())}, the model only"
                f" {config.vocab_size} embeddings; take the tokenizer files of the model's own checkpoint"
            )
        shapes = {name: headers[stored].shape for name, stored in names.encoder.items()}
        candidate = _Candidate(who, folder, config, shapes, vocabulary)
        first = first or candidate
        if difference := _difference(candidate, first):
            raise UserError(
                f"{who}: {folder} and {first.who} ({first.folder}) were not fine-tuned from one base: {difference};"
                " choose experts of the same base model"
            )


def check_head(folder: Path, config: "PretrainedConfig", task: tasks.Task) -> None:
    """Refuse a head that has not one output for each label of the task; `fmn.labels` finds which is which."""
    if config.num_labels != task.num_outputs:
        raise UserError(
            f"{task.name}: {folder} has a head of {config.num_labels} outputs, the task needs {task.num_outputs};"
            " give an expert of this task"
        )


class _Candidate(NamedTuple):
    who: str
    folder: Path
    config: Any
    shapes: dict[str, tuple[int, ...]]
    vocabulary: dict[str, int]


def _difference(one: _Candidate, other: _Candidate) -> str | None:
    """What keeps two checkpoints from being merged, in words, or None."""
    for name in ("model_type", *(size for size in _SIZES if size != "num_labels"), "hidden_act"):
        values = [getattr(candidate.config, name, None) for candidate in (one, other)]
        if values[0] != values[1]:
            return f"{name} is {values[0]}, not {values[1]}"
    for name in sorted({*one.shapes, *other.shapes}):
        shapes = [candidate.shapes.get(name, "absent") for candidate in (one, other)]
        if shapes[0] != shapes[1]:
            return f"{name} is {shapes[0]}, not {shapes[1]}"
    if one.vocabulary != other.vocabulary:
        token = min(token for token, _ in one.vocabulary.items() ^ other.vocabulary.items())
        places = [candidate.vocabulary.get(token, "absent") for candidate in (one, other)]
        return f"the token {token!r:.40} is {places[0]} in the vocabulary, not {places[1]}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a checkpoint folder. One without a padding token pads with its end of text."""
    from transformers import AutoTokenizer

    read_config(folder)
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise UserError(f"{folder}: has no tokenizer files; copy those of its base model into it")
    try:
        with quiet("transformers"):
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # the libraries below raise what they like on a broken file
        told = f"{folder}: its tokenizer files cannot be used: {_summary(error)}"
        raise machine.refusal(error, folder) or UserError(told) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"{folder}: its tokenizer has neither a padding nor an end token; set pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(folder: Path) -> "PreTrainedModel":
    """The classifier in a checkpoint folder (or a task's folder in a merged model), in float32 and evaluation mode.

    Every weight comes from the folder: one that the model needs and the folder lacks is a UserError.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    config = load_config(folder)
    check_tensors(folder, config, head=True)
    if (
        config.pad_token_id is None
    ):  # a batch of unequal lengths needs one to find where each text ends
        config.pad_token_id = load_tokenizer(folder).pad_token_id
    try:
        with quiet("transformers"), no_bars():
            model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise machine.refusal(error, folder) or UserError(
            f"{folder}: cannot be loaded: {_summary(error)}"
        ) from error
    return model.eval()
