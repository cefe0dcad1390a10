"""The one stage rule: an output is whole, current, and says what it was made from."""

import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fmn.errors import UserError
from fmn.store.records import Record, Settings
from fmn.store.stage import (
    InputChangedError,
    Job,
    NotCurrentError,
    Outcome,
    check_intact,
    check_output,
    only_current,
    read_info,
    read_record,
    read_sidecar,
    run_stage,
    sidecar_path,
    write_record,
)
from tests.folders import fill


class Count(Record):
    letters: int


class Options(Settings):
    times: int = 1
    device: str = "cpu"


DEFAULTS = Options()
Then = Callable[[], object]  # called at the end of the computation


def copy(
    source: Path,
    out: Path,
    settings: Options = DEFAULTS,
    then: Then = lambda: None,
    name: str = "copy",
) -> Outcome[Count]:
    """A stage that writes two files: side by side, or into a folder (a name without suffix)."""
    is_folder = not out.suffix

    def compute(job: Job) -> Count:
        path = job.path / "text" if is_folder else job.path
        text = source.read_text() * settings.times
        path.write_text(text)
        path.with_suffix(".note").write_text("beside")
        then()
        return Count(letters=len(text))

    reads, keys, count = (
        {"source": source},
        {"settings": settings},
        partial(read_info, record=Count),
    )
    return run_stage(
        name, 1, out, compute, reads=reads, settings=keys, summary=count, is_folder=is_folder
    )


def fail() -> None:
    raise RuntimeError("stopped")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.txt"
    path.write_text("abc")
    return path


@pytest.fixture(params=["new/out", "new/out.json"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An output, a folder or a file, in a folder that does not exist yet."""
    return tmp_path / str(request.param)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_output_is_computed_again_only_when_an_input_or_a_setting_changes(
    source: Path, out: Path
) -> None:
    first = copy(source, out)
    assert (first.stage, first.out, first.computed, first.summary.letters) == ("copy", out, True, 3)
    again = copy(source, out)
    assert (again.computed, again.summary) == (False, first.summary)
    assert not copy(source, out, Options(device="cuda")).computed  # changes no result
    assert copy(source, out, Options(times=2)).summary.letters == 6
    source.write_text("d")
    assert copy(source, out, Options(times=2)).computed
    assert (out / "text" if out.is_dir() else out).read_text() == "dd"


def test_the_sidecar_says_what_an_output_was_made_from(source: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "out.json", tmp_path / "folder"
    copy(source, out)
    sidecar = read_sidecar(out)
    assert sidecar is not None
    assert (sidecar.stage, list(sidecar.inputs)) == ("copy", ["source"])
    assert sidecar.settings == {"settings": {"times": 1}}
    assert sorted(sidecar.files) == ["out.json", "out.note"]
    copy(source, folder)
    assert sidecar_path(folder) == folder / "fmn.json"
    assert names(folder) == ["fmn.json", "text", "text.note"]
    assert names(tmp_path) == ["folder", "out.json", "out.json.fmn.json", "out.note", "source.txt"]


def test_inputs_are_files_folders_lists_of_them_or_digests(source: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "folder", tmp_path / "out.txt"
    copy(source, folder)

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


@pytest.mark.parametrize(
    "damaged", ["x.json", "x.note", "x.json.fmn.json", "x.json is removed", "x/text", "x/added"]
)
def test_a_damaged_output_is_refused_as_an_input_and_computed_again(
    source: Path, tmp_path: Path, damaged: str
) -> None:
    out = tmp_path / ("x" if damaged.startswith("x/") else "x.json")
    copy(source, out)
    check_intact(out)
    if damaged.endswith("removed"):
        out.unlink()
    else:
        (tmp_path / damaged).write_text("abd")
    with pytest.raises(UserError, match=r"not what was written|not as fmn|no such file"):
        copy(out, tmp_path / "next.json")
    assert copy(source, out).computed
    check_intact(out)


@pytest.mark.parametrize(
    "content",
    ["", "[" * 10**5, '{"files":' * 10**5, '{"files": {}}', '{"stage": 1, "key": "", "files": {}}'],
)
def test_what_is_no_sidecar_is_not_read(source: Path, content: str) -> None:
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


def test_a_stage_that_fails_leaves_what_was_there(source: Path, out: Path) -> None:
    copy(source, out)
    before = names(out.parent)
    source.write_text("new")
    with pytest.raises(RuntimeError, match="stopped"):
        copy(source, out, then=fail)
    check_intact(out)
    assert names(out.parent) == before


@pytest.mark.parametrize("result", [lambda: None, fail])
@pytest.mark.parametrize("content", ["other", None])
def test_an_input_that_another_process_replaces_is_reported(
    source: Path, out: Path, content: str | None, result: Then
) -> None:
    def replace() -> None:
        source.unlink()
        if content:
            source.write_text(content)
        result()

    problem = r"input source changed while|source\.txt: no such file"
    with pytest.raises(InputChangedError, match=problem):
        copy(source, out, then=replace)
    assert names(out.parent) == []


def test_an_input_that_vanishes_while_it_is_digested_is_reported(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(path: Path) -> str:
        path.unlink()
        return path.read_text()

    monkeypatch.setattr("fmn.store.artifacts.digest_file", digest)
    problem = r"source\.txt: was removed while it was read; run again"
    with pytest.raises(InputChangedError, match=problem):
        copy(source, out)


def test_a_kill_while_files_are_moved_is_repaired(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"

    def replace(path: Path, target: Path) -> None:
        if sidecar_path(out).exists():
            raise RuntimeError("killed")
        path.rename(target)

    with monkeypatch.context() as patches:
        patches.setattr(Path, "replace", replace)
        with pytest.raises(RuntimeError, match="killed"):
            copy(source, out)
    assert names(tmp_path) == ["out.json.fmn.json", "source.txt"]
    with pytest.raises(UserError, match="not what was written"):
        check_intact(out)
    assert copy(source, out).computed
    check_intact(out)


def test_an_output_is_computed_once_by_two_at_once(source: Path, out: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(lambda _: copy(source, out), range(8)))
    assert [outcome.computed for outcome in outcomes].count(True) == 1


def test_what_fmn_did_not_write_is_not_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    mine = ["mine/letters", "mine.json", "out.note"]
    for name in mine:
        (tmp_path / name).write_text("dear")
    (tmp_path / "empty").touch()
    (tmp_path / "empty.txt").mkdir()
    before = names(tmp_path)
    for out, problem in (
        ("mine", "mine: fmn did not make it"),
        ("mine.json", r"mine\.json: fmn did not make it"),
        ("out.json", r"out\.note: fmn did not make it, and out\.json needs"),
        ("empty", "empty: name a folder of its own"),
        ("empty.txt", r"empty\.txt: name a file of its own"),
    ):
        with pytest.raises(UserError, match=problem):
            copy(source, tmp_path / out)
    assert names(tmp_path) == before
    assert {(tmp_path / name).read_text() for name in mine} == {"dear"}
    (tmp_path / "out.note").unlink()
    copy(source, tmp_path / "out.json")
    assert copy(source, tmp_path / "out.json", Options(times=2)).computed  # replaces its own


def test_the_output_of_another_stage_is_not_replaced(source: Path, out: Path) -> None:
    copy(source, out, name="fetch")
    with pytest.raises(
        UserError, match=rf"^--out {out}: holds the output of `fmn fetch`; choose another --out"
    ):
        copy(source, out, name="report")
    check_intact(out)
    assert not copy(source, out, name="fetch").computed


def test_what_is_read_is_not_changed(source: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copyfile(source, model / "config.json")
    (tmp_path / "link.txt").symlink_to(source)
    for out in (source, tmp_path / "link.txt", model / ".." / "source.txt", tmp_path):
        with pytest.raises(UserError, match=r"would change .*, which is read"):
            copy(source, out)
    with pytest.raises(UserError, match="would change"):
        check_output(model / "new", [[source, model]])
    assert names(tmp_path) == ["link.txt", "model", "source.txt"]


@pytest.mark.parametrize("room", [0, 100_000])
def test_a_full_disk_is_explained_and_the_next_run_goes_on(
    source: Path, small_disk: Path, room: int
) -> None:
    source.write_text("abc" * 100_000)
    out = small_disk / "out"
    filler = fill(small_disk, room)
    with pytest.raises(UserError, match=f"^{out}: no space left on the disk of {small_disk} "):
        copy(source, out)
    assert not out.exists()
    filler.unlink()
    assert copy(source, out).computed


def test_a_read_only_disk_is_explained(source: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=f"{small_disk}.*: the file system is read-only"):
        copy(source, small_disk / "out")


def test_where_nothing_may_be_computed_only_a_current_output_passes(
    source: Path, tmp_path: Path
) -> None:
    copy(source, out := tmp_path / "copy.txt")
    allowed = only_current.set(True)
    try:
        assert not copy(source, out).computed
        source.write_text("other")
        with pytest.raises(NotCurrentError, match=r"copy\.txt: not up to date"):
            copy(source, out)
    finally:
        only_current.reset(allowed)
    assert out.read_text() == "abc"
    assert copy(source, out).computed
