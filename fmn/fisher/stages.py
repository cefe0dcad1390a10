"""The stages that compute statistics of one expert on its task's training split."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from fmn.errors import UserError
from fmn.fisher import files
from fmn.fisher.files import CheckpointOrigin, FisherMetadata, GramMetadata, StatisticMetadata
from fmn.models import labels, provenance
from fmn.models.stages import Device, Dtype
from fmn.store import artifacts
from fmn.store.records import Settings, at_least_one
from fmn.store.stage import Job, Outcome, Progress, no_progress, run_stage
from fmn.tasks.dataset import read_split, split_files, tokenize
from fmn.tasks.task import Task, load_task

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from fmn.fisher.mask_nodes import PartialSums

Estimator = Literal["empirical", "expected", "sampled", "batch"]

# DVC reads these: it does not see chained assignments.
FISHER = 4
FULL_FISHER = 4
GRAM = 4
SAVE_SECONDS = 5.0  # from one save of partial sums to the next


class SampleSettings(Settings):
    samples: int | Literal["all"] = Field(
        1024, description="examples, drawn without replacement from the training split"
    )
    seed: int = Field(0, ge=0, description="seed of the draw")
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field(
        "float32", description="dtype of matrix products; auto: bfloat16 where it is faster"
    )

    _at_least_one = field_validator("samples")(at_least_one)


class FisherSettings(SampleSettings):
    estimator: Estimator = Field(
        "empirical",
        description="whose labels: the data's (empirical), the model's in exact expectation"
        " (expected) or by a draw (sampled); batch: the paper's released code",
    )
    stratified: bool = Field(False, description="draw every label in its share")


class FullFisherSettings(SampleSettings):
    estimator: Literal["empirical", "expected", "sampled"] = Field(
        "empirical", description="as for the mask Fisher"
    )
    samples: int | Literal["all"] = Field(256, description="examples, drawn without replacement")


class GramSettings(SampleSettings):
    pass


def fisher(
    checkpoint: Path,
    *,
    task: str,
    data: Path,
    out: Path,
    settings: FisherSettings = FisherSettings(),  # noqa: B008
    progress: Progress = no_progress,
) -> Outcome[FisherMetadata]:
    """Compute the Fisher information of an expert's mask nodes.

    Partial sums are saved beside the output meanwhile: a run that was killed goes on from them.

    Args:
        checkpoint: the expert's folder
        task: its task
        data: folder of the task's data, or of several tasks'
        out: the Parquet file
    """

    def compute(path: Path, arguments: dict[str, Any], metadata: dict[str, Any]) -> None:
        from fmn.fisher.mask_nodes import estimate

        saved = out.with_name(f".{out.name}.partial-sums")
        key = "{key} {device} {dtype}".format(**metadata)
        result = estimate(
            **arguments,
            estimator=settings.estimator,
            problem_type=metadata["definition"].problem_type,
            stratified=settings.stratified,
            progress=progress,
            resume=_read_sums(saved, key),
            save=lambda sums: _write_sums(saved, key, sums),
            save_seconds=SAVE_SECONDS,
        )
        counts = {site: len(nodes) for site, nodes in result.fisher.items()}
        record = FisherMetadata(
            **metadata,
            estimator=settings.estimator,
            stratified=settings.stratified,
            layers=len({site.layer for site in counts}),
            heads=max(count for site, count in counts.items() if site.node == "head"),
            neurons=max(count for site, count in counts.items() if site.node == "neuron"),
            relative_stderr=result.relative_error,
        )
        files.write_fisher(path, result.fisher, result.stderr, record)
        saved.unlink(missing_ok=True)

    return _run("fisher", FISHER, checkpoint, task, data, out, settings, compute, files.read_fisher)


def full_fisher(
    checkpoint: Path,
    *,
    task: str,
    data: Path,
    out: Path,
    settings: FullFisherSettings = FullFisherSettings(),  # noqa: B008
    progress: Progress = no_progress,
) -> Outcome[StatisticMetadata]:
    """Compute the exact Fisher information of all of an expert's parameters.

    Args:
        checkpoint: the expert's folder
        task: its task
        data: folder of the task's data, or of several tasks'
        out: the safetensors file
    """

    def compute(path: Path, arguments: dict[str, Any], metadata: dict[str, Any]) -> None:
        from fmn.fisher.parameters import estimate

        estimator, problem_type = settings.estimator, metadata["definition"].problem_type
        tensors = estimate(
            **arguments, estimator=estimator, problem_type=problem_type, progress=progress
        )
        files.write_statistic(path, tensors, StatisticMetadata(**metadata, estimator=estimator))

    read = partial(files.read_statistic, record=StatisticMetadata)
    return _run("full-fisher", FULL_FISHER, checkpoint, task, data, out, settings, compute, read)


def gram(
    checkpoint: Path,
    *,
    task: str,
    data: Path,
    out: Path,
    settings: GramSettings = GramSettings(),  # noqa: B008
    progress: Progress = no_progress,
) -> Outcome[GramMetadata]:
    """Compute the Gram matrices of the inputs of an expert's linear maps.

    Args:
        checkpoint: the expert's folder
        task: its task
        data: folder of the task's data, or of several tasks'; labels are not read
        out: the safetensors file
    """

    def compute(path: Path, arguments: dict[str, Any], metadata: dict[str, Any]) -> None:
        from fmn.fisher.gram import estimate

        grams = estimate(**arguments, progress=progress)
        transposed = sorted(grams.transposed)
        record = GramMetadata(**metadata, inputs=grams.inputs, transposed=transposed)
        files.write_statistic(path, grams.moments, record)

    read = partial(files.read_statistic, record=GramMetadata)
    return _run("gram", GRAM, checkpoint, task, data, out, settings, compute, read)


def _run(
    name: str,
    version: int,
    checkpoint: Path,
    task: str,
    data: Path,
    out: Path,
    settings: SampleSettings,
    compute: Callable[[Path, dict[str, Any], dict[str, Any]], None],
    read: Callable[[Path], tuple[Any, ...]],
) -> Outcome[Any]:
    """Run a stage: `compute` writes a file with what `_load` gives; `read` ends in its metadata."""
    definition = load_task(data, task)
    estimator = getattr(settings, "estimator", None)
    if estimator in ("empirical", "batch") and not definition.has_labels:
        raise UserError(
            f"{task}: its rows have no labels, which the estimator {estimator} reads; choose the"
            " estimator expected"
        )
    return run_stage(
        name,
        version,
        out,
        lambda job: compute(job.path, *_load(job, checkpoint, definition, data, settings)),
        reads={"checkpoint": checkpoint, "train": split_files(data, definition, "train")},
        settings={"task": definition, "settings": settings},
        summary=lambda path: read(path)[-1],
    )


def _load(
    job: Job, checkpoint: Path, task: Task, data: Path, settings: SampleSettings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the functions that estimate a statistic take, and what its metadata say.

    The model's outputs are in the task's order; only the sampled rows have tokens.
    """
    import torch

    from fmn.models.devices import resolve_device, resolve_dtype
    from fmn.tasks.batches import select

    expert = labels.load_expert(checkpoint, task, data, settings.device)
    table = read_split(data, task, "train", labelled=not isinstance(settings, GramSettings))
    samples = None if settings.samples == "all" else settings.samples
    stratified = isinstance(settings, FisherSettings) and settings.stratified
    rows = select(_label_values(table), samples, settings.seed, stratified)
    device = resolve_device(settings.device)
    dtype = str(resolve_dtype(settings.dtype, device)).removeprefix("torch.")
    origin = provenance.lineage(checkpoint).model_dump()
    arguments = {
        "model": expert.model,
        "examples": tokenize(expert.tokenizer, expert.task, table, rows=rows),
        "samples": samples,
        "seed": settings.seed,
        "device": str(device),
        "dtype": dtype,
    }
    metadata = {
        "key": job.key,
        "task": task.name,
        "model_type": expert.model.config.model_type,
        "checkpoint": CheckpointOrigin(**origin, digest=job.inputs["checkpoint"]),
        "data_digest": job.inputs["train"],
        "definition": expert.task,
        "samples": len(rows),
        "seed": settings.seed,
        "dtype": dtype,
        "device": device.type,
        "threads": torch.get_num_threads(),
    }
    return arguments, metadata


def _label_values(table: "pa.Table") -> "np.ndarray":
    """The labels of all rows; zeros where they have none."""
    import numpy as np

    has_labels = "label" in table.column_names
    return table["label"].to_numpy() if has_labels else np.zeros(table.num_rows, np.int64)


def _write_sums(path: Path, key: str, sums: "PartialSums") -> None:
    import torch

    with artifacts.atomic_file(path) as partial_file:
        torch.save({"key": key, **vars(sums)}, partial_file)


def _read_sums(path: Path, key: str) -> "PartialSums | None":
    """The partial sums that the same run left when it was killed."""
    import torch

    from fmn.fisher.mask_nodes import PartialSums

    try:
        content = torch.load(path, weights_only=True)
        return PartialSums(**content) if content.pop("key") == key else None
    except Exception:  # a file that is absent or damaged may raise anything
        return None


STATISTICS: tuple[Callable[..., Outcome[Any]], ...] = (full_fisher, gram)
"""The stages beside the mask Fisher; each is a command of its own."""
