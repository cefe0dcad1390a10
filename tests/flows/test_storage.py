"""Files shared by several machines: under their digest, checked on arrival, whole in their place."""

import shutil
from pathlib import Path

import pytest

from flows import storage
from flows.faults import PassingError
from flows.storage import Cache, Made, Storage
from fmn.errors import UserError


@pytest.fixture
def shared(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/shared")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "tasks").mkdir(parents=True)
    for name, text in {
        "weights": "1 2 3",
        "tasks/weights": "1 2 3",
        "fmn.json": "{}",
        ".hidden": "x",
    }.items():
        (folder / name).write_text(text)
    return folder


def stored(shared: Storage, digest: str) -> Path:
    return Path(shared.root) / "files" / digest[:2] / digest


def test_a_tree_arrives_as_it_left_and_travels_once(
    shared: Storage, model: Path, tmp_path: Path
) -> None:
    files = storage.tree(model)
    assert sorted(files) == ["fmn.json", "tasks/weights", "weights"]
    assert shared.put(model, files) == len("1 2 3") + len("{}"), "the same bytes twice are one file"
    assert shared.put(model, files) == 0
    shared.get(tmp_path / "copy", files)
    assert storage.tree(tmp_path / "copy") == files
    assert (tmp_path / "copy/weights").samefile(tmp_path / "copy/tasks/weights")


def test_only_the_named_folders_belong_to_a_tree(model: Path) -> None:
    assert list(storage.tree(model, ("tasks",))) == ["tasks/weights"]


def test_a_merged_models_card_is_no_part_of_it(model: Path) -> None:
    before = storage.tree(model)
    (model / "README.md").write_text("scores")
    assert storage.tree(model) != before
    (model / "merge.json").write_text("{}")
    assert sorted(storage.tree(model)) == sorted([*before, "merge.json"])


@pytest.mark.parametrize("rot", ["flip", "cut", "gone"])
def test_a_rotten_file_is_named_and_put_there_again(
    shared: Storage, model: Path, tmp_path: Path, rot: str
) -> None:
    files = storage.tree(model)
    shared.put(model, files)
    file = stored(shared, files["weights"].digest)
    if rot == "gone":
        file.unlink()
    else:
        file.write_text({"flip": "1 2 4", "cut": "1 2"}[rot])
    with pytest.raises(PassingError, match=rf"file://.*{file.name}: .*weights"):
        shared.get(tmp_path / "copy", files)
    assert not file.exists()
    shared.put(model, files)
    shared.get(tmp_path / "again", files)
    assert storage.tree(tmp_path / "again") == files


def test_what_was_made_is_put_whole_in_its_place(shared: Storage, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    for name in ("a.json", "a.predictions.parquet", "expert/weights"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text(name)
    made = Made(storage.tree(there), 1.5)
    assert shared.made("request") is None
    shared.keep("request", there, made)
    assert shared.made("request") == made
    shared.take("request", made, here / "a.json")
    assert storage.tree(here) == made.files

    stored(shared, made.files["a.json"].digest).write_text("rotten")
    (here / "a.json").write_text("as it was")
    with pytest.raises(PassingError, match=r"not the a\.json that was put there"):
        shared.take("request", made, here / "a.json")
    assert (here / "a.json").read_text() == "as it was"
    assert shared.made("request") is None, "the next attempt makes it again"


def test_partial_sums_are_there_until_the_whole_is(shared: Storage, tmp_path: Path) -> None:
    sums = tmp_path / ".a.parquet.0-1.partial-sums"
    sums.write_text("half")
    shared.save_sums("request", sums)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shared.get_sums("request", elsewhere)
    assert (elsewhere / sums.name).read_text() == "half"
    shared.keep("request", tmp_path, Made({}, 1.0))
    shared.get_sums("request", tmp_path / "no such folder")


def test_a_storage_that_cannot_be_used_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^storage file://.*cannot be written and read") as caught:
        Storage(f"file://{tmp_path}/file/shared").probe()
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="storage nosuch://bucket: Protocol not known"):
        Storage("nosuch://bucket")


def test_another_machine_sees_the_probe_or_says_why_not(shared: Storage, tmp_path: Path) -> None:
    name = shared.probe()
    assert Storage(shared.url).sees(name) is None
    assert "No such file" in str(Storage(f"file://{tmp_path}/another").sees(name))


def test_a_machines_own_copies_are_kept_until_there_is_no_room(
    shared: Storage, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache")
    files = storage.tree(model)
    shared.put(model, files)
    first = cache.tree(shared, files, set())
    inode = first.stat().st_ino
    assert cache.tree(shared, files, set()).stat().st_ino == inode, "nothing travels twice"

    (first / "weights").unlink()
    (first / "weights").write_text("rotten")
    assert storage.tree(cache.tree(shared, files, set())) == files, "fetched anew"

    (model / "weights").write_text("others")
    others = storage.tree(model)
    shared.put(model, others)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0}))
    cache.tree(shared, others, {storage.digest(files)})
    assert first.exists(), "it is needed"
    (model / "weights").write_text("third")
    shared.put(model, third := storage.tree(model))
    cache.tree(shared, third, set())
    assert not first.exists()
