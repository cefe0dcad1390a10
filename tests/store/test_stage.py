"""The one stage rule: an output is whole, current, and says what it was made from."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fmn.errors import UserError
from fmn.store import stage
from fmn.store.records import Record, Settings
from fmn.store.stage import (
    Job,
    Outcome,
    check_intact,
    read_info,
    read_record,
    read_sidecar,
    run_stage,
    sidecar_path,
    write_record,
)
from tests.folders import fill


class Count(Record):
    """How many letters an output holds."""

    letters: int


class Options(Settings):
    times: int = 1
    device: str = "cpu"


DEFAULTS = Options()
COUNT = partial(read_info, record=Count)
Before = Callable[[], object]  # called before anything is written


def copy_file(
    source: Path, out: Path, settings: Options = DEFAULTS, before: Before = lambda: None
) -> Outcome[Count]:
    """A stage whose output is a file, with a second file beside it."""

    def compute(job: Job) -> Count:
        before()
        text = source.read_text() * settings.times
        job.path.write_text(text)
        job.path.with_suffix(".note").write_text("beside")
        return Count(letters=len(text))

    reads, keys = {"source": source}, {"settings": settings}
    return run_stage("copy", 1, out, compute, reads=reads, settings=keys, summary=COUNT)


def copy_folder(source: Path, out: Path, before: Before = lambda: None) -> Outcome[Count]:
    """A stage whose output is a folder."""

    def compute(job: Job) -> Count:
        (job.path / "inner").mkdir()
        (job.path / "inner" / "text").write_text(source.read_text())
        before()
        return Count(letters=1)

    reads = {"source": source}
    return run_stage(
        "folder", 1, out, compute, reads=reads, settings={}, summary=COUNT, is_folder=True
    )


def fail() -> None:
    raise RuntimeError("stopped")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.txt"
    path.write_text("abc")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_output_is_computed_again_only_when_an_input_or_a_setting_changes(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out.json"
    first = copy_file(source, out)
    assert (first.stage, first.out, first.computed) == ("copy", out, True)
    assert first.summary == Count(letters=3)
    again = copy_file(source, out)
    assert (again.computed, again.summary) == (False, first.summary)
    assert not copy_file(source, out, Options(device="cuda")).computed  # changes no result
    assert copy_file(source, out, Options(times=2)).summary.letters == 6
    source.write_text("d")
    assert copy_file(source, out, Options(times=2)).computed
    assert out.read_text() == "dd"


def test_the_sidecar_says_what_an_output_was_made_from(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    copy_file(source, out)
    sidecar = read_sidecar(out)
    assert sidecar is not None
    assert sidecar.stage == "copy"
    assert list(sidecar.inputs) == ["source"]
    assert sidecar.settings == {"settings": {"times": 1}}
    assert sorted(sidecar.files) == ["out.json", "out.note"]
    copy_folder(source, tmp_path / "folder")
    assert sidecar_path(tmp_path / "folder") == tmp_path / "folder" / "fmn.json"
    assert names(tmp_path / "folder") == ["fmn.json", "inner"]
    assert names(tmp_path) == ["folder", "out.json", "out.json.fmn.json", "out.note", "source.txt"]


def test_inputs_are_files_folders_lists_of_them_or_digests(source: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "folder", tmp_path / "out.txt"
    copy_folder(source, folder)

    def run(**changes: Any) -> bool:
        reads = {"file": source, "folder": folder, "list": [source], "digest": "a", **changes}
        settings = {"nested": {"options": [Options()]}, "number": 1}
        return run_stage(
            "s", 1, out, lambda job: job.path.touch(), reads=reads, settings=settings, summary=str
        ).computed

    assert run()
    assert not run(none=None)
    assert [run(digest="b"), run(list=[source, source]), run(folder=None)] == [True] * 3
    sidecar = read_sidecar(out)
    assert sidecar is not None
    assert sidecar.settings == {"nested": {"options": [{"times": 1}]}, "number": 1}
    with pytest.raises(UserError, match=r"nothing\.txt: no such file"):
        run(list=[tmp_path / "nothing.txt"])


@pytest.mark.parametrize("damage", ["change", "remove", "beside", "sidecar", "folder", "added"])
def test_a_damaged_output_is_refused_as_an_input_and_computed_again(
    source: Path, tmp_path: Path, damage: str
) -> None:
    is_folder = damage in ("folder", "added")
    run, out = (copy_folder, tmp_path / "x") if is_folder else (copy_file, tmp_path / "x.json")
    run(source, out)
    check_intact(out)
    if damage == "remove":
        out.unlink()
    else:
        files = {
            "change": out,
            "beside": out.with_suffix(".note"),
            "sidecar": sidecar_path(out),
            "folder": out / "inner" / "text",
            "added": out / "inner" / "new",
        }
        files[damage].write_text("abd")
    with pytest.raises(UserError, match=r"not what was written|not as fmn|no such file"):
        copy_file(out, tmp_path / "next.json")
    assert run(source, out).computed
    check_intact(out)


def test_a_card_may_be_edited(source: Path, tmp_path: Path) -> None:
    copy_folder(source, tmp_path / "folder")
    (tmp_path / "folder" / "README.md").write_text("mine")
    check_intact(tmp_path / "folder")
    assert not copy_folder(source, tmp_path / "folder").computed


@pytest.mark.parametrize(
    "content",
    ["", "[" * 10**5, '{"files":' * 10**5, '{"files": {}}', '{"stage": 1, "key": "", "files": {}}'],
)
def test_what_is_no_sidecar_is_not_read(source: Path, tmp_path: Path, content: str) -> None:
    sidecar_path(source).write_text(content)
    assert read_sidecar(source) is None
    with pytest.raises(UserError, match=r"fmn\.json: not as fmn writes it; make .* again"):
        check_intact(source)
    with pytest.raises(UserError, match=r"make .* again"):
        read_info(source, Count)


def test_a_record_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "count.json"
    write_record(path, Count(letters=2))
    assert read_record(path, Count) == Count(letters=2)
    for content in ("", "NaN", "{}", "[" * 10**5):
        path.write_text(content)
        with pytest.raises(UserError, match=r"count\.json: .*; count again"):
            read_record(path, Count, "count again")
    with pytest.raises(UserError, match="no such file"):
        read_record(tmp_path / "none.json", Count)


def test_a_stage_that_fails_leaves_what_was_there(source: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file.json"
    copy_folder(source, folder)
    copy_file(source, file)
    before = names(tmp_path)
    source.write_text("new")
    for run, out in ((copy_folder, folder), (copy_file, file)):
        with pytest.raises(RuntimeError, match="stopped"):
            run(source, out, before=fail)
        check_intact(out)
    assert names(tmp_path) == before


def test_a_kill_while_files_are_moved_is_repaired(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[Path] = []

    def replace(path: Path, target: Path) -> None:
        if moves:
            raise RuntimeError("killed")
        moves.append(path.rename(target))

    out = tmp_path / "out.json"
    with monkeypatch.context() as patches:
        patches.setattr(Path, "replace", replace)
        with pytest.raises(RuntimeError, match="killed"):
            copy_file(source, out)
    assert moves == [sidecar_path(out)]
    with pytest.raises(UserError, match="not what was written"):
        check_intact(out)
    assert copy_file(source, out).computed
    check_intact(out)


def test_an_output_is_computed_once_by_two_at_once(source: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(lambda _: copy_folder(source, tmp_path / "out"), range(8)))
    assert [outcome.computed for outcome in outcomes].count(True) == 1


def test_what_fmn_did_not_write_is_not_replaced(source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letters").write_text("dear")
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(UserError, match="mine: fmn did not make it"):
        copy_folder(source, mine)
    with pytest.raises(UserError, match=r"mine\.json: fmn did not make it"):
        copy_file(source, tmp_path / "mine.json")
    with pytest.raises(UserError, match="mine: name a file of its own"):
        copy_file(source, mine)
    assert (mine / "letters").read_text() == "dear"


def test_a_file_beside_the_output_that_fmn_did_not_write_is_not_replaced(
    source: Path, tmp_path: Path
) -> None:
    out, note = tmp_path / "out.json", tmp_path / "out.note"
    note.write_text("mine")
    with pytest.raises(UserError, match=r"out\.note: fmn did not make it, and out\.json needs"):
        copy_file(source, out)
    assert note.read_text() == "mine"
    assert names(tmp_path) == ["out.note", "source.txt"]
    note.unlink()
    copy_file(source, out)
    assert copy_file(source, out, Options(times=2)).computed  # replaces its own


def test_what_is_read_is_not_changed(source: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copyfile(source, model / "config.json")
    (tmp_path / "link.txt").symlink_to(source)
    for out in (source, tmp_path / "link.txt", model / ".." / "source.txt"):
        with pytest.raises(UserError, match=r"would change .*, which is read"):
            copy_file(source, out)
    with pytest.raises(UserError, match="would change"):
        copy_folder(source, tmp_path)
    with pytest.raises(UserError, match="would change"):
        stage.check_output(model / "new", [[source, model]])
    assert names(tmp_path) == ["link.txt", "model", "source.txt"]


@pytest.mark.parametrize("room", [0, 100_000])
def test_a_full_disk_is_explained_and_the_next_run_goes_on(
    source: Path, small_disk: Path, room: int
) -> None:
    source.write_text("abc" * 100_000)
    out = small_disk / "out"
    filler = fill(small_disk, room)
    with pytest.raises(UserError, match=f"^{out}: no space left on the disk of {small_disk} "):
        copy_folder(source, out)
    assert not out.exists()
    filler.unlink()
    assert copy_folder(source, out).computed


def test_a_read_only_disk_is_explained(source: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=f"{small_disk}.*: the file system is read-only"):
        copy_folder(source, small_disk / "out")


@pytest.fixture
def forbidden() -> Iterator[Path]:
    """A folder that this process may not write to, in a place that others may read."""
    folder = Path(tempfile.mkdtemp(prefix="fmn-forbidden-", dir="/tmp"))
    (folder / "source").write_text("abc")
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)  # nobody
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_missing_permission_is_explained(forbidden: Path) -> None:
    with pytest.raises(UserError, match=f"{forbidden}/.*: no permission; give this user the right"):
        copy_folder(forbidden / "source", forbidden / "out")
