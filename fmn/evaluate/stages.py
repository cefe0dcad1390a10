"""The stage that scores models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from pydantic import Field

from fmn.errors import UserError
from fmn.evaluate import bootstrap, files
from fmn.evaluate.files import Metrics
from fmn.evaluate.metrics import Answers, TaskAnswers, answers, averaged, score_splits
from fmn.merge import recipe
from fmn.models import labels
from fmn.models.stages import Device, Dtype
from fmn.store.records import Settings
from fmn.store.stage import Job, Outcome, Progress, no_progress, run_stage, write_record
from fmn.tasks import dataset
from fmn.tasks.encoding import encode
from fmn.tasks.task import Task, load_task, read_task, task_folder

EVALUATE = 8


class EvaluateSettings(Settings):
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field(
        "float32", description="precision of the matrix products; auto: bfloat16 where it pays"
    )


def evaluate(
    model: Path,
    *,
    data: Path,
    out: Path,
    tasks: Sequence[str] = (),
    settings: EvaluateSettings = EvaluateSettings(),  # noqa: B008
    progress: Progress = no_progress,
) -> Outcome[Metrics]:
    """Score a merged model, or one expert, with the metrics of its tasks.

    Every metric has its 95 % bootstrap interval. The predictions are written beside the metrics;
    paired tests between models need them. Tasks of a merged model whose rows have no labels are
    left out, unless they are asked for.

    Args:
        model: a merged model, or an expert
        data: folder of one task's rows, or of several tasks'
        out: the metrics file, JSON
        tasks: the tasks; by default those of the merged model
        settings: how to compute
        progress: called with the examples done and all examples of a split

    Raises:
        UserError: the model has no such task, its rows or their labels are missing, or what the
            outputs stand for cannot be told.
    """
    checkpoints = _checkpoints(model, tasks)
    every = {name: _definition(folder, data, name) for name, folder in checkpoints.items()}
    definitions = {name: task for name, task in every.items() if task.has_labels}
    unlabeled = [name for name in every if name not in definitions]
    if unlabeled and (tasks or not definitions):
        raise UserError(
            f"{data}: the rows of {unlabeled[0]} have no labels to score by; give --data with some"
        )
    # The outputs of a merged model are named; those of an expert may take training rows to name.
    label_data = None if recipe.is_merged(model) else data
    reads: dict[str, Path | list[Path]] = {"model": model}
    reads |= _rows(data, definitions, checkpoints if label_data else {})

    def compute(job: Job) -> None:
        aligned, predictions, rows = {}, {}, {}
        for name, task in definitions.items():
            expert = labels.load_expert(checkpoints[name], task, label_data, settings.device)
            aligned[name] = expert.labels
            answered = _predict(expert, data, settings, progress)
            predictions[name] = TaskAnswers(expert.task, answered)
            info = dataset.read_data_info(data, task)
            origin = info.model_dump(include={"source", "revision", "seed"}) if info else {}
            digests = {split: job.inputs[f"{name} {split}"] for split in answered}
            rows[name] = {**origin, "splits": digests}
        files.write_predictions(files.predictions_path(job.path), predictions)
        known = {"model": job.inputs["model"], "labels": aligned, "data": rows}
        known |= {"unlabeled": unlabeled, **_scores(predictions)}
        write_record(job.path, Metrics.model_validate(known))

    return run_stage(
        "evaluate", EVALUATE, out, compute, reads=reads,
        settings={"evaluate": settings, "tasks": every}, summary=files.read_metrics,
    )  # fmt: skip


def _checkpoints(model: Path, tasks: Sequence[str]) -> dict[str, Path]:
    """The folders to evaluate, by task; an expert is one and the same for all."""
    if not recipe.is_merged(model):
        if not tasks:
            raise UserError(f"{model}: not a merged model; say which task it is for, --task TASK")
        return dict.fromkeys(tasks, model)
    known = recipe.read_recipe(model).tasks
    if unknown := [name for name in tasks if name not in known]:
        raise UserError(f"{model}: no task {unknown[0]!r} in it; it has {', '.join(known)}")
    return {name: model / "tasks" / name for name in tasks or known}


def _definition(checkpoint: Path, data: Path, name: str) -> Task:
    """The definition beside a task's rows; the model's own, where there are no rows nor labels."""
    own = read_task(checkpoint)
    is_without_rows = own and not own.has_labels and not read_task(task_folder(data, name))
    return own if own and is_without_rows else load_task(data, name)


def _rows(
    data: Path, definitions: Mapping[str, Task], experts: Mapping[str, Path]
) -> dict[str, list[Path]]:
    """The files of the rows that are scored, and of those that tell an expert's labels."""
    files: dict[str, list[Path]] = {}
    for name, task in definitions.items():
        splits = dataset.validation_splits(data, task)
        if name in experts and dataset.has_split(data, task, "train"):
            is_named = labels.by_names(task, labels.output_names(experts[name]))
            splits = splits if is_named else (*splits, "train")
        files |= {f"{name} {split}": dataset.split_files(data, task, split) for split in splits}
    return files


def _predict(
    expert: labels.Expert, data: Path, settings: EvaluateSettings, progress: Progress
) -> dict[str, Answers]:
    """A checkpoint's answers on the validation splits of a task."""
    from fmn.models.predict import predict

    model, processor, task, *_ = expert
    predictions = {}
    for split in dataset.validation_splits(data, task):
        examples = encode(processor, task, dataset.read_split(data, task, split), scored=True)
        logits = predict(model, examples, progress=progress, **settings.model_dump())
        predictions[split] = answers(task, logits, examples.labels)
    return predictions


def _scores(predictions: Mapping[str, TaskAnswers]) -> dict[str, Any]:
    """The scores of a model's predictions by task, their mean, the intervals, the definitions."""
    tasks: dict[str, dict[str, Any]] = {}
    draws = {}
    for name, (task, splits) in predictions.items():
        resampled = bootstrap.resampled(task, splits)
        draws[name] = resampled["score"]
        tasks[name] = {
            **score_splits(task, splits),
            **{f"examples{task.suffix(split)}": len(splits[split].labels) for split in splits},
            "interval": {metric: bootstrap.interval(draw) for metric, draw in resampled.items()},
        }
    definitions = {name: answered.task for name, answered in predictions.items()}
    scores = {name: entry["score"] for name, entry in tasks.items()}
    mean: dict[str, Any] = {"score": None, "interval": None}
    if names := averaged(scores, definitions):
        mean["score"] = fmean(scores[name] for name in names)
        mean["interval"] = bootstrap.interval(np.mean([draws[name] for name in names], axis=0))
    return {"tasks": tasks, "definitions": definitions, **mean}
