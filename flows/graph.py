"""The table of the pipeline: its stages, their inputs and outputs, and the names they run for.

The Prefect flow submits the `nodes` of `PIPELINE`, `fmn stage` runs one of them, and ``dvc.yaml``
is rendered from it (`fmn dvc`). Paths are below the folder `work` of the settings.
"""

import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fmn import params
from fmn.errors import UserError, hint
from fmn.evaluate.stages import evaluate
from fmn.fisher.stages import fisher, fisher_of_parts, fisher_part, gram
from fmn.merge.stages import calibrate, merge, realign
from fmn.models.stages import finetune
from fmn.params import Params
from fmn.registry.stages import register
from fmn.report.stages import report
from fmn.rows.stages import data, find_source
from fmn.sources import origin
from fmn.sources.stages import FetchSettings, fetch
from fmn.store.records import Record
from fmn.store.stage import Outcome, run_stage, write_record


class Each(NamedTuple):
    """An argument of a stage that maps names, which the settings list, to paths."""

    path: str
    names: str


Reads = Mapping[str, str | Each]


@dataclass(frozen=True)
class Row:
    """A stage of the pipeline, and the names that it runs for.

    Attributes:
        name: its name for `fmn stage`.
        function: the stage function.
        names: the attribute of `Params` that lists the names; ONCE: it runs once, without a name.
        out: its output; ``{name}`` is replaced by a name, ``{encoder}`` and ``{model}`` by
            `Params.encoder` and `Params.model`.
        reads: its arguments that are paths, with the same replacements.
        section: the section of the settings for its argument `settings`.
        values: its other arguments from the settings, with their sections.
        is_task: whether the names are tasks that the function takes as an argument.
        dvc: its name in ``dvc.yaml``, if it differs: stages that write into one folder are one
            stage there.
    """

    name: str
    function: Callable[..., Outcome]
    names: str
    out: str
    reads: Reads
    section: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    is_task: bool = False
    dvc: str = ""


EXPERTS, LABELLED, MODELS, ONCE = "experts.tasks", "labelled", "models", ""
EXPERT, DATA, MODEL = "experts/{name}", "data/{name}", "models/{name}"
FISHER, GRAM = "fisher/{name}.parquet", "gram/{name}.gram.safetensors"
EXPERT_METRICS, METRICS = "metrics/experts/{name}.json", "metrics/{name}.json"
ALL_EXPERTS, ALL_FISHER = Each(EXPERT, EXPERTS), Each(FISHER, EXPERTS)

NOTHING: Reads = {}
BASE_AND_DATA = {"base": "base", "data": DATA}
EXPERT_AND_DATA = {"checkpoint": EXPERT, "data": DATA}
ONE_MODEL = {"model": EXPERT, "data": DATA}
MODEL_AND_DATA = {"model": MODEL, "data": "data"}
ALL_STATISTICS: Reads = {
    "experts": ALL_EXPERTS,
    "fisher": ALL_FISHER,
    "gram": Each(GRAM, "grams"),
    "base": "base",
    "data": "data",
}
EXPERTS_AND_DATA: Reads = {"experts": ALL_EXPERTS, "data": "data"}
MERGED_AND_EXPERTS: Reads = {"model": "models/merged", **EXPERTS_AND_DATA}
ENCODER_AND_EXPERTS: Reads = {"model": "models/{encoder}", **EXPERTS_AND_DATA}
ALL_RESULTS: Reads = {
    "merged": Each(METRICS, MODELS),
    "models": Each(MODEL, MODELS),
    "experts": Each(EXPERT_METRICS, LABELLED),
    "fisher": ALL_FISHER,
}
MODEL_AND_REPORT = {
    "model": "models/{model}",
    "metrics": "metrics/{model}.json",
    "data": "data",
    "report": "report",
    "card": "report/cards/{model}.md",
}

FROM_BASE = {"source": "base", "architecture": "architecture"}
FROM_SOURCE = {"source": "sources.{name}.source", "architecture": "architecture"}
DEFINITION = {"definition": "tasks.{name}"}
HEADLINE = {"headline": "model", "registry": "registry.name"}

PIPELINE = (
    Row("fetch-base", fetch, ONCE, "base", NOTHING, values=FROM_BASE),
    Row("data", data, EXPERTS, DATA, NOTHING, "data", DEFINITION, is_task=True),
    Row("fetch", fetch, "sources", EXPERT, BASE_AND_DATA, "sources.{name}", FROM_SOURCE,
        is_task=True),
    Row("finetune", finetune, "finetune", EXPERT, BASE_AND_DATA, "finetune.{name}", is_task=True),
    Row("fisher", fisher, EXPERTS, FISHER, EXPERT_AND_DATA, "fisher", is_task=True),
    Row("gram", gram, "grams", GRAM, EXPERT_AND_DATA, "grams.{name}", is_task=True),
    Row("merge", merge, "merges", MODEL, ALL_STATISTICS, "merges.{name}", dvc="models"),
    Row("calibrate", calibrate, "calibrations", MODEL, MERGED_AND_EXPERTS, "calibrations.{name}",
        dvc="models"),
    Row("realign", realign, "realign", MODEL, ENCODER_AND_EXPERTS, "realign.{name}", dvc="models"),
    Row("evaluate-expert", evaluate, LABELLED, EXPERT_METRICS, ONE_MODEL, "evaluate", is_task=True,
        dvc="metrics"),
    Row("evaluate", evaluate, MODELS, METRICS, MODEL_AND_DATA, "evaluate", dvc="metrics"),
    Row("report", report, ONCE, "report", ALL_RESULTS, values=HEADLINE),
    Row("register", register, ONCE, "registered.json", MODEL_AND_REPORT, "registry"),
)  # fmt: skip
REGISTER_TRIALS = "FMN_REGISTER_TRIALS"  # environment variable: trials are registered too
SETTINGS = "settings.json"  # the settings with every default filled in, which DVC compares


@dataclass(frozen=True)
class Node:
    """A stage of a run with its arguments, identified by `stage` and `name`."""

    stage: str
    name: str
    function: Callable[..., Outcome]
    arguments: Mapping[str, Any]

    @property
    def title(self) -> str:
        return f"{self.stage} {self.name}".strip()


def nodes(settings: Params, profile: Path) -> list[Node]:
    """The nodes of a run, each after those that it needs.

    Args:
        settings: the content of the settings file.
        profile: the settings file, which the registry stores with the model.
    """
    out = Path(settings.work) / SETTINGS
    versions = {_version_name(row): _version(row) for row in PIPELINE}
    arguments = {"params": profile, "versions": versions, "out": out}
    first = Node("settings", "", params.write_settings, arguments)
    return [first, *(node for row in PIPELINE for node in _row_nodes(row, settings, profile))]


def _version_name(row: Row) -> str:
    """The name of the constant that holds the version of a row's stage."""
    return row.function.__name__.upper()


def _version(row: Row) -> int:
    return int(getattr(sys.modules[row.function.__module__], _version_name(row)))


def _row_nodes(row: Row, settings: Params, profile: Path) -> Iterator[Node]:
    for name in _section(settings, row.names) if row.names else [ONCE]:
        arguments: dict[str, Any] = {"out": _path(row.out, settings, name)}
        for argument, template in row.reads.items():
            if isinstance(template, Each):
                names = _section(settings, template.names)
                paths = {each: _path(template.path, settings, each) for each in names}
                arguments[argument] = paths
            else:
                arguments[argument] = _path(template, settings, name)
        for argument, section in _sections(row, name).items():
            arguments[argument] = _section(settings, section)
        if row.name == "fetch":
            arguments["settings"] = FetchSettings(labels=arguments["settings"].labels)
        if row.function is evaluate and row.is_task:
            arguments["tasks"] = [name]
        elif row.is_task:
            arguments["task"] = name
        if row.function is register:
            arguments["params"] = profile
        yield from in_parts(Node(row.name, name, row.function, arguments), settings)


def in_parts(node: Node, settings: Params) -> list[Node]:
    """A node, or for a Fisher in parts (`fisher.parts`) the nodes of these, and their combination.

    The parts are beside the folder of statistics, as they are no outputs of DVC's stages.
    """
    count, arguments = settings.fisher.parts, node.arguments
    if node.function is not fisher or count == 1:
        return [node]
    out: Path = arguments["out"]
    folder = Path(settings.work) / "parts"
    parts = {f"{n}": folder / f"{out.stem}-{n}-of-{count}.parquet" for n in range(1, count + 1)}
    computing = [
        Node("fisher-part", f"{node.name} {number}", fisher_part,
             {**arguments, "out": part, "whole": out, "part": (int(number), count)})
        for number, part in parts.items()
    ]  # fmt: skip
    combining = {**arguments, "parts": parts}
    return [*computing, Node(node.stage, node.name, fisher_of_parts, combining)]


def _sections(row: Row, name: str) -> dict[str, str]:
    """The sections of the settings for a stage's arguments."""
    sections = {"settings": row.section, **row.values} if row.section else row.values
    return {argument: section.format(name=name) for argument, section in sections.items()}


def _section(settings: Params, path: str) -> Any:
    """The value at a dotted path in the settings; None for a missing entry."""
    value: Any = settings
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part)
    return value


def looks(settings: Params) -> Iterator[tuple[str, Callable[[], object]]]:
    """Cheap checks that sources and data sets exist, by setting, before the first stage.

    Each check raises a UserError if its source does not exist. Rows at a URL, which would have to
    be downloaded, and GLUE on the Hub are not checked.
    """
    work = Path(settings.work)
    sources = {"base": (settings.base, work / "base")}
    for name, each in settings.sources.items():
        sources[f"sources.{name}"] = each.source, work / "experts" / name
    for setting, (source, out) in sources.items():
        is_pinned = re.fullmatch(r"hf://.*@[0-9a-f]{40}", source)
        if not (is_pinned and out.exists()):  # offline, the fetched copy is enough
            yield setting, partial(origin.look, source)
    for name in settings.experts.tasks:
        definition = settings.tasks.get(name)
        rows = definition.dataset if definition else None
        if "://" not in rows.path if rows else settings.data.source != "hub":
            yield (
                f"tasks.{name}" if rows else "data",
                partial(find_source, name, settings.data, definition),
            )


def find_nodes(settings: Params, profile: Path, stage: str, name: str = "") -> list[Node]:
    """The nodes of a stage for one of its names, or for all of them (possibly none).

    Raises:
        UserError: the pipeline has no such stage, or the stage has no such name.
    """
    known = ["settings", *(row.name for row in PIPELINE)]
    if stage not in known:
        raise UserError(f"stage {stage}: choose one of {', '.join(known)}{hint(stage, known)}")
    of_stage = [node for node in nodes(settings, profile) if node.stage == stage]
    chosen = [node for node in of_stage if name in ("", node.name)]
    if name and not chosen:
        names = ", ".join(filter(None, (node.name for node in of_stage)))
        remedy = f"give one of its names: {names}" if names else "it takes no name"
        raise UserError(f"stage {stage}: has no {name}; {remedy}")
    return chosen


def needs(node: Node, listed: Iterable[Node]) -> list[Node]:
    """The nodes among `listed` whose outputs a node reads; nodes that only log have no output."""
    own = ("out", "whole")
    reads = {name: value for name, value in node.arguments.items() if name not in own}
    paths = list(_paths_in(reads))

    def is_read(out: Path) -> bool:
        return any(out == path or out in path.parents or path in out.parents for path in paths)

    writers = [other for other in listed if other is not node and "out" in other.arguments]
    return [other for other in writers if is_read(other.arguments["out"])]


def _paths_in(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _paths_in(item)


def _path(template: str, settings: Params, name: str) -> Path:
    model, encoder = settings.model, settings.encoder
    return Path(settings.work) / template.format(name=name, model=model, encoder=encoder)


def model_folder(settings: Params, name: str) -> Path:
    """The folder of one of the run's models."""
    return _path(MODEL, settings, name)


def make_folders(settings: Params) -> None:
    """Make the folder of Gram matrices, which DVC expects even if no merge needs them."""
    _path(GRAM, settings, "").parent.mkdir(parents=True, exist_ok=True)


# ---------------------------------------------------------------------------------------------
# The same for DVC


class Trial(Record):
    """The output of the stage `register` in an experiment of DVC."""

    trial: str
    messages: list[str]


def trial_name() -> str:
    """The name of the experiment of DVC (`dvc exp run`) that this process is part of, or ""."""
    return "" if os.environ.get(REGISTER_TRIALS) else os.environ.get("DVC_EXP_NAME", "")


def register_nothing(trial: str, out: Path) -> Outcome:
    """The stage `register` of an experiment of DVC: it registers nothing, and says so."""
    remedy = f"after `dvc exp apply {trial}`, `fmn run` registers its model"
    note = f"  the trial {trial} registers nothing; {remedy}; {REGISTER_TRIALS}=1 registers all"
    content = Trial(trial=trial, messages=[note])
    return run_stage(
        "register", 0, out, lambda job: write_record(job.path, content),
        reads={}, settings={"trial": trial}, summary=lambda _: content,
    )  # fmt: skip


DVC_HEADER = "# Written by `fmn dvc` from the table in flows/graph.py: change that instead.\n"
_COMMENT = """\
# Commands name a stage of the settings and read them: no setting reaches a shell. What floats is
# looked at by the stage settings, which always runs. The results of one task come back from DVC's
# cache with settings of before; others persist, so that a stage sees for itself what is there. What
# a pinned source or a merge gives again at once is not copied into the cache. Stages of which the
# settings ask for none compute nothing.
"""
_PLOTS = """\
metrics: ['${work}/report/metrics.json']
plots: ['${work}/report/pictures']
"""


FOREACH = {EXPERTS: "${item}", "sources": "${key}", "finetune": "${key}"}
"""Names that params.yaml itself lists, so that DVC has a stage for each; and DVC's variable."""
SECTIONS = {
    "merges": ["merge", "baselines"],
    "calibrations": ["calibrate"],
    "grams": ["gram", "merge", "baselines", "experts"],
    "model": ["calibrate", "realign"],
}
"""The sections that a property of the settings is computed from."""
PINS = {
    "fetch-base": "pins.base",
    "fetch": "pins.sources.{name}",
    "data": "pins.data.{name}",
}
"""The entries of the stage `settings` with the present revisions of sources that are not pinned."""


def dvc_yaml() -> str:
    """The text of ``dvc.yaml``."""
    from ruamel.yaml import YAML

    settings_file = f"${{work}}/{SETTINGS}"
    stages: dict[str, Any] = {
        "settings": {
            "cmd": "fmn stage settings",
            "always_changed": True,  # local data files may have changed
            "deps": ["params.yaml"],
            # In the cache, so that DVC can compare the settings of other commits.
            "outs": _dvc_outs([settings_file, f"{settings_file}.fmn.json"], is_cached=True),
        }
    }
    groups: dict[str, list[Row]] = {}
    for row in PIPELINE:
        groups.setdefault(row.dvc or row.name, []).append(row)
    for name, rows in groups.items():
        stages[name] = _dvc_stage(rows, settings_file)
    content = {
        "vars": [{name: {} for name in FOREACH if name != EXPERTS}],  # sections may be left out
        "stages": stages,
    }
    text = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = None
    yaml.width = 140
    yaml.dump(content, text)
    return DVC_HEADER + _COMMENT + text.getvalue() + _PLOTS


def _dvc_stage(rows: Sequence[Row], settings_file: str) -> dict[str, Any]:
    """A stage of ``dvc.yaml``, for each name of a row or for rows that write into one folder."""
    first = rows[0]
    name = FOREACH.get(first.names, "")
    fill = partial(str.format, name=name) if name else _folder
    sections, paths = list[str](), list[str]()
    for row in rows:
        if row.name in PINS:
            sections.append(PINS[row.name].format(name=name))
        for section in _sections(row, name).values():
            top = section.partition(".")[0]
            sections += SECTIONS.get(top, [section.removesuffix(".")])
        if row.names == LABELLED or any(isinstance(path, Each) for path in row.reads.values()):
            sections.append("experts")
        for template in row.reads.values():
            paths.append(_folder(template.path) if isinstance(template, Each) else fill(template))
    versions = dict.fromkeys(f"versions.{_version_name(row)}" for row in rows)
    commands = [f"fmn stage {row.name} {name}".strip() for row in rows]
    body: dict[str, Any] = {"cmd": commands if len(commands) > 1 else commands[0]}
    out = fill(first.out) if name or first.names == ONCE else first.out.partition("/")[0]
    if deps := _outermost([out, *paths], "/")[1:]:
        body["deps"] = [f"${{work}}/{path}" for path in deps]
    body["params"] = [{settings_file: _outermost([*sections, *versions], ".")}]
    outs = [out, f"{out}.fmn.json"] if Path(out).suffix else [out]
    is_cached = first.function not in (fetch, merge, register)
    # DVC takes back from its cache only what does not persist.
    is_own = is_cached and bool(name)
    body["outs"] = _dvc_outs([f"${{work}}/{path}" for path in outs], is_cached, not is_own)
    return {"foreach": f"${{{first.names}}}", "do": body} if name else body


def _folder(template: str) -> str:
    """A path; for a path with a name in it, the folder of all names."""
    return template.rpartition("/")[0] if "{" in template else template


def _outermost(paths: Iterable[str], separator: str) -> list[str]:
    """Paths without duplicates, and without those inside another."""
    listed = list(dict.fromkeys(paths))
    return [path for path in listed if not any(path.startswith(p + separator) for p in listed)]


def _dvc_outs(paths: Iterable[str], is_cached: bool, persists: bool = True) -> list[Any]:
    options = {"persist": True} if persists else {}
    options |= {} if is_cached else {"cache": False}
    # Copies, so that YAML has no anchors.
    return [{path: dict(options)} if options else path for path in paths]
