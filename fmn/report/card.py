"""The model card of a merged model: what the Hub reads of it, and what people read.

Its body is the jinja2 template ``templates/card.md``.
"""

from typing import TYPE_CHECKING

from fmn.evaluate.files import Metrics, TaskRows
from fmn.merge.methods import METHODS
from fmn.merge.recipe import Recipe
from fmn.report.page import render
from fmn.report.results import evaluate_table, markdown, measured
from fmn.tasks.dataset import HUB
from fmn.tasks.task import get_task

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

HUB_METRICS = {"pearson": "pearsonr"}
"""The Hub's name of a metric, if it is another than GLUE's."""
DATA_SETS = {"hub": (HUB, "GLUE"), "embedded": ("fmn/miniature-glue", "miniature GLUE")}
"""By source of the data: the id that a card calls it by, and its title."""
OTHER_DATA = ("glue", "GLUE from a folder")


def card(recipe: Recipe, metrics: Metrics) -> str:
    """The model card of a merged model that was evaluated."""
    body = render(
        "card.md",
        recipe=recipe,
        metrics=metrics,
        scores=markdown(*evaluate_table(metrics)),
        paper=METHODS[recipe.method].paper,
        data_sets=DATA_SETS,
        other_data=OTHER_DATA,
    )
    return f"---\n{front_matter(recipe, metrics).to_yaml()}\n---\n\n{body}\n"


def front_matter(recipe: Recipe, metrics: Metrics) -> "ModelCardData":
    """What the Hub reads of a card, with the scores as model-index."""
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    for task, scores in metrics.tasks.items():
        rows = metrics.data.get(task, TaskRows(splits={}))
        data_set, title = DATA_SETS.get(rows.source, OTHER_DATA)
        for split, metric, value, examples, _ in measured(task, scores):
            result = EvalResult(
                task_type="text-classification",
                task_name=f"GLUE {task}",
                dataset_type=data_set,
                dataset_name=f"{title}, {task}",
                dataset_config=task,
                dataset_split=split,
                dataset_revision=rows.revision or None,
                dataset_args={"rows": examples},
                metric_type=HUB_METRICS.get(metric, metric),
                metric_name=f"{task} {metric.replace('_', ' ')}",
                metric_value=round(value, 6),
            )
            results.append(result)
    tasks = list(recipe.experts) or recipe.tasks
    revisions = [expert.revision for expert in recipe.experts.values()]
    on_hub = [name[5:].partition("@")[0] for name in revisions if name.startswith("hf://")]
    names = {HUB_METRICS.get(name, name) for task in tasks for name in get_task(task).metrics}
    return ModelCardData(
        model_name=f"fmn {recipe.method} of {', '.join(tasks)}",
        library_name="transformers",
        pipeline_tag="text-classification",
        language="en",
        base_model=on_hub or None,
        base_model_relation="merge" if on_hub else None,
        datasets=[HUB] if any(rows.source == "hub" for rows in metrics.data.values()) else None,
        tags=["fmn", "merge", recipe.method, *tasks],
        metrics=sorted(names),
        eval_results=results,
        ignore_metadata_errors=False,
    )
