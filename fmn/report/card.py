"""The model card of a merged model: what the Hub reads of it, and what people read.

Its body is the jinja2 template ``templates/card.md``: what the model was merged from, its scores,
and the commands that make it again.
"""

from collections.abc import Mapping
from shlex import quote
from typing import TYPE_CHECKING, Any

from fmn.evaluate.files import Metrics, TaskRows
from fmn.merge.methods import METHODS
from fmn.merge.recipe import Checkpoint, Recipe
from fmn.report.page import render
from fmn.report.results import evaluate_table, markdown, measured
from fmn.store.records import Record
from fmn.tasks.dataset import HUB
from fmn.tasks.task import MAX_LENGTH, TASKS

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

HUB_METRICS = {"pearson": "pearsonr"}
"""The Hub's name of a metric, if it is another than GLUE's."""
DATA_SETS = {"hub": (HUB, "GLUE"), "embedded": ("fmn/miniature-glue", "miniature GLUE")}
"""By source of the data: the id that a card calls it by, and its title."""
SETTINGS = ("mapping", "normalise", "exponent", "damping", "scale", "density", "seed")
"""The settings of a recipe; None where the method has none."""


def card(recipe: Recipe, metrics: Metrics) -> str:
    """The model card of a merged model that was evaluated."""
    nodes = METHODS[recipe.method].fisher == "nodes"
    settings = {name: getattr(recipe, name) for name in SETTINGS}
    body = render(
        "card.md",
        recipe=recipe,
        metrics=metrics,
        scores=markdown(*evaluate_table(metrics)),
        paper=METHODS[recipe.method].paper,  # on arXiv, or None
        settings={name: value for name, value in settings.items() if value is not None},
        fisher="mask Fisher" if nodes else "full Fisher",
        max_length=MAX_LENGTH,
        coefficient_options=coefficient_options,
        data_options=data_options,
        data_set=data_set,
        options=options,
        source=source_of,
        statistics=(  # command, recipe's entries, suffix of the file
            ("fisher", recipe.fisher, "parquet")
            if nodes
            else ("full-fisher", recipe.fisher, "safetensors"),
            ("gram", recipe.gram, "gram.safetensors"),
        ),
    )
    return f"---\n{front_matter(recipe, metrics).to_yaml()}\n---\n\n{body}\n"


def front_matter(recipe: Recipe, metrics: Metrics) -> "ModelCardData":
    """What the Hub reads of a card, with the scores as model-index."""
    from huggingface_hub import EvalResult, ModelCardData

    tasks = list(recipe.experts) or recipe.tasks
    results = []
    for task, scores in metrics.tasks.items():
        rows = metrics.data.get(task)
        source = rows.source if rows else ""
        data_set_id, title = DATA_SETS.get(source, ("glue", "GLUE from a folder"))
        for split, metric, value, examples, _ in measured(task, scores):
            result = EvalResult(
                task_type="text-classification",
                task_name=f"GLUE {task}",
                dataset_type=data_set_id,
                dataset_name=f"{title}, {task}",
                dataset_config=task,
                dataset_split=split,
                dataset_revision=(rows.revision or None) if rows else None,
                dataset_args={"rows": examples},
                metric_type=HUB_METRICS.get(metric, metric),
                metric_name=f"{task} {metric.replace('_', ' ')}",
                metric_value=round(value, 6),
            )
            results.append(result)
    revisions = [expert.revision for expert in recipe.experts.values()]
    on_hub = [name[5:].partition("@")[0] for name in revisions if name.startswith("hf://")]
    metric_names = {HUB_METRICS.get(name, name) for task in tasks for name in TASKS[task].metrics}
    return ModelCardData(
        model_name=f"fmn {recipe.method} of {', '.join(tasks)}",
        library_name="transformers",
        pipeline_tag="text-classification",
        language="en",
        base_model=on_hub or None,
        base_model_relation="merge" if on_hub else None,
        datasets=[HUB] if any(rows.source == "hub" for rows in metrics.data.values()) else None,
        tags=["fmn", "merge", recipe.method, *tasks],
        metrics=sorted(metric_names),
        eval_results=results,
        ignore_metadata_errors=False,
    )


# ---- what the template calls ----


def data_set(rows: TaskRows) -> str:
    """What a task's rows are, in words."""
    titles = {"hub": f"`{HUB}`", "embedded": "the miniature GLUE that fmn makes"}
    return titles.get(rows.source, "a folder in GLUE's schema")


def data_options(rows: TaskRows | None) -> str:
    """The options of `fmn data` that give a task's rows again."""
    if rows is None or rows.source not in ("hub", "embedded"):
        return " --source path/to/glue"
    return options({"source": rows.source, "revision": rows.revision, "seed": rows.seed})


def source_of(checkpoint: Checkpoint, name: str) -> str:
    """Where `fmn fetch` finds a checkpoint; path/to/NAME for a folder, whose path is not known."""
    is_address = checkpoint.revision.startswith(("hf://", "models:", "package:"))
    return quote(checkpoint.revision) if is_address else f"path/to/{name}"


def options(values: Mapping[str, Any] | Record) -> str:
    """Settings as options of a command; those that are empty, or digests, are left out."""
    if isinstance(values, Record):
        names = {"estimator", "samples", "texts", "ridge", "seed", "dtype", "stratified"}
        values = values.model_dump(include=names)
    words = []
    for name, value in values.items():
        if value is not False and value not in ("", None):
            words.append(f" --{name.replace('_', '-')}")
            words += [] if value is True else [f" {quote(str(value))}"]
    return "".join(words)


def coefficient_options(recipe: Recipe) -> str:
    """The coefficients of a merge that are not 1, as options of `fmn merge`."""
    others = [f"{task}={value!r}" for task, value in recipe.coefficients.items() if value != 1]
    return f" --coefficient {' '.join(map(quote, others))}" if others else ""
