"""Contradictions between the files of a checkpoint, about tokenizer, head and other tensors."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fmn.errors import UserError
from fmn.models import checkpoints, loading
from fmn.models.checkpoints import TOKENIZER_CONFIG
from fmn.sources import forms, names
from fmn.store.headers import read_json, tensor_headers, write_json
from fmn.tasks.kinds import kind_of_class
from fmn.tasks.task import Task, in_a_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PROBE = "It's a fine film"
HEADS = r"(\w*classifier|score|qa_outputs|classification_head|logits_proj|sequence_summary)\b"
"""How the names of the heads begin that Transformers fine-tunes."""
UNUSED = re.compile(
    r"^(cls|lm_head|vocab_\w+|generator_\w+|discriminator_predictions|mlm_head|predictions"
    r"|qa_outputs|decoder\.(bias|weight)|final_logits_bias|mask_predictions|lm_predictions)(\.|$)"
    r"|(^|\.)pooler\.|(position_ids|token_type_ids|inv_freq|masked_bias|attn\.bias|mask_token"
    r"|num_batches_tracked|embed_positions\.weights|relative_position_index)$"
)
"""Tensors of checkpoints that no answer needs: heads of pretraining, poolers and buffers."""


def settle_tokens(folder: Path, config: "PretrainedConfig", notes: list[str]) -> None:
    """Write into a copy's tokenizer_config.json how case is treated, if its other files show it.

    Transformers makes a tokenizer of its class's defaults and tokenizer_config.json; what
    tokenizer.json says otherwise is a contradiction, or a doubt.

    Raises:
        UserError: two files contradict each other about case.
    """
    file = folder / TOKENIZER_CONFIG
    settings = read_json(file) if file.is_file() else {}
    if missing := loading.unstated_case(folder, loading.read_tokenizer(folder, config)):
        words = loading.CASE_UNSTATED.format(json.dumps(missing))
        notes.append(f"{words}; that is added to {TOKENIZER_CONFIG}")
        write_json(file, {**settings, **missing})
    elif (folder / "tokenizer.json").is_file():
        _check_case(folder, settings.get("do_lower_case"))
    else:
        notes += _about_pieces(folder, settings.get("do_lower_case"))
    notes += _about_tokens(folder, config)


def _check_case(folder: Path, do_lower_case: bool | None) -> None:
    """Raise a UserError if tokenizer_config.json contradicts tokenizer.json."""
    declared = loading.declared_case(folder).get("do_lower_case", do_lower_case)
    if do_lower_case is not None and declared != do_lower_case:
        raise UserError(
            f"{folder}: {TOKENIZER_CONFIG} has do_lower_case = {json.dumps(do_lower_case)}, but"
            f" tokenizer.json has {json.dumps(declared)}; correct the one that the model was"
            " not trained with"
        )


def _about_pieces(folder: Path, do_lower_case: bool | None) -> list[str]:
    """Notes about pieces that vocab.txt lacks, or has but the settings never use."""
    capitals, pieces = loading.capital_pieces(folder)
    figures = f"{capitals:,} of {pieces:,} pieces of vocab.txt have capital letters"
    if do_lower_case is True and capitals * 100 > pieces:
        return [f"{TOKENIZER_CONFIG} has do_lower_case = true, but {figures}, and are not used"]
    if do_lower_case is False and pieces and not capitals:
        problem = "so words with capital letters are unknown"
        return [f"{TOKENIZER_CONFIG} has do_lower_case = false, but {figures}, {problem}"]
    return []


def _about_tokens(folder: Path, config: "PretrainedConfig") -> list[str]:
    """A note if Transformers divides a text otherwise than tokenizer.json alone does."""
    if not (folder / "tokenizer.json").is_file():
        return []
    from tokenizers import Tokenizer

    alone = Tokenizer.from_file(str(folder / "tokenizer.json"))
    alone.no_padding()
    alone.no_truncation()
    own = alone.encode(PROBE).tokens
    used = loading.read_tokenizer(folder, config)(PROBE).tokens()
    if own == used:
        return []
    words = [" ".join(tokens[:8]) for tokens in (used, own)]
    return [f"Transformers divides {PROBE!r} into {words[0]}, tokenizer.json into {words[1]}"]


def about_head(folder: Path, config: "PretrainedConfig", task: Task) -> list[str]:
    """Notes about an expert whose config.json names another head than its weights have."""
    if not task.kind.has_head:
        return []
    notes = []
    classes = config.architectures or []
    if classes and task.task not in map(kind_of_class, classes):
        names = f"config.json names {', '.join(classes)}"
        notes.append(f"{names}, but the weights have the head for {task.task}, which is used")
    split = checkpoints.stored_names(folder, config, task.task)
    used = {*split.encoder.values(), *split.head.values()}
    unused = [name for name in tensor_headers(folder) if name not in used]
    if others := sorted(name for name in unused if re.match(HEADS, name)):
        notes.append(f"the weights hold another head too, which is not used: {others[0]}")
    return [f"{task.name}: {note}" for note in notes]


def unused_tensors(folder: Path, config: "PretrainedConfig") -> list[str]:
    """A note about tensors that the class of a fine-tuned model does not have, such as a CRF's."""
    model_class = forms.architecture(config.architectures)
    if model_class is None or kind_of_class(model_class.__name__) is None:
        return []
    model = names.layout(config, model_class)
    known = {*model.shapes, *model.base, *(model.prefix + name for name in model.base)}
    others = (name for name in tensor_headers(folder) if name not in known)
    unused = [n for n in others if not (UNUSED.search(n) or re.match(HEADS, n))]  # `about_head`
    what = (
        f"not used, as {model_class.__name__} has no such tensors: {in_a_line(sorted(unused), 5)}"
    )
    return [f"{what}; its author's program may answer otherwise"] if unused else []
