"""Load a checkpoint's tokenizer or image processor, and its model.

Nothing in it is ever executed: ``trust_remote_code`` is never true.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

from fmn.errors import UserError
from fmn.models.checkpoints import (
    CONFIG,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    check_tensors,
    kind_in,
    load_config,
    quiet,
)
from fmn.store.artifacts import digest_file
from fmn.store.headers import first_words, json_entries, read_json, tensor_headers
from fmn.tasks.kinds import KINDS, KindName

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fmn.tasks.images import ImageReader

CASE_UNSTATED = (
    "nothing says how its tokenizer treats case, and Transformers' default contradicts its"
    " vocabulary files, which need {}"
)
LARGEST_SIDE = 2**13  # pixels of an image that a model reads


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
    """Settings to add to tokenizer_config.json, so that case is treated as the other files say.

    Without `do_lower_case`, Transformers uses the default of the tokenizer's class and ignores
    tokenizer.json and the vocabulary: a cased BERT would read lower-case letters only.
    """
    file = folder / TOKENIZER_CONFIG
    settings = read_json(file).keys() if file.is_file() else set[str]()
    parameters = signature(type(tokenizer).__init__).parameters
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if "do_lower_case" in settings or "do_lower_case" not in parameters or backend is None:
        return {}
    declared, used = declared_case(folder), _case(backend.normalizer)
    if all(used[name] == value for name, value in declared.items()):
        return {}
    return {name: value for name, value in declared.items() if name in parameters.keys() - settings}


def declared_case(folder: Path) -> dict[str, bool]:
    """How tokenizer.json treats case, or how the pieces of vocab.txt need it to be treated."""
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            return _case(Tokenizer.from_file(str(folder / "tokenizer.json")).normalizer)
        except Exception:  # the library raises no narrower error; loading the file explains more
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
    """What a normalizer does to texts, by the names of Transformers' settings."""

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
    """Load a checkpoint's tokenizer, or its image processor.

    Raises:
        UserError: the checkpoint has no tokenizer or image processor that can be used.
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

    sides = [getattr(config, name, None) for name in ("image_size", "patch_size")]
    if not all(isinstance(side, int | list | tuple) for side in sides):
        problem = f"{CONFIG} of this {config.model_type} has no image_size and patch_size"
        raise UserError(f"{folder}: {problem}; give a model of patches, such as a ViT")
    size, patch = ((side, side) if isinstance(side, int) else tuple(side or ()) for side in sides)
    tokens = 1 + (size[0] // patch[0]) * (size[1] // patch[1])
    if (file := folder / "preprocessor_config.json").is_file():
        for key, value in json_entries(read_json(file)):
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
    if kind != "image-classification" and getattr(config, "pad_token_id", None) is None:
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
    """Resize a base model's embeddings to the size in tensors by its names."""
    embeddings = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is embeddings)
    stored = tensors.get(f"{path}.weight")
    if stored is not None and len(stored) != len(embeddings.weight):
        model.resize_token_embeddings(len(stored), mean_resizing=False)
