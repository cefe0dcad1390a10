"""What a merged model's folder says of itself."""

from pathlib import Path

import pytest

from fmn.errors import UserError
from fmn.merge import recipe
from fmn.merge.recipe import RECIPE, MergeSettings, Recipe, read_recipe, task_folder
from fmn.store.stage import write_record

SMALL = Recipe(tasks=["mrpc"], method="average", coefficients={"mrpc": 1.0})


def test_a_recipe_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert not recipe.is_merged(tmp_path)
    write_record(tmp_path / RECIPE, SMALL)
    assert recipe.is_merged(tmp_path)
    assert read_recipe(tmp_path) == SMALL
    assert task_folder(tmp_path, "mrpc") == tmp_path / "tasks" / "mrpc"
    with pytest.raises(UserError, match=r"'rte'.*mrpc"):
        task_folder(tmp_path, "rte")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "[" * 10**5, '{"format": 99}', SMALL.model_dump_json(exclude={"method"})],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / RECIPE).write_text(text)
    with pytest.raises(UserError, match=r"merge\.json.*`fmn merge`"):
        read_recipe(tmp_path)


def test_the_card_says_how_a_task_loads() -> None:
    text = recipe.card(SMALL)
    assert 'from_pretrained("tasks/mrpc")' in text
    assert "method average;" in text


def test_settings_that_the_method_does_not_use_are_left_out() -> None:
    assert set(MergeSettings(method="average").used()) == {"method", "coefficient", "scale"}
    assert set(MergeSettings().used("scale")) == {
        *("method", "coefficient", "mapping", "normalise", "exponent")
    }
    assert {"density", "seed"} < set(MergeSettings(method="dare-ties").used())
    assert "damping" in MergeSettings(method="regmean").used()
    with pytest.raises(ValueError, match="did you mean 'mask-fisher'"):
        MergeSettings(method="mask-fischer")


@pytest.mark.parametrize("coefficient", ["sst2=x", "sst2=nan", "sst2=-1", "sst2", "sst2=1 sst2=2"])
def test_coefficients_that_are_no_numbers_are_refused(coefficient: str) -> None:
    with pytest.raises(ValueError, match="sst2"):
        MergeSettings(coefficient=coefficient.split())
