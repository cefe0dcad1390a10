"""Files are whole or absent, and digests identify their content."""

import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from fmn.errors import UserError
from fmn.store import artifacts


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_keeps_its_old_content_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with suppress(RuntimeError), artifacts.atomic_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with artifacts.atomic_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_a_folder_is_replaced_whole_and_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    (tmp_path / ".folder.partial" / "inner").mkdir(parents=True)
    (tmp_path / ".folder.old").mkdir()
    for content in ("first", "second"):
        with artifacts.scratch_folder(path) as scratch:
            assert names(scratch) == []
            (scratch / content).write_text(content)
            artifacts.publish_folder(scratch, path)
    with pytest.raises(RuntimeError), artifacts.scratch_folder(path):
        raise RuntimeError
    assert names(tmp_path) == ["folder"]
    assert names(path) == ["second"]


def test_a_content_key_depends_on_every_part_but_not_on_order() -> None:
    parts = {"stage": "s", "version": 1, "settings": {"a": 1, "b": 2}, "inputs": {"x": "1"}}
    changes = {"stage": "t", "version": 2, "settings": {"a": 1, "b": 3}, "inputs": {"x": "2"}}
    key: Callable[..., str] = artifacts.content_key
    assert key(**parts | {"settings": {"b": 2, "a": 1}}) == key(**parts)
    others = {key(**parts | {name: change}) for name, change in changes.items()}
    assert len({key(**parts), *others}) == 5


def test_a_file_that_was_rewritten_has_a_new_digest(tmp_path: Path) -> None:
    for content in (b"a", b"b", b"a"):
        (tmp_path / "file").write_bytes(content)
        assert artifacts.digest_file(tmp_path / "file") == artifacts.digest_bytes(content)


def test_a_remembered_digest_counts_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_text("a")
    artifacts.remember_digest(path, "known")
    path.parent.rename(tmp_path / "renamed")
    path = tmp_path / "renamed" / "file"
    assert artifacts.digest_file(path) == "known"
    os.link(path, tmp_path / "link")
    assert artifacts.digest_file(path) == artifacts.digest_bytes(b"a")


def test_a_folders_digest_leaves_out_hidden_files_sidecar_and_card(tmp_path: Path) -> None:
    (tmp_path / "inner" / ".cache").mkdir(parents=True)
    for name in ("inner/b", "a"):
        (tmp_path / name).write_text(name)
    digest = artifacts.digest_folder(tmp_path)
    for name in (".hidden", "inner/.cache/x", artifacts.SIDECAR, artifacts.CARD):
        (tmp_path / name).write_text(name)
    assert artifacts.digest_folder(tmp_path) == digest
    assert list(artifacts.digest_files(tmp_path)) == ["a", "inner/b"]
    assert list(artifacts.visible(tmp_path, ["inner"])) == ["inner/b"]
    (tmp_path / "a").rename(tmp_path / "c")
    assert artifacts.digest_folder(tmp_path) != digest
    with pytest.raises(UserError, match="nowhere: no such folder"):
        artifacts.digest_folder(tmp_path / "nowhere")


def test_the_first_difference_is_named() -> None:
    expected = {"a": "1", "b": "2"}
    assert artifacts.differing(expected, {"b": "2", "a": "1"}) is None
    assert artifacts.differing(expected, {"b": "3", "a": "1"}) == "b"
    assert artifacts.differing({"b": "2"}, expected) == artifacts.differing(expected, {}) == "a"


def _hold(out: Path, is_held: Path) -> None:
    with artifacts.locked(out):
        is_held.touch()
        time.sleep(60)


def test_an_output_is_one_process_at_a_time_and_a_kill_frees_it(tmp_path: Path) -> None:
    out, is_held = tmp_path / "out", tmp_path / "held"
    holder = multiprocessing.get_context("spawn").Process(target=_hold, args=(out, is_held))
    holder.start()
    while not is_held.exists():
        time.sleep(0.01)
    started = time.monotonic()
    with artifacts.locked(tmp_path / "other"):
        pass
    holder.kill()
    with artifacts.locked(out):
        assert time.monotonic() - started < 30
    holder.join()
    assert names(tmp_path) == ["held"]
