"""The stages that tests of a kind of task run before and after a merge, on a CPU in float32."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fmn.evaluate.stages import EvaluateSettings, evaluate
from fmn.fisher.stages import Estimator, FisherSettings, GramSettings, fisher, gram
from fmn.models.stages import FinetuneSettings, finetune
from fmn.rows.stages import DataSettings, TaskOptions, data, definition_of

CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
METHODS = ("average", "mask-fisher", "regmean", "fisher-regmean", "ties", "wudi", "tsv-m")


def prepare(task: str, work: Path, **options: Any) -> Any:
    """Write a task's rows below `work`, as `fmn data TASK` with these options does."""
    definition = definition_of(task, TaskOptions(**options), DataSettings())
    return data(task, out=work / "data" / task, definition=definition).summary


def make_expert(
    work: Path, task: str, base: Path, *, estimator: Estimator = "empirical", **tuning: Any
) -> None:
    """Fine-tune an expert on rows below `work`, and write its statistics there."""
    common: dict[str, Any] = {"task": task, "data": work / "data"}
    expert = work / "experts" / task
    finetune(base, **common, out=expert, settings=FinetuneSettings(**tuning, **CPU))
    settings = FisherSettings(samples=32, estimator=estimator, **CPU)
    fisher(expert, **common, out=work / f"{task}.parquet", settings=settings)
    grams = GramSettings(samples=32, **CPU)
    gram(expert, **common, out=work / f"{task}.safetensors", settings=grams)


def merge_inputs(work: Path, tasks: Iterable[str], base: Path) -> dict[str, Any]:
    """What `merge` takes of experts that `make_expert` made below `work`."""
    return {
        "experts": {task: work / "experts" / task for task in tasks},
        "fisher": {task: work / f"{task}.parquet" for task in tasks},
        "gram": {task: work / f"{task}.safetensors" for task in tasks},
        "base": base,
    }


def score(model: Path, work: Path, name: str, tasks: Iterable[str] = ()) -> Path:
    """Evaluate a model on the rows below `work`; returns the metrics file."""
    out = work / f"{name}.json"
    settings = EvaluateSettings(**CPU)
    evaluate(model, data=work / "data", out=out, tasks=list(tasks), settings=settings)
    return out
