"""Files shared by several machines: stored once, by digest, and checked on arrival."""

from pathlib import Path

import pytest

from flows.storage import Storage, digest_files
from flows.workers import TransientError
from fmn.errors import UserError
from fmn.store.stage import Sidecar


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "tasks").mkdir(parents=True)
    texts = {"weights": "1 2 3", "tasks/weights": "1 2 3", "fmn.json": "{}", ".hidden": "x"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("damage", ["1 2 4", "1 2", None])
def test_files_travel_once_and_are_stored_again_if_damaged(
    model: Path, tmp_path: Path, damage: str | None
) -> None:
    shared, digests = Storage(f"file://{tmp_path}/shared"), digest_files(model)
    assert sorted(digests) == ["fmn.json", "tasks/weights", "weights"]

    def stamps() -> dict[Path, int]:
        paths = (tmp_path / "shared").rglob("*")
        return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}

    shared.put(model, digests)
    stored = stamps()
    assert len(stored) == 2, "the same bytes twice are one file"
    shared.put(model, digests)
    assert stamps() == stored
    shared.get(tmp_path / "copy", digests)
    assert digest_files(tmp_path / "copy") == digests
    assert (tmp_path / "copy/weights").samefile(tmp_path / "copy/tasks/weights")

    (file,) = (path for path in stored if path.name == digests["weights"])
    file.unlink()
    if damage is not None:
        file.write_text(damage)
    with pytest.raises(TransientError, match=rf"file://.*weights .*{file.name}"):
        shared.get(tmp_path / "damaged", digests)
    assert not file.exists()
    shared.put(model, digests)
    shared.get(tmp_path / "again", digests)
    assert digest_files(tmp_path / "again") == digests


def test_a_file_takes_along_its_sidecar_and_what_belongs_to_it(tmp_path: Path) -> None:
    files = {"a.json": "1", "a.parquet": "2"}
    sidecar = Sidecar(stage="x", key="y", files=files).model_dump_json()
    for name, text in {**files, "b.json": "3", "a.json.fmn.json": sidecar}.items():
        (tmp_path / name).write_text(text)
    names = ["a.json", "a.json.fmn.json", "a.parquet"]
    assert list(digest_files(tmp_path / "a.json")) == names
    assert list(digest_files(tmp_path / "b.json")) == ["b.json"]


def test_a_url_that_nothing_reads_is_refused() -> None:
    with pytest.raises(UserError, match="storage nosuch://bucket: Protocol not known"):
        Storage("nosuch://bucket")
