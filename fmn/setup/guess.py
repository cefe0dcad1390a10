"""Guess the settings of a task from its checkpoint, for `fmn init`.

Only small files are read: config.json, the model card, task.json. What they do not tell is marked
with a comment.
"""

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fmn.errors import UserError, visible
from fmn.models.checkpoints import CONFIG
from fmn.models.labels import output_names
from fmn.models.provenance import training_metadata
from fmn.rows.prepare import has_messages
from fmn.rows.sources import FORMATS
from fmn.setup.preview import first_rows
from fmn.sources import forms, origin
from fmn.sources.forms import ADAPTER_CONFIG
from fmn.sources.origin import SCHEMES, Origin
from fmn.store.headers import read_json
from fmn.tasks.kinds import KINDS, KindName, kind_of_class
from fmn.tasks.task import (
    DEFINITION,
    TASKS,
    DatasetSettings,
    Task,
    TaskSettings,
    read_task,
    task_settings,
)

CARD = "README.md"
MODULES = "modules.json"  # of Sentence Transformers
# Kinds by the task_type of a PEFT adapter.
ADAPTER_KINDS: Mapping[str, KindName] = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "FEATURE_EXTRACTION": "sentence-similarity",
}
# Usual names of the columns for each kind of task, the likeliest first.
_LABEL = ("label", "labels", "target", "class", "category")
_TEXT = ("text", "sentence", "sentence1", "content", "question", "question1", "premise", "review")
_SECOND = ("text_pair", "sentence2", "question2", "hypothesis")
COLUMNS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "text-classification": {"text": _TEXT, "text_pair": _SECOND, "label": _LABEL},
    "token-classification": {
        "tokens": ("tokens", "words"),
        "label": ("ner_tags", "tags", "pos_tags", "labels", "label"),
    },
    "image-classification": {"image": ("image", "img"), "label": _LABEL},
    "sentence-similarity": {
        "text": ("sentence1", "text1", "anchor", "text"),
        "text_pair": ("sentence2", "text2", "positive", "text_pair"),
        "label": ("score", "label", "similarity_score"),
    },
    "text-generation": {
        "prompt": ("prompt", "instruction", "question", "input"),
        "completion": ("completion", "response", "answer", "output"),
    },
}
COLUMNS = {**COLUMNS, "text2text-generation": COLUMNS["text-generation"]}
# Parts of a model's name that say nothing about its task.
_COMMON = re.compile(
    "(distil|ro|al|de|modern)?bert(a)?|electra|mpnet|vit|gpt2|t5|llama|qwen|mistral|minilm|base"
    "|large|small|tiny|(un)?cased|fine|finetuned?|tun(ed|ing)|ft|lora|model|adapter|english|en"
    "|checkpoint|best|final|v[1-3]|for|on"
)
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_UNNAMED = re.compile(r"(?i)label_?\d+|\d+|\s*")


@dataclass
class Guess:
    """The guesses from an expert's files.

    Attributes:
        kind: the kind of task, by its name on the Hub; None if the files do not tell.
        task: the task's settings.
        base: the source of the expert's base; None if the files do not tell.
        unknown: settings of `task` that the user must fill in, with the reasons.
    """

    source: str
    name: str
    kind: KindName | None
    base: str | None
    is_glue: bool
    task: dict[str, Any] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def in_words(self) -> str:
        """The kind of task, with the name in GLUE if the task is one of GLUE's."""
        return f"{self.kind or 'unknown'}{f' (GLUE, {self.name})' if self.is_glue else ''}"


def guess(source: str, base: str | None = None) -> Guess:
    """Guess an expert's task from the small files of its source.

    Args:
        base: the source of the base, if known; words in it are left out of the task's name.

    Raises:
        UserError: the source cannot be reached, or is neither a checkpoint nor an adapter.
    """
    source = forms.address(source)
    with tempfile.TemporaryDirectory() as scratch:
        place = origin.locate(source, Path(scratch))
        is_adapter = CONFIG not in place.names and ADAPTER_CONFIG in place.names
        if not is_adapter and CONFIG not in place.names:
            raise UserError(f"{source}: {forms.no_checkpoint(place.names)}")
        config = read_json(place.local(ADAPTER_CONFIG if is_adapter else CONFIG))
        card = _card(place)
        folder = place.local(CONFIG).parent
        definition = read_task(folder) if DEFINITION in place.names else None
        base = base or _base(place, config, card)
        outputs = _outputs(folder, config)
    rows = _rows_of_card(card)
    name = definition.name if definition else _task_name(source, base, rows)
    kind = definition.task if definition else _kind(place.names, config)
    is_glue = (
        kind == "text-classification"
        and name in TASKS
        and (is_adapter or len(outputs) == TASKS[name].num_outputs)
    )
    result = Guess(source, name, kind, base, is_glue)
    if not is_glue:
        _describe(result, config, outputs, definition, rows)
    return result


def _card(place: Origin) -> dict[str, Any]:
    """The metadata of a model card; empty if there is no readable card."""
    from huggingface_hub import metadata_load

    if CARD in place.names:
        with suppress(Exception):  # a card may hold anything
            return dict(metadata_load(place.local(CARD)) or {})
    return {}


def _kind(names: Iterable[str], config: Mapping[str, Any]) -> KindName | None:
    if "task_type" in config:
        return ADAPTER_KINDS.get(config["task_type"])
    words = str(next(iter(config.get("architectures") or ()), ""))
    if MODULES in names and "ForSequenceClassification" not in words:
        return "sentence-similarity"
    return kind_of_class(words)


def _outputs(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The names of a head's outputs; if config.json has none, LABEL_0 and so on, two by default."""
    count = config.get("num_labels")
    unnamed = range(count if isinstance(count, int) and 0 < count < 1000 else 2)
    return output_names(folder) or [f"LABEL_{output}" for output in unnamed]


def _base(place: Origin, config: Mapping[str, Any], card: Mapping[str, Any]) -> str | None:
    """The source of the model that an expert was fine-tuned from."""
    training = training_metadata(Path(place.source))  # only experts that fmn fine-tuned have it
    if training and training.base.revision.startswith(SCHEMES):
        return training.base.revision
    of_card = card.get("base_model")
    names = [config.get("base_model_name_or_path")]
    names += of_card if isinstance(of_card, list) else [of_card]
    names.append(config.get("_name_or_path"))
    own = place.source.removeprefix("hf://").partition("@")[0]
    for name in names:
        if not isinstance(name, str) or not name or name in (own, place.source):
            continue
        if (Path(name) / CONFIG).is_file():
            return name
        if _HUB_NAME.fullmatch(name) and not re.search(r"checkpoint-\d+$", name):
            return f"hf://{name}"
    return None


def _rows_of_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """The data set that a model card names, as settings describe it; empty if it names none."""
    with suppress(Exception):  # a card may hold anything
        for model in card.get("model-index") or []:
            for result in model.get("results") or []:
                rows = result.get("dataset") or {}
                if _HUB_NAME.fullmatch(str(rows.get("type", ""))):
                    name = rows.get("config") or rows.get("args")
                    is_default = not isinstance(name, str) or name == "default"
                    return {"path": rows["type"]} | ({} if is_default else {"name": name})
        names = card.get("datasets") or []
        for name in [names] if isinstance(names, str) else names:
            if _HUB_NAME.fullmatch(str(name)):
                return {"path": str(name)}
    return {}


def _task_name(source: str, base: str | None, rows: Mapping[str, Any]) -> str:
    """A name for the task: GLUE's, or the words of the checkpoint's name that its base lacks."""
    if rows.get("path") in ("glue", "nyu-mll/glue") and rows.get("name") in TASKS:
        return str(rows["name"])
    path = re.sub(r"^(hf://|models:/*|package:)", "", source)
    path = path if Path(source).exists() else path.partition("@")[0]
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    while len(parts) > 1 and re.fullmatch(r"checkpoint-\d+|\d+|model|expert|final", parts[-1]):
        parts.pop()
    words = re.findall(r"[^\W_]+", parts[-1] if parts else "task")
    of_base = set(re.findall(r"[^\W_]+", (base or "").lower()))
    lower = [word.lower() for word in words]
    rest = [word for word in lower if not _COMMON.fullmatch(word) and word not in of_base] or lower
    glue = {re.sub(r"\W", "", name): name for name in TASKS}
    name = "_".join(rest)
    return glue.get(name.replace("_", ""), name)[:60]


def _describe(
    result: Guess,
    config: Mapping[str, Any],
    outputs: Sequence[str],
    definition: Task | None,
    rows: Mapping[str, Any],
) -> None:
    """Fill in the settings of a task that is not one of GLUE's."""
    task, unknown = result.task, result.unknown
    task["task"] = result.kind or "text-classification"
    if result.kind is None:
        words = ", ".join(map(str, config.get("architectures") or ["no architecture"]))
        unknown["task"] = f"config.json names {words}, which is of no known kind of task"
    if definition:
        wanted = {"problem_type", "labels", "metrics", "max_length", "threshold"}
        task |= definition.model_dump(mode="json", include=wanted, exclude_defaults=True)
    elif task["task"] == "text-classification":
        task |= _problem(config, outputs, unknown)
    is_named = len({*outputs}) == len(outputs) > 1 and not any(map(_UNNAMED.fullmatch, outputs))
    if KINDS[task["task"]].has_head and is_named and not definition:
        task["labels"] = list(outputs)
    _find_rows(result, rows, definition)


def _problem(
    config: Mapping[str, Any], outputs: Sequence[str], unknown: dict[str, str]
) -> dict[str, Any]:
    kind = config.get("problem_type")
    if kind in ("multi_label_classification", "regression"):
        return {"problem_type": kind}
    if len(outputs) == 1 and "id2label" in config:
        unknown["problem_type"] = "remove this line if the one output is the logit of yes or no"
        return {"problem_type": "regression"}
    return {}


def _find_rows(result: Guess, rows: Mapping[str, Any], definition: Task | None) -> None:
    """Fill in the data set and the columns of a task as far as they can be guessed."""
    task, unknown, kind = result.task, result.unknown, result.task["task"]
    here = [Path("data") / result.name]
    here += [Path("data") / f"{result.name}{ending}" for ending in FORMATS]
    if path := next((path for path in here if path.exists()), None):
        rows = {"path": path.as_posix()}
    task["dataset"] = dict(rows) or {"path": f"data/{result.name}"}
    if not rows:
        unknown["dataset"] = "a file or folder of rows, or the name of a data set on the Hub"
    names = COLUMNS[kind]
    columns: dict[str, str] = {}
    try:
        tables, _ = first_rows(DatasetSettings(**rows)) if rows else ({}, 0)
    except UserError as error:
        tables, unknown["dataset"] = {}, str(error)
    present = list(next(iter(tables.values())).columns) if tables else []
    if any(has_messages(TaskSettings(task=kind), table) for table in tables.values()):
        return
    for use, likely in names.items():
        column = next((name for name in likely if name in present), None)
        if column is None and use == "label" and result.name in present:
            column = result.name
        if column and column not in columns.values():
            columns[use] = column
        elif use not in KINDS[kind].optional or not (present or kind == "text-classification"):
            columns[use] = likely[0]
            unknown["columns"] = (
                f"the columns are {', '.join(present)}" if present else "the columns"
            )
    if definition and not present:
        columns = definition.columns.model_dump(exclude_none=True)
    task["columns"] = columns


# ---------------------------------------------------------------------------------------------
# The settings file


def settings_text(
    guesses: Sequence[Guess], base: str | None, name: str
) -> tuple[str, dict[str, str]]:
    """The text of a settings file for experts, and what the user must fill in, by setting.

    Args:
        guesses: what is known about the experts; equal names are numbered.
        base: the source of the base, if known.
        name: the name of the registered model and of the folder `work`.
    """
    from ruamel.yaml.comments import CommentedMap

    names = _unique([each.name for each in guesses])
    bases = sorted({each.base for each in guesses if each.base})
    chosen, missing = base or (bases[0] if bases else "BASE"), dict[str, str]()
    if not base and not bases:
        missing["base"] = "the model that the experts were fine-tuned from, such as hf://ORG/NAME"
    elif not base and len(bases) > 1:
        missing["base"] = f"the experts name different bases: {', '.join(bases)}"
    kinds = [KINDS[each.kind or "text-classification"] for each in guesses]
    own = {}
    for task, each in zip(names, guesses, strict=True):
        if not each.is_glue:
            own[task] = each
        elif task != each.name and (glue := task_settings(each.name)):  # its second expert
            own[task] = replace(each, task=glue.model_dump(mode="json", exclude_defaults=True))
    content: dict[str, Any] = {"work": f"data/{name}", "base": chosen, "experts": {"tasks": names}}
    if own:
        content["tasks"] = {task: each.task for task, each in own.items()}
    content["sources"] = dict(zip(names, [each.source for each in guesses], strict=True))
    if not all("empirical" in kind.estimators for kind in kinds):
        content["fisher"] = {"estimator": "sampled"}
    if all(kind.has_head for kind in kinds):
        content |= {"merge": {"method": "auto"}, "calibrate": {"texts": 256}}
    else:
        content["realign"] = {}
    content["registry"] = {"name": name}
    for task, each in own.items():
        missing |= {f"tasks.{task}.{entry}": what for entry, what in each.unknown.items()}
    document = _commented(content)
    for setting, what in missing.items():
        *parents, key = setting.split(".")
        section: CommentedMap = document
        for parent in parents:
            section = section[parent]
        section.yaml_add_eol_comment(f"fill in: {visible(' '.join(what.split()))}", key)
    document.yaml_set_start_comment("Written by `fmn init`; `fmn check` says whether it can run.")
    return _dump(document), missing


def _unique(names: Sequence[str]) -> list[str]:
    """The names, made unique by numbers: the second `a` becomes `a_2`."""
    result: list[str] = []
    for name in names:
        number, new = 1, name
        while new in result:
            number += 1
            new = f"{name}_{number}"
        result.append(new)
    return result


def _commented(content: Mapping[str, Any], depth: int = 0) -> Any:
    """Convert plain data for ruamel.yaml: sections as blocks, deeper mappings in one line."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    section = CommentedMap()
    for key, value in content.items():
        if isinstance(value, Mapping):
            value = _commented(value, depth + 1)
        elif isinstance(value, list):
            value = CommentedSeq(value)
            value.fa.set_flow_style()
        section[key] = value
    is_flat = not any(isinstance(value, CommentedMap) for value in section.values())
    if depth and is_flat and not ("task" in section or len(section) > 3):
        section.fa.set_flow_style()
    return section


def _dump(document: Any) -> str:
    import io

    from ruamel.yaml import YAML

    text = io.StringIO()
    yaml = YAML()
    yaml.width = 4096  # keeps a comment on its line
    yaml.dump(document, text)
    return text.getvalue()
