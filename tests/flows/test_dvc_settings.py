"""Settings under `dvc repro`: none reaches a shell, and any section may be left out."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows import graph
from fmn import params
from tests.projects import PROFILE, dvc, make_project, repro, run

SECTIONS = ("finetune", "sources", "data", "fisher", "merge", "evaluate", "realign")


def write(folder: Path, **changes: Any) -> None:
    """Write the settings of a project with other sections; None leaves a section out."""
    settings = YAML(typ="safe").load(PROFILE) | changes
    content = {name: value for name, value in settings.items() if value is not None}
    YAML(typ="safe", pure=True).dump(content, folder / "params.yaml")


@pytest.fixture
def project(tiny_base: Path, tmp_path: Path) -> Path:
    return make_project(tmp_path / "a project", tiny_base)


@pytest.mark.parametrize(
    "changes",
    [
        {"experts": {"tasks": ["sst2; echo INJECTED > injected", "stsb"]}},
        {"sources": {"sst2; echo INJECTED > injected": "models/sst2"}},
        {"realign": {"realigned-$(echo INJECTED > injected)": {}}},
    ],
)
def test_a_name_that_is_a_command_fails_in_one_line(project: Path, changes: dict[str, Any]) -> None:
    write(project, **changes)
    text = run(project, "dvc", "repro", fails=True)
    assert re.search(r"fmn: params\.yaml:\d+: ", text)
    assert not list(project.rglob("injected"))
    assert not (project / "dvc.lock").exists()


def test_a_source_that_is_a_command_is_a_source_that_does_not_exist(project: Path) -> None:
    command = "x; echo INJECTED > injected"
    write(project, base=command)
    text = run(project, "dvc", "repro", "fetch-base", fails=True)
    assert f"fmn: {command}: no such folder" in text
    assert not list(project.rglob("injected"))
    assert "fetch-base" not in (project / "dvc.lock").read_text()


def test_paths_may_hold_spaces_and_quotes(project: Path) -> None:
    (project / "source").rename(project / "it's my base")
    write(project, base="it's my base", work="data/first run's files")
    dvc(project, "repro", "fetch-base", "data")
    work = project / "data/first run's files"
    assert (work / "base/model.safetensors").is_file()
    assert (work / "data/stsb/train.parquet").is_file()
    assert repro(project, "fetch-base", "data") == []


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_may_be_left_out(project: Path, section: str) -> None:
    others = {"sources": {"sst2": "models/sst2", "stsb": "models/stsb"}}
    write(project, **(others if section == "finetune" else {}), **{section: None})
    settings = params.load(project / "params.yaml")
    written = {node.stage for node in graph.nodes(settings, project / "params.yaml")}
    stages = {row.dvc or row.name for row in graph.PIPELINE if row.name in written}
    assert {"fetch-base", "data", "fisher", "models", "metrics", "report", "register"} <= stages
    dvc(project, "repro", "settings")  # every section that other stages compare is in its output
    assert section in json.loads((project / "data/tiny/settings.json").read_text())
    names = {
        line.split()[0].partition("@")[0] for line in dvc(project, "stage", "list").splitlines()
    }
    assert stages <= names


@pytest.mark.slow
def test_a_run_of_dvc_needs_no_optional_section(project: Path) -> None:
    write(project, **dict.fromkeys(("sources", "fisher", "merge", "evaluate"), None))
    dvc(project, "repro")
    assert (project / "data/tiny/registered.json").is_file()
    assert "nothing had changed" in run(project, "fmn", "run")
