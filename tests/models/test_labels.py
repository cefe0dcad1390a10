"""Labels in another order: read from names, or found in training data."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmn.errors import UserError
from fmn.models import checkpoints, labels
from fmn.models.labels import Labels
from fmn.tasks.task import TASKS, get_task
from tests.folders import WORDS, edit_config, tiny_bert

MNLI = get_task("mnli")


@pytest.mark.parametrize(
    ("name", "names", "order"),
    [
        ("mnli", ["contradict", "entail", "neutral"], [1, 2, 0]),
        ("mrpc", ["not_paraphrase", "paraphrase"], [0, 1]),
        ("mrpc", ["Equivalent", "not equivalent"], [1, 0]),
        ("qqp", ["duplicate", "not-duplicate"], [1, 0]),
        ("sst2", ["POSITIVE", "NEGATIVE"], [1, 0]),
        ("stsb", ["LABEL_0"], [0]),
    ],
)
def test_names_that_mean_something_give_the_order(
    name: str, names: list[str], order: list[int]
) -> None:
    assert labels.by_names(get_task(name), names) == Labels(order=order, origin="names")


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("mnli", ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ("mnli", ["entailment", "neutral", "LABEL_2"]),
        ("mnli", ["entailment", "entail", "neutral"]),
        ("mnli", ["entailment", "neutral"]),
        ("sst2", ["acceptable", "unacceptable"]),
        ("cola", []),
    ],
)
def test_names_that_mean_nothing_give_none(name: str, names: list[str]) -> None:
    assert labels.by_names(get_task(name), names) is None


def test_the_tasks_own_names_mean_themselves() -> None:
    for task in TASKS.values():
        own = labels.by_names(task, task.labels or ("score",))
        assert own is not None
        assert labels.names_by_output(task, own) == list(task.labels or ("score",))
        assert labels.notes({task.name: own}) == []


@given(st.permutations(range(3)))
def test_names_by_output_are_read_back_as_the_same_order(order: list[int]) -> None:
    names = labels.names_by_output(MNLI, Labels(order=order, origin="training data"))
    assert labels.by_names(MNLI, names) == Labels(order=order, origin="names")
    assert [names[output] for output in order] == list(MNLI.labels)


def outputs(
    right: np.ndarray, accuracy: float, meanings: Sequence[int], seed: int = 0
) -> np.ndarray:
    """Logits [N, C] of a model with a share of labels right; output o means label meanings[o]."""
    random = np.random.default_rng(seed)
    answers = np.where(
        random.random(len(right)) < accuracy, right, random.integers(0, len(meanings), len(right))
    )
    return np.eye(len(meanings))[answers][:, list(meanings)]  # [N, labels] to [N, outputs]


@given(st.permutations(range(3)), st.floats(0.3, 1.0), st.integers(0, 99))
def test_data_finds_the_order_of_any_expert_that_is_worth_something(
    meanings: list[int], accuracy: float, seed: int
) -> None:
    right = np.random.default_rng(seed).integers(0, 3, 512)
    decided = labels.by_data(MNLI, outputs(right, accuracy, meanings, seed), right, "expert")
    assert (decided.origin, decided.rows) == ("training data", 512)
    assert [meanings[output] for output in decided.order] == [0, 1, 2]
    assert decided.score == pytest.approx(accuracy + (1 - accuracy) / 3, abs=0.1)


def test_an_order_that_is_not_clearly_better_is_not_taken() -> None:
    right = np.random.default_rng(0).integers(0, 2, 512)
    answers = right.copy()
    answers[:270] = 1 - answers[:270]  # 47 % right as they stand, 53 % the other way
    with pytest.raises(UserError, match=r"47\.3%"):
        labels.by_data(get_task("sst2"), np.eye(2)[answers], right, "expert")
    decided = labels.by_data(get_task("sst2"), np.eye(2)[1 - right], right, "expert")
    assert decided == Labels(order=[1, 0], origin="training data", rows=512, score=1.0, as_is=0.0)


def test_a_model_no_better_than_chance_is_refused_with_its_score_and_that_of_chance() -> None:
    right = (np.arange(500) < 350).astype(np.int64)
    chance = r"sst2: here is no better than chance: .* guessing 70\.0%"
    for answers in (np.ones(500, dtype=int), np.zeros(500, dtype=int), np.arange(500) % 2):
        with pytest.raises(UserError, match=chance):
            labels.by_data(get_task("sst2"), np.eye(2)[answers], right, "here")
    better = np.where(np.arange(500) < 400, right, 1 - right)  # 80 % of the rows
    assert labels.by_data(get_task("sst2"), np.eye(2)[better], right, "here").score == 0.8


def test_where_the_metric_says_so_a_rare_label_that_is_found_now_and_then_is_no_guess() -> None:
    right = (np.arange(500) < 350).astype(np.int64)  # 70 % acceptable
    answers = np.where((np.arange(500) // 7) % 2 == 0, 1, right)  # half of the others found
    answers[:80] = 0  # at the price of as many errors: 69 % right, Matthews 0.2
    share = float((answers == right).mean())
    assert 0.65 < share < 0.7
    assert labels.by_data(get_task("cola"), np.eye(2)[answers], right, "here").score == share
    with pytest.raises(UserError, match=r"no better than chance: .* guessing 70\.0%"):
        labels.by_data(get_task("sst2"), np.eye(2)[answers], right, "here")
    for known in (np.ones(500, dtype=int), np.arange(500) % 2):
        with pytest.raises(UserError, match="cola: here is no better than chance"):
            labels.by_data(get_task("cola"), np.eye(2)[known], right, "here")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of SST-2 whose outputs mean (positive, negative), and rows that they have right."""
    folder = tmp_path_factory.mktemp("labels")
    expert = tiny_bert(folder / "unnamed")
    model, tokenizer = checkpoints.load_classifier(expert), checkpoints.load_tokenizer(expert)
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS[5:9], size=6)) for _ in range(200)]
    with torch.no_grad():
        logits = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits  # [N, 2]
    margin = (logits[:, 1] - logits[:, 0]).numpy()
    table = {"sentence": texts, "label": (margin < np.median(margin)).astype(np.int64)}
    (folder / "data" / "sst2").mkdir(parents=True)
    pq.write_table(pa.table(table), folder / "data" / "sst2" / "train.parquet")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["classifier.bias"] += torch.tensor([np.median(margin), 0.0], dtype=torch.float32)
    safetensors.torch.save_file(state, expert / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(expert, folder / "named")
    edit_config(folder / "named", id2label={"0": "POSITIVE", "1": "neg"})
    return folder


def test_names_decide_before_data_and_data_before_nothing(work: Path, tmp_path: Path) -> None:
    sst2, data = get_task("sst2"), work / "data"
    assert labels.decide(work / "named", sst2, data) == Labels(order=[1, 0], origin="names")
    decided = labels.decide(work / "unnamed", sst2, data, "cpu")
    assert decided == Labels(order=[1, 0], origin="training data", rows=200, score=1.0, as_is=0.0)
    for nowhere in (None, tmp_path):
        decided = labels.decide(work / "unnamed", sst2, nowhere)
        assert decided == Labels(order=[0, 1], origin="identity")
    with pytest.raises(UserError, match="head of 2 outputs, mnli needs 3"):
        labels.decide(work / "named", MNLI, data)


def test_every_decision_but_the_expected_one_has_a_note() -> None:
    decisions = {
        "sst2": Labels(order=[1, 0], origin="names"),
        "mrpc": Labels(order=[0, 1], origin="identity"),
        "rte": Labels(order=[1, 0], origin="training data", rows=9, score=0.8, as_is=0.2),
        "cola": Labels(order=[0, 1], origin="names"),
    }
    start = "the outputs are"
    assert labels.notes(decisions) == [
        f"labels of sst2: {start} positive, negative: as the names in config.json say",
        f"labels of mrpc: {start} not_equivalent, equivalent: NOT NAMED in config.json, and no data"
        " to find them; taken as they stand",
        f"labels of rte: {start} not_entailment, entailment: not named; found on 9 training rows"
        " (80.0% right, as they stand 20.0%)",
    ]


def test_ordered_changes_the_outputs_and_nothing_else(work: Path) -> None:
    model = checkpoints.load_classifier(work / "named")
    text = torch.tensor([[2, 5, 6, 7, 3]])
    with torch.inference_mode():
        expected = model(input_ids=text).logits[:, [1, 0]]
        decided = labels.decide(work / "named", get_task("sst2"), None)
        torch.testing.assert_close(labels.ordered(model, decided)(input_ids=text).logits, expected)
