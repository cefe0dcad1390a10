"""The `fmn` command.

Most commands are stage functions (`fmn.commands`): their options and help come from the function's
signature and docstring. A command prints a short summary, or with ``--json`` everything that the
stage reports.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Group, Parameter
from pydantic import ValidationError

from fmn import __version__, params
from fmn.commands import stages as commands
from fmn.commands.options import Json, call, outcome_json, print_outcome
from fmn.commands.predict import predict
from fmn.commands.shown import print_json
from fmn.commands.tasks import show_view, tokens_of
from fmn.environment import keep_freed_memory, settle_environment
from fmn.errors import UserError, hint, system_error
from fmn.registry.stages import compare_digests, read_lineage, settings_again
from fmn.rows.view import describe, known_tasks
from fmn.setup import stages as setup
from fmn.store.records import in_words
from fmn.terminal import (
    complain,
    errors,
    loading,
    only_ours,
    plain_characters,
    say,
    show_table,
)

Profile = Annotated[Path, Parameter(name=["--params", "-p"], help="the settings file")]
Verbose = Annotated[
    bool,
    Parameter(
        name=["--verbose", "-v"],
        help="show what the libraries print, which otherwise goes to run.log in `work`",
        show_default=False,
    ),
]
app = App(
    name="fmn",
    version=__version__,
    default_parameter=Parameter(consume_multiple=True, negative=""),
    suppress_keyboard_interrupt=False,  # `main` has a line for it
    help="Merge Transformers that were fine-tuned from one base on different tasks into one"
    " multi-task model.",
)


INTERRUPTED = (
    "interrupted; finished stages are kept and nothing is half-written: run the same command again"
    " to go on from here"
)


for _flag in ("--help", "--version"):
    app[_flag].group = commands.PROGRAMS


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one line and exit status 2."""
    settle_environment()
    keep_freed_memory()
    plain_characters()
    warnings.filterwarnings("ignore")
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except UserError as error:
        _fail(str(error), 2)
    except cyclopts.CycloptsError as error:
        command = " ".join(["fmn", *(error.command_chain or ())])
        _fail(f"{_one_line(error)}; see `{command} --help`", 2)
    except KeyboardInterrupt:
        _fail(INTERRUPTED, 130)
    except BrokenPipeError as error:  # whoever reads the output has ended, such as `head`
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from error  # as a shell says it of SIGPIPE
    except Exception as error:
        if explanation := system_error(error):
            _fail(str(explanation), 1)
        if isinstance(error, OSError):
            _fail(f"{error.filename or 'fmn'}: {error.strerror or error}; check the path", 1)
        raise


def _one_line(error: cyclopts.CycloptsError) -> str:
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ValidationError):
        first = cause.errors()[0]
        message, option = in_words(first), str(first["loc"][0]) if first["loc"] else ""
        # Without an option it is of several together.
        message = message.removesuffix("?").removeprefix(f"{option}: ")
        return f"--{option.replace('_', '-')}: {message}" if option else message
    if isinstance(error, cyclopts.MissingArgumentError) and error.argument:
        if error.keyword:
            return f"{error.keyword}: its value is missing"
        name = error.argument.name
        return (
            f"{name.lstrip('-').upper() if error.argument.index is not None else name}: is missing"
        )
    if isinstance(error, cyclopts.UnknownCommandError) and error.unused_tokens:
        name = error.unused_tokens[0]
        return f"{name}: no such command{hint(name, app).rstrip('?')}"
    if isinstance(error, cyclopts.UnknownOptionError):
        name = error.token.keyword or error.token.value
        known = [each for argument in error.argument_collection for each in argument.names]
        return f"{name}: no such option{hint(name, known).rstrip('?')}"
    if isinstance(error, cyclopts.UnusedCliTokensError):
        return f"{' '.join(error.unused_tokens or ())}: no argument of this command"
    text = " ".join(str(error).split())
    return text if text.endswith("...") else text.rstrip(".?")


def _fail(message: str, status: int) -> None:
    complain(message)
    raise SystemExit(status)


# ---------------------------------------------------------------------------------------------
# Commands that are stages


def _command(group: Group, name: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command in a group, with its example."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        called = name or function.__name__
        app.command(
            function, name=called, group=group, sort_key=list(commands.EXAMPLES).index(called),
            help_epilogue=f"Example: `{commands.EXAMPLES[called]}`",
        )  # fmt: skip
        return function

    return add


for _name, (_group, _function) in commands.COMMANDS.items():
    _command(_group, _name)(_function)
_command(commands.RESULTS)(predict)


# ---------------------------------------------------------------------------------------------
# Commands that are flows, or answer at once


@contextmanager
def _project(settings_file: Path) -> Iterator[Path]:
    """Work in the folder that the paths in a settings file are relative to; yields the file."""
    folder = params.project_of(settings_file)
    if folder == Path.cwd():
        yield settings_file
        return
    if errors().isatty():
        complain(f"paths in {settings_file} are relative to {folder}")
    inside = settings_file.absolute()
    with chdir(folder):
        yield Path(os.path.relpath(inside))


@contextmanager
def _flow(work: str | Path, verbose: bool, as_json: bool) -> Iterator[None]:
    """Keep the terminal to our own lines during a flow, and standard output to JSON."""
    loading()
    quiet = nullcontext() if verbose else only_ours(Path(work) / "run.log")
    with quiet, redirect_stdout(errors()) if as_json else nullcontext():
        yield


@_command(commands.START)
def init(
    experts: list[str],
    /,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"], help="the file to write")] = Path(
        "params.yaml"
    ),
    base: Annotated[str | None, Parameter(help="their base; default: as their files say")] = None,
    force: Annotated[
        bool, Parameter(help="replace a file that is there", show_default=False)
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a settings file for experts; what their files do not tell is marked "fill in".

    Args:
        experts: hf://org/name@revision, folders, models:/name@alias, package:module/path
    """
    info = setup.init(experts, out=out, base=base, force=force)
    if as_json:
        print_json({"out": str(out), **info.model_dump()})
        return
    say(f"init: {out}")
    show_table(["task", "kind"], [list(row) for row in info.tasks.items()])
    say(f"  base: {info.base}", *(f"  fill in {key}: {why}" for key, why in info.unknown.items()))
    say(*([f"  {info.problem}"] if info.problem else []))
    say(f"  {'then' if info.unknown else 'next'}: fmn check --params {out}")


@_command(commands.START)
def check(*, params_file: Profile = Path("params.yaml"), as_json: Json = False) -> None:
    """Check a run before anything large is downloaded or computed; exit status 0 or 1.

    It reads small files, headers of weights and first rows. It checks that sources and data exist
    and fit together, and that disk and memory are large enough.
    """
    loading()
    with _project(params_file) as file:
        checked = setup.check(file)
    if as_json:
        print_json({"ok": checked.is_ok, **checked.model_dump()})
    else:
        say(*(f"{'' if each.is_error else 'warning: '}{each.message}" for each in checked.findings))
        show_table(["source", "pinned"], [list(row) for row in checked.sources.items()], words=2)
        say(*(f"data {name}: {line}" for name, line in checked.data.items()))
        if checked.need.free_disk:  # settings that cannot be read tell of no need
            say(*(f"{what}: about {amount}" for what, amount in checked.need.in_words.items()))
        say("the run can start" if checked.is_ok else "the run would fail")
    if not checked.is_ok:
        raise SystemExit(1)


@_command(commands.START)
def run(
    *, params_file: Profile = Path("params.yaml"), verbose: Verbose = False, as_json: Json = False
) -> None:
    """Run the whole pipeline as a Prefect flow; print the results and where to look further.

    In a folder without settings, it writes those of the quick start and its data, and runs them.
    """
    if written := setup.write_quickstart(params_file):
        names = ", ".join(map(str, written))
        say(f"the quick start: this folder has no settings, so it gets {names}")
    with _project(params_file) as file, _flow(params.load(file).work, verbose, as_json):
        from flows.pipeline import run_pipeline

        results = run_pipeline(file)
    if as_json:
        print_json(results)


@_command(commands.AGAIN)
def schedule() -> None:
    """Run params.yaml every night, or on demand, with a Prefect server on loopback, until Ctrl-C.

    It deploys prefect.yaml, and writes that file in a folder that has none.
    """
    loading()
    from flows.schedule import main

    main()


@_command(commands.AGAIN)
def dvc(*, as_json: Json = False) -> None:
    """Write dvc.yaml, the pipeline of params.yaml for `dvc repro`; in a new folder, `dvc init` too.

    What `fmn run` computed before is not repeated.
    """
    loading()
    from flows.dvc import describe

    written = describe()
    if as_json:
        print_json({"written": list(map(str, written))})
        return
    say(f"dvc: {', '.join(map(str, written))}", "  next: dvc repro")


@_command(commands.MERGE)
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
    with _project(params_file) as file, _flow(params.load(file).work, verbose, as_json):
        from flows.compare import run_compare

        results = run_compare(file, name)
    if as_json:
        print_json(results)


@_command(commands.PROGRAMS)
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
    from flows.graph import find_nodes, make_folders, register_nothing, trial_name

    with _project(params_file) as file:
        settings = params.load(file)
        nodes = find_nodes(settings, file, name, of)
        make_folders(settings)
        if not nodes and not as_json:
            say(f"{name}: {file} asks for none")
        outcomes = []
        for node in nodes:
            if node.stage == "register" and (trial := trial_name()):
                outcomes.append(register_nothing(trial, node.arguments["out"]))
            else:
                outcomes.append(call(node.function, node.title, **node.arguments))
            if not as_json:
                print_outcome(outcomes[-1], as_json, lambda summary: None)
    if as_json:
        reports = [outcome_json(outcome) for outcome in outcomes]
        print_json(reports[0] if of and reports else reports)


@_command(commands.EXPERTS)
def tasks(
    name: str = "",
    /,
    *,
    params_file: Annotated[
        Path | None,
        Parameter(
            name=["--params", "-p"],
            help="the settings file; default: params.yaml, if there is one",
        ),
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
    if data and not data.is_dir():
        raise UserError(f"--data {data}: no such folder; give the folder that `fmn data` wrote")
    default = Path("params.yaml")
    file = params_file or (default if default.is_file() else None)
    settings = params.load(file) if file else None
    own = settings.tasks if settings else {}
    if not name:
        known = [task.model_dump() for task in known_tasks(own)]
        if as_json:
            print_json(known)
        else:
            show_table(list(known[0]), [list(task.values()) for task in known], words=len(known[0]))
        return
    loading()
    here = data.absolute() if data else None
    with _project(file) if file else nullcontext():
        rows = Path(settings.work) / "data" if settings else None
        rows = Path(os.path.relpath(here)) if here else rows
        view = describe(name, own.get(name), settings.data if settings else None, rows)
        tokens = tokens_of(view.task, view.example, settings)
    if as_json:
        print_json({**view.model_dump(mode="json"), "tokens": tokens})
        return
    show_view(view, tokens)


@_command(commands.PROGRAMS)
def schema() -> None:
    """Print the JSON schema of the settings, for editors.

    A first line `# yaml-language-server: $schema=FILE` in params.yaml names the file of it.
    """
    print_json(params.Params.model_json_schema())


@_command(commands.REGISTRY)
def mlflow(
    *,
    port: Annotated[int, Parameter(env_var="MLFLOW_PORT", help="the server's port")] = 5000,
) -> None:
    """Serve the registry's pages with MLflow on loopback, until Ctrl-C."""
    loading()
    from fmn.registry import tracking

    tracking.serve_pages(port)


@_command(commands.REGISTRY)
def reproduce(
    version: str,
    /,
    *,
    run: Annotated[
        bool, Parameter(help="rebuild it from those sources and settings", show_default=False)
    ] = False,
    out: Annotated[
        Path | None,
        Parameter(
            name=["--out", "-o"],
            help="folder to rebuild it in; default: data/reproduced/NAME-VERSION",
        ),
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
        print_json(summary)
    elif run:
        say(f"{uri} was rebuilt in {folder}: all digests are the same")
