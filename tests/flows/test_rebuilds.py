"""DVC and flows in one workspace: what a change rebuilds, what a second clone is spared."""

from pathlib import Path

import pytest

from tests.projects import (
    dvc,
    flow,
    make_project,
    repro,
    run,
    take_folders_as_experts,
)
from tests.test_floating import retune

pytestmark = pytest.mark.slow
AFTER_MERGE = ["evaluate@merged", "report", "register"]
MERGES = ["merge@base", "merge@average", "merge@merged"]


@pytest.fixture(scope="module")
def project(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after its first flow, committed."""
    folder = make_project(tmp_path_factory.mktemp("project"), tiny_base)
    flow(folder)
    commit(folder)
    return folder


def commit(folder: Path) -> None:
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-q", "-m", "as it is")


def edit(folder: Path, old: str, new: str) -> None:
    file = folder / "params.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))


def test_a_change_rebuilds_what_depends_on_it(project: Path) -> None:
    edit(project, "stsb: {epochs: 1", "stsb: {epochs: 2")
    ran = repro(project)
    assert [stage for stage in ran if "@stsb" in stage] == [
        "finetune@stsb",
        "fisher@stsb",
    ]
    assert not [stage for stage in ran if "@sst2" in stage or stage.startswith(("data", "fetch"))]
    assert {"evaluate-expert", *MERGES, "evaluate@average", *AFTER_MERGE} < set(ran)
    assert "nothing had changed" in flow(project)

    edit(project, "seed: 0", "seed: 1")
    assert {"fisher@sst2", "fisher@stsb", "merge@merged"} < set(ran := repro(project))
    assert not [
        stage for stage in ran if stage.startswith(("data", "fetch", "finetune", "evaluate-expert"))
    ]
    assert "nothing had changed" in flow(project)

    edit(project, "registry: {name: tiny}", "registry: {name: other}")
    assert "nothing had changed" not in flow(project)
    assert repro(project) == []


def test_a_second_clone_is_spared_what_was_pushed(project: Path, tmp_path: Path) -> None:
    dvc(project, "repro")
    dvc(project, "remote", "add", "-d", "store", str(tmp_path / "store"))
    commit(project)
    dvc(project, "push")
    stored = {file.stat().st_size for file in (tmp_path / "store").rglob("*") if file.is_file()}
    expert = (project / "data/tiny/experts/sst2/model.safetensors").stat().st_size
    base = (project / "data/tiny/base/model.safetensors").stat().st_size
    merged = (project / "data/tiny/merged/encoder/model.safetensors").stat().st_size
    assert expert in stored, "nobody else has an expert that was made here"
    assert base not in stored, "its source has it"
    assert merged not in stored, "made again in seconds"

    clone = tmp_path / "clone"
    run(project, "git", "clone", "-q", str(project), str(clone))
    dvc(clone, "pull")
    assert {stage.split("@")[0] for stage in repro(clone)} == {
        "fetch-base",
        "merge",
        "evaluate",
        "register",
    }
    assert "nothing had changed" in flow(clone)
    assert (clone / "data/tiny/fisher/sst2.parquet").read_bytes() == (
        project / "data/tiny/fisher/sst2.parquet"
    ).read_bytes()


def test_dvc_looks_where_sources_stand(
    project: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_project(tmp_path, tiny_base)
    take_folders_as_experts(folder, project / "data/tiny/experts")
    flow(folder)
    fetches = ["fetch@sst2", "fetch@stsb"]
    assert repro(folder) == fetches
    monkeypatch.chdir(folder)
    retune("stsb")
    ran = repro(folder)
    assert ran[:2] == fetches
    assert {"fisher@stsb", "evaluate-expert", "merge@merged", *AFTER_MERGE} < set(ran)
    assert not [stage for stage in ran[2:] if "@sst2" in stage or stage.startswith("data")]
    assert "nothing had changed" in flow(folder)
    retune("sst2")
    assert "nothing had changed" not in flow(folder)
    assert repro(folder) == fetches
