"""Files are whole or absent, and say what they were made from."""

from contextlib import suppress
from pathlib import Path

import pytest

from fmn.errors import UserError
from fmn.store import artifacts


def test_a_file_keeps_its_old_content_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with suppress(RuntimeError), artifacts.atomic_file(path) as partial:
        partial.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old"
    with artifacts.atomic_file(path) as partial:
        partial.write_text("new")
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "new"


def test_a_folder_is_replaced_whole_and_what_a_kill_left_is_cleared(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    (tmp_path / ".folder.partial" / "inner").mkdir(parents=True)
    (tmp_path / ".folder.old").mkdir()
    for content in ("one", "two"):
        with artifacts.whole_folder(path) as partial:
            assert not list(partial.iterdir())
            (partial / content).write_text(content)
    with pytest.raises(RuntimeError), artifacts.whole_folder(path):
        raise RuntimeError
    assert [item.name for item in tmp_path.iterdir()] == ["folder"]
    assert [item.name for item in path.iterdir()] == ["two"]


def test_a_content_key_depends_on_every_part_but_not_on_order() -> None:
    key = artifacts.content_key("stage", 1, {"a": 1, "b": 2}, {"x": "1", "y": "2"})
    assert key == artifacts.content_key("stage", 1, {"b": 2, "a": 1}, {"y": "2", "x": "1"})
    others = [
        artifacts.content_key("other", 1, {"a": 1, "b": 2}, {"x": "1", "y": "2"}),
        artifacts.content_key("stage", 2, {"a": 1, "b": 2}, {"x": "1", "y": "2"}),
        artifacts.content_key("stage", 1, {"a": 1, "b": 3}, {"x": "1", "y": "2"}),
        artifacts.content_key("stage", 1, {"a": 1, "b": 2}, {"x": "1", "y": "3"}),
    ]
    assert len({key, *others}) == 5


@pytest.mark.parametrize("damage", ["change", "delete", "add", "manifest", "empty"])
def test_a_folder_is_current_only_while_it_is_what_was_written(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "folder"
    with artifacts.whole_folder(folder) as partial:
        (partial / "a").write_text("a")
        (partial / "b").write_text("b")
        artifacts.write_manifest(partial, "stage", "key", {"said": 1})
    assert artifacts.folder_is_current(folder, "key")
    assert not artifacts.folder_is_current(folder, "other")
    assert artifacts.read_manifest(folder) is not None
    before = artifacts.digest_folder(folder)
    match damage:
        case "change":
            (folder / "a").write_text("x")
        case "delete":
            (folder / "a").unlink()
        case "add":
            (folder / "c").write_text("c")
        case "manifest":
            (folder / artifacts.SIDECAR).write_text("{")
        case "empty":
            (folder / "b").write_text("")
    assert not artifacts.folder_is_current(folder, "key")
    if damage == "manifest":
        assert artifacts.digest_folder(folder) == before
    else:
        with pytest.raises(UserError, match="not what was written"):
            artifacts.digest_folder(folder)


def test_a_file_that_was_rewritten_has_a_new_digest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("a")
    first = artifacts.digest_file(path)
    path.write_text("b")
    assert artifacts.digest_file(path) != first
    path.write_text("a")
    assert artifacts.digest_file(path) == first


def test_json_knows_its_key_and_notices_a_change(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    artifacts.write_json(path, "evaluate", "key", {"score": 0.5})
    assert artifacts.json_is_current(path, "key")
    assert not artifacts.json_is_current(path, "other")
    assert artifacts.read_json(path) == {"score": 0.5}
    path.write_text(path.read_text().replace("0.5", "0.9"))
    assert not artifacts.json_is_current(path, "key")
    with pytest.raises(UserError, match="not what was written"):
        artifacts.read_json(path)
    with pytest.raises(UserError, match="no such file"):
        artifacts.read_json(tmp_path / "none")


def test_json_of_any_depth_is_no_manifest(tmp_path: Path) -> None:
    for text in (
        "[" * 10**5,
        '{"files":' * 10**5,
        '{"files": {}}',
        '{"files": {}, "info": [], "stage": "x", "key": "y"}',
    ):
        (tmp_path / artifacts.SIDECAR).write_text(text)
        assert artifacts.read_manifest(tmp_path) is None


def test_what_an_output_took_stands_beside_it_and_goes_with_it(tmp_path: Path) -> None:
    out = tmp_path / "experts" / "sst2"
    out.mkdir(parents=True)
    artifacts.write_cost(out, "finetune", 12.3456)
    (tmp_path / "experts" / ".other.cost").write_text("not JSON")
    assert artifacts.read_costs(tmp_path) == {out: ("finetune", 12.346)}
    assert artifacts.digest_files(tmp_path) == {}
    out.rmdir()
    assert artifacts.read_costs(tmp_path) == {}


@pytest.mark.parametrize(
    "text", ['{"a": NaN, "fmn": {"key": "k"}}', '{"a": 1e999, "fmn": {"key": "k"}}', '{"fmn": []}']
)
def test_a_file_that_holds_no_number_or_no_mark_is_not_current(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(text)
    assert not artifacts.json_is_current(path, "k")
    with pytest.raises(UserError, match="not what was written"):
        artifacts.read_json(path)
