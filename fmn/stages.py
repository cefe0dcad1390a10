"""The stages: functions from files to files, each idempotent by content.

A stage computes the content key of its output; where the output is there, intact and carries that key, it returns at
once. The command line, the Prefect flow and DVC all call these functions, so none repeats what another did.
"""

import multiprocessing
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn import __version__, artifacts, checkpoints, data, labels, recipe, report, sources, statistics, tasks
from fmn.errors import UserError
from fmn.methods import NEEDS, Needs
from fmn.params import (
    CompareSettings,
    DataSettings,
    EvaluateSettings,
    FinetuneSettings,
    FisherSettings,
    FullFisherSettings,
    GramSettings,
    MergeSettings,
    RegistrySettings,
    SearchSettings,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from fmn.batches import Examples
    from fmn.fisher import State
    from fmn.intervals import Answers
    from fmn.search import Trial
    from fmn.trial import Contender

Progress = Callable[[int, int], None]

# What a stage's output depends on beside its settings and inputs; raised when the same inputs give other outputs.
# dvc.yaml has these as parameters of its stages.
FETCH = 1
DATA = 1
FINETUNE = 1
FISHER = 2
FULL_FISHER = 1
GRAM = 1
SEARCH = 1
MERGE = 2
EVALUATE = 2
REPORT = 1
COMPARE = 1
COMPARISON = 1
REGISTER = 1


@dataclass(frozen=True)
class Outcome:
    """What a stage did.

    Attributes:
        stage: its name.
        out: the output.
        computed: False when the output was there already.
        seconds: how long it took.
        summary: figures worth showing.
    """

    stage: str
    out: Path
    computed: bool
    seconds: float
    summary: Mapping[str, Any]


def _stage(
    stage: str,
    out: Path,
    current: Callable[[], bool],
    make: Callable[[], None],
    summarise: Callable[[], Mapping[str, Any]],
) -> Outcome:
    """Make ``out`` unless it is current; one process at a time. What fmn did not make is not replaced."""
    started = time.monotonic()
    artifacts.check_replaceable(out)
    with artifacts.locked(out):
        computed = not current()
        if computed:
            make()
    return Outcome(stage, out, computed, time.monotonic() - started, summarise())


def _apart(out: Path, inputs: Iterable[Path | None]) -> None:
    """Refuse an output that would replace what is read, or lie within a model that is read."""
    where = out.resolve()
    for path in inputs:
        given = path.resolve() if path is not None else None
        if given is None or path is None:
            continue
        model = any((given / name).is_file() for name in (recipe.RECIPE, checkpoints.CONFIG))
        if where == given or where in given.parents or (model and given in where.parents):
            raise UserError(f"--out {out}: would change {path}, which is read; choose another --out")


def _folder_stage(stage: str, out: Path, key: str, fill: Callable[[Path], Mapping[str, Any]]) -> Outcome:
    """A stage whose output is a folder that ``fill`` fills; what it returns goes into the manifest."""

    def make() -> None:
        with artifacts.whole_folder(out) as folder:
            artifacts.write_manifest(folder, stage, key, fill(folder))

    def summarise() -> Mapping[str, Any]:
        manifest = artifacts.read_manifest(out)
        return dict(manifest["info"]) if manifest else {}

    return _stage(stage, out, lambda: artifacts.folder_is_current(out, key), make, summarise)


def _json_stage(stage: str, out: Path, key: str, compute: Callable[[], Mapping[str, Any]]) -> Outcome:
    """A stage whose output is a JSON file."""
    return _stage(
        stage,
        out,
        lambda: artifacts.json_is_current(out, key),
        lambda: artifacts.write_json(out, stage, key, compute()),
        lambda: artifacts.read_json(out),
    )


def _limit(number: int | str) -> Any:
    return None if number == "all" else number


def _lineage(folder: Path) -> dict[str, str]:
    """Where a checkpoint comes from: the source as given, and its revision pinned."""
    manifest = artifacts.read_manifest(folder)
    if manifest is None:
        return {"source": "folder", "revision": f"sha256:{artifacts.digest_folder(folder)}"}
    info = manifest["info"]
    made = f"{manifest['stage']}:{manifest['key'][:16]}"
    return {"source": str(info.get("source", made)), "revision": str(info.get("revision", made))}


def fetch(source: str, out: Path, progress: Progress | None = None) -> Outcome:
    """A checkpoint from its source, pinned and verified, as the folder ``out``."""
    _apart(out, [Path(source)])
    pinned = sources.resolve(source)
    digest = sources.folder_digest(pinned)
    key = artifacts.content_key("fetch", FETCH, {"source": pinned}, {"folder": digest} if digest else {})

    def fill(folder: Path) -> Mapping[str, Any]:
        return {**sources.fetch(pinned, folder, progress=progress), "source": source}

    return _folder_stage("fetch", out, key, fill)


def prepare(task: str, out: Path, settings: DataSettings) -> Outcome:
    """A task's splits as Parquet in the folder ``out``."""
    _apart(out, [Path(settings.source)])
    found = tasks.task(task)
    source, revision = settings.source, settings.revision
    described = {"task": task, "source": source}
    inputs = {}
    if source == "embedded":
        described["seed"] = str(settings.seed)
    elif source == "hub":
        described["revision"] = revision = sources.resolve_dataset(data.HUB, revision)
    else:
        described["source"] = "folder"
        inputs = data.digests(Path(source), found, ["train", *data.validation_splits(Path(source), found)])
    key = artifacts.content_key("data", DATA, described, inputs)

    def fill(folder: Path) -> Mapping[str, Any]:
        rows = data.prepare(found, source, folder, seed=settings.seed, revision=revision)
        return {**described, "source": source, "rows": rows}

    return _folder_stage("data", out, key, fill)


def finetune(
    base: Path, task: str, folder: Path, out: Path, settings: FinetuneSettings, progress: Progress | None = None
) -> Outcome:
    """An expert for ``task``, fine-tuned from the checkpoint ``base`` on the training split below ``folder``."""
    _apart(out, [base, folder])
    found = tasks.task(task)
    inputs = {"base": artifacts.digest_folder(base), **data.digests(folder, found, ["train"])}
    described = settings.model_dump(exclude={"device"})
    key = artifacts.content_key("finetune", FINETUNE, {"task": task, **described}, inputs)

    def fill(target: Path) -> Mapping[str, Any]:
        from fmn import batches, finetune

        tokenizer = checkpoints.load_tokenizer(base)
        examples = data.tokenize(tokenizer, found, data.read(folder, found, "train"))
        rows = batches.select(examples.labels, _limit(settings.examples), settings.seed)
        model = finetune.new_expert(base, found, settings.seed)
        losses = finetune.finetune(
            model,
            examples.take(rows),
            regression=found.regression,
            progress=progress,
            **settings.model_dump(exclude={"examples"}),
        )
        with checkpoints.no_bars():
            model.cpu().save_pretrained(target)
            tokenizer.save_pretrained(target)
        last = losses[-max(1, len(losses) // 10) :]
        return {
            "task": task,
            "base": _lineage(base),
            **described,
            "examples": len(rows),
            "steps": len(losses),
            "loss": sum(last) / len(last),
        }

    return _folder_stage("finetune", out, key, fill)


def _write_state(path: Path, key: str, state: "State") -> None:
    import numpy as np

    with artifacts.whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, key=np.asarray(key), **state.arrays())


def _read_state(path: Path, key: str) -> "State | None":
    """The partial sums of a killed run for the same content key; None where there are none that can be read."""
    import numpy as np

    from fmn.fisher import State

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return State.from_arrays(arrays) if str(arrays["key"]) == key else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


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

    from fmn import fisher

    device, parts = settings.device, settings.workers
    if parts > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // parts))
        if device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{index % torch.cuda.device_count()}"
    found = tasks.task(task)
    model = labels.ordered(checkpoints.load_classifier(checkpoint), aligned)
    examples = data.tokenize(checkpoints.load_tokenizer(checkpoint), found, data.read(folder, found, "train"))
    ends: list[State] = []

    def save(state: "State") -> None:
        _write_state(sums, key, state)
        ends[:] = [state]

    fisher.estimate(
        model,
        examples,
        estimator=settings.estimator,
        regression=found.regression,
        samples=_limit(settings.samples),
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
    _apart(out, [checkpoint, folder])
    found = tasks.task(task)
    described = {"task": task, **settings.model_dump(exclude={"device", "workers"})}
    inputs = {"checkpoint": artifacts.digest_folder(checkpoint), **data.digests(folder, found, ["train"])}
    key = artifacts.content_key("fisher", FISHER, described, inputs)
    parts = settings.workers
    # Of a run that was killed; it goes on from there.
    sums = [out.with_name(f".{out.name}.{index}-{parts}.partial-sums") for index in range(parts)]

    def make() -> None:
        from fmn import fisher

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
            "checkpoint": {**_lineage(checkpoint), "digest": inputs["checkpoint"]},
            "data_digest": inputs["train"],
            "labels": {task: aligned},
            "estimator": settings.estimator,
            "samples": estimate.samples,
            "seed": settings.seed,
            "converged": estimate.converged,
            "relative_stderr": estimate.relative_error,
            "rank_correlation": estimate.correlation,
            "dtype": estimate.dtype,
            "device": estimate.device,
            "fmn": __version__,
        }
        artifacts.write_fisher(out, estimate.fisher, estimate.stderr, metadata)
        for path in sums:
            path.unlink(missing_ok=True)

    def summarise() -> Mapping[str, Any]:
        return artifacts.read_fisher(out)[2]

    return _stage("fisher", out, lambda: artifacts.fisher_is_current(out, key), make, summarise)


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
    _apart(out, [checkpoint, folder])
    found = tasks.task(task)
    described = {"task": task, **settings.model_dump(exclude={"device"})}
    inputs = {"checkpoint": artifacts.digest_folder(checkpoint), **data.digests(folder, found, ["train"])}
    key = artifacts.content_key(kind, algorithm, described, inputs)

    def make() -> None:
        examples = data.tokenize(checkpoints.load_tokenizer(checkpoint), found, data.read(folder, found, "train"))
        aligned = labels.decide(checkpoint, found, folder, settings.device)
        tensors, metadata = compute(labels.ordered(checkpoints.load_classifier(checkpoint), aligned), examples)
        stated = {
            **described,
            "key": key,
            "model_type": checkpoints.load_config(checkpoint).model_type,
            "checkpoint": {**_lineage(checkpoint), "digest": inputs["checkpoint"]},
            "data_digest": inputs["train"],
            "labels": {task: aligned},
            "samples": len(examples) if settings.samples == "all" else min(settings.samples, len(examples)),
            "fmn": __version__,
            **metadata,
        }
        statistics.write(out, kind, tensors, stated)

    def summarise() -> Mapping[str, Any]:
        return statistics.read(out, kind)[1]

    return _stage(kind, out, lambda: statistics.is_current(out, kind, key), make, summarise)


def full_fisher(
    checkpoint: Path, task: str, folder: Path, out: Path, settings: FullFisherSettings, progress: Progress | None = None
) -> Outcome:
    """The exact diagonal Fisher information of all of an expert's parameters, as safetensors."""

    def compute(model: "PreTrainedModel", examples: "Examples") -> "tuple[Mapping[str, Tensor], Mapping[str, Any]]":
        from fmn import diagonal

        regression = tasks.task(task).regression
        described = settings.model_dump(exclude={"samples"})
        samples = _limit(settings.samples)
        return diagonal.estimate(
            model, examples, regression=regression, samples=samples, progress=progress, **described
        ), {}

    return _large_statistic("full-fisher", FULL_FISHER, checkpoint, task, folder, out, settings, compute)


def gram(
    checkpoint: Path, task: str, folder: Path, out: Path, settings: GramSettings, progress: Progress | None = None
) -> Outcome:
    """The Gram matrices of what an expert's linear maps read, as safetensors."""

    def compute(model: "PreTrainedModel", examples: "Examples") -> "tuple[Mapping[str, Tensor], Mapping[str, Any]]":
        from fmn import gram

        described = settings.model_dump(exclude={"samples"})
        found = gram.estimate(model, examples, samples=_limit(settings.samples), progress=progress, **described)
        return found.moments, {"inputs": found.inputs, "transposed": sorted(found.transposed)}

    return _large_statistic("gram", GRAM, checkpoint, task, folder, out, settings, compute)


def _belongs(path: Path, kind: str, stated: Mapping[str, Any], task: str, expert: Path, digest: str) -> None:
    """Refuse a statistic of another task, or of another checkpoint than the expert with this digest."""
    title = {"fisher": "Fisher", "gram": "Gram matrices"}[kind]
    if stated["task"] != task:
        raise UserError(f"{path}: the {title} of task {stated['task']}, given for {task}")
    if stated["checkpoint"]["digest"] != digest:
        raise UserError(f"{path}: the {title} of another checkpoint than {expert}; make it again")


def _statistics(
    needs: Needs,
    experts: Mapping[str, Path],
    digests: Mapping[str, str],
    fisher_files: Mapping[str, Path],
    gram_files: Mapping[str, Path],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What a method takes beside the experts, as options of `fmn.merged`, and what the recipe says of it.

    Every statistic must be there, and be of the very checkpoint and task that it is given for.
    """
    options: dict[str, Any] = {}
    stated: dict[str, dict[str, Any]] = {"fisher": {}, "gram": {}}

    def take(kind: str, option: str, command: str, files: Mapping[str, Path], read: Callable[[Path], Any]) -> None:
        found = {}
        for task, digest in digests.items():
            if task not in files:
                raise UserError(f"--{kind} {task}=FILE is missing: this method weighs by it; `fmn {command}` makes it")
            found[task], metadata = read(files[task])
            _belongs(files[task], kind, metadata, task, experts[task], digest)
            names = ("estimator", "samples", "seed", "dtype", "key")
            stated[kind][task] = {
                "digest": artifacts.digest_file(files[task]),
                **{name: metadata[name] for name in names if name in metadata},
            }
        options[option] = found

    def nodes(path: Path) -> tuple[Any, Any]:
        values, _, metadata = artifacts.read_fisher(path)
        return values, metadata

    def grams(path: Path) -> tuple[Any, Any]:
        from fmn.merged import StoredGrams

        headers, metadata = statistics.read(path, "gram")
        return StoredGrams(headers, metadata["inputs"], metadata["transposed"]), metadata

    if needs.fisher == "nodes":
        take("fisher", "fisher", "fisher", fisher_files, nodes)
    if needs.fisher == "parameters":
        read_full = partial(statistics.read, kind="full-fisher")
        take("fisher", "full_fisher", "full-fisher", fisher_files, read_full)
    if needs.gram:
        take("gram", "grams", "gram", gram_files, grams)
    return options, stated


@dataclass(frozen=True)
class _Inputs:
    """What a merge is made from, checked.

    Attributes:
        experts: digests by task.
        base: digest of the base.
        options: the statistics as `fmn.merged` takes them.
        stated: what the recipe says of them.
    """

    experts: Mapping[str, str]
    base: str | None
    options: Mapping[str, Any]
    stated: Mapping[str, Mapping[str, Any]]

    @property
    def digests(self) -> dict[str, str]:
        named = {f"expert {task}": digest for task, digest in self.experts.items()}
        for kind, entries in self.stated.items():
            named |= {f"{kind} {task}": entry["digest"] for task, entry in entries.items()}
        return named | ({"base": self.base} if self.base else {})


def _inputs(
    experts: Mapping[str, Path],
    fisher_files: Mapping[str, Path],
    gram_files: Mapping[str, Path],
    base: Path | None,
    settings: MergeSettings,
) -> _Inputs:
    digests = {task: artifacts.digest_folder(folder) for task, folder in sorted(experts.items())}
    base_digest = artifacts.digest_folder(base) if base else None
    return _Inputs(
        digests, base_digest, *_statistics(NEEDS[settings.method], experts, digests, fisher_files, gram_files)
    )


def _described(settings: MergeSettings, *without: str) -> dict[str, Any]:
    """The settings that a merge depends on, but for those named."""
    unused = () if NEEDS[settings.method].fisher == "nodes" else ("mapping", "normalise", "exponent")
    return settings.model_dump(exclude={*unused, *without})


def search(
    experts: Mapping[str, Path],
    fisher_files: Mapping[str, Path],
    gram_files: Mapping[str, Path],
    base: Path | None,
    folder: Path,
    out: Path,
    merging: MergeSettings,
    settings: SearchSettings,
    progress: Progress | None = None,
) -> Outcome:
    """Coefficients for a merge, found by search, as a JSON file that `merge` takes.

    They are chosen by the mean over tasks of the score relative to the expert's, on rows of the training splits below
    ``folder``, those that the expert was not fine-tuned on where there are some; equal coefficients are the first
    trial. Trials are logged to MLflow, and kept beside ``out``: a search that was killed, or is given a larger budget,
    goes on from them.

    Raises UserError as `merge` does, and where an expert scores nothing that others could be compared with.
    """
    _apart(out, [*experts.values(), *fisher_files.values(), *gram_files.values(), base, folder])
    searched = settings.scale_range is not None
    for option, given in (("coefficient", merging.coefficient), ("scale", searched and merging.scale != "auto")):
        if given:
            raise UserError(f"--{option}: the search is to find it; leave it out")
    if len(experts) < 2 and not searched:
        raise UserError("one expert has no coefficients to search; give more as --expert TASK=DIR, or --scale-range")
    if searched and base is None:
        raise UserError("--scale-range needs the model that the experts were tuned from; give --base DIR")
    inputs = _inputs(experts, fisher_files, gram_files, base, merging)
    found = {task: tasks.task(task) for task in sorted(experts)}
    tuned_on = {task: _tuned_on(path) for task, path in sorted(experts.items())}
    described = {
        "merge": _described(merging, "coefficient"),
        **settings.model_dump(exclude={"trials", "experiment", "device"}),
        "tuned on": {task: list(rows) for task, rows in tuned_on.items()},
    }
    rows = {f"data {name}": data.digests(folder, task, ["train"])["train"] for name, task in found.items()}
    study = artifacts.content_key("search", SEARCH, described, {**inputs.digests, **rows})
    key = artifacts.content_key("search", SEARCH, {"study": study, "trials": settings.trials}, {})

    def compute() -> Mapping[str, Any]:
        from fmn import merged, registry, search, trial

        checkpoints.check_experts(experts, base)
        options = {**inputs.options, **merging.model_dump(exclude={"coefficient"}), "base": base}
        scale = merged.scale(experts, **options)
        encoder = merged.recombiner(experts, searched or scale != 1, **options)
        limit = (_limit(settings.rows), settings.search_seed, settings.device, settings.dtype)
        contenders = {
            name: trial.contender(experts[name], task, folder, "train", *limit, tuned_on[name])
            for name, task in found.items()
        }
        for name, one in contenders.items():
            if one.score <= 0:
                raise UserError(
                    f"expert {name}: scores {one.score:.3f} on {len(one.examples)} rows of its training data, which no"
                    " merge can be compared with; give more --rows, or a better expert"
                )

        def attempt(coefficients: Mapping[str, float], scale: float) -> dict[str, float]:
            return trial.relative_scores(contenders, encoder(coefficients, scale), settings.device, settings.dtype)

        params = {**described["merge"], **settings.model_dump(exclude={"trials", "experiment"}), "scale": scale}

        def log(done: "Sequence[Trial]") -> None:
            registry.log_trials(
                [_metrics(one) for one in done],
                name=f"search {', '.join(found)}",
                experiment=settings.experiment,
                key=study,
                params={**params, "tasks": ", ".join(found)},
            )
            if progress:
                progress(len(done), settings.trials)

        trials = search.search(
            attempt, list(found), settings.scale_range, scale=scale, trials=settings.trials,
            seed=settings.search_seed, file=out.with_name(f".{out.name}.trials"), name=study, report=log,
        )  # fmt: skip
        best, uniform = max(trials, key=lambda one: one.score), trials[0]
        return {
            "coefficients": best.coefficients,
            "scale": best.scale,
            "score": best.score,
            "uniform": uniform.score,
            "tasks": {
                name: {"expert": one.score, "uniform": uniform.scores[name], "found": best.scores[name]}
                for name, one in contenders.items()
            },
            "rows": {name: len(one.examples) for name, one in contenders.items()},
            "experts": inputs.experts,
            "merge": _described(merging, "coefficient", "scale"),
            "trials": [
                {"coefficients": one.coefficients, "scale": one.scale, "score": one.score, "tasks": one.scores}
                for one in trials
            ],
        }

    return _json_stage("search", out, key, compute)


def _tuned_on(expert: Path) -> tuple[int | None, int]:
    """How many training rows an expert was fine-tuned on, and the seed that drew them; (None, 0), all, if not known."""
    manifest = artifacts.read_manifest(expert)
    if manifest is None or manifest["stage"] != "finetune":
        return None, 0
    return int(manifest["info"]["examples"]), int(manifest["info"]["seed"])


def _metrics(one: "Trial") -> dict[str, float]:
    """A trial as MLflow shows it."""
    return {
        "score": one.score,
        "scale": one.scale,
        **{f"coefficient.{name}": value for name, value in one.coefficients.items()},
        **{f"relative.{name}": value for name, value in one.scores.items()},
    }


def merge(
    experts: Mapping[str, Path],
    fisher_files: Mapping[str, Path],
    base: Path | None,
    out: Path,
    settings: MergeSettings,
    progress: Progress | None = None,
    gram_files: Mapping[str, Path] | None = None,
    coefficients: Path | None = None,
) -> Outcome:
    """The experts merged into the folder ``out``.

    ``coefficients``: a file that `search` made, which gives coefficients and scale.

    Raises UserError when they do not fit one another or their tasks, or when a statistic or the coefficients belong to
    other checkpoints or tasks.
    """
    given = gram_files or {}
    _apart(out, [*experts.values(), *fisher_files.values(), *given.values(), base, coefficients])
    inputs = _inputs(experts, fisher_files, given, base, settings)
    found = _searched(coefficients, inputs, settings) if coefficients else None
    digests = inputs.digests | ({"coefficients": found["digest"]} if found else {})
    aligned = {task: _aligned(experts[task], task, fisher_files.get(task), inputs.experts[task]) for task in experts}
    key = artifacts.content_key("merge", MERGE, _described(settings) | {"labels": aligned}, digests)

    def make() -> None:
        from fmn import merged

        checkpoints.check_experts(experts, base)
        lineage: dict[str, Any] = {
            "fmn": __version__,
            "key": key,
            "experts": {task: {**_lineage(experts[task]), "digest": digest} for task, digest in inputs.experts.items()},
            **inputs.stated,
            "labels": aligned,
            "base": {**_lineage(base), "digest": inputs.base} if base else None,
        }
        options = {
            **inputs.options,
            **settings.model_dump(exclude={"coefficient"}),
            "coefficients": settings.coefficients,
            "base": base,
            "labels": {task: labels.names_by_output(tasks.task(task), one) for task, one in aligned.items()},
        }
        if found:
            lineage["search"] = {name: found[name] for name in ("digest", "score", "uniform")}
            options |= {"coefficients": found["coefficients"], "scale": found["scale"]}
        merged.write(out, experts, recipe=lineage, progress=progress, **options)

    def current() -> bool:
        try:
            recipe.verify(out)
        except UserError:
            return False
        return bool(recipe.read_recipe(out).get("key") == key)

    outcome = _stage("merge", out, current, make, lambda: recipe.read_recipe(out))
    if not (out / recipe.CARD).is_file():
        _write_card(out, None)
    return outcome


def _searched(file: Path, inputs: _Inputs, settings: MergeSettings) -> dict[str, Any]:
    """What `search` found, with the file's digest; UserError where it was for another merge than this."""
    found = artifacts.read_json(file)
    if "coefficients" not in found:
        raise UserError(f"{file}: not coefficients; `fmn search` makes them")
    if settings.coefficient or settings.scale != "auto":
        raise UserError(f"--coefficients {file} gives coefficients and scale; leave out --coefficient and --scale")
    if wrong := artifacts.differing(found["experts"], inputs.experts):
        raise UserError(f"{file}: coefficients of other experts than these (see {wrong}); search again")
    wanted, there = _described(settings, "coefficient", "scale"), found["merge"]
    if wrong := next((name for name in {**wanted, **there} if wanted.get(name) != there.get(name)), None):
        raise UserError(f"{file}: coefficients for a merge with another {wrong}; search again, or merge like that")
    return {**found, "digest": artifacts.digest_file(file)}


def _aligned(expert: Path, task: str, fisher_file: Path | None, digest: str) -> labels.Labels:
    """How an expert's outputs stand for the task's labels, without data: by names, or as its Fisher artifact says."""
    found = tasks.task(task)
    named = labels.by_names(found, labels.output_names(expert))
    if named is not None or fisher_file is None:
        return named or labels.as_they_stand(found)
    large = fisher_file.suffix == ".safetensors"
    stated = statistics.read(fisher_file, "full-fisher")[1] if large else artifacts.read_fisher(fisher_file)[2]
    _belongs(fisher_file, "fisher", stated, task, expert, digest)
    recorded: labels.Labels | None = stated.get("labels", {}).get(task)
    return recorded or labels.as_they_stand(found)


def _write_card(folder: Path, metrics: Mapping[str, Any] | None) -> None:
    text = report.card(recipe.read_recipe(folder), metrics)
    path = folder / recipe.CARD
    if not path.is_file() or path.read_text() != text:
        with artifacts.whole_file(path) as file:
            file.write_text(text)


def evaluate(
    model: Path,
    names: Sequence[str],
    folder: Path,
    out: Path,
    settings: EvaluateSettings,
    progress: Progress | None = None,
) -> Outcome:
    """The metrics of a merged model, or of one checkpoint, on the validation splits below ``folder``.

    Each has its 95 % bootstrap interval. The predictions lie beside the metrics, for paired tests between models.

    Args:
        model: a merged model, or an expert.
        names: the tasks; a merged model's own when empty.
        folder: of one task, or of tasks.
        out: the metrics file. A merged model's card gets the metrics too.
    """
    predictions = artifacts.predictions_file(out)
    for path in (out, predictions):
        _apart(path, [model, folder])
    artifacts.check_replaceable(predictions)
    is_merged = recipe.is_merged(model)
    if is_merged:
        recipe.verify(model)
        digest = artifacts.digest_file(model / recipe.RECIPE)
    else:
        digest = artifacts.digest_folder(model)
    chosen = list(names) or (recipe.read_recipe(model)["tasks"] if is_merged else [])
    if not chosen:
        raise UserError(f"{model}: not a merged model, so say which task it is for: --task TASK")
    found = {name: tasks.task(name) for name in chosen}
    inputs = {"model": digest}
    splits = {}
    for name, task in found.items():
        digests = data.digests(folder, task, data.validation_splits(folder, task))
        splits[name] = list(digests)
        # Outputs without a name that means something are told apart by the training split.
        if not is_merged and not labels.by_names(task, labels.output_names(model)) and data.has(folder, task, "train"):
            digests |= data.digests(folder, task, ["train"])
        inputs |= {f"{name} {split}": value for split, value in digests.items()}
    key = artifacts.content_key("evaluate", EVALUATE, settings.model_dump(exclude={"device"}), inputs)

    def make() -> None:
        from fmn import intervals

        entries, given, aligned = {}, {}, {}
        for name, task in found.items():
            checkpoint = recipe.task_folder(model, name) if is_merged else model
            # What a merged model's outputs mean was decided when it was merged, and its configuration says it.
            aligned[name] = labels.decide(checkpoint, task, None if is_merged else folder, settings.device)
            tables = {split: data.read(folder, task, split) for split in splits[name]}
            entries[name], given[name] = _scores(checkpoint, task, aligned[name], tables, settings, progress)
        draws = {name: intervals.resampled(task, given[name]) for name, task in found.items()}
        for name, values in draws.items():
            entries[name]["interval"] = {metric: intervals.interval(values[metric]) for metric in values}
        artifacts.write_predictions(predictions, given)
        content = {
            "model": digest,
            "tasks": entries,
            "score": sum(entry["score"] for entry in entries.values()) / len(entries),
            "interval": intervals.interval(intervals.macro({name: values["score"] for name, values in draws.items()})),
            "predictions": artifacts.digest_file(predictions),
            "labels": aligned,
        }
        artifacts.write_json(out, "evaluate", key, content)

    def current() -> bool:
        if not (artifacts.json_is_current(out, key) and predictions.is_file()):
            return False
        return bool(artifacts.read_json(out)["predictions"] == artifacts.digest_file(predictions))

    outcome = _stage("evaluate", out, current, make, lambda: artifacts.read_json(out))
    if is_merged and set(chosen) == set(recipe.read_recipe(model)["tasks"]):
        _write_card(model, outcome.summary)
    return outcome


def _scores(
    checkpoint: Path,
    task: tasks.Task,
    aligned: labels.Labels,
    tables: Mapping[str, Any],
    settings: EvaluateSettings,
    progress: Progress | None,
) -> tuple[dict[str, Any], dict[str, "Answers"]]:
    """A task's metrics on its validation splits, given as tables, and the answers that they are of.

    The metrics of the first split have their plain names.
    """
    from fmn.evaluate import answers, predict, score_answers

    tokenizer = checkpoints.load_tokenizer(checkpoint)
    model = labels.ordered(checkpoints.load_classifier(checkpoint), aligned)
    entry: dict[str, float] = {}
    given = {}
    scores = []
    for split, table in tables.items():
        examples = data.tokenize(tokenizer, task, table)
        logits = predict(model, examples, device=settings.device, dtype=settings.dtype, progress=progress)
        given[split] = answers(task, logits, examples.labels)
        found = {**score_answers(task, given[split]), "examples": len(examples)}
        scores.append(found.pop("score"))
        entry |= {f"{name}{task.suffix(split)}": value for name, value in found.items()}
    return {**entry, "score": sum(scores) / len(scores)}, given


@lru_cache(maxsize=16)
def _contender(_expert: str, _data: str, checkpoint: Path, task: str, *rest: Any) -> "Contender":
    """`trial.contender`, once a process for the cells that share it; the digests see to it that it is the same."""
    from fmn import trial

    return trial.contender(checkpoint, tasks.task(task), *rest)


def compare(
    experts: Mapping[str, Path],
    fisher_files: Mapping[str, Path],
    gram_files: Mapping[str, Path],
    base: Path,
    folder: Path,
    out: Path,
    merging: MergeSettings,
    settings: CompareSettings,
    tuned_on: Mapping[str, tuple[int | None, int]],
) -> Outcome:
    """A cell of a comparison: some experts merged in one way, in memory, and tried on their tasks.

    Args:
        tuned_on: by task, how many training rows the expert was fine-tuned on and the seed that drew them.
    """
    needs = NEEDS[merging.method]
    digests = {task: artifacts.digest_folder(path) for task, path in sorted(experts.items())}
    options, stated = _statistics(needs, experts, digests, fisher_files, gram_files)
    splits = {
        task: data.validation_splits(folder, tasks.task(task))[0] if settings.split == "validation" else "train"
        for task in digests
    }
    inputs = {f"expert {task}": digest for task, digest in digests.items()} | {"base": artifacts.digest_folder(base)}
    inputs |= {f"{kind} {task}": entry["digest"] for kind, entries in stated.items() for task, entry in entries.items()}
    inputs |= {task: data.digests(folder, tasks.task(task), [split])[split] for task, split in splits.items()}
    described = {
        "merge": merging.model_dump(),
        "rows": settings.model_dump(include={"split", "rows", "seed", "dtype"}),
        "tuned on": {task: list(tuned_on[task]) for task in digests} if settings.split == "train" else None,
    }
    key = artifacts.content_key("compare", COMPARE, described, inputs)

    def compute() -> Mapping[str, Any]:
        from fmn import merged, trial
        from fmn.evaluate import answers, score

        started = time.monotonic()
        how = merging.model_dump(exclude={"coefficient", "estimator"})
        how |= {**options, "coefficients": merging.coefficients, "base": base}
        encoder = merged.in_memory(experts, **how)
        seconds = time.monotonic() - started
        entries = {}
        for task, split in splits.items():
            limit = (_limit(settings.rows), settings.seed, settings.device, settings.dtype)
            one = _contender(digests[task], inputs[task], experts[task], task, folder, split, *limit, tuned_on[task])
            outputs = trial.logits(one, encoder, settings.device, settings.dtype)
            reached = score(one.task, outputs, one.examples.labels)["score"]
            entries[task] = {
                "score": reached,
                "expert": one.score,
                "relative": reached / one.score if one.score > 0 else None,
                "labels": one.examples.labels.tolist(),
                "predictions": answers(one.task, outputs, one.examples.labels).predicted.tolist(),
                "expert predictions": answers(one.task, one.logits, one.examples.labels).predicted.tolist(),
            }
        return {"tasks": entries, "seconds": seconds}

    return _json_stage("compare", out, key, compute)


def write_comparison(cells: Mapping[str, Mapping[str, Path]], out: Path) -> Outcome:
    """The tables of a comparison in the folder ``out``, from its cells' files by set and method."""
    inputs = {
        f"{name}/{method}": artifacts.digest_file(_there(path))
        for name, row in cells.items()
        for method, path in row.items()
    }
    key = artifacts.content_key("comparison", COMPARISON, {"order": list(inputs)}, inputs)

    def fill(target: Path) -> Mapping[str, Any]:
        from fmn import comparison

        read = {
            name: {method: artifacts.read_json(path) for method, path in row.items()} for name, row in cells.items()
        }
        return comparison.write(target, read)

    return _folder_stage("comparison", out, key, fill)


def write_report(
    experts: Mapping[str, Path], merged_models: Mapping[str, Path], fisher_files: Mapping[str, Path], out: Path
) -> Outcome:
    """Table and pictures in the folder ``out``.

    Args:
        experts: metrics files of the experts by task.
        merged_models: metrics files of the merged models by the name that the table gives them.
        fisher_files: Fisher artifacts by task.
    """
    if not merged_models:
        raise UserError("--merged NAME=FILE: at least one metrics file of a merged model is needed")
    files = {"expert": experts, "merged": merged_models, "fisher": fisher_files}
    inputs = {
        f"{kind} {name}": artifacts.digest_file(_there(file))
        for kind, named in files.items()
        for name, file in named.items()
    }
    key = artifacts.content_key("report", REPORT, {"order": list(inputs)}, inputs)

    def fill(folder: Path) -> Mapping[str, Any]:
        return report.write(
            folder,
            {task: artifacts.read_json(file) for task, file in experts.items()},
            {name: artifacts.read_json(file) for name, file in merged_models.items()},
            {task: artifacts.read_fisher(file)[0] for task, file in fisher_files.items()},
        )

    return _folder_stage("report", out, key, fill)


def _there(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return path


def register(
    model: Path, metrics: Path, report_folder: Path | None, out: Path | None, settings: RegistrySettings
) -> Outcome:
    """The merged model as a new version in the MLflow registry, with a run that holds its metrics and report.

    The version that these very files have already is not made again. ``out``, where given, records where it stands.
    """
    from fmn import registry

    started = time.monotonic()
    recipe.verify(model)
    made = recipe.read_recipe(model)
    found = artifacts.read_json(metrics)
    inputs = {"merged": artifacts.digest_file(model / recipe.RECIPE), "metrics": artifacts.digest_file(metrics)}
    key = artifacts.content_key("register", REGISTER, settings.model_dump(), inputs)
    if found.get("model") != inputs["merged"] or set(found["tasks"]) != set(made["tasks"]):
        raise UserError(f"{metrics}: not the metrics of all tasks of {model}; make them with `fmn evaluate {model}`")
    experts = made["experts"]
    registered = registry.register(
        model,
        name=settings.name,
        experiment=settings.experiment,
        key=key,
        params={
            **{
                name: made[name] for name in ("method", "mapping", "scale", "density", "seed") if made[name] is not None
            },
            "tasks": ", ".join(made["tasks"]),
            **{f"coefficient.{task}": value for task, value in made["coefficients"].items()},
            **{
                f"fisher.{task}.{name}": stated[name]
                for task, stated in made["fisher"].items()
                for name in ("estimator", "samples")
            },
        },
        metrics={
            "score": found["score"],
            **{
                f"{task}.{name}": value
                for task, entry in found["tasks"].items()
                for name, value in entry.items()
                if name != "interval"
            },
        },
        intervals={
            "score": found["interval"],
            **{
                f"{task}.{name}": ends
                for task, entry in found["tasks"].items()
                for name, ends in entry["interval"].items()
            },
        },
        artifacts={
            "merged": model / recipe.RECIPE,
            "metrics": metrics,
            **({"report": report_folder} if report_folder else {}),
        },
        tags={f"expert.{task}": entry["revision"] for task, entry in experts.items()},
    )
    summary = {
        "name": registered.name,
        "version": registered.version,
        "run": registered.run_id,
        "store": registered.tracking_uri,
    }
    if out is not None and not artifacts.json_is_current(out, key):
        artifacts.write_json(out, "register", key, summary)
    return Outcome("register", out or model, registered.new, time.monotonic() - started, summary)


def predict(model: Path, task: str, text: str, second: str | None) -> dict[str, Any]:
    """A merged model's answer for one text, or a pair: its label, its score, all probabilities."""
    import torch

    found = tasks.task(task)
    if (len(found.columns) == 2) != (second is not None):
        raise UserError(f"task {task} takes {len(found.columns)} texts: {', '.join(found.columns)}")
    recipe.verify(model)
    folder = recipe.task_folder(model, task)
    classifier = checkpoints.load_classifier(folder).eval()
    inputs = checkpoints.load_tokenizer(folder)(
        text, second, truncation=True, max_length=data.MAX_LENGTH, return_tensors="pt"
    )
    with torch.inference_mode():
        logits = classifier(**inputs).logits[0].float()  # [C]
    if found.regression:
        return {"label": "score", "score": logits.item()}
    shares = {classifier.config.id2label[label]: share for label, share in enumerate(logits.softmax(-1).tolist())}
    best = max(shares, key=shares.__getitem__)
    return {"label": best, "score": shares[best], "probabilities": shares}
