"""The stage functions that are commands, by workflow, with an example of each."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cyclopts import Group

from fmn.commands import shown
from fmn.commands.options import command_of
from fmn.commands.shown import Show, facts
from fmn.evaluate.stages import evaluate
from fmn.experiments.stages import search
from fmn.fisher.stages import STATISTICS, fisher
from fmn.merge.stages import calibrate, merge, realign
from fmn.models.stages import finetune
from fmn.registry.push import push
from fmn.registry.stages import register, roll_back
from fmn.report.stages import report
from fmn.rows.stages import DataSettings, TaskOptions, data, definition_of
from fmn.sources.stages import fetch
from fmn.store.stage import Outcome
from fmn.tasks.dataset import DataInfo

START, AGAIN, EXPERTS, STATISTIC, MERGE, RESULTS, REGISTRY, PROGRAMS = (
    Group(name, sort_key=number)
    for number, name in enumerate(
        (
            "Start here",
            "Run it again and again",
            "Experts and data",
            "Statistics of an expert",
            "Merging",
            "Scores and answers",
            "Registry and Hub",
            "For programs and editors",
        )
    )
)


def write_data(
    task: str,
    *,
    out: Path,
    settings: DataSettings = DataSettings(),  # noqa: B008
    options: TaskOptions = TaskOptions(),  # noqa: B008
) -> Outcome[DataInfo]:
    """Write a task's rows as Parquet files, one for each split, and its definition as task.json.

    GLUE's tasks and tasks with a task.json beside their rows need only --source. Describe any other
    task with --definition, or with --dataset and the columns:

    fmn data stars --dataset reviews.csv --text review --label stars --out data/stars

    Args:
        task: the task's name.
        out: the folder to write.
        settings: where the rows come from.
        options: a task of one's own.
    """
    definition = definition_of(task, options, settings)
    return data(task, out=out, settings=settings, definition=definition)


class Command(NamedTuple):
    """A stage function as a command; `name` is the command's, if it differs from the function's."""

    group: Group
    function: Callable[..., Any]
    show: Show
    name: str = ""


STAGES = (
    Command(EXPERTS, fetch, facts("revision", "model_type")),
    Command(EXPERTS, write_data, shown.show_data, "data"),
    Command(EXPERTS, finetune, facts("examples", "steps", "loss")),
    Command(STATISTIC, fisher, shown.show_fisher),
    *(
        Command(STATISTIC, statistic, facts("samples", "dtype", "published"))
        for statistic in STATISTICS
    ),
    Command(MERGE, merge, shown.show_merge),
    Command(MERGE, calibrate, shown.show_calibrate),
    Command(MERGE, realign, shown.show_realign),
    Command(MERGE, search, shown.show_search),
    Command(RESULTS, evaluate, shown.show_metrics),
    Command(RESULTS, report, shown.show_report),
    Command(REGISTRY, register, facts("name", "version", "alias", "reason", "run", "store")),
    Command(REGISTRY, roll_back, shown.show_champion, "rollback"),
    Command(REGISTRY, push, facts("url", "commit", "files", "bytes")),
)
COMMANDS: Mapping[str, tuple[Group, Callable[..., None]]] = {
    each.name or each.function.__name__.replace("_", "-"): (
        each.group,
        command_of(each.function, each.show),
    )
    for each in STAGES
}

_OF_SST2 = "--task sst2 --data rows --out"
_ALL = "--expert experts --data rows --out"
EXAMPLES: Mapping[str, str] = {
    "init": "fmn init hf://org/sentiment hf://org/topics -o params.yaml",
    "check": "fmn check -p params.yaml",
    "run": "fmn run -p params.yaml",
    "schedule": "fmn schedule",
    "dvc": "fmn dvc",
    "compare": "fmn compare study -p params/study-0.yaml",
    "tasks": "fmn tasks sst2",
    "fetch": "fmn fetch hf://org/sentiment@main --task sst2 --data rows -o experts/sst2",
    "data": "fmn data sst2 --source hub -o rows/sst2",
    "finetune": f"fmn finetune base {_OF_SST2} experts/sst2 --epochs 2",
    "fisher": f"fmn fisher experts/sst2 {_OF_SST2} fisher/sst2.parquet --samples 1024",
    "full-fisher": f"fmn full-fisher experts/sst2 {_OF_SST2} fisher/sst2.safetensors",
    "gram": f"fmn gram experts/sst2 {_OF_SST2} gram/sst2.gram.safetensors",
    "merge": "fmn merge --expert experts --fisher fisher --method mask-fisher -o merged",
    "calibrate": f"fmn calibrate merged {_ALL} calibrated",
    "realign": f"fmn realign merged {_ALL} realigned",
    "search": f"fmn search {_ALL} coefficients.json --fisher fisher",
    "evaluate": "fmn evaluate merged --data rows -o metrics/merged.json",
    "report": "fmn report --merged merged=metrics/merged.json -o report",
    "predict": 'fmn predict merged "a warm film" --task sst2; fmn predict'
    " models:/fmn/1 --task sst2 --file texts.txt --json",
    "register": "fmn register merged --metrics metrics/merged.json --name fmn -p params.yaml",
    "rollback": "fmn rollback fmn",
    "mlflow": "fmn mlflow --port 5001",
    "reproduce": "fmn reproduce models:/fmn@champion --run",
    "push": "fmn push merged hf://org/merged",
    "stage": "fmn stage fisher sst2 -p params.yaml",
    "schema": "fmn schema > params.schema.json",
}
"""The example at the end of `fmn COMMAND --help`."""
