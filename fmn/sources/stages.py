"""The stage that brings in checkpoints: `fetch`."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from fmn.errors import UserError
from fmn.models import checkpoints, labels, provenance
from fmn.models.provenance import CheckpointInfo
from fmn.sources import doubts, forms, origin
from fmn.store import artifacts, stage
from fmn.store.headers import write_json
from fmn.store.records import Settings
from fmn.store.stage import Job, Outcome, Progress, no_progress
from fmn.tasks import dataset
from fmn.tasks.kinds import ARCHITECTURE
from fmn.tasks.task import TASKS, Task, load_task, read_task

FETCH = 8


class ArchitectureSettings(Settings):
    """Where the mask nodes are in an architecture that fmn does not know; paths of modules."""

    layers: str = Field(..., description="path of the layers, with {} for their number: blocks.{}")
    heads: list[str] = Field(
        ...,
        min_length=3,
        max_length=3,
        description="in a layer: the attention's output projection; its inputs, such as"
        " 'attn: q=query k=key v=value' or 'attn: qkv=in_proj'; the normalisations, or ''",
    )
    neurons: list[str] = Field(
        ...,
        min_length=3,
        max_length=3,
        description="in a layer: the feed-forward's output projection; its inputs, such as"
        " 'mlp: u=up u=gate'; the normalisations, or ''",
    )
    transposed: bool = Field(False, description="whether weights are stored [in, out]")

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, path: str) -> str:
        if not re.fullmatch(r"[\w.]*(\{\}[\w.]*)+", path):
            raise ValueError(
                f"{path!r}: write a path of modules with {{}} in place of the layer's number, such"
                " as blocks.{}"
            )
        return path

    @field_validator("heads", "neurons")
    @classmethod
    def _check_inputs(cls, block: list[str]) -> list[str]:
        modules = block[1].rpartition(": ")[2].split()
        if not modules or not all(re.fullmatch(r"[qkvu]+=[\w.]+", module) for module in modules):
            raise ValueError(f"{block[1]!r}: write the inputs as 'PARENT: q=MODULE k=MODULE ...'")
        return block


class FetchSettings(Settings):
    """How the outputs of a fetched expert are read."""

    labels: list[str] = Field(
        default_factory=list,
        description="the labels that the outputs stand for, in the order of the outputs; default:"
        " by their names, or by training data",
    )


class ExpertSource(FetchSettings):
    """Where a published expert comes from; a plain text is its source."""

    source: str = Field(..., description="hf://org/name@revision, a folder, models:/..., package:")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


def fetch(
    source: str,
    *,
    out: Path,
    task: str = "",
    data: Path | None = None,
    base: Path | None = None,
    architecture: ArchitectureSettings | None = None,
    settings: FetchSettings = FetchSettings(),  # noqa: B008 - it is frozen
    progress: Progress = no_progress,
) -> Outcome[CheckpointInfo]:
    """Fetch a checkpoint, pinned and verified, into a folder.

    With a task, it is an expert of that task, and the copy is aligned with it: its outputs have
    the task's names and order, and its task.json is the task's definition. A LoRA adapter becomes
    the full model of its base. Statistics that are published beside an expert come along.

    Args:
        source: hf://org/name@revision, a folder, models:/name@alias or package:module/path
        out: the folder to write
        task: the task of an expert
        data: folder of the task's rows, whose training split decides or checks the outputs' order
        base: the model that the expert was fine-tuned from, which is checked by its weights, or
            a LoRA adapter was trained on; default: of an adapter, the one that it names
        architecture: where the mask nodes are, if fmn does not know the architecture

    Raises:
        UserError: the source cannot be reached, was damaged, or is no checkpoint that can be used;
            its outputs are not the task's labels, or it was fine-tuned from another base.
    """
    stage.check_output(out, [Path(forms.address(source))])
    if not task and (data or settings.labels):
        raise UserError("fetch: --data and --labels are for an expert; say its task, --task TASK")
    if data:
        artifacts.check_folder(data)
    pinned = origin.pin(source)
    reads: dict[str, Any] = {"folder": origin.folder_files(pinned), "base": base}
    keys = {"source": pinned, **({"architecture": architecture} if architecture else {})}
    definition = _definition(task, data, pinned)
    if task:
        keys |= {"task": definition or task, "fetch": settings.labels}
    if data and definition and labels.can_check(data, definition):
        reads["train"] = dataset.split_files(data, definition, "train")

    def compute(job: Job) -> CheckpointInfo:
        info = origin.copy_checkpoint(pinned, job.path, progress, base, statistics=bool(task))
        info = info.model_copy(update={"source": source})
        if architecture:
            _describe(job.path, architecture)
        if not task:
            return info
        order, notes = _align(job.path, source, definition or task, data, base, settings.labels)
        return info.model_copy(update={"labels": order, "notes": [*info.notes, *notes]})

    # No time is written: a base that a second clone fetches again is the same file to DVC.
    return stage.run_stage(
        "fetch", FETCH, out, compute,
        reads=reads, settings=keys, summary=partial(stage.read_info, record=CheckpointInfo),
        is_folder=True, is_timed=False,
    )  # fmt: skip


def _definition(task: str, data: Path | None, pinned: str) -> Task | None:
    """The definition of an expert's task, from its rows; or from its folder, if fmn tuned it."""
    definition = (load_task(data, task) if data else read_task(Path(pinned))) if task else None
    if definition and definition.name != task:
        raise UserError(f"{pinned}: an expert of {definition.name}, not {task}; correct --task")
    return definition


def _align(
    folder: Path,
    source: str,
    task: Task | str,
    data: Path | None,
    base: Path | None,
    names: Sequence[str],
) -> tuple[labels.Labels, list[str]]:
    """Align the copy of an expert with its task, or with the task of a name, and check its base.

    Returns:
        its labels, and what is doubtful about it; messages and notes name its source.
    """
    try:
        notes = []
        if isinstance(task, str):
            if task not in TASKS:
                notes.append(f"{task}: nothing but config.json says what it is; give --data")
            expert = labels.expert_task(folder, task)
        else:
            expert = task
        order = labels.align(folder, expert, data, names)
        notes += doubts.about_head(folder, checkpoints.load_config(folder), expert)
        notes += provenance.check_base(folder, base, expert.task) if base else []
    except UserError as error:  # the reader does not know the folder that is being written
        raise UserError(str(error).replace(str(folder), source)) from error
    return order, [note.replace(str(folder), source) for note in notes]


def _describe(folder: Path, architecture: ArchitectureSettings) -> None:
    """Let the configuration of a copy say where the mask nodes are."""
    content = checkpoints.read_config(folder) | {ARCHITECTURE: architecture.model_dump()}
    write_json(folder / checkpoints.CONFIG, content)
