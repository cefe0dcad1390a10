"""The stages: functions from files to files, each idempotent by content.

A stage computes the content key of its output; where the output is there, intact and carries that key, it returns at
once. The command line, the Prefect flow and DVC all call these functions, so none repeats what another did.
"""

import multiprocessing
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn import (
    __version__,
    artifacts,
    card,
    checkpoints,
    data,
    formats,
    labels,
    recipe,
    report,
    sources,
    stage,
    statistics,
    tasks,
)
from fmn.errors import UserError
from fmn.params import (
    DataSettings,
    EvaluateSettings,
    FinetuneSettings,
    FisherSettings,
    FullFisherSettings,
    GramSettings,
)
from fmn.stage import Outcome, Progress

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from fmn.batches import Examples
    from fmn.fisher import State
    from fmn.intervals import Answers

# What a stage's output depends on beside its settings and inputs; raised when the same inputs give other outputs.
# dvc.yaml has these as parameters of its stages.
FETCH = 1
DATA = 1
FINETUNE = 1
FISHER = 2
FULL_FISHER = 1
GRAM = 1
EVALUATE = 3
REPORT = 3

# The stages that a report says the cost of, in their order.
COSTED = ("fetch", "data", "finetune", "fisher", "full-fisher", "gram", "search", "merge", "realign", "evaluate")


def fetch(source: str, out: Path, progress: Progress | None = None) -> Outcome:
    """A checkpoint from its source, pinned and verified, as the folder ``out``."""
    stage.apart(out, [Path(source)])
    pinned = sources.resolve(source)
    digest = sources.folder_digest(pinned)
    key = artifacts.content_key("fetch", FETCH, {"source": pinned}, {"folder": digest} if digest else {})

    def fill(folder: Path) -> Mapping[str, Any]:
        return {**sources.fetch(pinned, folder, progress=progress), "source": source}

    return stage.run_folder("fetch", out, key, fill)


def prepare(task: str, out: Path, settings: DataSettings) -> Outcome:
    """A task's splits as Parquet in the folder ``out``."""
    stage.apart(out, [Path(settings.source)])
    found = tasks.task(task)
    source, revision = settings.source, settings.revision
    described = {"task": task, "source": source}
    inputs = {}
    if source == "embedded":
        described["seed"] = str(settings.seed)
    elif source == "hub":
        described["revision"] = revision = sources.resolve_dataset(data.HUB, revision)
    else:
        if "://" in source:
            raise UserError(f"data {source}: not a folder; name one, or embedded, or hub")
        described["source"] = "folder"
        inputs = data.digests(Path(source), found, ["train", *data.validation_splits(Path(source), found)])
    key = artifacts.content_key("data", DATA, described, inputs)

    def fill(folder: Path) -> Mapping[str, Any]:
        rows = data.prepare(found, source, folder, seed=settings.seed, revision=revision)
        return {**described, "source": source, "rows": rows}

    return stage.run_folder("data", out, key, fill)


def finetune(
    base: Path, task: str, folder: Path, out: Path, settings: FinetuneSettings, progress: Progress | None = None
) -> Outcome:
    """An expert for ``task``, fine-tuned from the checkpoint ``base`` on the training split below ``folder``."""
    stage.apart(out, [base, folder])
    found = tasks.task(task)
    inputs = {"base": artifacts.digest_folder(base), **data.digests(folder, found, ["train"])}
    described = settings.model_dump(exclude={"device"})
    key = artifacts.content_key("finetune", FINETUNE, {"task": task, **described}, inputs)

    def fill(target: Path) -> Mapping[str, Any]:
        import torch

        from fmn import batches, finetune

        tokenizer = checkpoints.load_tokenizer(base)
        table = data.read(folder, found, "train")
        rows = batches.select(table["label"].to_numpy(), stage.limit(settings.examples), settings.seed)
        examples = data.tokenize(tokenizer, found, table.take(rows))
        model = finetune.new_expert(base, found, settings.seed)
        losses = finetune.finetune(
            model,
            examples,
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
            "base": stage.lineage(base),
            **described,
            "data_digest": inputs["train"],
            "examples": len(rows),
            "threads": torch.get_num_threads(),
            "steps": len(losses),
            "loss": sum(last) / len(last),
        }

    return stage.run_folder("finetune", out, key, fill)


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


def _drawn(
    checkpoint: Path, task: tasks.Task, folder: Path, samples: int | str, seed: int, stratified: bool = False
) -> "Examples":
    """The training split below ``folder``; of a sample, no more is tokenised than `fmn.batches.select` draws."""
    from fmn import batches

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

    from fmn import fisher

    device, parts = settings.device, settings.workers
    if parts > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // parts))
        if device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{index % torch.cuda.device_count()}"
    found = tasks.task(task)
    model = labels.ordered(checkpoints.load_classifier(checkpoint), aligned)
    examples = _drawn(checkpoint, found, folder, settings.samples, settings.seed, settings.stratified)
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
    inputs = {"checkpoint": artifacts.digest_folder(checkpoint), **data.digests(folder, found, ["train"])}
    key = artifacts.content_key("fisher", FISHER, described, inputs)
    parts = settings.workers
    # Of a run that was killed; it goes on from there.
    sums = [out.with_name(f".{out.name}.{index}-{parts}.partial-sums") for index in range(parts)]

    def make() -> None:
        import torch

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
            "checkpoint": {**stage.lineage(checkpoint), "digest": inputs["checkpoint"]},
            "data_digest": inputs["train"],
            "labels": {task: aligned},
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
    inputs = {"checkpoint": artifacts.digest_folder(checkpoint), **data.digests(folder, found, ["train"])}
    key = artifacts.content_key(kind, algorithm, described, inputs)

    def make() -> None:
        import torch

        examples = _drawn(checkpoint, found, folder, settings.samples, settings.seed)
        aligned = labels.decide(checkpoint, found, folder, settings.device)
        tensors, metadata = compute(labels.ordered(checkpoints.load_classifier(checkpoint), aligned), examples)
        stated = {
            **described,
            "key": key,
            "model_type": checkpoints.load_config(checkpoint).model_type,
            "checkpoint": {**stage.lineage(checkpoint), "digest": inputs["checkpoint"]},
            "data_digest": inputs["train"],
            "labels": {task: aligned},
            "samples": len(examples) if settings.samples == "all" else min(settings.samples, len(examples)),
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

    def compute(model: "PreTrainedModel", examples: "Examples") -> "tuple[Mapping[str, Tensor], Mapping[str, Any]]":
        from fmn import diagonal

        regression = tasks.task(task).regression
        described = settings.model_dump(exclude={"samples"})
        samples = stage.limit(settings.samples)
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
        found = gram.estimate(model, examples, samples=stage.limit(settings.samples), progress=progress, **described)
        return found.moments, {"inputs": found.inputs, "transposed": sorted(found.transposed)}

    return _large_statistic("gram", GRAM, checkpoint, task, folder, out, settings, compute)


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
        stage.apart(path, [model, folder])
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
    splits, origins = {}, {}
    for name, task in found.items():
        digests = data.digests(folder, task, data.validation_splits(folder, task))
        splits[name] = list(digests)
        origins[name] = {**data.origin(folder, task), "splits": dict(digests)}
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
            "data": origins,
        }
        if is_merged and (realigned := recipe.read_recipe(model).get("realign")):
            content["realigned from"] = realigned["merged"]
        artifacts.write_json(out, "evaluate", key, content)

    def current() -> bool:
        if not (artifacts.json_is_current(out, key) and predictions.is_file()):
            return False
        return bool(artifacts.read_json(out)["predictions"] == artifacts.digest_file(predictions))

    outcome = stage.run("evaluate", out, current, make, lambda: artifacts.read_json(out))
    if is_merged and set(chosen) == set(recipe.read_recipe(model)["tasks"]):
        card.write(model, outcome.summary, {name: data.stated(folder, task) for name, task in found.items()})
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


def realigned(folder: Path, merged_models: Mapping[str, Path]) -> dict[str, Path]:
    """The metrics files in ``folder``, by name, of models that are one of the merged ones with its heads re-aligned."""
    shown = {artifacts.read_json(stage.there(file)).get("model") for file in merged_models.values()}
    found = {file.stem: file for file in sorted(folder.glob("*.json")) if file not in merged_models.values()}
    return {name: file for name, file in found.items() if artifacts.read_json(file).get("realigned from") in shown}


def write_report(
    experts: Mapping[str, Path],
    merged_models: Mapping[str, Path],
    fisher_files: Mapping[str, Path],
    out: Path,
    work: Path | None = None,
) -> Outcome:
    """Tables, pictures and a page of them in the folder ``out``.

    Args:
        experts: metrics files of the experts by task.
        merged_models: metrics files of the merged models by the name that the table gives them.
        fisher_files: Fisher artifacts by task.
        work: the run's folder, which tells how the models were merged and what the stages took.
    """
    if not merged_models:
        raise UserError("--merged NAME=FILE: at least one metrics file of a merged model is needed")
    if report.EXPERT in merged_models:
        raise UserError(f"--merged {report.EXPERT}=FILE: the experts' column has that name; choose another")
    files = {"expert": experts, "merged": merged_models, "fisher": fisher_files}
    inputs = {
        f"{kind} {name}": artifacts.digest_file(stage.there(file))
        for kind, named in files.items()
        for name, file in named.items()
    }
    metrics = {name: artifacts.read_json(file, formats.Metrics) for name, file in merged_models.items()}
    folders = _merged_below(work, metrics) if work else {}
    recipes = {name: recipe.read_recipe(folder) for name, folder in folders.items()}
    # What a recipe says is in the metrics' digest of it; what the stages took is no part of what a report is.
    key = artifacts.content_key("report", REPORT, {"order": list(inputs), "recipes": list(recipes)}, inputs)
    for task, stated in recipes.get(report.headline(metrics), {}).get("fisher", {}).items():
        if task in fisher_files and stated["digest"] != inputs[f"fisher {task}"]:
            raise UserError(f"{fisher_files[task]}: not the Fisher that {report.headline(metrics)} was merged with")

    def fill(folder: Path) -> Mapping[str, Any]:
        alone = {task: evaluated(file) for task, file in experts.items()}
        table = report.tabulate(alone, {name: evaluated(file) for name, file in merged_models.items()})
        fisher = {task: artifacts.read_fisher(file)[0] for task, file in fisher_files.items()}
        names = {name: name for name in table.tasks} | {path.name: name for name, path in folders.items()}
        return report.write(folder, table, fisher, recipes, _costs(work, names) if work else [])

    return stage.run_folder("report", out, key, fill)


def evaluated(metrics: Path) -> report.Evaluated:
    """What a metrics file says, and the predictions beside it."""
    return report.Evaluated(artifacts.read_json(metrics, formats.Metrics), artifacts.read_predictions(metrics))


def _merged_below(work: Path, metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Path]:
    """The folders of merged models in the run's folder, by the name of the metrics that are of them."""
    there = {artifacts.digest_file(path): path.parent for path in sorted(work.glob(f"*/{recipe.RECIPE}"))}
    return {name: there[content["model"]] for name, content in metrics.items() if content.get("model") in there}


def _costs(work: Path, names: Mapping[str, str]) -> list[report.Cost]:
    """What the stages before a report took, in their order, by the names that the report gives their outputs."""
    shown = {"base": "base", **names}
    found = [
        report.Cost(made_by, shown[name], seconds)
        for path, (made_by, seconds) in artifacts.read_costs(work).items()
        if made_by in COSTED and (name := path.name.split(".")[0]) in shown
    ]
    order = list(shown.values())
    return sorted(found, key=lambda one: (COSTED.index(one.stage), order.index(one.name)))


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
