"""The stages that compute statistics of one expert on its task's training split."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, field_validator

from fmn.errors import UserError
from fmn.fisher import files, published
from fmn.fisher.files import CheckpointOrigin, FisherMetadata, GramMetadata, StatisticMetadata
from fmn.models import checkpoints, labels, loading, provenance
from fmn.models.stages import Device, Dtype
from fmn.store import artifacts
from fmn.store.records import Settings, at_least_one
from fmn.store.stage import Job, Outcome, Progress, if_current, no_progress, run_stage
from fmn.tasks.dataset import label_array, read_split, split_files
from fmn.tasks.encoding import encode
from fmn.tasks.task import Task, load_task

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from fmn.fisher.mask_nodes import Estimate, PartialSums

Estimator = Literal["empirical", "expected", "sampled", "batch"]

# DVC reads these: it does not see chained assignments.
FISHER = 8
FULL_FISHER = 5
GRAM = 5
MAX_ROUNDING = 0.02  # mean relative error that bfloat16 may leave where dtype auto chose it
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


class PublishedSettings(SampleSettings):
    published: Literal["same", "any", "none"] = Field(
        "same",
        description="a statistic that was published beside the expert is taken if it is of these"
        " settings and of the same rows; any: of whichever rows; none: it is never taken",
    )


class FisherSettings(PublishedSettings):
    estimator: Estimator = Field(
        "empirical",
        description="whose labels: the data's (empirical), the model's in exact expectation"
        " (expected; a backward pass for each class) or by a draw (sampled); batch: the paper's"
        " released code",
    )
    stratified: bool = Field(False, description="draw every label in its share")
    recompute: bool = Field(
        False,
        description="compute each layer's activations again in the backward pass: a third slower,"
        " for models whose activations do not fit in memory",
    )


class FullFisherSettings(SampleSettings):
    estimator: Literal["empirical", "expected", "sampled"] = Field(
        "empirical", description="as for the mask Fisher"
    )
    samples: int | Literal["all"] = Field(256, description="examples, drawn without replacement")


class GramSettings(PublishedSettings):
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

    Partial sums are saved beside the output; a run that was killed continues from them.

    Args:
        checkpoint: the expert's folder
        task: its task
        data: folder of the task's data, or of several tasks'
        out: the Parquet file
    """
    expert = _Inputs(checkpoint, load_task(data, task), data, settings, progress)
    return _run("fisher", FISHER, out, expert, partial(_estimate, out, expert), files.read_fisher)


def fisher_part(
    checkpoint: Path,
    *,
    task: str,
    data: Path,
    out: Path,
    whole: Path,
    part: tuple[int, int],
    settings: FisherSettings,
    progress: Progress = no_progress,
) -> Outcome[FisherMetadata]:
    """Compute the Fisher information from one of several parts of an expert's sample.

    It computes nothing if the Fisher information from the whole sample is there.

    Args:
        checkpoint: the expert's folder
        task: its task
        data: folder of the task's data, or of several tasks'
        out: the part's Parquet file, for `fisher_of_parts`
        whole: the output of `fisher_of_parts`
        part: the number of the part, from 1, and of all parts
        settings: of the whole
    """
    inputs = _Inputs(checkpoint, load_task(data, task), data, settings, progress, part)
    outcome = if_current(partial(fisher, checkpoint, task=task, data=data, out=whole,
                                 settings=settings)) or _part(out, inputs)  # fmt: skip
    # The whole one tells of a published statistic.
    return replace(outcome, summary=outcome.summary.model_copy(update={"published": None}))


def fisher_of_parts(
    checkpoint: Path,
    *,
    task: str,
    data: Path,
    out: Path,
    parts: Mapping[str, Path],
    settings: FisherSettings,
    progress: Progress = no_progress,
) -> Outcome[FisherMetadata]:
    """Combine the outputs of `fisher_part` into that of `fisher`, equal except for rounding.

    Parts that are not there are computed here.

    Args:
        checkpoint: the expert's folder
        task: its task
        data: folder of the task's data, or of several tasks'
        out: the Parquet file
        parts: the file of each part, in order
    """
    inputs = _Inputs(checkpoint, load_task(data, task), data, settings, progress)

    def compute(path: Path, sample: _Sample) -> None:
        from fmn.fisher.mask_nodes import Estimate, combined

        estimates, records = [], []
        for number, part in enumerate(parts.values(), 1):
            _part(part, inputs._replace(part=(number, len(parts))))
            values, errors, record = files.read_fisher(part)
            estimates.append(Estimate(values, errors, record.samples))
            records.append(record)
        roughest = min(records, key=lambda record: record.dtype)  # bfloat16, if a machine chose it
        of_machine = ("dtype", "precision", "device", "threads")
        sample.metadata.update({name: getattr(roughest, name) for name in of_machine})
        _write(path, combined(estimates, inputs.options["estimator"]), sample.metadata)

    return _run("fisher", FISHER, out, inputs, compute, files.read_fisher)


def _part(out: Path, inputs: "_Inputs") -> Outcome[FisherMetadata]:
    compute = partial(_estimate, out, inputs)
    return _run("fisher-part", FISHER, out, inputs, compute, files.read_fisher)


def _estimate(out: Path, inputs: "_Inputs", path: Path, sample: "_Sample") -> None:
    """Write the Fisher information of `inputs.part` to `path`; partial sums are beside `out`."""
    from fmn.fisher.mask_nodes import HEAVIEST, estimate

    metadata, is_checked = sample.metadata, False
    if inputs.settings.dtype == "auto" and metadata["dtype"] == "bfloat16":
        if metadata["estimator"] == "batch":  # its terms are not those of examples
            metadata |= {"dtype": "float32", "precision": "float32, as always for batch"}
        elif (metadata["estimator"], inputs.task.loss) == ("sampled", "tokens"):
            # The heaviest examples are those with an improbable draw, which would not come again.
            metadata["precision"] = "bfloat16, unchecked, as other logits draw other words"
        else:
            is_checked = True
    arguments = _arguments(inputs, sample)
    saved = out.with_name(f".{out.name}.partial-sums")

    def compute(heaviest: int = 0) -> "Estimate":
        key = "{key} {device} {dtype}".format(**metadata)
        return estimate(
            **{**arguments, "dtype": metadata["dtype"]},
            part=inputs.part,
            heaviest=heaviest,
            recompute=getattr(inputs.settings, "recompute", False),
            resume=_read_sums(saved, key),
            save=lambda sums: _write_sums(saved, key, sums),
            save_seconds=SAVE_SECONDS,
        )

    result = compute(HEAVIEST if is_checked else 0)
    if is_checked:
        rounding, count = result.rounding, min(HEAVIEST, result.samples)
        error = "" if rounding is None else f"; rounding of the others: about {rounding:.2%}"
        metadata["precision"] = f"bfloat16, and float32 for the {count} heaviest examples{error}"
        if rounding is not None and rounding > MAX_ROUNDING:
            metadata["dtype"] = "float32"
            metadata["precision"] = f"float32, as bfloat16 was too far off{error}"
            result = compute()
    _write(path, result, metadata)
    artifacts.discard(saved)


def _write(path: Path, result: "Estimate", metadata: dict[str, Any]) -> None:
    counts = {site: len(nodes) for site, nodes in result.fisher.items()}
    record = FisherMetadata(
        **metadata | {"samples": result.samples},
        layers=len({site.layer for site in counts}),
        heads=max(count for site, count in counts.items() if site.node == "head"),
        neurons=max(count for site, count in counts.items() if site.node == "neuron"),
        relative_stderr=result.relative_error,
    )
    files.write_fisher(path, result.fisher, result.stderr, record)


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

    expert = _Inputs(checkpoint, load_task(data, task), data, settings, progress)

    def compute(path: Path, sample: _Sample) -> None:
        from fmn.fisher.parameters import estimate

        values = estimate(**_arguments(expert, sample))
        files.write_statistic(path, values, StatisticMetadata(**sample.metadata))

    read = partial(files.read_statistic, record=StatisticMetadata)
    return _run("full-fisher", FULL_FISHER, out, expert, compute, read)


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

    expert = _Inputs(checkpoint, load_task(data, task), data, settings, progress)

    def compute(path: Path, sample: _Sample) -> None:
        from fmn.fisher.gram import estimate

        grams = estimate(**_arguments(expert, sample))
        transposed = sorted(grams.transposed)
        record = GramMetadata(**sample.metadata, inputs=grams.inputs, transposed=transposed)
        files.write_statistic(path, grams.moments, record)

    read = partial(files.read_statistic, record=GramMetadata)
    return _run("gram", GRAM, out, expert, compute, read)


class _Inputs(NamedTuple):
    """The inputs of a statistic: an expert, and the rows of its task in `data`.

    `part`: which part of the sample, and of how many.
    """

    checkpoint: Path
    task: Task
    data: Path
    settings: SampleSettings
    progress: Progress
    part: tuple[int, int] = (1, 1)

    @property
    def options(self) -> dict[str, Any]:
        """Settings that only some statistics have."""
        options = self.settings.model_dump(include={"estimator", "stratified"})
        if options.get("estimator") not in (None, *self.task.kind.estimators):
            options["estimator"] = "sampled"  # one section of settings serves tasks of every kind
        if self.task.loss == "tokens" and "stratified" in options:
            options["stratified"] = False  # a text has many labels
        return options


def _run(
    name: str,
    version: int,
    out: Path,
    inputs: _Inputs,
    compute: Callable[[Path, "_Sample"], None],
    read: Callable[[Path], tuple[Any, ...]],
) -> Outcome[Any]:
    """Run a stage: `compute` writes a file for a sample; `read` ends in the metadata."""
    task, estimator = inputs.task, inputs.options.get("estimator")
    if estimator in ("empirical", "batch") and not task.has_labels and task.loss != "embedding":
        raise UserError(
            f"{task.name}: its rows have no labels, which the estimator {estimator} reads; choose"
            " the estimator expected"
        )
    train = split_files(inputs.data, task, "train")

    def write(job: Job) -> None:
        sample = _sample(job, inputs)
        path = inputs.checkpoint / published.NAMES.get(name.removesuffix("-part"), "")
        if not (path.is_file() and _take(path, job, inputs, sample)):
            compute(job.path, sample)

    part = {"part": inputs.part} if name == "fisher-part" else {}
    return run_stage(
        name,
        version,
        out,
        write,
        reads={"checkpoint": inputs.checkpoint, "train": train},
        settings={"task": task, "settings": inputs.settings, **part},
        summary=lambda path: read(path)[-1],
    )


class _Sample(NamedTuple):
    """The rows of a statistic: the whole split, the number of those that are drawn, and what the
    statistic's metadata say."""

    table: "pa.Table"
    rows: "np.ndarray"
    metadata: dict[str, Any]


def _sample(job: Job, inputs: _Inputs) -> _Sample:
    import torch

    from fmn.models.devices import resolve_device, resolve_dtype
    from fmn.tasks.batches import select

    checkpoint, task, data, settings, *_ = inputs
    table = read_split(data, task, "train", labelled=not isinstance(settings, GramSettings))
    samples = None if settings.samples == "all" else settings.samples
    is_stratified = inputs.options.get("stratified", False)
    rows = select(label_array(task, table), samples, settings.seed, is_stratified)
    device = resolve_device(settings.device)
    config = checkpoints.load_config(checkpoint)
    origin = provenance.lineage(checkpoint).model_dump()
    origin |= {"digest": job.inputs["checkpoint"], "identity": published.identity(checkpoint)}
    metadata = {
        **inputs.options,
        "seed": settings.seed,
        "dtype": str(resolve_dtype(settings.dtype, device)).removeprefix("torch."),
        "key": job.key,
        "task": task.name,
        "model_type": config.model_type,
        "checkpoint": CheckpointOrigin(**origin),
        "data_digest": job.inputs["train"],
        "rows": published.rows_digest(task, table),
        "definition": labels.complete(task, config),
        "samples": len(rows),
        "device": device.type,
        "threads": torch.get_num_threads(),
    }
    return _Sample(table, rows, metadata)


def _take(path: Path, job: Job, inputs: _Inputs, sample: _Sample) -> bool:
    """Copy a published statistic if it fits the settings; else the metadata get the reason."""
    settings, metadata = inputs.settings, sample.metadata
    if not isinstance(settings, PublishedSettings) or settings.published == "none":
        return False
    problem = published.misfit(
        path,
        metadata,
        any_rows=settings.published == "any",
        any_dtype=settings.dtype == "auto",
    )
    if problem:
        metadata["published"] = f"not taken, but computed: {path} is {problem}"
        return False
    here = ("key", "task", "checkpoint", "definition")
    changes = {name: metadata[name] for name in here} | {"published": f"taken from {path}"}
    published.take(path, job.path, changes)
    return True


def _arguments(inputs: _Inputs, sample: _Sample) -> dict[str, Any]:
    """The arguments of the functions that estimate statistics.

    The model's outputs are in the task's order; only the sampled rows have tokens.
    """
    from fmn.models.devices import resolve_device

    checkpoint, task, data, settings, progress, _ = inputs
    device = resolve_device(settings.device)
    # A narrow model stays narrow on a GPU: a float32 copy would take twice its memory.
    is_narrow = device.type != "cpu" or sample.metadata["dtype"] == "bfloat16"
    dtype = loading.stored_dtype(checkpoint) if is_narrow else None
    expert = labels.load_expert(checkpoint, task, data, settings.device, dtype)
    arguments = {
        **inputs.options,
        "seed": settings.seed,
        "dtype": sample.metadata["dtype"],
        "model": expert.model,
        "examples": encode(expert.processor, expert.task, sample.table, rows=sample.rows),
        "samples": None if settings.samples == "all" else settings.samples,
        "device": str(device),
        "progress": progress,
    }
    if inputs.options:  # the loss is differentiated
        arguments["problem_type"] = expert.task.loss
    return arguments


def _write_sums(path: Path, key: str, sums: "PartialSums") -> None:
    import torch

    with artifacts.atomic_file(path) as partial_file:
        torch.save({"key": key, **vars(sums)}, partial_file)


def _read_sums(path: Path, key: str) -> "PartialSums | None":
    """The partial sums that a killed run with the same inputs left behind."""
    import torch

    from fmn.fisher.mask_nodes import PartialSums

    try:
        content = torch.load(path, weights_only=True)
        return PartialSums(**content) if content.pop("key") == key else None
    except Exception:  # a file that is absent or damaged may raise anything
        return None


STATISTICS: tuple[Callable[..., Outcome[Any]], ...] = (full_fisher, gram)
"""The stages beside the mask Fisher; each is a command of its own."""
