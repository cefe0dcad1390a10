"""Print a task (`fmn tasks TASK`): its definition, and an example as text and as tokens."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmn.params import Params
from fmn.rows.view import TaskView
from fmn.terminal import say


def show_view(view: TaskView, tokens: Any) -> None:
    """Print a task's complete definition, its source, and its first example."""
    definition = view.task.model_dump(mode="json", exclude_none=True)
    say(*(f"{key}: {_listed(value)}" for key, value in definition.items()))
    say(f"source: {view.source}", *view.notes)
    say(*(f"first example, {key}: {_listed(value)}" for key, value in view.example.items()))
    if view.example:
        say(f"as tokens: {_listed(tokens)}")


def _listed(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} = {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def tokens_of(task: Any, example: Mapping[str, Any], settings: Params | None) -> Any:
    """The first example's tokens, by the tokenizer of `base`; or the reason why there are none."""
    folder = _local_base(settings) if settings else None
    if folder is None:
        return "not shown, as no tokenizer is at hand; --params names settings whose base is here"
    if not example or task.columns.image:
        return []
    import pyarrow as pa

    from fmn.models.loading import load_processor
    from fmn.tasks.encoding import encode

    tokenizer = load_processor(folder, task.task)
    table = pa.table({name: [example[name]] for name in task.text_columns})
    return tokenizer.convert_ids_to_tokens(encode(tokenizer, task, table).inputs["input_ids"][0])


def _local_base(settings: Params) -> Path | None:
    """The folder of the base model, if it is on this machine."""
    folders = [Path(settings.work) / "base", Path(settings.base)]
    module, _, path = settings.base.removeprefix("package:").partition("/")
    if settings.base.startswith("package:") and (spec := importlib.util.find_spec(module)):
        folders += [Path(place) / path for place in spec.submodule_search_locations or ()]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)
