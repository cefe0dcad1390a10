"""The stage that scores models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fmn.errors import UserError
from fmn.merge import recipe
from fmn.models import checkpoints, labels
from fmn.models.stages import Device, Dtype
from fmn.report import card
from fmn.store import artifacts, stage
from fmn.store.records import Settings
from fmn.store.stage import Outcome, Progress
from fmn.tasks import dataset as data
from fmn.tasks import task as tasks

if TYPE_CHECKING:
    from fmn.evaluate.bootstrap import Answers


EVALUATE = 3


class EvaluateSettings(Settings):
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field(
        "float32", description="precision of the matrix products; auto: bfloat16 where it pays"
    )


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
        stage.check_intact(model)
        digest = artifacts.digest_file(model / recipe.RECIPE)
    else:
        digest = artifacts.digest_folder(model)
    chosen = list(names) or (recipe.read_recipe(model).tasks if is_merged else [])
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
        if (
            not is_merged
            and not labels.by_names(task, labels.output_names(model))
            and data.has(folder, task, "train")
        ):
            digests |= data.digests(folder, task, ["train"])
        inputs |= {f"{name} {split}": value for split, value in digests.items()}
    key = artifacts.content_key(
        "evaluate", EVALUATE, settings.model_dump(exclude={"device"}), inputs
    )

    def make() -> None:
        from fmn.evaluate import bootstrap as intervals

        entries, given, aligned = {}, {}, {}
        for name, task in found.items():
            checkpoint = recipe.task_folder(model, name) if is_merged else model
            # What a merged model's outputs mean was decided when it was merged, and its configuration says it.
            aligned[name] = labels.decide(
                checkpoint, task, None if is_merged else folder, settings.device
            )
            tables = {split: data.read(folder, task, split) for split in splits[name]}
            entries[name], given[name] = _scores(
                checkpoint, task, aligned[name], tables, settings, progress
            )
        draws = {name: intervals.resampled(task, given[name]) for name, task in found.items()}
        for name, values in draws.items():
            entries[name]["interval"] = {
                metric: intervals.interval(values[metric]) for metric in values
            }
        artifacts.write_predictions(predictions, given)
        content = {
            "model": digest,
            "tasks": entries,
            "score": sum(entry["score"] for entry in entries.values()) / len(entries),
            "interval": intervals.interval(
                intervals.macro({name: values["score"] for name, values in draws.items()})
            ),
            "predictions": artifacts.digest_file(predictions),
            "labels": aligned,
            "data": origins,
        }
        if is_merged and (realigned := recipe.read_recipe(model).realign):
            content["realigned from"] = realigned.merged
        artifacts.write_json(out, "evaluate", key, content)

    def current() -> bool:
        if not (artifacts.json_is_current(out, key) and predictions.is_file()):
            return False
        return bool(artifacts.read_json(out)["predictions"] == artifacts.digest_file(predictions))

    outcome = stage.run("evaluate", out, current, make, lambda: artifacts.read_json(out))
    if is_merged and set(chosen) == set(recipe.read_recipe(model).tasks):
        card.write(
            model,
            outcome.summary,
            {name: data.stated(folder, task) for name, task in found.items()},
        )
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
    from fmn.models.predict import answers, predict, score_answers

    tokenizer = checkpoints.load_tokenizer(checkpoint)
    model = labels.ordered(checkpoints.load_classifier(checkpoint), aligned)
    entry: dict[str, float] = {}
    given = {}
    scores = []
    for split, table in tables.items():
        examples = data.tokenize(tokenizer, task, table)
        logits = predict(
            model, examples, device=settings.device, dtype=settings.dtype, progress=progress
        )
        given[split] = answers(task, logits, examples.labels)
        found = {**score_answers(task, given[split]), "examples": len(examples)}
        scores.append(found.pop("score"))
        entry |= {f"{name}{task.suffix(split)}": value for name, value in found.items()}
    return {**entry, "score": sum(scores) / len(scores)}, given
