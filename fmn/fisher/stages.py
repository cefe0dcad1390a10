"""The stages that compute statistics of one expert."""

import multiprocessing
import os
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from fmn import __version__
from fmn.fisher import files as statistics
from fmn.models import checkpoints, labels
from fmn.models.provenance import lineage
from fmn.models.stages import Device, Dtype
from fmn.store import artifacts, stage
from fmn.store.records import Settings, at_least_one
from fmn.store.stage import Outcome, Progress
from fmn.tasks import dataset as data
from fmn.tasks import task as tasks

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from fmn.fisher.mask_nodes import State
    from fmn.tasks.batches import Examples


Estimator = Literal["empirical", "expected", "sampled", "batch"]


FISHER = 2
FULL_FISHER = 1
GRAM = 1


class FisherSettings(Settings):
    estimator: Estimator = Field(
        "empirical",
        description="whose labels: the data's (empirical), the model's in exact"
        " expectation (expected) or by a draw (sampled); batch: the paper's released code",
    )
    samples: int | Literal["all", "auto"] = Field(
        1024,
        description="examples, drawn without replacement; auto: until the estimate has converged",
    )
    stratified: bool = Field(False, description="draw every label in its share")
    seed: int = Field(0, ge=0, description="seed of the draw")
    workers: int = Field(
        1,
        ge=1,
        description="processes that share the examples, each on a GPU of its own where there are several",
    )
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field(
        "float32", description="precision of the matrix products; auto: bfloat16 where it pays"
    )

    _some = field_validator("samples")(at_least_one)

    @model_validator(mode="after")
    def _auto_is_one_run(self) -> "FisherSettings":
        if self.samples == "auto" and self.workers > 1:
            raise ValueError(
                "samples auto looks at the result as it grows, so it cannot be shared: take workers 1"
            )
        return self


class GramSettings(Settings):
    samples: int | Literal["all"] = Field(
        1024, description="examples, drawn without replacement; labels are not read"
    )
    seed: int = Field(0, ge=0, description="seed of the draw")
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field(
        "float32", description="precision of the matrix products; auto: bfloat16 where it pays"
    )

    _some = field_validator("samples")(at_least_one)


class FullFisherSettings(GramSettings):
    estimator: Literal["empirical", "expected", "sampled"] = Field(
        "empirical", description="as for the mask Fisher"
    )
    samples: int | Literal["all"] = Field(256, description="examples, drawn without replacement")


def _write_state(path: Path, key: str, state: "State") -> None:
    import numpy as np

    with artifacts.whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, key=np.asarray(key), **state.arrays())


def _read_state(path: Path, key: str) -> "State | None":
    """The partial sums of a killed run for the same content key; None where there are none that can be read."""
    import numpy as np

    from fmn.fisher.mask_nodes import State

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return State.from_arrays(arrays) if str(arrays["key"]) == key else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _drawn(
    checkpoint: Path,
    task: tasks.Task,
    folder: Path,
    samples: int | str,
    seed: int,
    stratified: bool = False,
) -> "Examples":
    """The training split below ``folder``; of a sample, no more is tokenised than `fmn.batches.select` draws."""
    from fmn.tasks import batches

    table = data.read(folder, task, "train")
    given = None if samples == "auto" else stage.limit(samples)
    rows = batches.select(table["label"].to_numpy(), given, seed, stratified)
    few = rows if len(rows) < table.num_rows else None
    return data.tokenize(checkpoints.load_tokenizer(checkpoint), task, table, rows=few)


def _sum_part(
    checkpoint: Path,
    task: str,
    folder: Path,
    settings: FisherSettings,
    aligned: labels.Labels,
    index: int,
    key: str,
    sums: Path,
    save_seconds: float,
    progress: Progress | None = None,
) -> "State":
    """The partial sums of one worker's part of the sample; they are saved in ``sums``, and taken up from there."""
    import torch

    from fmn.fisher import mask_nodes as fisher

    device, parts = settings.device, settings.workers
    if parts > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // parts))
        if device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{index % torch.cuda.device_count()}"
    found = tasks.task(task)
    model = labels.ordered(checkpoints.load_classifier(checkpoint), aligned)
    examples = _drawn(
        checkpoint, found, folder, settings.samples, settings.seed, settings.stratified
    )
    ends: list[State] = []

    def save(state: "State") -> None:
        _write_state(sums, key, state)
        ends[:] = [state]

    fisher.estimate(
        model,
        examples,
        estimator=settings.estimator,
        regression=found.regression,
        samples=stage.limit(settings.samples),
        stratified=settings.stratified,
        seed=settings.seed,
        part=(index, parts),
        device=device,
        dtype=settings.dtype,
        progress=progress,
        state=_read_state(sums, key),
        save=save,
        save_seconds=save_seconds,
    )
    return ends[0]


def fisher(
    checkpoint: Path,
    task: str,
    folder: Path,
    out: Path,
    settings: FisherSettings,
    progress: Progress | None = None,
    save_seconds: float = 5.0,
) -> Outcome:
    """The mask Fisher of an expert on its task's training split, as a Parquet artifact.

    Every ``save_seconds`` the partial sums are saved beside ``out``; a run that was killed goes on from them and gives
    the same bytes.
    """
    stage.apart(out, [checkpoint, folder])
    found = tasks.task(task)
    described = {"task": task, **settings.model_dump(exclude={"device", "workers"})}
    inputs = {
        "checkpoint": artifacts.digest_folder(checkpoint),
        **data.digests(folder, found, ["train"]),
    }
    key = artifacts.content_key("fisher", FISHER, described, inputs)
    parts = settings.workers
    # Of a run that was killed; it goes on from there.
    sums = [out.with_name(f".{out.name}.{index}-{parts}.partial-sums") for index in range(parts)]

    def make() -> None:
        import torch

        from fmn.fisher import mask_nodes as fisher

        aligned = labels.decide(checkpoint, found, folder, settings.device)
        jobs = [
            (checkpoint, task, folder, settings, aligned, index, key, sums[index], save_seconds)
            for index in range(parts)
        ]
        if parts == 1:
            states = [_sum_part(*jobs[0], progress)]
        else:
            with ProcessPoolExecutor(parts, multiprocessing.get_context("spawn")) as pool:
                states = [job.result() for job in [pool.submit(_sum_part, *job) for job in jobs]]
        estimate = fisher.summarise(fisher.combine(states))
        sites = sorted(estimate.fisher)
        metadata = {
            "key": key,
            "task": task,
            "model_type": checkpoints.load_config(checkpoint).model_type,
            "layers": len({site.layer for site in sites}),
            # Of a layer; of the largest where they differ.
            "heads": max(len(estimate.fisher[site]) for site in sites if site.node == "head"),
            "neurons": max(len(estimate.fisher[site]) for site in sites if site.node == "neuron"),
            "checkpoint": {**lineage(checkpoint).model_dump(), "digest": inputs["checkpoint"]},
            "data_digest": inputs["train"],
            "labels": {task: aligned.model_dump(by_alias=True)},
            "estimator": settings.estimator,
            "samples": estimate.samples,
            "seed": settings.seed,
            **({"stratified": True} if settings.stratified else {}),
            "converged": estimate.converged,
            "relative_stderr": estimate.relative_error,
            "rank_correlation": estimate.correlation,
            "dtype": estimate.dtype,
            "device": estimate.device,
            "threads": torch.get_num_threads(),
            "fmn": __version__,
        }
        artifacts.write_fisher(out, estimate.fisher, estimate.stderr, metadata)
        for path in sums:
            path.unlink(missing_ok=True)

    def summarise() -> Mapping[str, Any]:
        return artifacts.read_fisher(out)[2]

    return stage.run("fisher", out, lambda: artifacts.fisher_is_current(out, key), make, summarise)


def _large_statistic(
    kind: str,
    algorithm: int,
    checkpoint: Path,
    task: str,
    folder: Path,
    out: Path,
    settings: FullFisherSettings | GramSettings,
    compute: "Callable[[PreTrainedModel, Examples], tuple[Mapping[str, Tensor], Mapping[str, Any]]]",
) -> Outcome:
    """A statistic of an expert on its task's training split, as safetensors; `compute` gives tensors and metadata."""
    stage.apart(out, [checkpoint, folder])
    found = tasks.task(task)
    described = {"task": task, **settings.model_dump(exclude={"device"})}
    inputs = {
        "checkpoint": artifacts.digest_folder(checkpoint),
        **data.digests(folder, found, ["train"]),
    }
    key = artifacts.content_key(kind, algorithm, described, inputs)

    def make() -> None:
        import torch

        examples = _drawn(checkpoint, found, folder, settings.samples, settings.seed)
        aligned = labels.decide(checkpoint, found, folder, settings.device)
        tensors, metadata = compute(
            labels.ordered(checkpoints.load_classifier(checkpoint), aligned), examples
        )
        stated = {
            **described,
            "key": key,
            "model_type": checkpoints.load_config(checkpoint).model_type,
            "checkpoint": {**lineage(checkpoint).model_dump(), "digest": inputs["checkpoint"]},
            "data_digest": inputs["train"],
            "labels": {task: aligned.model_dump(by_alias=True)},
            "samples": len(examples)
            if settings.samples == "all"
            else min(settings.samples, len(examples)),
            "threads": torch.get_num_threads(),
            "fmn": __version__,
            **metadata,
        }
        statistics.write(out, kind, tensors, stated)

    def summarise() -> Mapping[str, Any]:
        return statistics.read(out, kind)[1]

    return stage.run(kind, out, lambda: statistics.is_current(out, kind, key), make, summarise)


def full_fisher(
    checkpoint: Path,
    task: str,
    folder: Path,
    out: Path,
    settings: FullFisherSettings,
    progress: Progress | None = None,
) -> Outcome:
    """The exact diagonal Fisher information of all of an expert's parameters, as safetensors."""

    def compute(
        model: "PreTrainedModel", examples: "Examples"
    ) -> "tuple[Mapping[str, Tensor], Mapping[str, Any]]":
        from fmn.fisher import parameters as diagonal

        regression = tasks.task(task).regression
        described = settings.model_dump(exclude={"samples"})
        samples = stage.limit(settings.samples)
        return diagonal.estimate(
            model, examples, regression=regression, samples=samples, progress=progress, **described
        ), {}

    return _large_statistic(
        "full-fisher", FULL_FISHER, checkpoint, task, folder, out, settings, compute
    )


def gram(
    checkpoint: Path,
    task: str,
    folder: Path,
    out: Path,
    settings: GramSettings,
    progress: Progress | None = None,
) -> Outcome:
    """The Gram matrices of what an expert's linear maps read, as safetensors."""

    def compute(
        model: "PreTrainedModel", examples: "Examples"
    ) -> "tuple[Mapping[str, Tensor], Mapping[str, Any]]":
        from fmn.fisher import gram

        described = settings.model_dump(exclude={"samples"})
        found = gram.estimate(
            model, examples, samples=stage.limit(settings.samples), progress=progress, **described
        )
        return found.moments, {"inputs": found.inputs, "transposed": sorted(found.transposed)}

    return _large_statistic("gram", GRAM, checkpoint, task, folder, out, settings, compute)
