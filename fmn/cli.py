"""The `fmn` command.

Most commands are stage functions: their options and help come from the function's signature and
docstring. A command prints a short summary, or with ``--json`` everything that the stage reports.
"""

import functools
import importlib.util
import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter
from pydantic import ValidationError

from fmn import __version__, params
from fmn.environment import settle_environment
from fmn.errors import UserError, system_error
from fmn.evaluate.stages import evaluate
from fmn.experiments.stages import SearchSettings, search
from fmn.fisher.stages import STATISTICS, fisher
from fmn.merge.stages import calibrate, cost, merge, realign
from fmn.models.stages import Completion, Prediction, Similarity, Tags, finetune, predict
from fmn.registry.push import push
from fmn.registry.stages import (
    compare_digests,
    log_search,
    read_lineage,
    register,
    roll_back,
    settings_again,
)
from fmn.report.stages import report
from fmn.rows.stages import DataSettings, TaskOptions, data, definition_of
from fmn.rows.view import describe, known_tasks
from fmn.setup import stages as setup
from fmn.sources.stages import fetch
from fmn.store.records import Record, Settings, pairs
from fmn.store.stage import Outcome
from fmn.tasks.dataset import DataInfo
from fmn.terminal import complain, errors, only_ours, progress_bar, say, show_table

Profile = Annotated[Path, Parameter(name="--params", help="the settings file")]
Verbose = Annotated[
    bool, Parameter(help="show what the libraries print, which otherwise goes to run.log in `work`")
]
Json = Annotated[bool, Parameter(name="--json", help="print the summary as JSON")]
Show = Callable[[Any], None]

LARGE = 10 * 10**9  # bytes that a merge reads; beyond them it is said how long that takes
OPTIONS = {"experts": "--expert", "models": "--model", "tasks": "--task"}
"""Options that are not called like the argument."""

SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "experts": ("", ".json"),
    "models": ("",),
    "merged": (".json",),
    "fisher": (".parquet", ".safetensors"),
    "gram": (".gram.safetensors",),
}
"""What NAME=PATH options take from one folder instead: folders, or files that end like this."""

app = App(
    name="fmn",
    version=__version__,
    default_parameter=Parameter(consume_multiple=True, negative=""),
    suppress_keyboard_interrupt=False,  # `main` has a line for it
    help="Merge Transformers that were fine-tuned from one base on different tasks into one"
    " multi-task model.",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one line and exit status 2."""
    settle_environment()
    warnings.filterwarnings("ignore")
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except UserError as error:
        _fail(str(error), 2)
    except cyclopts.CycloptsError as error:
        _fail(f"{_one_line(error)} See `fmn --help`.", 2)
    except KeyboardInterrupt:
        _fail("interrupted; finished stages are kept", 130)
    except Exception as error:
        if explanation := system_error(error):
            _fail(str(explanation), 1)
        if isinstance(error, OSError):
            _fail(f"{error.filename or 'fmn'}: {error.strerror or error}", 1)
        raise


def _one_line(error: cyclopts.CycloptsError) -> str:
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ValidationError):
        first = cause.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # of several options together
            return f"{message}."
        return f"--{str(first['loc'][0]).replace('_', '-')}: {message} (got {first['input']!r})."
    return " ".join(str(error).split())


def _fail(message: str, status: int) -> None:
    complain(message)
    raise SystemExit(status)


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=1, default=str))  # noqa: T201


def _print_outcome(outcome: Outcome[Any] | Record, as_json: bool, show: Show) -> None:
    """Print what a stage did and reports, or the record that a function without output returns."""
    summary: Any = outcome.summary if isinstance(outcome, Outcome) else outcome
    head: dict[str, Any] = {}
    if isinstance(outcome, Outcome):
        head = {"stage": outcome.stage, "out": str(outcome.out), "computed": outcome.computed}
    if as_json:
        _print_json(head | summary.model_dump(mode="json", by_alias=True))
        return
    if isinstance(outcome, Outcome):
        time = f"{outcome.seconds:.1f} s" if outcome.computed else "already there"
        say(f"{outcome.stage}: {outcome.out} ({time})")
    show(summary)
    say(*getattr(summary, "messages", ()))


# ---------------------------------------------------------------------------------------------
# Commands that are stages


def _add_stage(function: Callable[..., Any], show: Show, name: str = "") -> None:
    """Register a stage function as a command, with ``--json`` beside its own options."""
    signature = inspect.signature(function, eval_str=True)
    parameters = [
        _as_option(parameter)
        for parameter in signature.parameters.values()
        if parameter.name != "progress"
    ]
    mappings = [each.name for each in signature.parameters.values() if _is_mapping(each)]
    json_option = inspect.Parameter(
        "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json
    )

    @functools.wraps(function)
    def command(*args: Any, as_json: bool = False, **options: Any) -> None:
        for argument in mappings:  # the experts first, which say of what a folder's files are
            items = options.pop(argument, None)
            if items is not None:
                options[argument] = _paths_by_name(items, argument, options.get("experts"))
        if isinstance(settings_file := options.get("params"), Path):
            params.load(settings_file)  # `register` keeps them; a mistake in them shows here
        if function is merge:
            _tell_cost(options)
        if "progress" not in signature.parameters:
            outcome = function(*args, **options)
        else:
            with progress_bar(function.__name__.replace("_", " ")) as progress:
                outcome = function(*args, **options, progress=progress)
        if function is search:
            log_search(outcome.summary, options.get("settings", SearchSettings()))
        _print_outcome(outcome, as_json, show)

    wrapped: Any = command
    wrapped.__signature__ = signature.replace(
        parameters=[*parameters, json_option], return_annotation=None
    )
    wrapped.__annotations__ = {item.name: item.annotation for item in [*parameters, json_option]}
    app.command(wrapped, name=name or function.__name__.replace("_", "-"))


def _tell_cost(options: Mapping[str, Any]) -> None:
    """Say what a large merge takes, before it starts."""
    experts, out = options["experts"], options["out"]
    if not out.exists() and all(folder.is_dir() for folder in experts.values()):
        files = [*(options.get("fisher") or {}).values(), *(options.get("gram") or {}).values()]
        needed = cost(experts, out, options.get("base"), filter(Path.is_file, files))
        if needed.read > LARGE:
            complain(f"the merge {needed.in_words}")


def _as_option(parameter: inspect.Parameter) -> inspect.Parameter:
    """A stage's argument as the command line takes it."""
    annotation, default = parameter.annotation, parameter.default
    option = Parameter(name=OPTIONS.get(parameter.name))
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        option = Parameter(name="*")
    elif _is_mapping(parameter):
        is_needed = default is inspect.Parameter.empty
        annotation = list[str] if is_needed else list[str] | None
        default = default if is_needed else None
    elif parameter.name == "tasks":
        annotation, option = list[str], Parameter(name=option.name, show_default=False)
    return parameter.replace(annotation=Annotated[annotation, option], default=default)


def _is_mapping(parameter: inspect.Parameter) -> bool:
    return "Mapping" in str(parameter.annotation)


def _paths_by_name(
    items: Sequence[str], argument: str, experts: Mapping[str, Path] | None
) -> dict[str, Path]:
    """``NAME=PATH ...``, or one folder that holds a folder or file for each name.

    Of a folder of statistics, only those of the experts are taken.
    """
    option = OPTIONS.get(argument, f"--{argument}")
    if len(items) != 1 or "=" in items[0]:
        return {name: Path(path) for name, path in pairs(list(items), option).items()}
    folder = Path(items[0])
    for suffix in SUFFIXES[argument]:
        paths = {
            path.name.removesuffix(suffix): path
            for path in sorted(folder.glob(f"[!.]*{suffix}"))
            if path.is_dir() == (not suffix)
        }
        # TASK.gram.safetensors is no TASK.safetensors
        paths = {name: path for name, path in paths.items() if not suffix or "." not in name}
        if experts and argument in ("fisher", "gram"):
            paths = {name: path for name, path in paths.items() if name in experts}
        if paths:
            return paths
    raise UserError(f"{option} {folder}: neither NAME=PATH nor a folder of them")


def _facts(*names: str) -> Show:
    """Show some entries of a summary, a line each."""

    def show(summary: Any) -> None:
        values = {name: getattr(summary, name) for name in names}
        say(*(f"  {name}: {value}" for name, value in values.items() if value is not None))

    return show


def write_data(
    task: str,
    *,
    out: Path,
    settings: DataSettings = DataSettings(),  # noqa: B008
    options: TaskOptions = TaskOptions(),  # noqa: B008
) -> Outcome[DataInfo]:
    """Write a task's rows as Parquet files, one for each split, and its definition as task.json.

    GLUE's tasks and those with a task.json beside their rows need no more than --source. Any other
    is described by --definition, or by --dataset and the columns:

    fmn data stars --dataset reviews.csv --text review --label stars --out data/stars

    Args:
        task: the task's name.
        out: the folder to write.
        settings: where the rows come from.
        options: a task of one's own.
    """
    definition = definition_of(task, options, settings)
    return data(task, out=out, settings=settings, definition=definition)


def _show_data(info: DataInfo) -> None:
    rows = ", ".join(f"{split} {count}" for split, count in info.rows.items())
    notes = info.notes or [f"rows: {rows}"]
    say(*(f"  {note}" for note in notes), *(f"  warning: {line}" for line in info.warnings))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _show_merge(recipe: Any) -> None:
    if recipe.auto:
        tried = [
            [each.method, f"{each.scale:g}", _percent(each.error)]
            + [_percent(each.tasks[task]) for task in recipe.tasks]
            for each in recipe.auto.candidates
        ]
        show_table(["method", "scale", "off the experts' outputs, %", *recipe.tasks], tried)
        say(f"  {recipe.method} at scale {recipe.scale:g}: {recipe.auto.in_words}")
    body = [
        [task, f"{recipe.coefficients[task]:g}", expert.revision]
        for task, expert in recipe.experts.items()
    ]
    show_table(["task", "coefficient", "expert"], body)


def _show_realign(recipe: Any) -> None:
    body = [
        [task, str(fit.texts), f"{fit.ridge:.2g}", _percent(fit.before), _percent(fit.after)]
        for task, fit in recipe.realign.tasks.items()
    ]
    show_table(["task", "texts", "ridge", "off the expert's outputs, %", "re-aligned"], body)


def _show_calibrate(recipe: Any) -> None:
    body = [[task, _percent(error)] for task, error in recipe.calibrate.errors.items()]
    show_table(["task", "off the expert's states, %"], body)


def _show_metrics(metrics: Any) -> None:
    from fmn.report.results import evaluate_notes, evaluate_table

    show_table(*evaluate_table(metrics))
    say(*evaluate_notes(metrics))


def _show_search(result: Any) -> None:
    body = [
        [task, f"{result.coefficients[task]:.3f}", _percent(entry.uniform), _percent(entry.best)]
        for task, entry in result.tasks.items()
    ]
    means = ["mean", "", _percent(result.uniform), _percent(result.score)]
    header = ["task", "coefficient", "uniform, % of expert", "best, % of expert"]
    show_table(header, [*body, means])
    say(f"  scale: {result.scale}")


def _show_champion(change: Any) -> None:
    before = change.before or "none"
    say(f"champion of {change.name}: version {change.champion}, was {before}")


def _show_report(summary: Any) -> None:
    show_table(summary.header, summary.body)
    say(*summary.verdict, wrap=True)
    say(*summary.notes)


def _show_answer(answer: Any) -> None:
    """What `predict` gives, by kind of task."""
    if isinstance(answer, Prediction):
        say(f"{answer.label} ({answer.score:.3f})")
    elif isinstance(answer, Tags):
        say(*(f"{each.text}: {each.entity} ({each.score:.3f})" for each in answer.spans))
    elif isinstance(answer, Completion):
        say(answer.text)
    elif isinstance(answer, Similarity):
        say(f"{answer.score:.3f}")
    else:
        say(" ".join(f"{value:g}" for value in answer.embedding))


COMMANDS: tuple[tuple[Callable[..., Any], Show], ...] = (
    (fetch, _facts("revision", "model_type")),
    (finetune, _facts("examples", "steps", "loss")),
    (
        fisher,
        _facts(
            "estimator", "samples", "dtype", "precision", "device", "relative_stderr", "published"
        ),
    ),
    *((statistic, _facts("samples", "dtype", "published")) for statistic in STATISTICS),
    (merge, _show_merge),
    (calibrate, _show_calibrate),
    (realign, _show_realign),
    (evaluate, _show_metrics),
    (search, _show_search),
    (report, _show_report),
    (push, _facts("url", "commit", "files", "bytes")),
    (register, _facts("name", "version", "alias", "reason", "run", "store")),
)
_add_stage(write_data, _show_data, "data")
for _stage, _show in COMMANDS:
    _add_stage(_stage, _show)
_add_stage(predict, _show_answer)
_add_stage(roll_back, _show_champion, "rollback")


# ---------------------------------------------------------------------------------------------
# Commands that are flows, or answer at once


@contextmanager
def _flow(work: str | Path, verbose: bool, as_json: bool) -> Iterator[None]:
    """Keep the terminal to our own lines during a flow, and standard output to JSON."""
    quiet = nullcontext() if verbose else only_ours(Path(work) / "run.log")
    with quiet, redirect_stdout(errors()) if as_json else nullcontext():
        yield


@app.command
def init(
    experts: list[str],
    /,
    *,
    out: Annotated[Path, Parameter(help="the file to write")] = Path("params.yaml"),
    base: Annotated[str | None, Parameter(help="their base; default: as their files say")] = None,
    force: Annotated[bool, Parameter(help="replace a file that is there")] = False,
    as_json: Json = False,
) -> None:
    """Write a settings file for experts; what their files do not tell is marked "fill in".

    Args:
        experts: hf://org/name@revision, folders, models:/name@alias, package:module/path
    """
    info = setup.init(experts, out=out, base=base, force=force)
    if as_json:
        _print_json({"out": str(out), **info.model_dump()})
        return
    say(f"init: {out}")
    show_table(["task", "kind"], [list(row) for row in info.tasks.items()])
    say(f"  base: {info.base}", *(f"  fill in {key}: {why}" for key, why in info.unknown.items()))
    say(*([f"  {info.problem}"] if info.problem else []))
    say(f"  {'then' if info.unknown else 'next'}: fmn check --params {out}")


@app.command
def check(*, params_file: Profile = Path("params.yaml"), as_json: Json = False) -> None:
    """Say what can be known of a run before anything large is downloaded; exit status 0 or 1.

    It reads small files, headers of weights and first rows: whether sources and data exist and fit
    one another, and whether disk and memory suffice.
    """
    checked = setup.check(params_file)
    if as_json:
        _print_json({"ok": checked.is_ok, **checked.model_dump()})
    else:
        say(*(f"{'' if each.is_error else 'warning: '}{each.message}" for each in checked.findings))
        show_table(["source", "pinned"], [list(row) for row in checked.sources.items()], words=2)
        say(*(f"data {name}: {line}" for name, line in checked.data.items()))
        say(*(f"{what}: about {amount}" for what, amount in checked.need.in_words.items()))
        say("the run can start" if checked.is_ok else "the run would fail")
    if not checked.is_ok:
        raise SystemExit(1)


@app.command
def run(
    *, params_file: Profile = Path("params.yaml"), verbose: Verbose = False, as_json: Json = False
) -> None:
    """Run the whole pipeline as a Prefect flow; print the results and where to look further."""
    from flows.pipeline import run_pipeline

    with _flow(params.load(params_file).work, verbose, as_json):
        results = run_pipeline(params_file)
    if as_json:
        _print_json(results)


@app.command
def compare(
    name: str,
    /,
    *,
    params_file: Profile = Path("params.yaml"),
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Compare merge methods over sets of experts; every cell is computed once.

    Args:
        name: an entry of the settings' section compare
    """
    from flows.compare import run_compare

    with _flow(params.load(params_file).work, verbose, as_json):
        results = run_compare(params_file, name)
    if as_json:
        _print_json(results)


@app.command
def stage(
    name: str,
    of: str = "",
    /,
    *,
    params_file: Profile = Path("params.yaml"),
    as_json: Json = False,
) -> None:
    """Run a single stage of the pipeline that the settings describe; what `dvc repro` calls.

    Args:
        name: the stage, as dvc.yaml calls it
        of: for which task or model; default: all
    """
    from flows.graph import find_nodes, make_folders

    settings = params.load(params_file)
    make_folders(settings)
    nodes = find_nodes(settings, params_file, name, of)
    if not nodes:
        say(f"{name}: {params_file} asks for none")
    for node in nodes:
        if "progress" not in inspect.signature(node.function).parameters:
            outcome = node.function(**node.arguments)
        else:
            with progress_bar(node.title) as progress:
                outcome = node.function(**node.arguments, progress=progress)
        _print_outcome(outcome, as_json, lambda summary: None)


@app.command
def tasks(
    name: str = "",
    /,
    *,
    params_file: Annotated[
        Path | None,
        Parameter(name="--params", help="the settings file; default: params.yaml, if there is one"),
    ] = None,
    data: Annotated[
        Path | None, Parameter(help="folder of rows that `fmn data` wrote; default: that of `work`")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the tasks that are known; or show one, resolved, with its first example and its tokens.

    Args:
        name: a task
    """
    default = Path("params.yaml")
    file = params_file or (default if default.is_file() else None)
    settings = params.load(file) if file else None
    own = settings.tasks if settings else {}
    if not name:
        known = [task.model_dump() for task in known_tasks(own)]
        if as_json:
            _print_json(known)
        else:
            show_table(list(known[0]), [list(task.values()) for task in known], words=len(known[0]))
        return
    written = data or (Path(settings.work) / "data" if settings else None)
    view = describe(name, own.get(name), settings.data if settings else None, written)
    tokens = _tokens(view.task, view.example, settings)
    if as_json:
        _print_json({**view.model_dump(mode="json"), "tokens": tokens})
        return
    definition = view.task.model_dump(mode="json", exclude_none=True)
    say(*(f"{key}: {_listed(value)}" for key, value in definition.items()))
    say(f"source: {view.source}", *view.notes)
    say(*(f"first example, {key}: {_listed(value)}" for key, value in view.example.items()))
    if view.example:
        say(f"as tokens: {_listed(tokens)}")


def _listed(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} = {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _tokens(task: Any, example: Mapping[str, Any], settings: params.Params | None) -> Any:
    """The first example's tokens, by the tokenizer of `base`; or why there are none."""
    folder = _local_base(settings) if settings else None
    if folder is None:
        return "not shown, as no tokenizer is at hand; --params names settings whose base is here"
    if not example or task.columns.image:
        return []
    import pyarrow as pa

    from fmn.models.checkpoints import load_processor
    from fmn.tasks.encoding import encode

    tokenizer = load_processor(folder, task.task)
    table = pa.table({name: [example[name]] for name in task.text_columns})
    return tokenizer.convert_ids_to_tokens(encode(tokenizer, task, table).inputs["input_ids"][0])


def _local_base(settings: params.Params) -> Path | None:
    """The folder of the base model, if it is on this machine."""
    folders = [Path(settings.work) / "base", Path(settings.base)]
    module, _, path = settings.base.removeprefix("package:").partition("/")
    if settings.base.startswith("package:") and (spec := importlib.util.find_spec(module)):
        folders += [Path(place) / path for place in spec.submodule_search_locations or ()]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


@app.command
def schema() -> None:
    """Print the JSON schema of the settings, for editors.

    A first line `# yaml-language-server: $schema=FILE` in params.yaml names the file of it.
    """
    _print_json(params.Params.model_json_schema())


@app.command
def reproduce(
    version: str,
    /,
    *,
    run: Annotated[bool, Parameter(help="rebuild it from those sources and settings")] = False,
    out: Annotated[
        Path | None,
        Parameter(help="folder to rebuild it in; default: data/reproduced/NAME-VERSION"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a registered version was made from; with --run rebuild it and compare digests.

    Args:
        version: models:/NAME/VERSION or models:/NAME@ALIAS
    """
    registered = read_lineage(version)
    uri, header = registered.uri, ["", "", "sha256"]
    summary: dict[str, Any] = {
        "version": uri,
        "tags": registered.tags,
        "lineage": registered.table,
        "settings": registered.lineage.settings,
    }
    if not as_json:
        body = [[name, origin, digest[:12]] for name, origin, digest in registered.table]
        show_table(header, body, words=2)
    if run:
        from flows.pipeline import rebuild

        folder = out or Path("data/reproduced") / uri.removeprefix("models:/").replace("/", "-")
        profile = settings_again(registered, folder)
        with _flow(folder, False, as_json):
            outputs = rebuild(profile, registered.tags["made"], registered.lineage.threads)
        digests = compare_digests(registered, *outputs)
        if not as_json:
            words = {True: "the same", False: "differs"}
            body = [[name, words[before == now], now[:12]] for name, before, now in digests]
            show_table(header, body, words=2)
        if wrong := [name for name, before, now in digests if before != now]:
            raise UserError(f"{uri}: the rebuild in {folder} differs in {', '.join(wrong)}")
        summary |= {"again": digests, "same": True}
    if as_json:
        _print_json(summary)
    elif run:
        say(f"{uri} was rebuilt in {folder}: all digests are the same")
