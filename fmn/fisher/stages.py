"""The stages that compute statistics of one expert on its task's training split."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from pydantic import Field, field_validator

from fmn.fisher import files
from fmn.fisher.files import FisherMetadata, GramMetadata, StatisticMetadata
from fmn.models import checkpoints, labels
from fmn.models.stages import Device, Dtype
from fmn.store import artifacts, stage
from fmn.store.records import Labels, Settings, at_least_one
from fmn.store.stage import Job, Outcome, Progress, no_progress, run_stage
from fmn.tasks import dataset
from fmn.tasks import task as tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fmn.fisher.mask_nodes import PartialSums
    from fmn.tasks.batches import Examples

Estimator = Literal["empirical", "expected", "sampled", "batch"]
M = TypeVar("M", bound=files.Metadata)

VERSION = 3  # raised when the same inputs and settings give other numbers than before
SAVE_SECONDS = 5.0  # from one save of partial sums to the next


class SampleSettings(Settings):
    samples: int | Literal["all"] = Field(
        1024, description="examples, drawn without replacement from the training split"
    )
    seed: int = Field(0, ge=0, description="seed of the draw")
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field(
        "float32", description="number format of matrix products; auto: bfloat16 where it pays"
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

    def compute(job: Job) -> None:
        from fmn.fisher.mask_nodes import estimate

        expert = _load(job, checkpoint, task, data, settings, settings.stratified)
        sums = out.with_name(f".{out.name}.partial-sums")
        key = "{key} {device} {dtype}".format(**expert.metadata)
        found = estimate(
            expert.model,
            expert.examples,
            estimator=settings.estimator,
            regression=tasks.task(task).regression,
            stratified=settings.stratified,
            resume=_read_sums(sums, key),
            save=lambda partial: _write_sums(sums, key, partial),
            save_seconds=SAVE_SECONDS,
            progress=progress,
            **expert.options,
        )
        heads, neurons = (
            max(len(nodes) for site, nodes in found.fisher.items() if site.node == kind)
            for kind in ("head", "neuron")
        )
        metadata = FisherMetadata(
            **expert.metadata,
            estimator=settings.estimator,
            stratified=settings.stratified,
            layers=len({site.layer for site in found.fisher}),
            heads=heads,
            neurons=neurons,
            relative_stderr=found.relative_error,
        )
        files.write_fisher(job.path, found.fisher, found.stderr, metadata)
        sums.unlink(missing_ok=True)

    def summary(path: Path) -> FisherMetadata:
        return files.read_fisher(path)[2]

    return _run("fisher", checkpoint, task, data, out, settings, compute, summary)


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

    def compute(job: Job) -> None:
        from fmn.fisher.parameters import estimate

        expert = _load(job, checkpoint, task, data, settings)
        tensors = estimate(
            expert.model,
            expert.examples,
            estimator=settings.estimator,
            regression=tasks.task(task).regression,
            progress=progress,
            **expert.options,
        )
        metadata = StatisticMetadata(**expert.metadata, estimator=settings.estimator)
        files.write_statistic(job.path, tensors, metadata)

    def summary(path: Path) -> StatisticMetadata:
        return files.read_statistic(path, StatisticMetadata)[1]

    return _run("full-fisher", checkpoint, task, data, out, settings, compute, summary)


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

    def compute(job: Job) -> None:
        from fmn.fisher.gram import estimate

        expert = _load(job, checkpoint, task, data, settings)
        grams = estimate(expert.model, expert.examples, progress=progress, **expert.options)
        metadata = GramMetadata(
            **expert.metadata, inputs=grams.inputs, transposed=sorted(grams.transposed)
        )
        files.write_statistic(job.path, grams.moments, metadata)

    def summary(path: Path) -> GramMetadata:
        return files.read_statistic(path, GramMetadata)[1]

    return _run("gram", checkpoint, task, data, out, settings, compute, summary)


def _run(
    name: str,
    checkpoint: Path,
    task: str,
    data: Path,
    out: Path,
    settings: SampleSettings,
    compute: Callable[[Job], None],
    summary: Callable[[Path], M],
) -> Outcome[M]:
    train = dataset.digests(data, tasks.task(task), ["train"])["train"]
    return run_stage(
        name,
        VERSION,
        out,
        compute,
        reads={"checkpoint": checkpoint, "train": train},
        settings={"task": task, "settings": settings},
        summary=summary,
    )


class _Expert(NamedTuple):
    """An expert, examples to compute a statistic on, and what all statistics have in common.

    Attributes:
        options: arguments of the statistics' `estimate` functions.
        metadata: entries of the statistics' metadata.
    """

    model: "PreTrainedModel"
    examples: "Examples"
    options: dict[str, Any]
    metadata: dict[str, Any]


def _load(
    job: Job,
    checkpoint: Path,
    task_name: str,
    data: Path,
    settings: SampleSettings,
    stratified: bool = False,
) -> _Expert:
    """The expert, with outputs in its task's order; only the rows of the sample are tokenised."""
    import torch

    from fmn.models.devices import resolve_device, resolve_dtype
    from fmn.tasks.batches import select

    task = tasks.task(task_name)
    aligned = labels.decide(checkpoint, task, data, settings.device)
    model = labels.ordered(checkpoints.load_classifier(checkpoint), aligned)
    table = dataset.read(data, task, "train")
    samples = None if settings.samples == "all" else settings.samples
    rows = select(table["label"].to_numpy(), samples, settings.seed, stratified)
    device = resolve_device(settings.device)
    dtype = str(resolve_dtype(settings.dtype, device)).removeprefix("torch.")
    origin = {**stage.lineage(checkpoint), "digest": job.inputs["checkpoint"]}
    return _Expert(
        model,
        dataset.tokenize(checkpoints.load_tokenizer(checkpoint), task, table, rows=rows),
        {"samples": samples, "seed": settings.seed, "device": str(device), "dtype": dtype},
        {
            "key": job.key,
            "task": task_name,
            "model_type": model.config.model_type,
            "checkpoint": files.CheckpointOrigin.model_validate(origin),
            "data_digest": job.inputs["train"],
            "labels": {task_name: Labels.model_validate(aligned)},
            "samples": len(rows),
            "seed": settings.seed,
            "dtype": dtype,
            "device": device.type,
            "threads": torch.get_num_threads(),
        },
    )


def _write_sums(path: Path, key: str, sums: "PartialSums") -> None:
    import numpy as np

    with artifacts.whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, key=np.asarray(key), **vars(sums))


def _read_sums(path: Path, key: str) -> "PartialSums | None":
    """The partial sums of a run that was killed, if it was for the same key."""
    import numpy as np
    import torch

    from fmn.fisher.mask_nodes import PartialSums

    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            total, squares, pending = (
                torch.from_numpy(arrays[name]) for name in ("total", "squares", "pending")
            )
            return PartialSums(
                total, squares, pending, int(arrays["done"]), int(arrays["batch_tokens"])
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
