"""DVC and flows in one workspace: what a change rebuilds, what a second clone is spared."""

from pathlib import Path

import pytest

from tests.projects import dvc, flow, make_project, repro, run, take_folders_as_experts
from tests.test_floating import retune

pytestmark = pytest.mark.slow
FROM_MERGE = {"models", "metrics", "report", "register"}
SAME = "nothing had changed"


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
    of_stsb = ["finetune@stsb", "fisher@stsb"]
    assert [stage for stage in ran if "@stsb" in stage] == of_stsb
    assert not [stage for stage in ran if "@sst2" in stage or stage.startswith(("data", "fetch"))]
    assert set(ran) - set(of_stsb) == {"gram", *FROM_MERGE}
    assert SAME in flow(project)

    edit(project, "seed: 0", "seed: 1")
    ran = repro(project)
    assert set(ran) == {"fisher@sst2", "fisher@stsb", *FROM_MERGE}
    assert SAME in flow(project)

    edit(project, "registry: {name: tiny}", "registry: {name: other}")
    assert SAME not in flow(project)
    assert repro(project) == []


def test_a_second_clone_is_spared_what_was_pushed(project: Path, tmp_path: Path) -> None:
    dvc(project, "repro")
    dvc(project, "remote", "add", "-d", "store", str(tmp_path / "store"))
    commit(project)
    dvc(project, "push")
    stored = {file.stat().st_size for file in (tmp_path / "store").rglob("*") if file.is_file()}

    def is_stored(folder: str) -> bool:
        return (project / "data/tiny" / folder / "model.safetensors").stat().st_size in stored

    assert is_stored("experts/sst2"), "nobody else has an expert that was made here"
    assert not is_stored("base"), "its source has it"
    assert not is_stored("models/merged/encoder"), "it is made again in seconds"

    clone = tmp_path / "clone"
    run(project, "git", "clone", "-q", str(project), str(clone))
    dvc(clone, "pull")
    computed = {stage.split("@")[0] for stage in repro(clone)}
    assert computed == {"fetch-base", "models", "metrics", "register"}
    assert SAME in flow(clone)
    fisher = "data/tiny/fisher/sst2.parquet"
    assert (clone / fisher).read_bytes() == (project / fisher).read_bytes()


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
    assert {"fisher@stsb", *FROM_MERGE} < set(ran)
    assert not [stage for stage in ran[2:] if "@sst2" in stage or stage.startswith("data")]
    assert SAME in flow(folder)
