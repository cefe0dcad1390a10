"""Upload a merged model, or an expert with its statistics, to the Hugging Face Hub."""

import re
from pathlib import Path

from fmn.errors import UserError
from fmn.fisher import published
from fmn.merge.recipe import CARD, is_merged, read_recipe
from fmn.models import checkpoints
from fmn.models.checkpoints import FISHER, GRAM
from fmn.store import artifacts, hub, stage
from fmn.store.records import Record
from fmn.store.stage import Progress, no_progress

_TARGET = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.+/-]+))?")


class Pushed(Record):
    """An upload: address of the repository, commit, pinned source, number of files and bytes."""

    url: str
    commit: str
    source: str
    files: int
    bytes: int


def push(
    model: Path,
    to: str,
    *,
    card: Path | None = None,
    fisher: Path | None = None,
    gram: Path | None = None,
    private: bool = False,
    revision: str = "",
    message: str = "",
    progress: Progress = no_progress,
) -> Pushed:
    """Put a merged model with its card, or an expert with its statistics, on the Hub.

    It is one commit: the repository has all of it or nothing. `hf auth login` or HF_TOKEN says who
    you are.

    Args:
        model: folder of the merged model, or of an expert
        to: hf://ORG/NAME; made if it does not exist
        card: model card, made by `fmn report`; default: the folder's README.md
        fisher: of an expert: its Fisher information, made by `fmn fisher`
        gram: of an expert: its Gram matrices, made by `fmn gram`
        private: whether a new repository is private
        revision: branch, made if it does not exist; default: main, or that of hf://ORG/NAME@BRANCH
        message: of the commit

    Raises:
        UserError: the folder is neither, it was changed, the statistics are of another checkpoint,
            or the Hub refuses.
    """
    match = _TARGET.fullmatch(to)
    if not match or ".." in to:
        raise UserError(
            f"{to}: not a place on the Hub; write hf://ORG/NAME or hf://ORG/NAME@BRANCH"
        )
    repo, branch = match[1], revision or match[2] or "main"
    files, title = _files_and_title(model, fisher, gram)
    if card:
        if not card.is_file():
            raise UserError(f"{card}: no such file; `fmn report` writes model cards")
        files[CARD] = card
    is_stale = re.compile("(encoder|tasks)/.*").fullmatch if is_merged(model) else None
    address, commit = hub.upload(
        repo,
        files,
        branch=branch,
        message=message or title,
        private=private,
        is_stale=lambda name: bool(is_stale and is_stale(name)),
        progress=progress,
    )
    size = sum(path.stat().st_size for path in files.values())
    source = f"hf://{repo}@{commit}"
    return Pushed(url=address, commit=commit, source=source, files=len(files), bytes=size)


def _files_and_title(
    model: Path, fisher: Path | None, gram: Path | None
) -> tuple[dict[str, Path], str]:
    """The files to upload, of a merged model or of an expert with its statistics; and a title."""
    files = {name: path for name, path in {FISHER: fisher, GRAM: gram}.items() if path}
    if is_merged(model):
        if files:
            raise UserError(f"{model}: is a merged model; --fisher and --gram are for an expert")
        return _merged_files(model), f"{', '.join(read_recipe(model).tasks)} in one model"
    published.check(model, fisher, gram)
    return files | _expert_files(model), "An expert and its statistics"


def _merged_files(model: Path) -> dict[str, Path]:
    """The files of a merged model; UserError if one was changed."""
    recipe = read_recipe(model)
    stage.check_intact(model)
    for folder in (model / "encoder", *(model / "tasks" / task for task in recipe.tasks)):
        checkpoints.check_tensors(
            folder, checkpoints.load_config(folder), head=folder.name != "encoder"
        )
    files = artifacts.visible(model)
    return {name: path for name, path in files.items() if path.name != artifacts.SIDECAR}


def _expert_files(model: Path) -> dict[str, Path]:
    files = artifacts.visible(model)
    own = (artifacts.SIDECAR, FISHER, GRAM)
    return {name: path for name, path in files.items() if name not in own}
