"""DVC and flows in one workspace: what a change rebuilds, what a second clone is spared."""

import sqlite3
from pathlib import Path

import pytest

from tests.conftest import wait_until
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
    run(folder, "git", "commit", "-q", "--allow-empty", "-m", "as it is")


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

    edit(project, "seed: 1", "seed: 0")
    assert not [stage for stage in repro(project) if "@" in stage], "they come from the cache"
    edit(project, "stsb: {epochs: 2", "stsb: {epochs: 1")
    assert not [stage for stage in repro(project) if "@" in stage]
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
    assert computed == {"fetch-base", "models", "metrics", "report", "register"}
    assert SAME in flow(clone)
    fisher = "data/tiny/fisher/sst2.parquet"
    assert (clone / fisher).read_bytes() == (project / fisher).read_bytes()


def test_dvc_looks_where_sources_stand(
    project: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_project(tmp_path, tiny_base)
    take_folders_as_experts(folder, project / "data/tiny/experts")
    flow(folder)
    assert repro(folder) == []
    monkeypatch.chdir(folder)
    retune("stsb")
    ran = repro(folder)
    assert {"fetch@stsb", "fisher@stsb", *FROM_MERGE} < set(ran)
    assert not [stage for stage in ran if "@sst2" in stage or stage.startswith("data")]
    assert SAME in flow(folder)


@pytest.mark.parametrize("how", [(), ("--temp",), ("--queue",)])
def test_a_trial_registers_nothing_until_it_is_taken(project: Path, how: tuple[str, ...]) -> None:
    dvc(project, "repro")
    commit(project)
    change = f"fisher.samples={20 + len(how) + len(''.join(how))}"
    dvc(project, "exp", "run", "--name", f"trial{''.join(how)}", *how, "-S", change)
    if "--queue" in how:
        dvc(project, "queue", "start")
        wait_until(lambda: "Success" in dvc(project, "queue", "status"))
    record = project / "data/tiny/registered.json"
    if not how:
        assert "trial" in record.read_text()
        assert "fisher" in dvc(project, "exp", "diff")
    versions = sqlite3.connect(project / "mlflow.db").execute("select count(*) from model_versions")
    before = versions.fetchone()[0]
    dvc(project, "exp", "apply", f"trial{''.join(how)}")
    flow(project)
    versions = sqlite3.connect(project / "mlflow.db").execute("select count(*) from model_versions")
    assert versions.fetchone()[0] == before + 1
    run(project, "git", "checkout", "-q", ".")
