"""JSON that a stage reads and that no stage wrote: every entry is as it should be, not read, or refused in one line."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fmn.errors import UserError
from fmn.evaluate import stages as evaluate_stages
from fmn.evaluate.files import predictions_path
from fmn.evaluate.stages import EvaluateSettings
from fmn.merge import recipe
from fmn.merge import stages as merge_stages
from fmn.merge.stages import MergeSettings, RealignSettings
from fmn.registry import lineage
from fmn.registry import stages as registry_stages
from fmn.report import results as report
from fmn.report import stages as report_stages
from fmn.store import artifacts

REMOVED = object()
WRONG: tuple[Any, ...] = (REMOVED, None, "x", {}, -1.5, ["x"], {"x": "y"}, True)
FEW = (REMOVED, None, ["x"])  # where each is followed by a merge


def places(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the entries of JSON are, at any depth."""
    entries = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for name, value in entries:
        yield (*place, name)
        yield from places(value, (*place, name))


def changed(
    content: Mapping[str, Any], ways: Sequence[Any] = WRONG
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The content with one entry removed or replaced, each in each way."""
    for place in places(content):
        for wrong in ways:
            other: Any = copy.deepcopy(content)
            inner = other
            for part in place[:-1]:
                inner = inner[part]
            if wrong is REMOVED:
                del inner[place[-1]]
            else:
                inner[place[-1]] = wrong
            yield (
                f"{'.'.join(map(str, place))}: {'removed' if wrong is REMOVED else wrong!r}",
                other,
            )


@pytest.fixture(scope="module")
def work(tiny_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged model, one with its heads re-aligned, and their metrics."""
    out = tmp_path_factory.mktemp("formats")
    experts = {task: tiny_work / "experts" / task for task in ("mrpc", "stsb")}
    fisher = {task: tiny_work / "fisher" / f"{task}.parquet" for task in experts}
    settings = MergeSettings(method="mask-fisher")
    merge_stages.merge(experts, fisher, tiny_work / "base", out / "merged", settings)
    merge_stages.realign(
        out / "merged", experts, tiny_work / "data", out / "realigned", RealignSettings(texts=16)
    )
    for name in ("merged", "realigned"):
        evaluate_stages.evaluate(
            out / name,
            data=tiny_work / "data",
            out=out / f"{name}.json",
            settings=EvaluateSettings(device="cpu"),
        )
    return out


def survived(what: str, attempt: Callable[..., object], *given: Any) -> bool:
    """Whether it went well; a refusal is one line."""
    told = None
    try:
        attempt(*given)
    except UserError as error:
        told = str(error)
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error
    assert told is None or "\n" not in told
    return told is None


def tabulated(metrics: Path) -> report.Table:
    return report.tabulate({}, {"merged": report_stages.read_evaluated(metrics)})


def described(model: Path, metrics: Path) -> None:
    """What the registration reads of a merged model and its metrics."""
    lineage.describe(model, *registry_stages._read(model, metrics))


@pytest.mark.parametrize("name", ["merged", "realigned"])
def test_a_recipe_that_fmn_did_not_write_is_refused_or_does(name: str, work: Path) -> None:
    file = work / name / recipe.RECIPE
    whole = file.read_bytes()
    metrics = artifacts.read_json(work / f"{name}.json")
    went = []
    try:
        for what, content in changed(
            {key: value for key, value in json.loads(whole).items() if key != "digest"}
        ):
            if what.startswith("files.encoder/"):
                continue
            recipe.write_recipe(work / name, content)
            artifacts.write_json(
                work / "given.json",
                "evaluate",
                "",
                metrics | {"model": artifacts.digest_file(file)},
            )
            went.append(survived(what, described, work / name, work / "given.json"))
    finally:
        file.write_bytes(whole)
    assert any(went)
    assert not all(went)


def test_metrics_that_fmn_did_not_write_are_refused_or_do(work: Path, tmp_path: Path) -> None:
    whole, file = artifacts.read_json(work / "merged.json"), tmp_path / "metrics.json"
    predictions = predictions_path(work / "merged.json")
    shutil.copyfile(predictions, predictions_path(file))
    went = []
    for what, content in changed(whole):
        artifacts.write_json(file, "evaluate", "", content)
        went.append(survived(what, described, work / "merged", file))
        survived(what, tabulated, file)
    assert any(went)
    assert not all(went)


def test_a_manifest_that_fmn_did_not_write_is_refused_or_does(
    work: Path, tiny_work: Path, tmp_path: Path
) -> None:
    expert = tmp_path / "mrpc"
    shutil.copytree(tiny_work / "experts" / "mrpc", expert)
    file = expert / artifacts.SIDECAR
    whole = json.loads(file.read_bytes())
    experts = {"mrpc": expert, "stsb": tiny_work / "experts" / "stsb"}
    for number, (what, content) in enumerate(changed({**whole, "files": {}}, FEW)):
        file.write_text(json.dumps({**content, "files": whole["files"]}))
        given: tuple[Any, ...] = (
            experts,
            {},
            None,
            tmp_path / f"{number}",
            MergeSettings(method="average"),
        )
        survived(what, merge_stages.merge, *given)
