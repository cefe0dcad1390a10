"""The model card: what the Hub reads of it, and what people read."""

from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from fmn.report.card import card
from fmn.tasks.task import get_task
from tests import reports
from tests.kinds import TASKS as KINDS
from tests.reports import CLASSES, COMMIT, NUMBERS, own_task

ENTRIES: dict[str, Any] = {
    "mnli": {
        "accuracy": 0.7,
        "examples": 30,
        "accuracy_mismatched": 0.6,
        "examples_mismatched": 20,
        "score": 0.65,
        "interval": {"accuracy": [0.651, 0.749], "accuracy_mismatched": [0.55, 0.65]},
    },
    "stsb": {"pearson": 0.9, "spearmanr": 0.8, "score": 0.85, "examples": 1500, "interval": {}},
}
DATA = {
    "mnli": {"source": "hub", "revision": "abc", "splits": {}},
    "stsb": {"source": "embedded", "seed": 3, "splits": {}},
}


def text(**more: Any) -> str:
    recipe = reports.recipe(["mnli", "stsb"], **more)
    tasks = [get_task(name) for name in ENTRIES]
    return card(recipe, reports.metrics(ENTRIES, tasks, data=DATA))


def front_matter(card_text: str) -> tuple[ModelCardData, dict[str, Any]]:
    data = ModelCard(card_text).data
    content: dict[str, Any] = data.to_dict()  # type: ignore[no-untyped-call]
    return ModelCardData(**content), content


def test_the_front_matter_is_what_the_hub_reads() -> None:
    data, content = front_matter(text())
    assert data.base_model == ["org/some-base-uncased-mnli", "org/some-base-uncased-stsb"]
    assert content["base_model_relation"] == "merge"
    assert data.datasets == ["nyu-mll/glue"]
    assert data.metrics == ["accuracy", "pearsonr", "spearmanr"]
    assert content["pipeline_tag"] == "text-classification"
    name, results = model_index_to_eval_results(content["model-index"])
    assert name == "fmn mask-fisher of mnli, stsb"
    values = {
        (result.dataset_config, result.dataset_split, result.metric_type): result.metric_value
        for result in results
    }
    assert values == {
        ("mnli", "validation_matched", "accuracy"): 0.7,
        ("mnli", "validation_mismatched", "accuracy"): 0.6,
        ("stsb", "validation", "pearsonr"): 0.9,
        ("stsb", "validation", "spearmanr"): 0.8,
    }
    by_task = {result.dataset_config: result for result in results}
    mnli, stsb = by_task["mnli"], by_task["stsb"]
    assert (mnli.dataset_type, mnli.dataset_revision) == ("nyu-mll/glue", "abc")
    assert stsb.dataset_type != "nyu-mll/glue", "made-up data does not pass for GLUE"


def test_the_card_reads_well() -> None:
    search = {"digest": "", "score": 0.93, "uniform": 0.91}
    shown = text(coefficients={"mnli": 1.0, "stsb": 0.5}, search=search)
    for words in (
        "# mnli, stsb: one model, merged with mask-fisher",
        "| mnli | accuracy | validation_matched | 70.00 | 65.1 to 74.9 | 30 |",
        "| mean | score |  | 75.00 | 70.0 to 80.0 |  |",
        f"| stsb | `hf://org/some-base-uncased-stsb@{COMMIT}` | `012345` | 0.5 |"
        " mask Fisher of 1024 examples, empirical |",
        "[arXiv 2403.09891](https://arxiv.org/abs/2403.09891)",
        "mapping structured, normalise kind, exponent 1.0, scale 1.732, coefficients and scale by"
        " search on the training data (93.0 % of the experts' scores there",
        "entailment, neutral, contradiction | accuracy | 128 | GLUE, revision abc |",
        "| stsb | regression |  | pearson + spearmanr | 128 | miniature GLUE, seed 3 |",
        "`fmn reproduce models:/NAME/VERSION`",
        "## Limits",
        "no measure of English",
    ):
        assert words in shown, words


def test_local_experts_are_no_base_models_of_the_hub() -> None:
    names = {"mnli": "finetune:0123", "stsb": "sha256:0123"}
    experts = {task: reports.checkpoint(revision) for task, revision in names.items()}
    data, content = front_matter(text(experts=experts, base=None))
    assert data.base_model is None
    assert "base_model_relation" not in content


def test_own_tasks_are_told_in_the_hubs_words_and_names_are_text() -> None:
    odd = own_task(CLASSES, "f1_macro", "roc_auc", name="odd", labels=40)
    odd = odd.model_copy(update={"labels": ("<b>|x", "*a*\nb", *odd.labels[2:]), "max_length": 512})
    price, flat = own_task(NUMBERS, "mse", name="price"), own_task(NUMBERS, "r2", name="flat")
    entries: dict[str, Any] = {
        "odd": {"f1_macro": 0.5, "roc_auc": 0.75, "score": 0.625, "examples": 9, "interval": {}},
        "price": {"mse": 12.34567, "score": 12.34567, "examples": 9, "interval": {"mse": [9, 16]}},
        "flat": {"r2": None, "score": None, "examples": 9, "interval": {"r2": None}},
    }
    rows = {"source": "org/odd-texts", "revision": "abc", "splits": {}}
    data = {"odd": rows, "price": {"source": "/home/me/prices.csv", "splits": {}}}
    metrics = reports.metrics(entries, [odd, price, flat], data=data, unlabeled=["bare"])
    shown = card(reports.recipe(list(entries)), metrics)
    data_of_card, content = front_matter(shown)
    assert data_of_card.metrics == ["f1", "mse", "r_squared", "roc_auc"]
    assert data_of_card.datasets == ["org/odd-texts"]
    assert "language" not in content
    _, results = model_index_to_eval_results(content["model-index"])
    assert [(each.metric_type, each.metric_args, each.dataset_type) for each in results] == [
        ("f1", {"average": "macro"}, "org/odd-texts"),
        ("roc_auc", None, "org/odd-texts"),
        ("mse", None, "price"),
    ]
    for words in (
        "| odd | f1_macro | validation | 50.00 | – | 9 |",
        "| price | mse (less is better) | validation | 12.35 | 9 to 16 | 9 |",
        "| flat | r2 | validation | undefined | – | 9 |",
        "| mean | score | of odd | 62.50 |",
        r"\<b>\|x, \*a\* b, label 2, label 3, label 4, label 5, label 6, label 7, ... (40 labels)",
        "| f1 macro + roc auc | 512 | org/odd-texts, revision abc |",
        "| mse (less is better) | 128 | prices.csv |",
        "- flat: undefined: its labels or answers here do not define r2",
        "- mean score: over odd; without price and flat",
        "- bare: not scored, as its rows have no labels",
    ):
        assert words in shown, words


def of_kinds(*names: str) -> str:
    """The card of tasks of these kinds, each with the score 0.5 in all its metrics."""
    tasks = {name: KINDS[name] for name in names}
    entries = {
        name: dict.fromkeys(task.metrics, 0.5) | {"score": 0.5, "examples": 9, "interval": {}}
        for name, task in tasks.items()
    }
    definitions = {name: task.model_dump(mode="json") for name, task in tasks.items()}
    recipe = reports.recipe([*names], definitions=definitions)
    return card(recipe, reports.metrics(entries, [*tasks.values()], data={}))


@pytest.mark.parametrize(
    ("names", "tag", "library", "usage"),
    [
        (["ner"], "token-classification", "transformers", 'e("token-classification", "tasks/ner")'),
        (["flowers"], "image-classification", "transformers", '"tasks/flowers")'),
        (["similar"], "sentence-similarity", "sentence-transformers", "import SentenceTransformer"),
        (["chat"], "text-generation", "transformers", 'AutoModelForCausalLM.from_pretrained("tas'),
        (["sums"], "text2text-generation", "transformers", "import AutoModelForSeq2SeqLM"),
        (["mood", "ner", "similar"], None, "transformers", 'SentenceTransformer("tasks/similar")'),
    ],
)
def test_every_kind_is_tagged_and_loaded_as_its_library_does(
    names: list[str], tag: str | None, library: str, usage: str
) -> None:
    shown = of_kinds(*names)
    _, content = front_matter(shown)
    assert content.get("pipeline_tag") == tag
    assert content["library_name"] == library
    assert usage in shown
    block = shown.split("```python")[1].split("```")[0]
    compile(block, "usage", "exec")
    assert ("a head for each task" in shown) == any(KINDS[name].kind.has_head for name in names)
    assert {"token-classification", "text-classification"} <= {*content["tags"]} or len(names) == 1


def test_perplexity_is_no_percentage_beside_an_exact_match_that_is_one() -> None:
    task = KINDS["chat"].model_copy(update={"metrics": ("perplexity", "exact_match")})
    entry = {"perplexity": 5.25, "exact_match": 0.5, "score": 5.25, "examples": 9, "interval": {}}
    recipe = reports.recipe(["chat"], definitions={"chat": task.model_dump(mode="json")})
    shown = card(recipe, reports.metrics({"chat": entry}, [task], data={}))
    assert "| chat | perplexity (less is better) | validation | 5.25 |" in shown
    assert "| chat | exact_match | validation | 50.00 |" in shown
    assert "## Scores on the validation splits\n" in shown
    assert "## Scores on the validation splits, in percent\n" in text()
    assert "| task | metric | split | score |" in shown
    assert "chat: perplexity (less is better); a plain number, no percentage" in shown
