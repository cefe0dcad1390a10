"""The pipeline, written down once: its stages, what each reads and writes, and for which names.

`PIPELINE` is the table. The Prefect flow submits its `nodes`, `fmn stage` runs one of them, and
``dvc.yaml`` is rendered from it (`make dvc`). Paths are below the folder `work` of the settings.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import getsourcefile
from pathlib import Path
from typing import Any, NamedTuple

from fmn import params
from fmn.errors import UserError, hint
from fmn.evaluate.stages import evaluate
from fmn.fisher.stages import fisher, gram
from fmn.merge.stages import MergeSettings, merge, realign
from fmn.models.stages import FetchSettings, fetch, finetune
from fmn.params import Params
from fmn.registry.stages import register
from fmn.report.stages import report
from fmn.store.stage import Outcome
from fmn.tasks.stages import data

Names = str | Mapping[str, str]  # a section of the settings that lists names, or names with folders


class Each(NamedTuple):
    """A mapping from names to paths, as an argument of a stage."""

    path: str
    names: tuple[Names, ...]


Reads = Mapping[str, str | Each]


@dataclass(frozen=True)
class Row:
    """A stage of the pipeline, and the names that it runs for.

    Attributes:
        name: what ``dvc.yaml`` and `fmn stage` call it.
        function: the stage function.
        names: the names.
        out: its output; ``{name}`` and ``{folder}`` stand for a name and its folder.
        reads: its arguments that are paths, in the same way.
        section: the section of the settings that is its argument `settings`.
        values: its other arguments that are in the settings, and where.
        is_task: whether the names are tasks that the function takes as an argument.
    """

    name: str
    function: Callable[..., Outcome]
    names: Names
    out: str
    reads: Reads
    section: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    is_task: bool = False


EXPERTS, LABELLED, ONCE = "experts.tasks", "labelled", {"": ""}
# Beside the merge that is asked for stand two bounds: nothing merged, and what everybody tries
# first. The folder of the first is not called base, as that is where the base itself lies.
MERGES = {"base": "base-heads", "average": "average", "merged": "merged"}
BOUNDS = {
    "base": MergeSettings(method="average", scale=0),
    "average": MergeSettings(method="average"),
}
MODELS: tuple[Names, ...] = (MERGES, "realign")

EXPERT, DATA = "experts/{name}", "data/{name}"
FISHER, GRAM = "fisher/{name}.parquet", "fisher/{name}.gram.safetensors"
EXPERT_METRICS, METRICS = "metrics/experts/{name}.json", "metrics/{name}.json"
ALL_EXPERTS, ALL_FISHER = Each(EXPERT, (EXPERTS,)), Each(FISHER, (EXPERTS,))

NOTHING: Reads = {}
ROWS = {"data": DATA}
BASE_AND_DATA = {"base": "base", "data": DATA}
EXPERT_AND_DATA = {"checkpoint": EXPERT, "data": DATA}
ONE_MODEL = {"model": EXPERT, "data": DATA}
MODEL_AND_DATA = {"model": "{folder}", "data": "data"}
ALL_STATISTICS: Reads = {
    "experts": ALL_EXPERTS,
    "fisher": ALL_FISHER,
    "gram": Each(GRAM, ("gram",)),
    "base": "base",
}
MERGED_AND_EXPERTS: Reads = {"model": "merged", "experts": ALL_EXPERTS, "data": "data"}
ALL_RESULTS: Reads = {
    "merged": Each(METRICS, MODELS),
    "models": Each("{folder}", MODELS),
    "experts": Each(EXPERT_METRICS, (LABELLED,)),
    "fisher": ALL_FISHER,
}
MERGED_AND_REPORT = {
    "model": "merged",
    "metrics": "metrics/merged.json",
    "data": "data",
    "report": "report",
    "card": "report/cards/merged.md",
}

FROM_BASE = {"source": "base"}
FROM_SOURCE = {"source": "sources.{name}.source"}
DEFINITION = {"definition": "tasks.{name}"}

PIPELINE = (
    Row("fetch-base", fetch, ONCE, "base", NOTHING, values=FROM_BASE),
    Row("data", data, EXPERTS, DATA, NOTHING, "data", DEFINITION, is_task=True),
    Row("fetch", fetch, "sources", EXPERT, ROWS, "sources.{name}", FROM_SOURCE, is_task=True),
    Row("finetune", finetune, "finetune", EXPERT, BASE_AND_DATA, "finetune.{name}", is_task=True),
    Row("fisher", fisher, EXPERTS, FISHER, EXPERT_AND_DATA, "fisher", is_task=True),
    Row("gram", gram, "gram", GRAM, EXPERT_AND_DATA, "gram.{name}", is_task=True),
    Row("evaluate-expert", evaluate, LABELLED, EXPERT_METRICS, ONE_MODEL, "evaluate", is_task=True),
    Row("merge", merge, MERGES, "{folder}", ALL_STATISTICS, "merge"),
    Row("evaluate", evaluate, MERGES, METRICS, MODEL_AND_DATA, "evaluate"),
    Row("realign", realign, "realign", "{folder}", MERGED_AND_EXPERTS, "realign.{name}"),
    Row("evaluate-realigned", evaluate, "realign", METRICS, MODEL_AND_DATA, "evaluate"),
    Row("report", report, ONCE, "report", ALL_RESULTS),
    Row("register", register, ONCE, "registered.json", MERGED_AND_REPORT, "registry"),
)
SETTINGS = "settings.json"  # the settings with every default filled in, which DVC compares


@dataclass(frozen=True)
class Node:
    """A stage of a run, with its arguments; `stage` and `name` identify it."""

    stage: str
    name: str
    function: Callable[..., Outcome]
    arguments: Mapping[str, Any]

    @property
    def title(self) -> str:
        return f"{self.stage} {self.name}".strip()


def nodes(settings: Params, profile: Path) -> list[Node]:
    """What a settings file asks for, each node after those that it needs.

    Args:
        settings: the content of the settings file.
        profile: the settings file, which the registry keeps with the model.
    """
    out = Path(settings.work) / SETTINGS
    first = Node("settings", "", params.write_settings, {"params": profile, "out": out})
    return [first, *(node for row in PIPELINE for node in _row_nodes(row, settings, profile))]


def _row_nodes(row: Row, settings: Params, profile: Path) -> Iterator[Node]:
    work = Path(settings.work)
    for name, folder in _names(row.names, settings).items():
        arguments: dict[str, Any] = {"out": work / row.out.format(name=name, folder=folder)}
        for argument, template in row.reads.items():
            arguments[argument] = _paths(template, settings, name, folder)
        for argument, section in _sections(row, name).items():
            arguments[argument] = _section(settings, section)
        if row.name == "merge" and name in BOUNDS:
            arguments["settings"] = BOUNDS[name]
        if row.name == "fetch":
            arguments["settings"] = FetchSettings(labels=arguments["settings"].labels)
        if row.function is evaluate and row.is_task:
            arguments["tasks"] = [name]
        elif row.is_task:
            arguments["task"] = name
        if row.function is register:
            arguments["params"] = profile
        yield Node(row.name, name, row.function, arguments)


def _sections(row: Row, name: str) -> dict[str, str]:
    """Where the settings have a stage's arguments."""
    sections = {"settings": row.section, **row.values} if row.section else row.values
    return {argument: section.format(name=name) for argument, section in sections.items()}


def _section(settings: Params, path: str) -> Any:
    """A section of the settings, or what stands in it; None for an entry that is not there."""
    value: Any = settings
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part)
    return value


def find_nodes(settings: Params, profile: Path, stage: str, name: str = "") -> list[Node]:
    """A stage of a settings file for one of its names, or for all of them.

    Raises:
        UserError: the pipeline has no such stage, or the stage no such name.
    """
    listed = nodes(settings, profile)
    of_stage = [node for node in listed if node.stage == stage]
    if not of_stage:
        known = list(dict.fromkeys(node.stage for node in listed))
        raise UserError(f"stage {stage}: {profile} has {', '.join(known)}{hint(stage, known)}")
    chosen = [node for node in of_stage if name in ("", node.name)]
    if not chosen:
        names = ", ".join(node.name for node in of_stage)
        raise UserError(f"stage {stage}: give one of its names: {names}")
    return chosen


def needs(node: Node, listed: Iterable[Node]) -> list[Node]:
    """The nodes that write what a node reads; one that registers or logs writes nothing."""
    reads = {name: value for name, value in node.arguments.items() if name != "out"}
    paths = list(_paths_in(reads))
    writers = [other for other in listed if other is not node and "out" in other.arguments]
    return [
        other for other in writers if any(_overlap(other.arguments["out"], path) for path in paths)
    ]


def _overlap(out: Path, path: Path) -> bool:
    """Whether an output is what is read, holds it, or lies in it."""
    return out == path or out in path.parents or path in out.parents


def _paths_in(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _paths_in(item)


def _names(names: Names, settings: Params) -> dict[str, str]:
    """Names, each with its folder, as a section of the settings or a row lists them."""
    if not isinstance(names, str):
        return dict(names)
    return {name: name for name in _section(settings, names)}


def _paths(template: str | Each, settings: Params, name: str, folder: str) -> Any:
    work = Path(settings.work)
    if isinstance(template, str):
        return work / template.format(name=name, folder=folder)
    items = [item for names in template.names for item in _names(names, settings).items()]
    return {key: work / template.path.format(name=key, folder=value) for key, value in items}


# ---------------------------------------------------------------------------------------------
# The same for DVC

_HEADER = """\
# Written by `make dvc` from flows/graph.py; a test holds the two equal.
# Commands name a stage of the settings and read them: no setting reaches a shell. Outputs persist,
# so that a stage sees for itself that nothing changed. What a pinned source or a merge gives again
# at once is not copied into the cache.
"""
_PLOTS = """\
metrics: ['${work}/report/results.json']
plots:
- ${work}/report/pictures
- scores:
    template: bar_horizontal
    x: {'${work}/report/scores.csv': score}
    y: {'${work}/report/scores.csv': scored}
    title: scores, %
"""


def dvc_yaml() -> str:
    """The text of ``dvc.yaml``."""
    from ruamel.yaml import YAML

    settings_file = f"${{work}}/{SETTINGS}"
    stages: dict[str, Any] = {
        "settings": {
            "cmd": "fmn stage settings",
            "always_changed": True,  # local data files may have changed
            "deps": ["params.yaml"],
            "outs": _dvc_outs([settings_file, f"{settings_file}.fmn.json"], is_cached=False),
        }
    }
    for row in PIPELINE:
        stages[row.name] = _dvc_stage(row, settings_file)
    content = {
        # Sections that the settings may leave out.
        "vars": [{name: {} for name in ("sources", "finetune", "gram", "realign")}],
        "stages": stages,
    }
    text = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = None
    yaml.width = 100
    yaml.dump(content, text)
    return _HEADER + text.getvalue() + _PLOTS


def _dvc_stage(row: Row, settings_file: str) -> dict[str, Any]:
    foreach, name, fill = _dvc_names(row)
    source = Path(getsourcefile(row.function) or "").resolve()
    module = source.relative_to(Path(__file__).resolve().parents[1]).as_posix()
    sections = _outermost(_sections(row, name).values(), ".")
    if row.names == LABELLED or any(isinstance(template, Each) for template in row.reads.values()):
        sections.append("experts")
    body: dict[str, Any] = {"cmd": f"fmn stage {row.name} {name}".strip()}
    if row.name == "fetch":  # a source may float: every repro looks where it stands
        body["always_changed"] = True
    paths = [
        fill(template) if isinstance(template, str) else _folder(template.path)
        for template in row.reads.values()
    ]
    if deps := [f"${{work}}/{path}" for path in _outermost(filter(None, paths), "/")]:
        body["deps"] = deps
    body["params"] = [{settings_file: sections}, {module: [row.function.__name__.upper()]}]
    outs = [fill(row.out)]
    if Path(outs[0]).suffix:
        outs.append(f"{outs[0]}.fmn.json")
        if row.function is evaluate:
            outs.append(outs[0].replace(".json", ".predictions.parquet"))
    is_cached = row.function not in (fetch, merge, realign, register)
    body["outs"] = _dvc_outs([f"${{work}}/{path}" for path in outs], is_cached)
    return {"foreach": foreach, "do": body} if foreach else body


def _dvc_names(row: Row) -> tuple[Any, str, Callable[[str], str]]:
    """What DVC repeats a stage for, what the name is there, and what fills in a path."""
    if row.names == ONCE:
        return None, "", str
    if row.names == LABELLED:  # which params.yaml does not list: one stage for all names
        return None, "", _folder
    if isinstance(row.names, str):
        name = "${item}" if row.names == EXPERTS else "${key}"
        return f"${{{row.names}}}", name, partial(str.format, name=name, folder=name)
    return dict(row.names), "${key}", partial(str.format, name="${key}", folder="${item}")


def _folder(template: str) -> str:
    """The folder of the paths of all names; "" if it is `work`."""
    return template.partition("{")[0].rstrip("/")


def _outermost(paths: Iterable[str], separator: str) -> list[str]:
    """Paths, each once, without those that lie in another."""
    listed = list(dict.fromkeys(paths))
    return [path for path in listed if not any(path.startswith(p + separator) for p in listed)]


def _dvc_outs(paths: Iterable[str], is_cached: bool) -> list[Any]:
    options = {"persist": True} if is_cached else {"persist": True, "cache": False}
    return [{path: dict(options)} for path in paths]  # copies, so that YAML has no anchors
