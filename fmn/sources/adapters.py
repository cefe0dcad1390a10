"""Merge a LoRA adapter into its base, to get a full model.

PEFT computes it (Hu et al., 2022, https://arxiv.org/abs/2106.09685): ``W + scale * B A`` for every
adapted matrix; trained biases and whole modules replace those of the base. Every tensor of an
adapter is used; otherwise the adapter is refused.
"""

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from copy import deepcopy
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn.errors import UserError
from fmn.models import checkpoints, loading
from fmn.models.checkpoints import CONFIG, SMALL_FILES, TOKENIZER_FILES, VOCABULARY_FILES
from fmn.sources import forms, names, weights
from fmn.sources.forms import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from fmn.store.headers import TensorHeader, file_headers, first_words, read_json, tensor_headers

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PretrainedConfig, PreTrainedModel

# The Auto class for what PEFT calls the type of task.
_AUTO_CLASSES: Mapping[str, str] = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "FEATURE_EXTRACTION": "MODEL_MAPPING",
}
# Settings of LoRA with which an adapter changes more than its base's weights.
_UNSUPPORTED: Mapping[str, str] = {
    "alora_invocation_tokens": "is active for a part of a text only",
    "layer_replication": "repeats layers of its base",
    "use_qalora": "belongs to quantized weights",
    "megatron_config": "belongs to a model of Megatron",
    "arrow_config": "chooses among adapters for each token",
}
# These begin from changed weights of the base, which an adapter alone does not tell; those of PiSSA
# and OLoRA follow from the base.
_CHANGED_BASES = ("loftq", "corda", "lora_ga", "pissa_niter")
_MODEL = "base_model.model."  # how PEFT's names of an adapter's tensors begin


def choose(files: frozenset[str]) -> list[str]:
    """The file of an adapter's weights; a pickled file only if there is no other.

    Raises:
        UserError: there are no weights of an adapter, or a full model is beside the adapter.
    """
    try:
        beside: list[str] = weights.choose(files)
    except UserError:
        beside = []
    if beside or "model.safetensors.index.json" in files:
        raise UserError(
            f"holds a PEFT adapter beside a full model; move {ADAPTER_CONFIG} and"
            " adapter_model.safetensors into a folder of their own, and give the one that you mean"
        )
    for name in ADAPTER_WEIGHTS:
        if name in files:
            return [name]
    raise UserError(f"has {ADAPTER_CONFIG}, but no {ADAPTER_WEIGHTS[0]}; get that too")


def base_source(adapter: Path) -> str:
    """The source of the model that an adapter was trained on; "" if its files do not name one."""
    config = read_json(adapter / ADAPTER_CONFIG)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not name or not isinstance(name, str) or not name.isprintable():
        return ""
    if (Path(name) / CONFIG).is_file() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return name
    return f"hf://{name}" + (f"@{revision}" if revision else "")


def difference(base: Path, other: Path) -> str | None:
    """The first difference between the encoders of two checkpoints; None if they are equal.

    Values in two dtypes are the same if they round to the same in the narrower one.
    """
    import torch

    stored = [_encoder(folder) for folder in (base, other)]
    for name, (header, old) in stored[0].items():
        header_2, old_2 = stored[1].get(name, (None, ""))
        if header_2 is None:
            if "pooler" in name:
                continue
            return f"{name} is missing in one"
        if header.shape != header_2.shape:
            return f"{name} has shape {list(header.shape)}, there {list(header_2.shape)}"
        values = [names.tensor(header, old), names.tensor(header_2, old_2)]
        dtype = min((value.dtype for value in values), key=lambda dtype: dtype.itemsize)
        if not torch.equal(*(value.to(dtype) for value in values)):
            return f"{name} has other values"
    return None


def _encoder(folder: Path) -> dict[str, tuple[TensorHeader, str]]:
    """The tensors of a checkpoint's base model by their names there, with the stored names."""
    config = checkpoints.load_config(folder)
    model = names.layout(config, forms.architecture(config.architectures))
    tensors = {}
    for stored, header in tensor_headers(folder).items():
        name = stored.removeprefix(model.prefix)
        if name in model.base:
            tensors[name] = (header, stored)
    return tensors


# ---------------------------------------------------------------------------------------------
# The merge


def merge(adapter: Path, base: Path, out: Path, notes: list[str]) -> None:
    """Write the full model that an adapter makes of its base; adds notes.

    Args:
        adapter: a folder with the adapter's configuration and weights, and, where it has them, a
            tokenizer and the configuration of the model.
        base: the folder of the base model.
        out: an empty folder.

    Raises:
        UserError: PEFT is not installed; the adapter is of a kind that no weights stand for, does
            not fit the base, or lacks a part of the model, such as its head.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(f"{adapter}: is a LoRA adapter; `pip install peft`") from error
    raw = read_json(adapter / ADAPTER_CONFIG)
    if problem := _problem(raw):
        raise UserError(f"{adapter}: {problem}")
    _check_tokenizer(adapter, base)
    try:
        with checkpoints.quiet():
            tensors = _tensors(adapter)
            settings = peft.PeftConfig.from_pretrained(str(adapter))
            config = _config(adapter, base)
            model_class, renamed = _model_class(raw, adapter, config, tensors)
            _rename_targets(settings, tensors, renamed)
            tensors = {renamed[name]: tensor for name, tensor in tensors.items()}
            model = _base_model(model_class, config, base, tensors)
            merged = _merged(model, settings, tensors)
    except UserError as error:
        raise UserError(f"{adapter}: {error}") from error
    except Exception as error:  # PEFT raises many kinds of errors for an adapter that does not fit
        problem = f"does not fit the base {base}: {first_words(error)}"
        raise UserError(f"{adapter}: {problem}; give the base that it was trained on") from error
    _save(merged, adapter, base, out, notes)


def check_shapes(adapter: Path, base: Path) -> None:
    """Compare an adapter with its base, from configurations and headers alone.

    Raises:
        UserError: the adapter is of a kind that no weights stand for, or has other shapes.
    """
    raw = read_json(adapter / ADAPTER_CONFIG)
    if util.find_spec("peft") is None:
        raise UserError(f"{adapter}: is a LoRA adapter; `pip install peft`")
    if problem := _problem(raw):
        raise UserError(f"{adapter}: {problem}")
    if not (adapter / ADAPTER_WEIGHTS[0]).is_file():  # a pickle, which has no header
        return
    headers = file_headers(adapter / ADAPTER_WEIGHTS[0])
    clean, config = _clean_names(headers), _config(adapter, base)
    try:
        model_class, todays = _model_class(raw, adapter, config, dict.fromkeys(clean.values()))
    except UserError as error:
        raise UserError(f"{adapter}: {error}") from error
    shapes = names.layout(config, model_class).shapes
    for stored, name in clean.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", todays[name].removeprefix(_MODEL))
        weight = shapes.get(f"{match[1]}.weight", ()) if match else ()
        own = headers[stored].shape  # of A [r, in], of B [out, r]
        if match and len(weight) == 2 and own[match[2] == "A"] not in weight:
            raise UserError(
                f"{adapter}: {stored} has shape {list(own)}, and what it adapts in {base}"
                f" {list(weight)}; give the base that it was trained on"
            )


def _problem(raw: Mapping[str, Any]) -> str | None:
    """The reason in its configuration why an adapter cannot become a full model, or None."""
    import dataclasses

    import peft

    kind = str(raw.get("peft_type"))
    if kind != "LORA":
        return f"is an adapter of the kind {kind:.40}; only LoRA adapters become full models"
    for name, meaning in _UNSUPPORTED.items():
        if raw.get(name):
            return f"the adapter {meaning} ({name}); it does not become a full model"
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASES):
        return (
            f"the adapter starts from changed weights of its base (init_lora_weights {start});"
            " convert it to a plain LoRA adapter (`path_initial_model_for_weight_conversion` of"
            " `save_pretrained`)"
        )
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    unknown = sorted(name for name in raw.keys() - known if raw[name])
    if unknown:
        return f"{ADAPTER_CONFIG} has {unknown[0]!r:.60}, which this PEFT does not know; upgrade it"
    return None


def _tensors(adapter: Path) -> "dict[str, torch.Tensor]":
    """An adapter's tensors by the names that PEFT reads, without what wrappers left in them."""
    import torch
    from safetensors.torch import load_file

    file = next(adapter / name for name in ADAPTER_WEIGHTS if (adapter / name).is_file())
    if file.suffix == ".bin":
        stored = weights.unpickle(file)
    else:
        file_headers(file)  # raises an error of one line if a file is damaged
        stored = load_file(file)
    if not stored or any(tensor.numel() == 0 for tensor in stored.values()):
        raise UserError("has empty tensors, as DeepSpeed ZeRO-3 leaves them; save it again")
    tensors: dict[str, torch.Tensor] = {}
    for name, new in _clean_names(stored).items():  # PEFT writes some parameters under two names
        if new in tensors and not torch.equal(tensors[new], stored[name]):
            raise UserError(f"has two values of {new}; save the adapter again")
        tensors[new] = stored[name]
    return tensors


def _clean_names(stored: Iterable[str]) -> dict[str, str]:
    """The names that PEFT reads by stored name, without those of values that are replaced."""
    return {
        name: re.sub(r"\.(lora_\w+|modules_to_save)\.default(?=\.|$)", r".\1", clean)
        .replace(".modules_to_save.", ".")
        .removeprefix("module.")
        for name, clean in names.without_wrappers(stored).items()
        if ".original_module." not in clean  # the base's values, which a saved module replaces
    }


def _check_tokenizer(adapter: Path, base: Path) -> None:
    """Refuse an adapter whose tokenizer gives tokens other ids than that of the base."""
    has = [any((each / name).is_file() for name in VOCABULARY_FILES) for each in (adapter, base)]
    if not all(has):
        return
    config = checkpoints.load_config(base)
    own, other = (loading.read_tokenizer(folder, config).get_vocab() for folder in (adapter, base))
    for token in sorted(own.keys() & other.keys()):
        if own[token] != other[token]:
            raise UserError(
                f"{adapter}: its tokenizer has the token {token!r:.40} at {own[token]}, that of the"
                f" base {base} at {other[token]}; give the base that it was trained on"
            )


def _config(adapter: Path, base: Path) -> "PretrainedConfig":
    """The base's configuration, with the labels that lie beside the adapter."""
    config = deepcopy(checkpoints.load_config(base))
    if (adapter / CONFIG).is_file():
        own, _ = forms.tidy(read_json(adapter / CONFIG))
        for name in ("id2label", "label2id", "problem_type", "pad_token_id"):
            if (value := own.get(name)) is not None:
                value = {int(k): v for k, v in value.items()} if name == "id2label" else value
                setattr(config, name, value)
    return config


def _base_model(
    model_class: "type[PreTrainedModel]",
    config: "PretrainedConfig",
    base: Path,
    tensors: "dict[str, torch.Tensor]",
) -> "PreTrainedModel":
    """The base in the class that an adapter is for, in float32, with room for its vocabulary."""
    shapes = {name.removeprefix(_MODEL): tuple(value.shape) for name, value in tensors.items()}
    outputs = names.head_outputs(config, model_class, shapes)
    if outputs is not None and outputs != config.num_labels:
        config.num_labels = outputs
    model, missing = _loaded(model_class, base, config)
    if missing and all(name.startswith("pooler.") for name in missing):  # nothing uses the pooler
        model, missing = _loaded(model_class, base, config, add_pooling_layer=False)
    for name in sorted(missing):
        if _MODEL + name not in tensors:
            raise UserError(
                f"neither the adapter nor the base {base} has {name} of a {model_class.__name__};"
                " train the adapter again with it in modules_to_save"
            )
    _resize(model, tensors)
    return model


def _loaded(
    model_class: "type[PreTrainedModel]", base: Path, config: "PretrainedConfig", **options: Any
) -> "tuple[PreTrainedModel, set[str]]":
    """A base in float32, and the names of the parameters that it lacks."""
    import torch

    options |= {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    loaded: Any = model_class.from_pretrained(base, config=config, dtype=torch.float32, **options)
    return loaded[0], set(loaded[1]["missing_keys"])


def _resize(model: "PreTrainedModel", tensors: "Mapping[str, torch.Tensor]") -> None:
    """Give a model as many embeddings as the adapter was saved with."""
    embeddings = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is embeddings)
    endings = {".weight": 0, ".base_layer.weight": 0, ".lora_embedding_A": 1}
    for ending, dimension in endings.items():
        tensor = tensors.get(f"{_MODEL}{path}{ending}")
        if tensor is not None and tensor.shape[dimension] != embeddings.weight.shape[0]:
            model.resize_token_embeddings(tensor.shape[dimension], mean_resizing=False)
            return


def _model_class(
    raw: Mapping[str, Any],
    adapter: Path,
    config: "PretrainedConfig",
    tensors: Iterable[str],
) -> "tuple[type[PreTrainedModel], dict[str, str]]":
    """The class of Transformers that an adapter was trained on, and the names of its tensors."""
    from transformers.models.auto import modeling_auto

    candidates: list[type[PreTrainedModel]] = []
    own = read_json(adapter / CONFIG) if (adapter / CONFIG).is_file() else {}
    mapping = raw.get("auto_mapping")
    mapping = mapping if isinstance(mapping, dict) else {}
    for named in (own.get("architectures"), [mapping.get("base_model_class")]):
        model_class = forms.architecture(named)
        candidates += [model_class] if model_class else []
    if auto := _AUTO_CLASSES.get(str(raw.get("task_type"))):
        with suppress(KeyError):
            model_class = getattr(modeling_auto, auto)[type(config)]
            candidates.append(model_class[0] if isinstance(model_class, tuple) else model_class)
    candidates += [*names.classes(config.model_type)] if not candidates else []
    unknown = ""
    for model_class in candidates:
        renamed = _todays_names(tensors, names.layout(config, model_class))
        unknown = next((name for name, new in renamed.items() if not new), "")
        if not unknown:
            names.refuse_doubles(renamed)
            return model_class, renamed
    if not candidates:
        raise UserError("does not say for which class of models it is (task_type); set it")
    raise UserError(
        f"adapts {unknown.removeprefix(_MODEL)}, which a {candidates[-1].__name__} has not; give"
        " the base that it was trained on"
    )


def _todays_names(stored: Iterable[str], model: names.Layout) -> dict[str, str]:
    """Today's names of an adapter's tensors, by stored name.

    A module may have its name in an older version of Transformers, or that in the base model alone.
    A module that is unknown has the name "".
    """
    from transformers.core_model_loading import apply_renamings

    known = {*model.shapes, *(name.rpartition(".")[0] for name in model.shapes)}
    renamed = {}
    for name in stored:
        path = name.removeprefix(_MODEL)
        module = re.split(r"\.lora_|\.base_layer|\.token_adapter", path)[0]
        today = apply_renamings(f"{module}.weight", model.renamings).removesuffix(".weight")
        forms_of_name = (module, today, model.prefix + module, module.removeprefix(model.prefix))
        new = next((each for each in forms_of_name if each in known), None)
        renamed[name] = _MODEL + new + path[len(module) :] if new else ""
    return renamed


def _rename_targets(
    settings: "PeftConfig", stored: Iterable[str], renamed: Mapping[str, str]
) -> None:
    """Rename the modules in an adapter's settings if its Transformers had older names for them.

    Raises:
        UserError: other settings name modules too.
    """
    if all(renamed[name] == name for name in stored):
        return
    changed: Any = settings
    for name in ("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules"):
        if getattr(changed, name, None):
            raise UserError(
                f"names modules as an older Transformers did, also in {name}; save it"
                " again with this Transformers"
            )
    modules = {new.removeprefix(_MODEL).partition(".lora_") for new in renamed.values()}
    changed.target_modules = {module for module, is_adapted, _ in modules if is_adapted}


def _merged(
    model: "PreTrainedModel", settings: "PeftConfig", tensors: "dict[str, torch.Tensor]"
) -> "PreTrainedModel":
    import peft

    settings.inference_mode = True
    adapted = peft.PeftModel(model, settings, autocast_adapter_dtype=False)
    try:
        result: Any = peft.set_peft_model_state_dict(adapted, dict(tensors))
    except KeyError as error:
        raise UserError(
            f"lacks {error.args[0]}, a module to save; get the whole adapter"
        ) from error
    if result.unexpected_keys:
        unexpected = sorted(result.unexpected_keys)[0]
        raise UserError(f"its tensor {unexpected} has no place in the base; give its own base")
    own = [name for name in result.missing_keys if re.search(r"\.(lora_|modules_to_save\.)", name)]
    if own:
        raise UserError(f"lacks {sorted(own)[0]}, which its configuration asks for; get it again")
    _untie(adapted)
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return merged.eval()


def _untie(adapted: Any) -> None:
    """Give each adapted module a weight of its own.

    PEFT would merge what it adds to one of two tied weights into both (peft#2018), although the
    adapted model adds it to one.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    uses = Counter(id(weight) for _, weight in adapted.named_parameters(remove_duplicate=False))
    for module in adapted.modules():
        layer: Any = module.get_base_layer() if isinstance(module, LoraLayer) else None
        weight = getattr(layer, "weight", None)
        if weight is not None and uses[id(weight)] > 1:
            layer.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)


def _save(
    merged: "PreTrainedModel", adapter: Path, base: Path, out: Path, notes: list[str]
) -> None:
    """Write the merged model in its base's dtype, with the adapter's tokenizer or the base's."""
    import torch

    config: Any = merged.config
    tied = getattr(merged, "all_tied_weights_keys", None) or {}
    state = merged.state_dict()
    apart = [t for t, s in tied.items() if not torch.equal(state[t], state[s])]
    if apart and config.is_encoder_decoder:
        raise UserError(
            f"{adapter}: changes {apart[0]} apart from what it is tied to, which a"
            f" {config.model_type} does not store; train it again without its embeddings"
        )
    if apart:
        config.tie_word_embeddings = False
        merged.all_tied_weights_keys = {}
        notes.append(f"the adapter changes {apart[0]} apart from what it was tied to; both stay")
    has_tokenizer = any((adapter / name).is_file() for name in VOCABULARY_FILES)
    for name in SMALL_FILES:  # the files of one tokenizer belong together
        own = has_tokenizer if name in TOKENIZER_FILES else (adapter / name).is_file()
        if (source := (adapter if own else base) / name).is_file():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, out / name)
    has_own = any((out / name).is_file() for name in VOCABULARY_FILES)
    if has_own and getattr(config, "pad_token_id", None) is None:
        tokenizer: Any = loading.read_tokenizer(out, config)
        has_pad = tokenizer.pad_token is not None
        config.pad_token_id = tokenizer.pad_token_id if has_pad else tokenizer.eos_token_id
    dtypes = {header.dtype for header in tensor_headers(base).values()}
    narrow = {"F16": torch.float16, "BF16": torch.bfloat16}
    if len(dtypes) == 1 and (dtype := narrow.get(next(iter(dtypes)))):
        merged = merged.to(dtype)
    with checkpoints.quiet():
        merged.save_pretrained(out)
