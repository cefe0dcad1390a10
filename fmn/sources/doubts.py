"""What the files of a checkpoint say against one another: of its tokenizer, and of its head."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fmn.errors import UserError
from fmn.models import checkpoints
from fmn.models.checkpoints import TOKENIZER_CONFIG
from fmn.models.headers import read_json, tensor_headers
from fmn.tasks.kinds import kind_of_class
from fmn.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HEADS = r"(\w*classifier|score|qa_outputs|classification_head|logits_proj|sequence_summary)\b"
"""How the names of the heads begin that Transformers fine-tunes."""


def settle_case(folder: Path, config: "PretrainedConfig", notes: list[str]) -> None:
    """Let a copy's tokenizer_config.json say how case is treated, if its other files tell.

    Raises:
        UserError: it says otherwise than tokenizer.json.
    """
    file = folder / TOKENIZER_CONFIG
    settings = read_json(file) if file.is_file() else {}
    if missing := checkpoints.unstated_case(folder, checkpoints.read_tokenizer(folder, config)):
        words = checkpoints.CASE_UNSTATED.format(json.dumps(missing))
        notes.append(f"{words}; that is added to {TOKENIZER_CONFIG}")
        file.write_text(json.dumps({**settings, **missing}, indent=2) + "\n")
        return
    stated = settings.get("do_lower_case")
    if (folder / "tokenizer.json").is_file():
        declared = checkpoints.declared_case(folder).get("do_lower_case", stated)
        if stated is not None and declared != stated:
            raise UserError(
                f"{folder}: {TOKENIZER_CONFIG} has do_lower_case = {json.dumps(stated)}, but"
                f" tokenizer.json has {json.dumps(declared)}; correct the one that the model was"
                " not trained with"
            )
        return
    capitals, pieces = checkpoints.capital_pieces(folder)
    figures = f"{capitals:,} of {pieces:,} pieces of vocab.txt have capital letters"
    if stated is True and capitals * 100 > pieces:
        notes.append(
            f"{TOKENIZER_CONFIG} has do_lower_case = true, but {figures}, and are not used"
        )
    if stated is False and pieces and not capitals:
        problem = "so words with capital letters are unknown"
        notes.append(f"{TOKENIZER_CONFIG} has do_lower_case = false, but {figures}, {problem}")


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
