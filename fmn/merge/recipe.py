"""What a merged model's folder says of itself (``merge.json``), and whether its files are still those. Loads no torch.

`fmn.merged` writes the folder, and describes it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmn.errors import UserError
from fmn.store import machine
from fmn.store import records as formats
from fmn.store.artifacts import agrees, canonical, differing, digest_bytes, digest_files

RECIPE = "merge.json"
CARD = "README.md"
FORMAT = 1


def is_merged(folder: Path) -> bool:
    """Whether a folder holds a merged model rather than a checkpoint of one model."""
    return (folder / RECIPE).is_file()


def read_recipe(folder: Path) -> dict[str, Any]:
    """The content of ``merge.json``; UserError where there is none that can be read."""
    try:
        content = json.loads((folder / RECIPE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        told = f"{folder}: not a merged model ({RECIPE} missing or damaged); `fmn merge` makes one"
        raise machine.refusal(error, folder) or UserError(told) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{folder / RECIPE}: not of format {FORMAT}, which this fmn reads; merge again"
        )
    formats.check(content, formats.Recipe, folder / RECIPE, "merge again")
    return content


def task_folder(folder: Path, task: str) -> Path:
    """The checkpoint of one task of a merged model; UserError for a task that it does not have."""
    tasks = read_recipe(folder)["tasks"]
    if task not in tasks:
        raise UserError(
            f"{folder}: no task {task!r} in this merged model; it has {', '.join(tasks)}"
        )
    return folder / "tasks" / task


def write_recipe(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``merge.json``, with a digest of what it says; returns all of it."""
    stated = {**content, "digest": _digest(content)}
    (folder / RECIPE).write_text(json.dumps(stated, indent=1) + "\n")
    return stated


def _digest(content: Mapping[str, Any]) -> str:
    return digest_bytes(
        canonical({name: value for name, value in content.items() if name != "digest"})
    )


def verify(folder: Path) -> None:
    """Raise UserError naming the first file of a merged model that is missing, was added, or changed."""
    stated = read_recipe(folder)
    if "digest" in stated and not agrees(
        stated["digest"], lambda: _digest(stated)
    ):  # older ones have none
        raise UserError(f"{folder / RECIPE}: not what was written there; merge again")
    found = {
        name: digest for name, digest in digest_files(folder).items() if name not in (RECIPE, CARD)
    }
    wrong = differing(stated["files"], found)
    if wrong is not None:
        raise UserError(
            f"{folder / wrong}: not what was written there (see {folder / RECIPE}); merge again"
        )
