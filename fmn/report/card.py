"""Write the model card of a merged model: front matter for the Hub, and a text for people.

The text is the jinja2 template ``templates/card.md``.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fmn.evaluate.files import Metrics, TaskRows
from fmn.merge.methods import METHODS
from fmn.merge.recipe import Recipe, library, loading
from fmn.report.page import render
from fmn.report.results import evaluate_notes, evaluate_table, is_in_percent, measured
from fmn.report.wording import DATA_SETS, markdown, task_table
from fmn.tasks.kinds import KINDS, KindName
from fmn.tasks.task import Task

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

HUB_METRICS = {
    **{"pearson": "pearsonr", "r2": "r_squared", "seqeval_f1": "seqeval"},
    "spearmanr_cosine": "spearman_cosine",
}
"""The Hub's name of a metric, if it differs from ours."""


def card(recipe: Recipe, metrics: Metrics, verdict: Sequence[str] = ()) -> str:
    """The model card of an evaluated merged model, with a report's verdict on it."""
    definitions = recipe.definitions | metrics.definitions
    body = render(
        "card.md",
        kinds=list(dict.fromkeys(task.task for task in definitions.values())),
        usage=_usage(definitions),
        in_percent=is_in_percent(metrics.definitions),
        recipe=recipe,
        metrics=metrics,
        scores=markdown(*evaluate_table(metrics)),
        notes=evaluate_notes(metrics),
        verdict=verdict,
        tasks=markdown(*task_table(definitions, metrics.data)),
        paper=METHODS[recipe.method].paper,
    )
    return f"---\n{front_matter(recipe, metrics).to_yaml()}\n---\n\n{body}\n"


def _usage(tasks: Mapping[str, Task]) -> str:
    """Example code that loads the first task of each kind."""
    names: dict[KindName, str] = {}
    for name, task in tasks.items():
        names.setdefault(task.task, name)
    lines = [f'pipeline("{k}", "tasks/{n}")' for k, n in names.items() if KINDS[k].has_head]
    if lines:
        lines = ["from transformers import pipeline", "", *lines]
    others = [loading(n, tasks[n]) for k, n in names.items() if not KINDS[k].has_head]
    return "\n\n".join(["\n".join(lines)] * bool(lines) + others)


def hub_metric(name: str) -> tuple[str, dict[str, str] | None]:
    """The Hub's name of a metric, and its arguments there."""
    if name.startswith("f1_"):
        return "f1", {"average": name.removeprefix("f1_")}
    return HUB_METRICS.get(name, name), None


def front_matter(recipe: Recipe, metrics: Metrics) -> "ModelCardData":
    """A card's front matter, with the defined scores as model-index."""
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    for name, scores in metrics.tasks.items():
        task, rows = metrics.definitions[name], metrics.data.get(name, TaskRows(splits={}))
        is_on_hub = bool(rows.revision) and rows.source not in DATA_SETS
        data_set, title = DATA_SETS.get(rows.source, (rows.source if is_on_hub else name, ""))
        for split, metric, value, examples, _ in measured(task, scores):
            if value is None:
                continue
            kind, arguments = hub_metric(metric)
            result = EvalResult(
                task_type=task.task,
                task_name=name,
                dataset_type=data_set,
                dataset_name=f"{title}, {name}" if title else name,
                dataset_config=name if title else None,
                dataset_split=split,
                dataset_revision=rows.revision or None,
                dataset_args={"rows": examples},
                metric_type=kind,
                metric_args=arguments,
                metric_name=f"{name} {metric.replace('_', ' ')}",
                metric_value=round(value, 6),
            )
            results.append(result)
    tasks, sources = list(recipe.experts) or recipe.tasks, list(metrics.data.values())
    revisions = [expert.revision for expert in recipe.experts.values()]
    bases = [name[5:].partition("@")[0] for name in revisions if name.startswith("hf://")]
    is_glue = sources and all(rows.source in DATA_SETS for rows in sources)
    data_sets = {DATA_SETS.get(rows.source, (rows.source,))[0] for rows in sources if rows.revision}
    kinds = {hub_metric(name)[0] for task in metrics.definitions.values() for name in task.metrics}
    forms = sorted({task.task for task in (recipe.definitions | metrics.definitions).values()})
    return ModelCardData(
        model_name=f"fmn {recipe.method} of {', '.join(tasks)}",
        library_name=library((recipe.definitions | metrics.definitions).values()),
        pipeline_tag=forms[0] if len(forms) == 1 else None,
        language="en" if is_glue else None,
        base_model=bases or None,
        base_model_relation="merge" if bases else None,
        datasets=sorted(data_sets) or None,
        tags=["fmn", "merge", recipe.method, *(forms if len(forms) > 1 else []), *tasks],
        metrics=sorted(kinds),
        eval_results=results or None,
        ignore_metadata_errors=False,
    )
