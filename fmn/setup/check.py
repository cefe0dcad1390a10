"""Check a run before it starts: whether sources and data fit together, and what it needs.

Each source is replaced by its outline (`fmn.setup.outline`), so that the checks of a merge read
only headers. Only the first rows of data are read. All problems are listed, not only the first.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
from pydantic import Field, ValidationError

from fmn import params
from fmn.errors import UserError
from fmn.fisher import architectures
from fmn.merge.inputs import plan_merge, stored_tensors
from fmn.merge.methods import needs_of
from fmn.merge.recipe import MergeSettings
from fmn.merge.stages import SPEED
from fmn.models import checkpoints, labels, loading, provenance
from fmn.models.embedding import check_agreement
from fmn.params import Params
from fmn.rows.formats import Table
from fmn.rows.prepare import as_prompts, has_messages
from fmn.rows.sources import hub_name, local_files
from fmn.rows.stages import find_source
from fmn.setup.outline import Outline, outline
from fmn.setup.preview import first_rows
from fmn.sources import adapters
from fmn.sources.origin import pin
from fmn.store.records import Record
from fmn.store.yaml_file import line_of, read_yaml
from fmn.tasks.dataset import HUB
from fmn.tasks.encoding import check_template
from fmn.tasks.kinds import KINDS, KindName
from fmn.tasks.rows import INPUTS
from fmn.tasks.task import (
    TASKS,
    ColumnSettings,
    DatasetSettings,
    Task,
    TaskSettings,
    in_a_line,
    task_settings,
)

WHOLE = 1 << 26  # all local rows are read up to this many bytes
# Bytes a parameter, in float32: the weights; with gradients and Adam's two moments.
INFERENCE, TRAINING = 4, 16
PROCESS = 700_000_000  # bytes of a process with PyTorch and Transformers, and of its activations


class Finding(Record):
    """A problem in one line, ``place: problem; remedy``. A run can start despite a warning.

    >>> Finding.of("tasks.x: no column y; name another").problem
    'no column y'
    """

    message: str
    place: str
    problem: str
    remedy: str
    is_error: bool = True

    @classmethod
    def of(cls, message: object, is_error: bool = True) -> "Finding":
        """Split the message of a `UserError` into place, problem and remedy."""
        place, _, rest = str(message).partition(": ")
        problem, _, remedy = rest.rpartition("; ")
        entries = {
            "place": place,
            "problem": problem or remedy,
            "remedy": remedy if problem else "",
        }
        return cls(message=str(message), is_error=is_error, **entries)


class Need(Record):
    """Estimates of what a run needs, and what is free on this machine; all in bytes.

    Attributes:
        moved: bytes that are downloaded, and that merges read and write.
    """

    download: int = 0
    moved: int = 0
    disk: int = 0
    memory: int = 0
    free_disk: int = 0
    free_memory: int = 0

    @property
    def in_words(self) -> dict[str, str]:
        """The amounts as texts with units, and the estimated time, by name."""
        return {
            "download": size(self.download),
            "disk": f"{size(self.disk)} of {size(self.free_disk)} free",
            "memory": f"{size(self.memory)} of {size(self.free_memory)} free",
            "time": f"{self.moved / SPEED / 60:.0f} minutes for files alone, at"
            f" {size(SPEED)}/s; statistics and scores come on top",
        }


class Checked(Record):
    """The report of `fmn check`.

    Attributes:
        findings: the problems and warnings.
        sources: the pinned source of each expert, by task, and of the base, as "base".
        data: by task, the origin of its rows and the use of their columns.
        need: estimates of what the run needs.
    """

    findings: list[Finding] = Field(default_factory=list)
    sources: dict[str, str] = Field(default_factory=dict)
    data: dict[str, str] = Field(default_factory=dict)
    need: Need = Need()

    @property
    def is_ok(self) -> bool:
        """Whether the run can start: there are warnings at most."""
        return not any(finding.is_error for finding in self.findings)


@contextmanager
def _noted(findings: list[Finding], place: str = "") -> Iterator[None]:
    """Add a UserError of the block to the findings and continue after the block."""
    try:
        yield
    except UserError as error:
        message = str(error)
        prefix = f"{place}: " if place and not message.startswith(f"{place}: ") else ""
        findings.append(Finding.of(prefix + message))


def check(file: Path) -> Checked:
    """Check a settings file as far as possible before its run downloads or computes anything."""
    findings: list[Finding] = []
    content: object = None
    with _noted(findings):
        content = read_yaml(file)
    try:
        settings = Params.model_validate(content)
    except ValidationError as error:
        lines = params.problems(error, str(file), partial(line_of, file))
        return Checked(findings=findings or [Finding.of(line) for line in lines])
    if settings.notify.webhook and not settings.notify.address:
        name = settings.notify.webhook.get_secret_value()
        problem = f"notify.webhook: {name} is not set; export it where the run starts"
        findings.append(Finding.of(problem, is_error=False))
    with tempfile.TemporaryDirectory() as scratch:
        data, tasks, download = _check_data(settings, findings)
        outlines = _outlines(settings, Path(scratch), findings)
        _check_fit(settings, Path(scratch), tasks, outlines, findings)
        need = _need(settings, Path(scratch), outlines, download)
    if need.disk > need.free_disk:
        room = f"about {size(need.disk)} are needed on the disk of {settings.work}"
        findings.append(Finding.of(
            f"work: {room}, {size(need.free_disk)} are free; make room, or name another folder"
        ))  # fmt: skip
    if need.memory > need.free_memory:
        room = f"about {size(need.memory)} of memory are needed, {size(need.free_memory)} are free"
        remedy = "end other programs, or use a machine with more"
        findings.append(Finding.of(f"memory: {room}; {remedy}", is_error=False))
    pinned = {name: each.pinned for name, each in outlines.items()}
    return Checked(findings=findings, sources=pinned, data=data, need=need)


def size(count: float) -> str:
    """A number of bytes with a unit.

    >>> size(2_345_678)
    '2.3 MB'
    """
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.{0 if unit == 'B' else 1}f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


# ---------------------------------------------------------------------------------------------
# Data


def _check_data(
    settings: Params, findings: list[Finding]
) -> tuple[dict[str, str], dict[str, Task | int | None], int]:
    """Check the rows of all tasks.

    Returns:
        by task, a description of its rows; by task, its definition, or the number of its labels if
        no more is known; and the bytes of rows to download.
    """
    data: dict[str, str] = {}
    tasks: dict[str, Task | int | None] = {}
    download = 0
    for name in settings.experts.tasks:
        tasks[name] = TASKS.get(name) if name not in settings.tasks else None
        definition = settings.tasks.get(name)
        with _noted(findings, f"tasks.{name}"):
            rows = _elsewhere(name, settings, definition)
            if rows is None:
                source = find_source(name, settings.data, definition)
                prepared = source.read()
                tasks[name] = prepared.task
                data[name] = f"{source.name}: {'; '.join(prepared.notes)}".rstrip(": ")
                findings += [
                    Finding.of(f"tasks.{name}: {line}", is_error=False)
                    for line in prepared.warnings
                ]
                continue
            tables, count = first_rows(rows)
            download += count
            columns = definition or TaskSettings()
            if columns.columns == ColumnSettings() and not columns.dataset:
                columns = task_settings(name) or columns
            for table in tables.values():
                labels_of = _check_columns(name, columns, table)
                tasks[name] = tasks[name] or labels_of
            table = next(iter(tables.values()))
            data[name] = f"{rows.path}: columns {in_a_line(list(table.columns))}"
    return data, tasks, download


def _elsewhere(
    name: str, settings: Params, definition: TaskSettings | None
) -> DatasetSettings | None:
    """The data set if only its first rows are read: on the Hub, at a URL, or in large files."""
    if definition and definition.dataset:
        rows = definition.dataset
        is_here = hub_name(rows) is None and "://" not in rows.path
        is_small = is_here and sum(f.stat().st_size for f in local_files(definition)) <= WHOLE
        return None if is_small else rows
    if settings.data.source != "hub" or name not in TASKS:
        return None
    splits = {split: f"{name}/{split}-*.parquet" for split in ("train", *TASKS[name].validation)}
    return DatasetSettings(path=HUB, revision=settings.data.revision, data_files=splits)


def _check_columns(name: str, definition: TaskSettings, table: Table) -> int | None:
    """Check the columns and texts of the first rows; returns the number of labels, if known."""
    kind, settings = KINDS[definition.kind], definition.columns
    if has_messages(definition, table):
        table = as_prompts(definition, table)
    columns = settings.of_kind(definition.kind)
    if kind.problem_types and settings.label:
        columns["label"] = settings.label
    may_lack = {*kind.optional, *([] if definition.metrics else ["label"])}
    for use in (may_lack & columns.keys()) - settings.model_fields_set:
        if columns[use] not in table.columns:
            columns.pop(use)
    for use, column in columns.items():
        values = table.values(column, name)
        is_text = use not in (*INPUTS, "label")
        if is_text and (wrong := [each for each in values if not isinstance(each, str)]):
            raise UserError(
                f"{table.place}: column {column} is {wrong[0]!r:.40} in one of the first rows, not"
                " a text; name the column of the texts"
            )
    if definition.problem_type == "regression" or not kind.has_head:
        return 1 if kind.has_head else None
    names = definition.label_names or table.classes.get(columns.get("label", ""), ())
    return len(names) or None


# ---------------------------------------------------------------------------------------------
# Sources


def _outlines(settings: Params, scratch: Path, findings: list[Finding]) -> dict[str, Outline]:
    """The outlines of the base and of fetched experts, by the names of their folders."""
    sources = {"base": settings.base}
    sources |= {f"expert {name}": each.source for name, each in settings.sources.items()}
    outlines: dict[str, Outline] = {}
    for name, source in sources.items():
        (scratch / name).mkdir()
        place = "base" if name == "base" else f"sources.{name.removeprefix('expert ')}"
        with _noted(findings, place):
            facts = outlines[name] = outline(source, scratch / name, statistics=name != "base")
            lines = _warnings(facts, outlines.get("base"))
            findings += [Finding.of(f"{place}: {line}", is_error=False) for line in lines]
    return outlines


def _warnings(facts: Outline, base: Outline | None) -> list[str]:
    """Warnings about what can only be checked after a checkpoint is downloaded."""
    if facts.is_pickled:
        problem = "the weights are pickled, so that their shapes are not known yet"
        return [f"{problem}; take safetensors if there are"]
    if facts.adapter_base is None:
        return []
    problem = "is an adapter, which is checked when it becomes a full model"
    if facts.adapter_base and base:
        with suppress(UserError):  # the base that it names is somewhere else
            if pin(facts.adapter_base) == base.pinned:
                return []
        problem += f"; it names the base {facts.adapter_base}, which must be the run's by content"
    return [problem]


def _check_fit(
    settings: Params,
    scratch: Path,
    tasks: Mapping[str, Task | int | None],
    outlines: Mapping[str, Outline],
    findings: list[Finding],
) -> None:
    """Check that experts fit the base and one another, and that their heads fit their tasks."""
    base = scratch / "base" if "base" in outlines else None
    folders = {
        name: scratch / f"expert {name}"
        for name in settings.sources
        if f"expert {name}" in outlines and outlines[f"expert {name}"].adapter_base is None
    }
    kinds = {name: (settings.tasks.get(name) or TaskSettings()).kind for name in folders}
    for name, folder in folders.items():
        first: Path = base or next(iter(folders.values()))
        with _explained(findings, settings, scratch, f"sources.{name}"):
            provenance.check_experts({name: folder}, {}, None if first == folder else first)
        with _explained(findings, settings, scratch, f"sources.{name}"):
            _check_head(kinds[name], folder, tasks.get(name), settings.sources[name].labels)
    for name in settings.sources:
        facts = outlines.get(f"expert {name}")
        if base and facts and facts.adapter_base is not None:
            with _explained(findings, settings, scratch, f"sources.{name}"):
                adapters.check_shapes(scratch / f"expert {name}", base)
    with _explained(findings, settings, scratch, "experts"):
        check_agreement({n: f for n, f in folders.items() if kinds[n] == "sentence-similarity"})
    with _explained(findings, settings, scratch, "experts"):
        if len(folders) > 1 and not findings:
            plan_merge(folders, MergeSettings(method="average"))
    needs_nodes = any(needs_of(each.method).fisher for each in settings.merges.values())
    if needs_nodes and (some := next(iter(folders.values()), base)):
        with _explained(findings, settings, scratch, "fisher"):
            config, shapes = checkpoints.load_config(some), _encoder_shapes(some)
            architectures.claims(config, shapes, "structured")


@contextmanager
def _explained(
    findings: list[Finding], settings: Params, scratch: Path, place: str
) -> Iterator[None]:
    """Like `_noted`, but messages name the sources instead of the folders of their outlines."""
    try:
        yield
    except UserError as error:
        message = str(error)
        for name, each in settings.sources.items():
            message = message.replace(str(scratch / f"expert {name}"), each.source)
        message = message.replace(str(scratch / "base"), settings.base)
        findings.append(Finding.of(f"{place}: {message}"))


def _check_head(kind: KindName, folder: Path, task: Task | int | None, names: list[str]) -> None:
    """Check that an expert has a head for its task; raises a UserError if it does not fit."""
    config = checkpoints.load_config(folder)
    if isinstance(task, Task):
        checkpoints.check_kind(folder, config, task)
    checkpoints.check_tensors(folder, config, head=True, kind=kind)
    if isinstance(task, Task) and task.chat:
        check_template(loading.load_tokenizer(folder, config))
    if not KINDS[kind].has_head:
        return
    if isinstance(task, Task):
        labels.decide(folder, labels.complete(task, config, names), None, names=names)
    elif task and config.num_labels not in (task, 1 if task == 2 else task):
        raise UserError(
            f"the expert has {config.num_labels} outputs, and the task {task} labels; give an"
            " expert of this task"
        )


def _encoder_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: header.shape for name, header in stored_tensors(folder)[0].items()}


# ---------------------------------------------------------------------------------------------
# Disk and memory


def _need(settings: Params, scratch: Path, outlines: Mapping[str, Outline], rows: int) -> Need:
    """Estimate what a run needs; an unknown checkpoint counts as the largest known one."""
    largest = max((each.weights for each in outlines.values()), default=0)
    parameters = max((each.parameters for each in outlines.values()), default=0)
    download = rows + sum(each.download for each in outlines.values())
    copied = sum(each.weights - each.download for each in outlines.values())
    tuned = INFERENCE * parameters * len(settings.finetune)
    encoders = len(settings.merges) + len(settings.calibrations) + 1  # one more in the registry
    gram = _gram_bytes(scratch, outlines) if settings.grams else 0
    own_layers = sum(each.own_layers for each in settings.realign.values())
    own = own_layers * len(settings.experts.tasks) * largest // _layers(scratch, outlines)
    models = encoders * largest + own
    folder = Path(settings.work).absolute()
    while not folder.exists():
        folder = folder.parent
    per_parameter = TRAINING if settings.finetune else 2 * INFERENCE
    merged = 2 * len(settings.experts.tasks) * largest  # digested and read
    return Need(
        download=download,
        moved=download + copied + len(settings.merges) * (merged + largest),
        disk=download + copied + tuned + models + gram * len(settings.grams) + rows,
        memory=per_parameter * parameters + gram + PROCESS,
        free_disk=shutil.disk_usage(folder).free,
        free_memory=psutil.virtual_memory().available,
    )


def _layers(scratch: Path, outlines: Mapping[str, Outline]) -> int:
    for folder in _whole(scratch, outlines):
        return int(getattr(checkpoints.load_config(folder), "num_hidden_layers", 0) or 1)
    return 1


def _whole(scratch: Path, outlines: Mapping[str, Outline]) -> list[Path]:
    """The folders of outlines that are no adapters."""
    return [scratch / name for name, facts in outlines.items() if facts.adapter_base is None]


def _gram_bytes(scratch: Path, outlines: Mapping[str, Outline]) -> int:
    """Bytes of the Gram matrices of one expert, at most: one for each linear map, in float32."""
    for folder in _whole(scratch, outlines):
        shapes = _encoder_shapes(folder)
        maps = checkpoints.linear_maps(checkpoints.load_config(folder))
        inputs = [
            shapes[each][0 if flipped else 1] for each, flipped in maps.items() if each in shapes
        ]
        return 4 * sum(width * width for width in inputs)
    return 0
