"""Embedding models in the format of Sentence Transformers: encoder, pooling, normalisation."""

import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fmn.errors import UserError
from fmn.models.checkpoints import EMBEDDING_FILES, finite
from fmn.store.headers import WEIGHTS, first_words, json_value, read_json, write_json

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
TEXT_SETTINGS = "sentence_bert_config.json"
POOLING = "1_Pooling/config.json"
_PLACES = re.compile(
    "Transformer: Pooling:1_Pooling( Dense:2_Dense( Dense:3_Dense)?)?( Normalize:[2-4]_Normalize)?"
)
_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")


class Modules(NamedTuple):
    """The steps of an embedding model after its encoder; merged experts must have the same.

    Not among them are dense layers, which belong to each task, like a classifier's head.

    Attributes:
        pooling: the modes; the embeddings of several modes are concatenated.
        normalise: whether embeddings are scaled to the length 1.
        prompt: a text that is put before every text.
        prompts: other such texts, by name, which users can choose.
    """

    pooling: tuple[str, ...] = ("mean",)
    normalise: bool = False
    prompt: str = ""
    prompts: tuple[tuple[str, str], ...] = ()


def _mean(states: Tensor, mask: Tensor, power: float = 1.0) -> Tensor:
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9) ** power


def _weighted_mean(states: Tensor, mask: Tensor) -> Tensor:
    """The mean with weights that rise by one from token to token."""
    return _mean(states, mask * torch.arange(1, mask.shape[1] + 1).to(mask)[:, None])


def _maximum(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(mask == 0, float("-inf")).amax(1)


def _last_token(states: Tensor, mask: Tensor) -> Tensor:
    last = mask[..., 0].sum(1).long() - 1  # [B]
    return states[torch.arange(len(states), device=states.device), last]


POOLINGS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": lambda states, _: states[:, 0],
    "max": _maximum,
    "mean": _mean,
    "mean_sqrt_len_tokens": partial(_mean, power=0.5),
    "weightedmean": _weighted_mean,
    "lasttoken": _last_token,
}
"""From states [B, T, D] and a mask [B, T, 1], padded on the right, to embeddings [B, D]."""
_OLD_KEYS = {  # older files have a truth value for each mode
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def pooled(states: Tensor, mask: Tensor, modes: tuple[str, ...]) -> Tensor:
    """The embedding [B, D times modes] of the states [B, T, D] of the tokens in a mask [B, T]."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    return torch.cat([POOLINGS[mode](states, mask[..., None].to(states)) for mode in modes], -1)


class SentenceEncoder(nn.Module):
    """An encoder that gives two embeddings of each text, [B, D].

    `logits` has the length 1: with this name for it, statistics and merges need not know of
    embeddings. `sentence_embedding` is what SentenceTransformer gives.
    """

    base_model_prefix = "encoder"

    def __init__(self, encoder: PreTrainedModel, modules: Modules, folder: Path) -> None:
        super().__init__()
        self.encoder, self.modules_read, self.folder = encoder, modules, folder
        self.dense = read_dense(folder)

    @property
    def base_model(self) -> PreTrainedModel:
        return self.encoder

    @property
    def config(self) -> Any:
        return self.encoder.config

    def set_attn_implementation(self, name: str) -> None:
        self.encoder.set_attn_implementation(name)

    def can_generate(self) -> bool:
        return False

    def forward(self, **inputs: Tensor) -> SimpleNamespace:
        states = self.encoder(**inputs).last_hidden_state  # [B, T, D]
        own = self.dense(pooled(states, inputs["attention_mask"], self.modules_read.pooling))
        unit = nn.functional.normalize(own, dim=-1)
        embedding = unit if self.modules_read.normalise else own
        return SimpleNamespace(logits=unit, sentence_embedding=embedding)

    def save_pretrained(self, folder: Path, **options: Any) -> None:
        """Write the model as Transformers does, with the files that make it an embedding model."""
        self.encoder.save_pretrained(folder, **options)
        for name in EMBEDDING_FILES:
            if (self.folder / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(self.folder / name, folder / name)
        for path, layer in self.dense.named_children():
            tensors = {
                f"linear.{name}": tensor
                for name, tensor in layer.get_submodule("0").state_dict().items()
            }
            save_file(tensors, folder / path / WEIGHTS, {"format": "pt"})


def sentence_encoder(encoder: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Load the embedding model in a folder around its encoder, which is already loaded.

    Raises:
        UserError: it has a decoder, or as `read_modules` does.
    """
    if encoder.config.is_encoder_decoder:
        raise _refused(folder / "config.json", "the model has a decoder", "give another model")
    model = SentenceEncoder(encoder, read_modules(folder), folder)
    width = encoder.config.hidden_size * len(model.modules_read.pooling)
    for path, layer in model.dense.named_children():
        weight = layer.get_parameter("0.weight")
        if weight.shape[1] != width:
            problem = f"it takes {weight.shape[1]} numbers, and what is before it gives {width}"
            raise UserError(f"{folder / path}: {problem}; save the model again")
        width = weight.shape[0]
    # It has the methods of a Transformers model that fmn calls.
    return cast("PreTrainedModel", model.eval())


def notes(folder: Path) -> list[str]:
    """Notes about an embedding model, for the user. Raises as `read_modules` and `read_dense`."""
    read_modules(folder)
    read_dense(folder)
    if (folder / MODULES).is_file():
        return []
    return [f"it has no {MODULES}: its embedding is the plain mean over the tokens"]


def read_modules(folder: Path) -> Modules:
    """Read the steps of the embedding model in a folder.

    Without `modules.json` it is the mean over tokens, as for SentenceTransformer.

    Raises:
        UserError: it does something that fmn does not, or a file is damaged.
    """
    try:
        return _modules(folder)
    except (AttributeError, TypeError) as error:  # the files may hold anything
        problem = f"{MODULES} and its settings are not as SentenceTransformer writes them"
        raise UserError(f"{folder}: {problem} ({error!s:.80}); save the model again") from error


def _modules(folder: Path) -> Modules:
    settings = _read(folder, SETTINGS)
    if not (folder / MODULES).is_file():
        first = str((_read(folder, "config.json").get("architectures") or [""])[0])
        if first.endswith("ForCausalLM"):  # SentenceTransformer would take the last token's state
            problem = f"a {first} without {MODULES} has no embedding of its own"
            raise UserError(f"{folder}: {problem}; save it with SentenceTransformer")
        return Modules()
    modules = _listed(folder)
    places = " ".join(f"{kind}:{path}" for kind, path in modules)
    if not _PLACES.fullmatch(places):
        names = ", ".join(f"{kind} in {path or '.'}" for kind, path in modules)
        known = "Transformer, Pooling in 1_Pooling, perhaps one or two Dense, perhaps Normalize"
        raise _refused(folder / MODULES, f"its modules are {names:.200}", f"give one of {known}")
    is_normalised = modules[-1][0] == "Normalize"
    if settings.get("truncate_dim") is not None:
        raise _refused(folder / SETTINGS, "truncate_dim cuts embeddings", "leave it out")
    text = _read(folder, TEXT_SETTINGS)
    for _, path in modules[2:]:
        own = _read(folder, f"{path}/config.json")
        names_read = {own.get(f"module_{end}_name") for end in ("input", "output")}
        if not names_read <= {None, "sentence_embedding"}:
            raise _refused(folder / path, "it is of tokens", "give another model")
    methods = {each.get("method") for each in text.get("modality_config", {}).values()}
    is_encoder = text.get("transformer_task", "feature-extraction") == "feature-extraction"
    if not is_encoder or not methods <= {"forward"}:
        raise _refused(folder / TEXT_SETTINGS, "it is of no text encoder", "give another model")
    prompts = {name: str(prompt) for name, prompt in (settings.get("prompts") or {}).items()}
    default = prompts.get(settings.get("default_prompt_name") or "", "")
    pooling = _pooling(folder / POOLING, is_prompted=bool(default))
    named = tuple(sorted((name, prompt) for name, prompt in prompts.items() if prompt))
    return Modules(pooling, is_normalised, default, named)


def _listed(folder: Path) -> list[tuple[str, Any]]:
    """The modules in a folder's `modules.json`, as (kind, path)."""
    listed = [(each.get("type"), each.get("path")) for each in json_value(folder / MODULES)]
    return [(str(kind).rpartition(".")[2], path) for kind, path in listed]


def read_dense(folder: Path) -> nn.Sequential:
    """The dense layers of the embedding model in a folder, by the names of their folders.

    Raises:
        UserError: one has an unknown activation, or weights that do not fit its settings.
    """
    layers = nn.Sequential()
    listed = _listed(folder) if (folder / MODULES).is_file() else []
    for path in (path for kind, path in listed if kind == "Dense"):
        file, settings = folder / path / WEIGHTS, read_json(folder / path / "config.json")
        place, _, activation = str(settings.get("activation_function", "torch.Tanh")).rpartition(
            "."
        )
        # SentenceTransformer takes Tanh for another library's, with a warning.
        if (
            activation not in _ACTIVATIONS
            or not f"{place}.".startswith("torch.")
            or settings.get("use_residual")
        ):
            problem = f"the activation {activation:.40} or a residual connection"
            raise _refused(folder / path, problem, f"give a model with {', '.join(_ACTIVATIONS)}")
        try:
            width, size = (int(settings[name]) for name in ("in_features", "out_features"))
            linear = nn.Linear(width, size, bias=settings.get("bias", True))
            tensors = load_file(file)
            linear.load_state_dict({n.removeprefix("linear."): t for n, t in tensors.items()})
        except (KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            problem = f"its weights do not fit its config.json: {first_words(error)}"
            raise UserError(f"{file}: {problem}; save the model again") from error
        if not all(map(finite, linear.parameters())):
            raise UserError(f"{file}: it holds NaN or Inf; save the model again")
        layers.add_module(path, nn.Sequential(linear, getattr(nn, activation)()))
    return layers


def leave_out_dense(folder: Path) -> None:
    """Remove the dense layers from an embedding model's folder."""
    if not (folder / MODULES).is_file():
        return
    modules = json_value(folder / MODULES)
    dense = [path for kind, path in _listed(folder) if kind == "Dense"]
    for path in dense:
        shutil.rmtree(folder / path)
    if dense:
        write_json(folder / MODULES, [each for each in modules if each["path"] not in dense])


def _pooling(path: Path, is_prompted: bool) -> tuple[str, ...]:
    """The modes in the settings of a pooling."""
    settings = read_json(path)
    modes = settings.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _OLD_KEYS.items() if settings.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if unknown := [mode for mode in modes if mode not in POOLINGS]:
        raise _refused(path, f"unknown pooling {unknown[0]!r:.40}", "give another model")
    if is_prompted and not settings.get("include_prompt", True):
        raise _refused(path, "the default prompt is left out of the pooling", "give another model")
    return tuple(modes)


def set_up_tokenizer(tokenizer: Any, folder: Path, config: Any) -> None:
    """Set a tokenizer's limit of tokens and prompt as SentenceTransformer does.

    Its `model_max_length` is the most tokens of a text, its `prompt` what texts begin with.

    Raises:
        UserError: texts are to be in small letters, and the tokenizer does not see to that.
    """
    settings = _read(folder, TEXT_SETTINGS) if (folder / MODULES).is_file() else {}
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or -1]
    longest = settings.get("max_seq_length") or min(each for each in limits if each > 0)
    tokenizer.model_max_length = int(longest)
    tokenizer.prompt = read_modules(folder).prompt
    if settings.get("do_lower_case") and tokenizer.tokenize("A") != tokenizer.tokenize("a"):
        raise _refused(
            folder / TEXT_SETTINGS, "do_lower_case", "set it in tokenizer_config.json instead"
        )


def check_agreement(folders: Mapping[str, Path]) -> None:
    """Raise a UserError if embedding models, by task, need different encoders.

    Raises:
        UserError: their pooling, normalisation or prompts differ.
    """
    modules = {task: read_modules(folder) for task, folder in folders.items()}
    first = next(iter(modules), "")
    for task, own in modules.items():
        for name, value, other in zip(Modules._fields, own, modules[first], strict=True):
            if value != other:
                raise UserError(
                    f"{task}: {folders[task]} and {folders[first]} cannot be merged: {name} is"
                    f" {_words(value)}, not {_words(other)}; choose models that agree, or tune one"
                    " again"
                )


def _words(value: Any) -> str:
    return " and ".join(map(str, value)) or "none" if isinstance(value, tuple) else repr(value)


def _read(folder: Path, name: str) -> dict[str, Any]:
    """The content of a JSON file of settings; empty if the file does not exist."""
    return read_json(folder / name) if (folder / name).is_file() else {}


def _refused(path: Path, problem: str, remedy: str) -> UserError:
    return UserError(f"{path}: {problem}, which fmn does not know of embedding models; {remedy}")
