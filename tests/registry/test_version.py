"""The metrics, tags and page of a registered version, without MLflow."""

import json
from pathlib import Path

import pytest

from fmn.evaluate.files import Metrics, read_metrics
from fmn.merge.recipe import read_recipe
from fmn.registry import stages as registry_stages
from fmn.registry.promotion import Decision, Standing
from fmn.registry.version import Baselines, grouped_metrics, page, read_baselines, version_tags
from fmn.tasks.task import Columns, Task
from tests.kinds import TASKS as KINDS
from tests.registry.conftest import Merged


@pytest.fixture
def undefined(merged: Merged) -> Metrics:
    """Metrics without a score of stsb, and so without a mean."""
    metrics = read_metrics(merged.metrics)
    stsb = metrics.tasks["stsb"].model_copy(update={"score": None, "interval": {"score": None}})
    changes = {"tasks": metrics.tasks | {"stsb": stsb}, "score": None, "interval": None}
    return metrics.model_copy(update=changes)


def test_undefined_scores_are_named_in_tags_and_not_logged(
    merged: Merged, undefined: Metrics
) -> None:
    logged = grouped_metrics(undefined, Baselines())
    assert logged["score/sst2"] == undefined.tasks["sst2"].score
    assert {"score/mean", "score/stsb"}.isdisjoint(logged)
    price = Task(
        name="price", columns=Columns(text="text"), problem_type="regression", metrics=("mse",)
    )
    definitions = undefined.definitions | {"price": price}
    recipe = read_recipe(merged.model)
    assert version_tags(undefined, recipe, definitions, Baselines())["score"] == "undefined"
    tags = registry_stages._standing_tags(undefined, definitions)
    scores = json.loads(tags["fmn.scores"])
    assert (scores["stsb"], scores["price"]) == (None, None)
    assert json.loads(tags["fmn.errors"]) == ["price"]


def test_without_a_report_there_are_no_baselines(merged: Merged, tmp_path: Path) -> None:
    metrics = read_metrics(merged.metrics)
    assert read_baselines(None, metrics) == Baselines()
    assert read_baselines(tmp_path, metrics) == Baselines(), "not a folder of `fmn report`"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("mood", 'pd.DataFrame([{"text": "A warm and funny film."}])'),
        ("ner", 'pd.DataFrame([{"text": "A warm and funny film."}])'),
        ("flowers", 'pd.DataFrame([{"image": image}])'),
    ],
)
def test_a_page_has_code_scores_and_the_change(
    merged: Merged, undefined: Metrics, name: str, code: str
) -> None:
    uri, definitions = "models:/demo/2", {name: KINDS[name]}
    old = Standing("1", {"sst2": undefined.tasks["sst2"].score}, (), "")
    decision, recipe = Decision("challenger", "a <b> reason"), read_recipe(merged.model)
    text = page(uri, merged.model, recipe, undefined, definitions, Baselines(), decision, old)
    assert text.startswith("**Challenger**: a \\<b> reason.")
    assert code in text
    assert "less version 1's |" in text
    assert "| stsb&emsp;| undefined" in text
