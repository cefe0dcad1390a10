"""What a merged model's folder says of itself, and whether it is still so."""

import json
from pathlib import Path

import pytest

from fmn.errors import UserError
from fmn.merge import recipe
from fmn.store.artifacts import digest_files

MADE = {"tasks": ["mrpc"], "method": "average", "coefficients": {"mrpc": 1.0}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tasks" / "mrpc").mkdir(parents=True)
    (tmp_path / "tasks" / "mrpc" / "config.json").write_text("{}")
    content = {"format": recipe.FORMAT, **MADE, "files": digest_files(tmp_path)}
    (tmp_path / recipe.RECIPE).write_text(json.dumps(content))
    return tmp_path


def test_a_merged_model_is_told_from_a_checkpoint(folder: Path) -> None:
    assert recipe.is_merged(folder)
    assert not recipe.is_merged(folder / "tasks" / "mrpc")


def test_an_unchanged_folder_is_accepted_and_its_card_may_change(folder: Path) -> None:
    (folder / recipe.CARD).write_text("a new card")
    recipe.verify(folder)


@pytest.mark.parametrize("change", ["change", "add", "remove"])
def test_the_file_that_changed_is_named(folder: Path, change: str) -> None:
    file = folder / "tasks" / "mrpc" / ("extra.json" if change == "add" else "config.json")
    file.unlink(missing_ok=True) if change == "remove" else file.write_text('{"a": 1}')
    with pytest.raises(UserError, match=file.name):
        recipe.verify(folder)


def test_a_task_that_is_not_there_is_named_with_those_that_are(folder: Path) -> None:
    assert recipe.task_folder(folder, "mrpc") == folder / "tasks" / "mrpc"
    with pytest.raises(UserError, match=r"'rte'.*mrpc"):
        recipe.task_folder(folder, "rte")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 10**5, '{"format": 99}', '{"format": 1}'])
def test_what_is_no_recipe_is_refused(folder: Path, text: str) -> None:
    (folder / recipe.RECIPE).write_text(text)
    with pytest.raises(UserError, match="merge"):
        recipe.read_recipe(folder)


def test_a_recipe_that_says_something_else_than_was_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("weights")
    recipe.write_recipe(
        tmp_path, {"format": recipe.FORMAT, **MADE, "scale": 1.5, "files": digest_files(tmp_path)}
    )
    recipe.verify(tmp_path)
    file = tmp_path / recipe.RECIPE
    for scale in ("1.7", "NaN"):
        file.write_text(file.read_text().replace("1.5", scale))
        with pytest.raises(UserError, match=r"merge\.json: not what was written there"):
            recipe.verify(tmp_path)
        file.write_text(file.read_text().replace(scale, "1.5"))
