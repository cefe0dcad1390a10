"""The one stage rule: an output is whole, current, and says what it was made from."""

import os
from pathlib import Path

import pytest

from fmn.errors import UserError
from fmn.store.records import Record, Settings
from fmn.store.stage import (
    Job,
    Outcome,
    check_intact,
    read_info,
    read_sidecar,
    run_stage,
    sidecar_path,
)


class Count(Record):
    """How many letters an output holds."""

    letters: int


class Options(Settings):
    times: int = 1
    device: str = "cpu"


def copy_text(source: Path, out: Path, settings: Options | None = None) -> Outcome[Count]:
    """A stage whose output is a file, with a second file beside it."""
    settings = settings or Options()

    def compute(job: Job) -> Count:
        text = source.read_text() * settings.times
        job.path.write_text(text)
        job.path.with_suffix(".note").write_text("beside")
        return Count(letters=len(text))

    return run_stage(
        "copy",
        1,
        out,
        compute,
        reads={"source": source},
        settings={"settings": settings},
        summary=lambda path: read_info(path, Count),
    )


def copy_folder(source: Path, out: Path, fails: bool = False) -> Outcome[Count]:
    """A stage whose output is a folder."""

    def compute(job: Job) -> Count:
        (job.path / "inner").mkdir()
        (job.path / "inner" / "text").write_text(source.read_text())
        if fails:
            raise RuntimeError("half way")
        return Count(letters=1)

    return run_stage(
        "folder",
        1,
        out,
        compute,
        reads={"source": source},
        settings={},
        summary=lambda path: read_info(path, Count),
        is_folder=True,
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.txt"
    path.write_text("abc")
    return path


def test_an_output_is_computed_once_and_again_when_an_input_or_a_setting_changes(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "made" / "out.json"
    first = copy_text(source, out)
    assert first.computed
    assert first.summary == Count(letters=3)
    assert not copy_text(source, out).computed
    assert not copy_text(source, out, Options(device="cuda")).computed  # changes no result
    assert copy_text(source, out, Options(times=2)).summary.letters == 6
    source.write_text("d")
    assert copy_text(source, out, Options(times=2)).computed
    assert out.read_text() == "dd"


def test_the_sidecar_says_what_an_output_was_made_from(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    copy_text(source, out)
    sidecar = read_sidecar(out)
    assert sidecar is not None
    assert sidecar.stage == "copy"
    assert list(sidecar.inputs) == ["source"]
    assert sidecar.settings == {"settings": {"times": 1}}
    assert sorted(sidecar.files) == ["out.json", "out.note"]
    copy_folder(source, tmp_path / "folder")
    assert sidecar_path(tmp_path / "folder") == tmp_path / "folder" / "fmn.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "folder",
        "out.json",
        "out.json.fmn.json",
        "out.note",
        "source.txt",
    ]


@pytest.mark.parametrize("damage", ["change", "remove", "beside"])
def test_a_damaged_output_is_refused_as_an_input_and_computed_again(
    source: Path, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "out.json"
    copy_text(source, out)
    if damage == "change":
        out.write_text("abd")
    elif damage == "remove":
        out.unlink()
    else:
        out.with_suffix(".note").write_text("other")
    with pytest.raises(UserError, match="not what was written"):
        check_intact(out)
    assert copy_text(source, out).computed
    assert out.read_text() == "abc"
    check_intact(out)


def test_an_added_file_in_a_folder_is_damage_but_for_the_card(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "folder"
    copy_folder(source, out)
    (out / "README.md").write_text("mine")
    check_intact(out)
    (out / "extra").write_text("x")
    with pytest.raises(UserError, match="extra: not what was written"):
        check_intact(out)


def test_a_stage_that_fails_leaves_what_was_there(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "folder"
    copy_folder(source, out)
    source.write_text("new")
    with pytest.raises(RuntimeError):
        copy_folder(source, out, fails=True)
    assert (out / "inner" / "text").read_text() == "abc"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "source.txt"]


def test_what_fmn_did_not_write_is_not_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "letters").write_text("dear")
    with pytest.raises(UserError, match="did not make"):
        copy_folder(source, out)
    file = tmp_path / "mine.json"
    file.write_text("{}")
    with pytest.raises(UserError, match="did not make"):
        copy_text(source, file)


def test_an_output_must_not_be_an_input_nor_lie_in_a_model_that_is_read(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="would change"):
        copy_text(source, source)
    with pytest.raises(UserError, match="would change"):
        copy_folder(source, tmp_path)


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.txt: no such file"):
        copy_text(tmp_path / "nothing.txt", tmp_path / "out.json")


def test_a_full_disk_is_explained_with_the_output(source: Path, tmp_path: Path) -> None:
    def compute(job: Job) -> None:
        raise OSError(os.strerror(28)) from OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"out.json: no space left on the disk of"):
        run_stage(
            "copy",
            1,
            tmp_path / "out.json",
            compute,
            reads={"source": source},
            settings={},
            summary=lambda path: None,
        )
