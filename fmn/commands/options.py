"""Make a command of a stage function: options and help come from its signature and docstring."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fmn import params
from fmn.commands.shown import Show, print_json
from fmn.errors import UserError
from fmn.experiments.stages import SearchSettings, search
from fmn.merge.stages import cost, merge
from fmn.registry.stages import log_search
from fmn.store.artifacts import absent
from fmn.store.records import Record, Settings, pairs
from fmn.store.stage import Outcome
from fmn.terminal import complain, loading, progress_bar, say

Json = Annotated[
    bool, Parameter(name="--json", help="print the summary as JSON", show_default=False)
]
NAMES: Mapping[str, str | tuple[str, ...]] = {
    "experts": "--expert",
    "models": "--model",
    "tasks": "--task",
    "out": ("--out", "-o"),
    "params": ("--params", "-p"),
}
"""Options whose name differs from the argument's, or that have a short form."""

SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "experts": ("", ".json"),
    "models": ("",),
    "merged": (".json",),
    "fisher": (".parquet", ".safetensors"),
    "gram": (".gram.safetensors",),
}
"""Options of NAME=PATH also accept one folder: of folders (""), or of files with this suffix."""


LARGE = 10 * 10**9  # a merge that reads more bytes prints its cost first


def command_of(function: Callable[..., Any], show: Show) -> Callable[..., None]:
    """The command of a stage function: its own options, and ``--json``."""
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
        for argument in mappings:  # the experts first, as statistics are selected by their names
            items = options.pop(argument, None)
            if items is not None:
                options[argument] = _paths_by_name(items, argument, options.get("experts"))
        if isinstance(settings_file := options.get("params"), Path):
            params.load(settings_file)  # reports a mistake before `register` stores the file
        if function is merge:
            _show_cost(options)
        outcome = call(function, function.__name__.replace("_", " "), *args, **options)
        if function is search:
            log_search(outcome.summary, options.get("settings", SearchSettings()))
        print_outcome(outcome, as_json, show)

    wrapped: Any = command
    wrapped.__signature__ = signature.replace(
        parameters=[*parameters, json_option], return_annotation=None
    )
    wrapped.__annotations__ = {item.name: item.annotation for item in [*parameters, json_option]}
    return command


def _show_cost(options: Mapping[str, Any]) -> None:
    """Print the cost of a large merge before it starts."""
    experts, out = options["experts"], options["out"]
    if not out.exists() and all(folder.is_dir() for folder in experts.values()):
        files = [*(options.get("fisher") or {}).values(), *(options.get("gram") or {}).values()]
        needed = cost(experts, out, options.get("base"), filter(Path.is_file, files))
        if needed.read > LARGE:
            complain(f"the merge {needed.in_words}")


def call(function: Callable[..., Any], title: str, *args: Any, **options: Any) -> Any:
    """Call a stage function, with a progress bar if it reports progress."""
    loading()
    if "progress" not in inspect.signature(function).parameters:
        return function(*args, **options)
    with progress_bar(title) as progress:
        return function(*args, **options, progress=progress)


def outcome_json(outcome: Outcome[Any] | Record) -> dict[str, Any]:
    """The result of a stage as JSON; or the record that a function without output returns."""
    if not isinstance(outcome, Outcome):
        return outcome.model_dump(mode="json", by_alias=True)
    head = {
        "stage": outcome.stage,
        "out": str(outcome.out),
        "computed": outcome.computed,
        "seconds": round(outcome.seconds, 3),
    }
    summary: dict[str, Any] = outcome.summary.model_dump(mode="json", by_alias=True)
    return head | summary


def print_outcome(outcome: Outcome[Any] | Record, as_json: bool, show: Show) -> None:
    """Print the result of a stage."""
    if as_json:
        print_json(outcome_json(outcome))
        return
    summary: Any = outcome
    if isinstance(outcome, Outcome):
        summary = outcome.summary
        time = f"{outcome.seconds:.1f} s" if outcome.computed else "already there"
        say(f"{outcome.stage}: {outcome.out} ({time})")
    show(summary)
    say(*getattr(summary, "messages", ()))


def _as_option(parameter: inspect.Parameter) -> inspect.Parameter:
    """Convert a stage's argument to an option of the command line."""
    annotation, default = parameter.annotation, parameter.default
    option = Parameter(name=NAMES.get(parameter.name), show_default=None if default else False)
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
    """Paths by name, from ``NAME=PATH ...`` or from one folder with a folder or file for each name.

    From a folder of statistics, only those of the experts are used.
    """
    option = str(NAMES.get(argument, f"--{argument}"))
    if len(items) != 1 or "=" in items[0]:
        return {name: Path(path) for name, path in pairs(list(items), option).items()}
    folder = Path(items[0])
    for suffix in SUFFIXES[argument]:
        paths = {
            path.name.removesuffix(suffix): path
            for path in sorted(folder.glob(f"[!.]*{suffix}"))
            if path.is_dir() == (not suffix)
        }
        # TASK.gram.safetensors also ends in .safetensors
        paths = {name: path for name, path in paths.items() if not suffix or "." not in name}
        if experts and argument in ("fisher", "gram"):
            paths = {name: path for name, path in paths.items() if name in experts}
        if paths:
            return paths
    if not folder.exists():
        raise UserError(f"{option} {folder}: {absent(folder)}; give it, or NAME=PATH")
    raise UserError(f"{option} {folder}: neither NAME=PATH nor a folder of them")
