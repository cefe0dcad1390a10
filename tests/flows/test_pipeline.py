"""The whole pipeline in a project of its own: a flow, DVC, and each in step with the other."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.projects import PROFILE, dvc, flow, make_project, repro, run


@pytest.fixture(scope="module")
def project(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("project"), tiny_base)
    steps = "realign: {realigned: {texts: 16}}\nbaselines: {paper: {mapping: paper}}\n"
    profile = PROFILE.replace("fisher: {", "fisher: {parts: 2, ")
    (folder / "params.yaml").write_text(profile + steps)
    return folder


def test_flow_and_dvc_never_repeat_each_other(project: Path) -> None:
    first = flow(project)
    assert "up to date" not in first
    assert "models:/tiny/1" in first
    stage = re.compile(
        r"(settings|data|fetch|finetune|fisher(-part)?|evaluate|merge|realign|report|register) .* +"
        r"[\d.]+ s +\d+ of 26(, about [\d.]+ (s|min|h) left)?"
    )
    places = [number for number, line in enumerate(first.splitlines()) if stage.fullmatch(line)]
    assert places == list(range(len(places))), (
        f"stages first, then the table, and nothing else: {first}"
    )
    assert first.splitlines()[len(places)].startswith("task "), first
    assert all(len(line) <= 100 for line in first.splitlines())
    assert "Completed()" in (project / "data/tiny/run.log").read_text(), (
        "what the libraries say is kept"
    )
    header = next(line for line in first.splitlines() if line.startswith("task "))
    models = ["base", "average", "paper", "merged", "realigned"]
    assert header.split() == ["task", *models, "expert"]
    assert re.search(r"\nThe model realigned keeps \d+\.\d % of the experts' scores", first)
    assert re.search(r"\nmodel +data/tiny/models/realigned\n", first)
    page = (project / "data/tiny/report/report.html").read_text()
    for words in ("The model realigned keeps", "What larger models keep", "What it cost"):
        assert words in page
    assert "Who owns what" in page, "by the Fisher information of the merge"

    second = flow(project)
    assert second.startswith(f"{len(places)} stages up to date\n")
    assert "Finished in state" not in (project / "data/tiny/run.log").read_text(), "no flow ran"
    assert "nothing had changed" in second
    assert "models:/tiny/1" in second, "nothing new is registered"

    summary = json.loads(flow(project, "--json", stdout=True))
    assert (summary["computed"], summary["registered"]["version"]) == (False, "1")
    assert {each["computed"] for each in summary["stages"]} == {False}
    assert all(Path(project / each["out"]).exists() for each in summary["stages"])
    assert (project / summary["report"]).is_file()

    assert repro(project) == []
    assert dvc(project, "status").split() == ["settings:", "always", "changed"]
    numbers = dvc(project, "metrics", "show")
    assert {"mean", "score", "retained", "sst2", "stsb"} < set(numbers.split())
    assert all(len(line) < 80 for line in dvc(project, "metrics", "show").splitlines())
    dvc(project, "plots", "show")
    shown = (project / "dvc_plots" / "index.html").read_text()
    for picture in ("scores", "frontier", "heads", "owners", "costs"):
        assert f"pictures_{picture}.svg" in shown
    assert "<script" not in shown, "it is seen without a network"
    assert not [
        path for path in (project / "data").rglob(".gitignore") if path.parent != project / "data"
    ]


def test_a_setting_changed_through_dvc_leaves_the_flow_nothing_to_do(project: Path) -> None:
    flow(project)
    profile = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(profile.replace("mapping: structured", "mapping: paper"))
    ran = repro(project)
    assert sorted(ran) == ["gram", "metrics", "models", "register", "report"]
    third = flow(project)
    assert "nothing had changed" in third
    assert "models:/tiny/2" in third


@pytest.mark.slow
def test_calibration_and_other_entries_come_and_go_with_the_settings(project: Path) -> None:
    flow(project)
    profile = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(re.sub("(?m)^realign.*", "realign: {}", profile))
    assert sorted(repro(project)) == ["models", "register", "report"]
    output = flow(project)
    assert "nothing had changed" in output
    assert "data/tiny/models/merged" in output
    (project / "params.yaml").write_text(profile)
    assert sorted(repro(project)) == ["models", "register", "report"]


@pytest.mark.slow
def test_dvc_builds_everything_from_nothing_and_the_flow_agrees(project: Path) -> None:
    flow(project)
    shutil.rmtree(project / "data" / "tiny")
    dvc(project, "repro", "--force")
    assert "nothing had changed" in flow(project)


def test_a_comparison_has_the_bounds_beside_its_methods_and_is_made_once(project: Path) -> None:
    section = (
        "compare: {both: {sets: [all], rows: 40, methods: {mask-fisher: {method: mask-fisher}}}}\n"
    )
    (project / "compared.yaml").write_text(PROFILE + section)
    compare = (sys.executable, "-m", "fmn", "compare", "both", "--params", "compared.yaml")
    first = run(project, *compare)
    table = [line.split()[0] for line in first.splitlines() if line.split()[-1:] != ["s"]]
    assert [name for name in table if name in ("base", "average", "mask-fisher", "expert")] == [
        "base", "average", "mask-fisher", "expert"
    ]  # fmt: skip
    page = project / "data/tiny/compare/both/tables/report.html"
    assert "3 ways to merge sst2 and stsb" in page.read_text()
    again = run(project, *compare)
    assert re.match(r"\d+ stages up to date\n", again)
    assert not [line for line in again.splitlines() if line.startswith("compar")]


def test_a_mistake_in_the_profile_is_told_before_anything_starts(project: Path) -> None:
    (project / "wrong.yaml").write_text(PROFILE.replace("sst2:", "sst:"))
    output = flow(project, "--params", "wrong.yaml", fails=True)
    assert re.match(r"fmn: wrong\.yaml:\d+: ", output)
    assert output.count("\n") == 1


def test_sources_that_are_not_there_are_named_before_the_first_stage(project: Path) -> None:
    profile = PROFILE.replace("data/tiny", "data/none").replace(
        "sources: {}", "sources: {stsb: nowhere}"
    )
    lines = [line for line in profile.splitlines() if not line.startswith("  stsb:")]
    (project / "none.yaml").write_text("\n".join(lines))
    output = flow(project, "--params", "none.yaml", fails=True)
    assert output.startswith("fmn: none.yaml:5: sources.stsb: nowhere: no such folder")
    assert output.count("\n") == 1
    assert not (project / "data/none/base").exists()


def test_a_stage_that_fails_is_named_and_the_others_are_kept(project: Path) -> None:
    profile = PROFILE.replace("data/tiny", "data/other").replace(
        "sources: {}", "sources: {stsb: broken}"
    )
    lines = [line for line in profile.splitlines() if not line.startswith("  stsb:")]
    (project / "other.yaml").write_text("\n".join(lines))
    shutil.copytree(project / "source", project / "broken")
    (project / "broken/model.safetensors").write_bytes(b"no weights")
    output = flow(project, "--params", "other.yaml", fails=True)
    last = output.splitlines()[-1]
    assert re.fullmatch(r"fmn: fetch stsb: broken.*; finished, in percent: sst2 \d+\.\d", last)
    assert "Traceback" not in output
    assert (project / "data/other/experts/sst2/model.safetensors").is_file()
    assert not (project / "data/other/models").exists()


@pytest.mark.slow
def test_a_version_is_made_again_from_what_it_was_registered_with(project: Path) -> None:
    flow(project)
    version = "models:/tiny@champion"
    shown = run(project, sys.executable, "-m", "fmn", "reproduce", version)
    assert "fine-tuned: epochs 1.0" in shown
    again = run(
        project, sys.executable, "-m", "fmn", "reproduce", version, "--run", "--out", "again"
    )
    assert "all digests are the same" in again
    assert "differs" not in again
    assert "register" not in again
    (project / "source").rename(project / "moved")
    command = ("fmn", "reproduce", version, "--run", "--out", "other")
    output = run(project, sys.executable, "-m", *command, fails=True)
    (project / "moved").rename(project / "source")
    assert re.search(r"^fmn: fetch-base: .*/source: no such folder", output.splitlines()[-1])
