"""The forms in which people keep checkpoints: addresses, folders, and entries of config.json.

Usable forms are converted to the form that the rest of the package reads. For the others,
`no_checkpoint` and `no_weights` return a message with the form and a remedy.
"""

import os
import re
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from fmn.errors import UserError
from fmn.models import checkpoints
from fmn.models.checkpoints import CONFIG
from fmn.store import artifacts
from fmn.store.headers import PICKLED, WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_CONFIGS = (f"/{CONFIG}", f"/{ADAPTER_CONFIG}")
_HUB_HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
_HUB_PATH = re.compile(
    r"(?!datasets/|spaces/)([\w.-]+(?:/[\w.-]+)??)(?:/(tree|blob|resolve)/([^/]+)(/.+)?)?"
)

# By file name: what a folder without usable weights holds, and what the user can do.
_UNUSABLE: Mapping[str, str] = {
    r"(.*/)?(global_step\d+/|zero_to_fp32\.py$|mp_rank_\d+_|(bf16_)?zero_pp_rank_)": (
        "holds DeepSpeed's shards of a model; run `python zero_to_fp32.py . OUT"
        " --safe_serialization` in it, and put the configuration and tokenizer into OUT"
    ),
    r"(.*/)?(pytorch_model_fsdp_\d+/|.*\.distcp$)": (
        "holds FSDP's shards of a model; run `accelerate merge-weights` on it, and put the"
        " configuration and tokenizer beside the result"
    ),
    r"pytorch_model\.bin/": (
        "has a folder pytorch_model.bin, as zero_to_fp32.py writes it; move its files up"
    ),
    r"adapter_model\.": f"has an adapter's weights without its {ADAPTER_CONFIG}; get that too",
    r"consolidated.*\.(pth|safetensors)$": (
        "holds weights in their author's own format; take the version for Transformers"
    ),
    r".*\.gguf$": "holds a GGUF file, which is for inference; take the model that it was made from",
    r"(tf_model.*\.h5|.*\.ckpt.*|flax_model.*\.msgpack)$": (
        "holds weights of TensorFlow or Flax alone; take a version with safetensors"
    ),
    r"(.*/)?.*\.(onnx|mlmodel|tflite)$|openvino_model": (
        "holds an exported model, which is for inference; take the model that it was made from"
    ),
    r"(model|pytorch_model)\.\w+\.(safetensors|bin)$": (
        "has weights of a variant alone ({name}); rename the file to model.safetensors or"
        " pytorch_model.bin to use it"
    ),
    r".*\.safetensors$": "has no model.safetensors but {name}; rename it if that is the model",
}


# ---------------------------------------------------------------------------------------------
# Addresses and folders


def address(source: str) -> str:
    """A source as fmn writes it: ``https://`` addresses of the Hub and ``file://`` become short.

    Examples:
        >>> address("https://huggingface.co/org/name/tree/v2")
        'hf://org/name@v2'
        >>> address("file:///models/bert")
        '/models/bert'

    Raises:
        UserError: it is an address of another site, or of no model.
    """
    parts = urlsplit(source)
    if parts.scheme == "file":
        return unquote(parts.path)
    if parts.scheme not in ("http", "https"):
        return source
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", ""))
    match = _HUB_PATH.fullmatch(parts.path.strip("/").removesuffix(".git"))
    if parts.netloc not in {*_HUB_HOSTS, endpoint.netloc} or not match:
        raise UserError(f"{source}: not the address of a model on the Hub; write hf://org/name")
    repo, kind, revision, path = match.groups()
    path = unquote(path or "")
    folder = path if kind == "tree" else path.rpartition("/")[0]
    return f"hf://{repo}{folder}" + (f"@{unquote(revision)}" if revision else "")


def checkpoint_folder(folder: Path) -> Path:
    """The folder of a checkpoint; for a repository in the Hub's cache, that of its only snapshot.

    Raises:
        UserError: there is no such folder, or the cache has several snapshots and no main.
    """
    if folder.is_file():
        raise UserError(f"{folder}: is a file; give the folder that holds it")
    if not folder.is_dir():
        raise UserError(f"{folder}: {artifacts.absent(folder)}; of the Hub, write hf://org/name")
    snapshots = folder / "snapshots"
    if not (folder.name.startswith("models--") and snapshots.is_dir()):
        return folder
    with suppress(OSError):
        main = snapshots / (folder / "refs" / "main").read_text().strip()
        if main.is_dir():
            return main
    choices = sorted(path.name for path in snapshots.iterdir() if path.is_dir())
    if len(choices) != 1:
        names = ", ".join(choices) or "none"
        raise UserError(f"{folder}: snapshots {names} are in the cache; give the folder of one")
    return snapshots / choices[0]


def names_below(folder: Path) -> frozenset[str]:
    """The files in a folder, and in the folders in it, as paths relative to it."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    for inner in folder.iterdir():
        with suppress(OSError):  # not a folder, or one that may not be read
            names |= {f"{inner.name}/{path.name}" for path in inner.iterdir()}
    return frozenset(names)


# ---------------------------------------------------------------------------------------------
# What cannot be used


def no_checkpoint(names: Set[str]) -> str:
    """The end of a message about a place with these files that has no configuration."""
    if "merge.json" in names:
        return checkpoints.no_checkpoint(names)
    folders = sorted({name.partition("/")[0] for name in names if name.endswith(_CONFIGS)})
    inner = [name for name in folders if not re.fullmatch(r"\d+_(Pooling|Dense|Normalize)", name)]
    inner.sort(key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split("-")])
    if len(inner) > 1 and all(name.startswith("checkpoint-") for name in inner):
        return f"holds the checkpoints of a training run: {', '.join(inner)}; give one of them"
    if inner:
        if len(inner) == 1:
            return f"has no {CONFIG}, but {inner[0]} has; give that folder"
        return f"has no {CONFIG}, but {', '.join(inner[:12])} have; give one of these folders"
    has_weights = WEIGHTS in names or PICKLED in names
    return (not has_weights and _unusable(names)) or checkpoints.no_checkpoint(names)


def no_weights(names: Iterable[str]) -> str:
    """The end of a message about a place with these files that has no weights to read."""
    neither = f"has neither {WEIGHTS} nor {PICKLED}; save it with `save_pretrained`"
    return _unusable(names) or neither


def _unusable(names: Iterable[str]) -> str | None:
    names = sorted(names)
    for pattern, message in _UNUSABLE.items():
        for name in names:
            if re.match(pattern, name):
                return message.format(name=name)
    return None


# ---------------------------------------------------------------------------------------------
# Entries of config.json

# Entries that describe how the author ran the model, not the model itself.
_MACHINE = re.compile(
    r"_?attn_implementation(_internal|_autoset)?|use_flash_attn|use_flash_attention_2?"
    r"|_experts_implementation|device_map"
)
# Entries that mean nothing with these values; Transformers fails on them.
_EMPTY: Mapping[str, tuple[Any, ...]] = {
    "architectures": ("", [], {}, [None], [""]),
    "dtype": ("", [], {}, "auto"),
    "torch_dtype": ("", [], {}, "auto"),
    "id2label": ("", [], {}),
    "label2id": ("", [], {}),
    "problem_type": ("", [], {}),
    **dict.fromkeys(("num_labels", "use_cache", "tie_word_embeddings", "return_dict"), (None, "")),
}


def tidy(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Remove entries of a configuration that are valid only on its author's machine, or empty.

    Returns:
        the configuration, and what the user should know of the changes.
    """
    notes: list[str] = []
    content = _tidy_entries(config, notes)
    if not content.get("model_type") and (model_type := _model_type(content)):
        content["model_type"] = model_type
        notes.append(f"config.json has no model_type; as its architectures say, it is {model_type}")
    names, ids = content.get("id2label"), content.get("label2id")
    if isinstance(names, dict) and isinstance(ids, dict):
        wrong = [n for i, n in names.items() if isinstance(n, str) and str(ids.get(n, i)) != str(i)]
        if wrong:
            notes.append(
                f"config.json contradicts itself: label2id has {wrong[0]!r:.40} for another output"
                " than id2label, which counts"
            )
    return content, notes


def _tidy_entries(config: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in config.items():
        # Code from elsewhere, such as "someone/kernel", stays and is refused later.
        is_code = isinstance(value, str) and re.search(r"\W", value)
        if _MACHINE.fullmatch(name) and not is_code:
            if value not in (None, False, "eager", "sdpa"):
                notes.append(f"config.json asks for {name} = {value}; that is not taken over")
        elif value in _EMPTY.get(name, ()):
            notes.append(f"config.json has {name} = {value!r}; that is left out")
        elif re.fullmatch(r"(pad|bos|eos|sep|cls|mask)_token_id", name) and _is_negative(value):
            notes.append(f"config.json has {name} = {value}; that is left out")
        elif name in ("dtype", "torch_dtype") and isinstance(value, str):
            content[name] = value.removeprefix("torch.")
        elif name == "architectures" and isinstance(value, str):
            content[name] = [value]
        elif isinstance(value, dict) and name.endswith("_config"):
            content[name] = _tidy_entries(value, notes)
        else:
            content[name] = value
    return content


def _is_negative(value: Any) -> bool:
    return isinstance(value, int) and value < 0


def _model_type(config: Mapping[str, Any]) -> str | None:
    """The model type of the class that a configuration without one names."""
    model_class = architecture(config.get("architectures"))
    return getattr(getattr(model_class, "config_class", None), "model_type", None)


def architecture(names: Any) -> "type[PreTrainedModel] | None":
    """The class of Transformers that `architectures` in a configuration names; None for others."""
    import transformers

    name = names[0] if isinstance(names, list) and len(names) == 1 else ""
    if not (isinstance(name, str) and name.isidentifier()):
        return None
    with suppress(AttributeError, ImportError):
        value = getattr(transformers, name)
        if isinstance(value, type) and issubclass(value, transformers.PreTrainedModel):
            return value
    return None
