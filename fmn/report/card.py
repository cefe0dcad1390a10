"""The model card beside a merged model, as the Hub reads it: what it is made of, its scores, how to make it again."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from shlex import join, quote
from typing import Any

from fmn.merge import recipe
from fmn.merge.methods import NEEDS, PAPERS
from fmn.report.results import markdown, measured, percent, span
from fmn.store import artifacts
from fmn.tasks.dataset import HUB, MAX_LENGTH
from fmn.tasks.task import TASKS

HUB_METRICS = {"pearson": "pearsonr"}
"""The Hub's name of a metric, where it is another than GLUE's."""
SETTINGS = ("mapping", "normalise", "exponent", "damping", "scale", "density", "seed")
"""Of a recipe, in the order of `fmn.params.MergeSettings`; None where the method has none."""
EMBEDDED = "the miniature GLUE that fmn makes"

Stated = Mapping[str, Mapping[str, Any]]
"""By task, what the manifest of its data says: source, revision or seed, rows by split."""


def write(folder: Path, metrics: Mapping[str, Any] | None, data: Stated | None = None) -> None:
    """The card of the merged model in `folder`, written anew where it says something else; arguments as for `card`."""
    text = card(
        recipe.read_recipe(folder).model_dump(mode="json", by_alias=True), metrics, data or {}
    )
    path = folder / recipe.CARD
    if not path.is_file() or path.read_text() != text:
        with artifacts.whole_file(path) as file:
            file.write_text(text)


def card(made: Mapping[str, Any], metrics: Mapping[str, Any] | None, data: Stated) -> str:
    """The text of a card.

    Args:
        made: the content of ``merge.json``.
        metrics: the content of its metrics file, where it was evaluated.
        data: where the rows come from, of the tasks for which that is known.
    """
    evaluated: Mapping[str, Any] = metrics["tasks"] if metrics else {}
    parts = [
        ["---", front_matter(made, evaluated, data).to_yaml(), "---", ""],
        _head(made),
        _scores(evaluated, metrics),
        _experts(made),
        _method(made),
        _data(made, evaluated, data),
        _limits(made, data),
        ["## How to reproduce it", "", f"With fmn {made.get('fmn', '')}:".replace(" :", ":"), ""],
        ["```", *commands(made, data), "```", ""],
    ]
    return "\n".join(line for part in parts for line in part)


def front_matter(made: Mapping[str, Any], evaluated: Mapping[str, Any], data: Stated) -> Any:
    """What the Hub reads of a card, as `huggingface_hub.ModelCardData`."""
    from huggingface_hub import EvalResult, ModelCardData

    experts = [
        hub for entry in made["experts"].values() if (hub := _hub_name(entry.get("revision", "")))
    ]
    given = {task: data.get(task, {}).get("source", "hub") for task in made["experts"]}
    results = [
        EvalResult(
            task_type="text-classification",
            task_name=f"GLUE {task}",
            dataset_type=_data_set(given[task])[0],
            dataset_name=f"{_data_set(given[task])[1]}, {task}",
            dataset_config=task,
            dataset_split=split,
            dataset_revision=data.get(task, {}).get("revision"),
            dataset_args={"rows": examples},
            metric_type=HUB_METRICS.get(metric, metric),
            metric_name=f"{task} {metric.replace('_', ' ')}",
            metric_value=round(value, 6),
        )
        for task, entry in evaluated.items()
        for split, metric, value, examples, *_ in measured(task, entry)
    ]
    return ModelCardData(
        model_name=f"fmn {made['method']} of {', '.join(made['experts'])}",
        library_name="transformers",
        pipeline_tag="text-classification",
        language="en",
        base_model=experts or None,
        base_model_relation="merge" if experts else None,
        datasets=[HUB] if "hub" in given.values() else None,
        tags=["fmn", "merge", made["method"], *made["experts"]],
        metrics=sorted(
            {
                HUB_METRICS.get(name, name)
                for task in made["experts"]
                for name in TASKS[task].metrics
            }
        ),
        eval_results=results or None,
        ignore_metadata_errors=False,
    )


def _hub_name(revision: str) -> str | None:
    """ "org/name" of "hf://org/name@commit"; None for what is not on the Hub."""
    return (
        revision.removeprefix("hf://").partition("@")[0] if revision.startswith("hf://") else None
    )


def _data_set(source: str) -> tuple[str, str]:
    """The id that a card calls a data set by, and its title."""
    return {"hub": (HUB, "GLUE"), "embedded": ("fmn/miniature-glue", "miniature GLUE")}.get(
        source, ("glue", "GLUE from a folder")
    )


def _head(made: Mapping[str, Any]) -> Iterator[str]:
    names = list(made["experts"])
    yield f"# {', '.join(names)}: one model, merged with {made['method']}"
    yield ""
    yield (
        f"One encoder that was merged from {len(names)} experts without training, and a head for each task."
        " `encoder/` loads with `AutoModel.from_pretrained`, `tasks/TASK/` with"
        " `AutoModelForSequenceClassification.from_pretrained`:"
    )
    yield from ["", "```python", "from transformers import pipeline", ""]
    yield f'pipeline("text-classification", "tasks/{names[0]}")'
    yield from ["```", ""]


def _scores(evaluated: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> Iterator[str]:
    if not evaluated or metrics is None:
        return
    yield from ["## Scores on the validation splits, in percent", ""]
    body = [
        [task, split, metric.replace("_", " "), str(examples), percent(value), span(interval)]
        for task, entry in evaluated.items()
        for split, metric, value, examples, interval in measured(task, entry)
    ]
    if len(evaluated) > 1:
        body.append(
            ["mean", "", "score", "", percent(metrics["score"]), span(metrics.get("interval"))]
        )
    yield markdown(["task", "split", "metric", "examples", "score", "95 % interval"], body)


def _experts(made: Mapping[str, Any]) -> Iterator[str]:
    yield from ["## Experts", ""]
    body = [
        [
            task,
            f"`{_origin(entry)}`",
            f"`{entry.get('digest', '')[:12]}`",
            f"{made['coefficients'][task]:g}",
        ]
        for task, entry in made["experts"].items()
    ]
    yield markdown(["task", "expert", "sha256", "coefficient"], body)
    if base := made.get("base"):
        yield from [f"Base: `{_origin(base)}`.", ""]


def _origin(entry: Mapping[str, str]) -> str:
    return entry.get("revision") or entry.get("source") or "a local folder"


def _method(made: Mapping[str, Any]) -> Iterator[str]:
    paper = PAPERS[made["method"]]
    yield from ["## Method", ""]
    yield (
        f"`{made['method']}`"
        + (f" ([arXiv {paper}](https://arxiv.org/abs/{paper}))" if paper else "")
        + ", with"
    )
    yield f"{', '.join(f'{name} {made[name]}' for name in SETTINGS if made.get(name) is not None)}."
    if search := made.get("search"):
        yield (
            f" Coefficients and scale were found by search on the training data: {percent(search['score'])} % of the"
            f" experts' scores there, where equal coefficients reach {percent(search['uniform'])} %."
        )
    if settled := made.get("realign"):
        counts = [str(fit["texts"]) for fit in settled["tasks"].values()]
        yield (
            " Then the last linear map of every head was fitted anew to what its expert answers to training texts"
            f" without labels ({', '.join(counts)} of them)."
        )
    yield ""
    body = [
        [
            task,
            _title(made, kind),
            stated.get("estimator", ""),
            str(stated["samples"]),
            stated.get("dtype", ""),
        ]
        for kind in ("fisher", "gram")
        for task, stated in made.get(kind, {}).items()
    ]
    if body:
        yield markdown(["task", "statistic", "estimator", "training examples", "dtype"], body)


def _title(made: Mapping[str, Any], kind: str) -> str:
    fisher = "mask Fisher" if NEEDS[made["method"]].fisher == "nodes" else "full Fisher"
    return {"fisher": fisher, "gram": "Gram matrices"}[kind]


def _data(made: Mapping[str, Any], evaluated: Mapping[str, Any], data: Stated) -> Iterator[str]:
    if not data:
        return
    yield from ["## Data", ""]
    body = []
    for task in made["experts"]:
        stated = data.get(task, {})
        rows = {split: str(count) for split, count in stated.get("rows", {}).items()}
        tried = [f"{split}: {count}" for split, count in rows.items() if split != "train"]
        which = {"hub": f"`{HUB}`", "embedded": EMBEDDED}.get(
            stated.get("source", ""), "a folder in GLUE's schema"
        )
        pinned = (
            f"revision {stated['revision']}"
            if "revision" in stated
            else f"seed {stated.get('seed', '')}"
        )
        where = f"{which}, {pinned}" if stated.get("source") in ("hub", "embedded") else which
        body.append([task, where, rows.get("train", ""), ", ".join(tried)])
    yield markdown(["task", "data", "training rows", "rows that it is scored on"], body)
    yield f"Texts are cut at {MAX_LENGTH} tokens. Statistics are of training rows, scores of validation rows."
    yield ""


def _limits(made: Mapping[str, Any], data: Stated) -> Iterator[str]:
    head = (
        "Each task's head is its expert's own"
        + (
            ", re-aligned to answer as the expert does to unlabeled training texts"
            if made.get("realign")
            else ""
        )
        + "; only the encoder is merged. A task can lose against its expert."
    )
    yield from ["## Limits", "", f"- {head}"]
    yield "- The intervals say how far the examples leave a score uncertain, not how far other experts would differ."
    yield "- Scores are of GLUE's validation splits; whoever chose the experts may have looked at them."
    yield "- It has the biases of its experts and of their data, and their licences hold for it."
    if any(stated.get("source") == "embedded" for stated in data.values()):
        yield f"- Its data is {EMBEDDED}, whose sentences come from a small grammar: no measure of English."
    yield "- `merge.json` holds the whole recipe: experts and their digests, method, mapping, coefficients, versions."
    yield ""


# ---- how to make it again ----


def commands(made: Mapping[str, Any], data: Stated) -> list[str]:
    """The commands that make the model, from the sources of its experts to its metrics.

    A folder, of which the recipe knows no more than its digest, is called path/to/WHAT.
    """
    needs = NEEDS[made["method"]]
    lines = []
    base = made.get("base")
    if base:
        lines.append(join(["fmn", "fetch", _source(base, "base"), "--out", "base"]))
    for task, entry in made["experts"].items():
        lines.append(
            join(["fmn", "data", task, *_data_options(data.get(task, {})), "--out", f"data/{task}"])
        )
        expert = f"experts/{task}"
        if settings := entry.get("settings"):
            options = [
                part
                for name, value in settings.items()
                for part in (f"--{name.replace('_', '-')}", str(value))
            ]
            lines.append(
                join(
                    [
                        "fmn",
                        "finetune",
                        "base",
                        "--task",
                        task,
                        "--data",
                        "data",
                        *options,
                        "--out",
                        expert,
                    ]
                )
            )
        else:
            lines.append(join(["fmn", "fetch", _source(entry, task), "--out", expert]))
        for kind, stated in (("fisher", made.get("fisher", {})), ("gram", made.get("gram", {}))):
            if task in stated:
                lines.append(_statistic(kind, needs.fisher or "", task, stated[task]))
    lines.append(_merge(made, needs.gram))
    model = "merged"
    if settled := made.get("realign"):
        model = "realigned"
        options = [f"--{name} {settled[name]}" for name in ("texts", "ridge", "seed", "dtype")]
        lines.append(
            f"fmn realign merged --expert experts --data data {' '.join(options)} --out {model}"
        )
    lines.append(f"fmn evaluate {model} --data data --out metrics.json")
    return lines


def _source(entry: Mapping[str, str], name: str) -> str:
    revision = entry.get("revision", "")
    return revision if revision.startswith(("hf://", "models:", "package:")) else f"path/to/{name}"


def _data_options(stated: Mapping[str, Any]) -> Sequence[str]:
    source = stated.get("source")
    if source == "embedded":
        return ["--source", "embedded", "--seed", stated.get("seed", "0")]
    if source == "hub":
        return [
            "--source",
            "hub",
            *(["--revision", stated["revision"]] if "revision" in stated else []),
        ]
    return ["--source", "path/to/glue"]


def _statistic(kind: str, fisher: str, task: str, stated: Mapping[str, Any]) -> str:
    command, suffix = {
        "fisher": ("fisher", ".parquet") if fisher == "nodes" else ("full-fisher", ".safetensors"),
        "gram": ("gram", ".gram.safetensors"),
    }[kind]
    options = [
        f"--{name} {stated[name]}"
        for name in ("estimator", "samples", "seed", "dtype")
        if name in stated
    ]
    options += ["--stratified"] if stated.get("stratified") else []
    out = f"--out statistics/{task}{suffix}"
    return " ".join(
        ["fmn", command, f"experts/{task}", "--task", task, "--data data", *options, out]
    )


def _merge(made: Mapping[str, Any], gram: bool) -> str:
    words = ["fmn merge --expert experts"]
    words += ["--fisher statistics"] if made.get("fisher") else []
    words += ["--gram statistics"] if gram else []
    words += ["--base base"] if made.get("base") else []
    words.append(f"--method {made['method']}")
    words += [f"--{name} {made[name]}" for name in SETTINGS if made.get(name) is not None]
    given = [f"{task}={value!r}" for task, value in made["coefficients"].items() if value != 1]
    words += [f"--coefficient {' '.join(map(quote, given))}"] if given else []
    return " ".join([*words, "--out merged"])
