"""Files shared by several machines: stored once, by digest, and checked on arrival."""

from pathlib import Path

import pytest

from flows import storage
from flows.storage import Storage
from flows.workers import TransientError
from fmn.errors import UserError
from fmn.store.stage import Sidecar


@pytest.fixture
def shared(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/shared")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "tasks").mkdir(parents=True)
    texts = {"weights": "1 2 3", "tasks/weights": "1 2 3", "fmn.json": "{}", ".hidden": "x"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def stored(folder: Path) -> list[Path]:
    return [path for path in (folder / "shared").rglob("*") if path.is_file()]


def test_a_folder_arrives_as_it_left_and_travels_once(
    shared: Storage, model: Path, tmp_path: Path
) -> None:
    digests = storage.digest_files(model)
    assert sorted(digests) == ["fmn.json", "tasks/weights", "weights"]
    shared.put(model, digests)
    stamps = {path: path.stat().st_mtime_ns for path in stored(tmp_path)}
    assert len(stamps) == 2, "the same bytes twice are one file"
    shared.put(model, digests)
    assert {path: path.stat().st_mtime_ns for path in stored(tmp_path)} == stamps
    shared.get(tmp_path / "copy", digests)
    assert storage.digest_files(tmp_path / "copy") == digests
    assert (tmp_path / "copy/weights").samefile(tmp_path / "copy/tasks/weights")


def test_named_folders_alone_are_taken(model: Path) -> None:
    assert list(storage.digest_files(model, ("tasks",))) == ["tasks/weights"]


def test_a_file_takes_along_its_sidecar_and_what_belongs_to_it(tmp_path: Path) -> None:
    files = {"a.json": "1", "a.parquet": "2"}
    sidecar = Sidecar(stage="x", key="y", files=files).model_dump_json()
    for name, text in {**files, "b.json": "3", "a.json.fmn.json": sidecar}.items():
        (tmp_path / name).write_text(text)
    names = ["a.json", "a.json.fmn.json", "a.parquet"]
    assert list(storage.digest_files(tmp_path / "a.json")) == names
    assert list(storage.digest_files(tmp_path / "b.json")) == ["b.json"]


@pytest.mark.parametrize("damage", ["1 2 4", "1 2", None])
def test_a_damaged_file_is_named_and_stored_again(
    shared: Storage, model: Path, tmp_path: Path, damage: str | None
) -> None:
    digests = storage.digest_files(model)
    shared.put(model, digests)
    (file,) = (path for path in stored(tmp_path) if path.name == digests["weights"])
    file.unlink()
    if damage is not None:
        file.write_text(damage)
    with pytest.raises(TransientError, match=rf"file://.*weights .*{file.name}"):
        shared.get(tmp_path / "copy", digests)
    assert not file.exists()
    shared.put(model, digests)
    shared.get(tmp_path / "again", digests)
    assert storage.digest_files(tmp_path / "again") == digests


def test_a_url_that_nothing_reads_is_refused() -> None:
    with pytest.raises(UserError, match="storage nosuch://bucket: Protocol not known"):
        Storage("nosuch://bucket")
