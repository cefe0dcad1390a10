"""Labels in another order: read from names, found in training data, and without effect on any result."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import pipeline

from fmn import cli
from fmn.errors import UserError
from fmn.evaluate import stages as evaluate_stages
from fmn.evaluate.bootstrap import Answers
from fmn.evaluate.stages import EvaluateSettings
from fmn.fisher import stages as fisher_stages
from fmn.fisher.stages import Estimator, FisherSettings
from fmn.merge import recipe
from fmn.merge import stages as merge_stages
from fmn.merge.stages import MergeSettings
from fmn.models import checkpoints, labels
from fmn.models import stages as models_stages
from fmn.models.stages import FinetuneSettings
from fmn.store import artifacts
from fmn.tasks.task import TASKS, task

MNLI = task("mnli")
EVALUATE = EvaluateSettings(device="cpu")
TURNED = (
    2,
    0,
    1,
)  # the label that each output of the permuted expert stands for; not its own inverse
WORDS = ("good", "green", "never")  # what a hypothesis must hold for each label


# ---- names ----


@pytest.mark.parametrize(
    ("name", "names", "order"),
    [
        ("mnli", ["entailment", "neutral", "contradiction"], [0, 1, 2]),
        ("mnli", ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], [2, 1, 0]),
        ("mnli", ["contradict", "entail", "neutral"], [1, 2, 0]),
        ("mrpc", ["not_paraphrase", "paraphrase"], [0, 1]),
        ("mrpc", ["Equivalent", "not equivalent"], [1, 0]),
        ("qqp", ["duplicate", "not-duplicate"], [1, 0]),
        ("sst2", ["neg", "pos"], [0, 1]),
        ("sst2", ["POSITIVE", "NEGATIVE"], [1, 0]),
        ("cola", ["acceptable", "unacceptable"], [1, 0]),
        ("rte", ["not_entailment", "entailment"], [1, 0]),
        ("wnli", ["not_entailment", "entailment"], [0, 1]),
        ("stsb", ["score"], [0]),
    ],
)
def test_names_that_mean_something_give_the_order(
    name: str, names: list[str], order: list[int]
) -> None:
    assert labels.by_names(task(name), names) == {"order": order, "from": "names"}


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("mnli", ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ("mnli", ["0", "1", "2"]),
        ("mnli", ["entailment", "neutral", "LABEL_2"]),
        ("mnli", ["entailment", "entail", "neutral"]),
        ("mnli", ["entailment", "neutral"]),
        ("sst2", ["acceptable", "unacceptable"]),
        ("stsb", ["LABEL_0"]),
        ("cola", []),
    ],
)
def test_names_that_mean_nothing_give_none(name: str, names: list[str]) -> None:
    assert labels.by_names(task(name), names) is None


def test_the_tasks_own_names_mean_themselves() -> None:
    for one in TASKS.values():
        found = labels.by_names(one, one.labels or ("score",))
        assert found is not None
        assert labels.names_by_output(one, found) == list(one.labels or ("score",))
        assert labels.notes({one.name: found}) == []


@given(st.permutations(range(3)))
def test_names_by_output_are_read_back_as_the_same_order(order: list[int]) -> None:
    names = labels.names_by_output(MNLI, {"order": order, "from": "training data"})
    assert labels.by_names(MNLI, names) == {"order": order, "from": "names"}
    assert [names[output] for output in order] == list(MNLI.labels)


# ---- data ----


def outputs(right: np.ndarray, accuracy: float, turned: Sequence[int], seed: int = 0) -> np.ndarray:
    """Logits [N, C] of a model that has a share of labels right, and whose output o stands for label turned[o]."""
    random = np.random.default_rng(seed)
    says = np.where(
        random.random(len(right)) < accuracy, right, random.integers(0, len(turned), len(right))
    )
    return np.eye(len(turned))[says][:, list(turned)]  # [N, labels] to [N, outputs]


@settings(deadline=None)  # the first call imports SciPy
@given(st.permutations(range(3)), st.floats(0.3, 1.0), st.integers(0, 99))
def test_data_finds_the_order_of_any_expert_that_is_worth_something(
    turned: list[int], accuracy: float, seed: int
) -> None:
    right = np.random.default_rng(seed).integers(0, 3, 512)
    found = labels.by_data(MNLI, outputs(right, accuracy, turned, seed), right, "expert")
    assert found["from"] == "training data"
    assert [turned[output] for output in found["order"]] == [0, 1, 2]
    assert found["rows"] == 512
    assert found["score"] == pytest.approx(accuracy + (1 - accuracy) / 3, abs=0.1)


def test_an_order_that_is_not_clearly_better_is_not_taken() -> None:
    right = np.random.default_rng(0).integers(0, 2, 512)
    answers = right.copy()
    answers[:270] = 1 - answers[:270]  # 47 % right as they stand, 53 % turned
    with pytest.raises(UserError, match=r"47\.3%"):
        labels.by_data(task("sst2"), np.eye(2)[answers], right, "expert")
    found = labels.by_data(task("sst2"), np.eye(2)[1 - right], right, "expert")
    assert found == {
        "order": [1, 0],
        "from": "training data",
        "rows": 512,
        "score": 1.0,
        "as_is": 0.0,
    }


def test_a_model_no_better_than_chance_is_refused_with_its_score_and_that_of_chance() -> None:
    right = (np.arange(500) < 350).astype(np.int64)
    for answers in (np.ones(500, dtype=int), np.zeros(500, dtype=int), np.arange(500) % 2):
        with pytest.raises(
            UserError, match=r"sst2: here is no better than chance: .* guessing 70\.0%"
        ):
            labels.by_data(task("sst2"), np.eye(2)[answers], right, "here")
    better = np.where(np.arange(500) < 400, right, 1 - right)  # 80 % of the rows
    assert labels.by_data(task("sst2"), np.eye(2)[better], right, "here")["score"] == 0.8


def test_a_rare_label_that_is_found_now_and_then_is_more_than_guessing_where_the_metric_says_so() -> (
    None
):
    right = (np.arange(500) < 350).astype(np.int64)  # 70 % acceptable
    answers = np.where((np.arange(500) // 7) % 2 == 0, 1, right)  # half of the others found
    answers[:80] = 0  # at the price of as many errors: 69 % right, Matthews 0.2
    share = float((answers == right).mean())
    assert 0.65 < share < 0.7
    assert labels.by_data(task("cola"), np.eye(2)[answers], right, "here")["score"] == share
    with pytest.raises(UserError, match=r"no better than chance: .* guessing 70\.0%"):
        labels.by_data(task("sst2"), np.eye(2)[answers], right, "here")
    for known in (np.ones(500, dtype=int), np.arange(500) % 2):
        with pytest.raises(UserError, match="cola: here is no better than chance"):
            labels.by_data(task("cola"), np.eye(2)[known], right, "here")


@pytest.mark.parametrize("slope", [-1.0, 0.0])
def test_a_regression_model_that_is_not_correlated_is_refused(slope: float) -> None:
    values = np.linspace(0, 5, 100).astype(np.float32)
    with pytest.raises(UserError, match="no better than chance: the correlation"):
        labels.by_data(task("stsb"), slope * values[:, None], values, "expert")
    found = labels.by_data(task("stsb"), 0.1 * values[:, None], values, "expert")
    assert found["order"] == [0]
    assert found["score"] == pytest.approx(1.0)


# ---- stages: an expert whose head is permuted gives the same results ----


@pytest.fixture(scope="module")
def work(tiny_base: Path, tiny_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNLI of one deciding word a label; an expert of it, and the same with its outputs turned, named or not."""
    folder = tmp_path_factory.mktemp("labels")
    (folder / "data" / "mnli").mkdir(parents=True)
    for split, rows in {
        "train": 600,
        "validation_matched": 120,
        "validation_mismatched": 90,
    }.items():
        random = np.random.default_rng(rows)
        right = random.integers(0, 3, rows)
        said = np.where(random.random(rows) < 0.85, right, random.integers(0, 3, rows))
        table = {
            "premise": ["the film was long"] * rows,
            "hypothesis": [
                f"it was {WORDS[label]} {'very ' * int(random.integers(4))}film" for label in said
            ],
            "label": right,
        }
        pq.write_table(pa.table(table), folder / "data" / "mnli" / f"{split}.parquet")
    tuning = FinetuneSettings(epochs=6, learning_rate=5e-3, device="cpu", dtype="float32")
    models_stages.finetune(tiny_base, "mnli", folder / "data", folder / "plain", tuning)
    turn(folder / "plain", folder / "named", ["Contradict", "entails", "NEUTRAL"])
    turn(folder / "plain", folder / "unnamed", None)
    shutil.copytree(tiny_work / "experts" / "stsb", folder / "stsb")
    shutil.copytree(tiny_work / "data" / "stsb", folder / "data" / "stsb")
    shutil.copyfile(tiny_work / "fisher" / "stsb.parquet", folder / "stsb.parquet")
    return folder


def turn(expert: Path, out: Path, names: list[str] | None) -> None:
    """A copy of an MNLI expert whose output o stands for label TURNED[o]."""
    shutil.copytree(expert, out)
    (out / "fmn.json").unlink()
    state = load_file(out / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = state[name][list(TURNED)].clone()
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    names = names or [f"LABEL_{output}" for output in range(3)]
    config = json.loads((out / "config.json").read_text())
    config["id2label"] = {str(output): name for output, name in enumerate(names)}
    config["label2id"] = {name: output for output, name in enumerate(names)}
    (out / "config.json").write_text(json.dumps(config))


def evaluated(
    work: Path, model: str, out: Path, *names: str
) -> tuple[dict[str, Any], dict[str, dict[str, Answers]]]:
    summary = evaluate_stages.evaluate(
        work / model, names or ["mnli"], work / "data", out / f"{model}.json", EVALUATE
    ).summary
    return dict(summary["tasks"]), artifacts.read_predictions(out / f"{model}.json")


@pytest.mark.parametrize(("turned", "source"), [("named", "names"), ("unnamed", "training data")])
def test_a_permuted_expert_has_the_same_scores(
    work: Path, tmp_path: Path, turned: str, source: str
) -> None:
    entries, predictions = evaluated(work, "plain", tmp_path)
    assert entries["mnli"]["accuracy"] > 0.7
    again, same = evaluated(work, turned, tmp_path)
    assert again == entries
    for split, given_answers in predictions["mnli"].items():
        np.testing.assert_array_equal(same["mnli"][split].predicted, given_answers.predicted)
    said = artifacts.read_json(tmp_path / f"{turned}.json")["labels"]["mnli"]
    assert (said["order"], said["from"]) == ([1, 2, 0], source)
    assert not evaluate_stages.evaluate(
        work / turned, ["mnli"], work / "data", tmp_path / f"{turned}.json", EVALUATE
    ).computed


@pytest.mark.parametrize("estimator", ["empirical", "expected", "sampled", "batch"])
def test_a_permuted_expert_has_the_same_fisher(
    work: Path, tmp_path: Path, estimator: Estimator
) -> None:
    asked = FisherSettings(estimator=estimator, samples=64, device="cpu", dtype="float32")
    found = {}
    for name in ("plain", "named", "unnamed"):
        fisher_stages.fisher(
            work / name, "mnli", work / "data", tmp_path / f"{name}.parquet", asked
        )
        found[name], _, stated = artifacts.read_fisher(tmp_path / f"{name}.parquet")
        assert stated["labels"]["mnli"]["order"] == ([0, 1, 2] if name == "plain" else [1, 2, 0])
    for site, nodes in found["plain"].items():
        for name in ("named", "unnamed"):
            np.testing.assert_allclose(found[name][site], nodes, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("method", ["mask-fisher", "average"])
def test_a_permuted_expert_gives_the_same_merged_model(
    work: Path, tmp_path: Path, method: str
) -> None:
    asked = FisherSettings(samples=64, device="cpu", dtype="float32")
    predictions, answers = {}, {}
    for name in ("plain", "named", "unnamed"):
        file, out = tmp_path / f"{name}.parquet", tmp_path / name
        fisher_stages.fisher(work / name, "mnli", work / "data", file, asked)
        made = merge_stages.merge(experts={"mnli": work / name, "stsb": work / "stsb"}, fisher={"mnli": file, "stsb": work / "stsb.parquet"}, out=out, settings=MergeSettings(method=method)).summary  # fmt: skip
        source = "training data" if name == "unnamed" else "names"
        assert made.labels["mnli"].origin == source
        assert made.labels["mnli"].order == ([0, 1, 2] if name == "plain" else [1, 2, 0])
        evaluate_stages.evaluate(out, [], work / "data", tmp_path / f"{name}.json", EVALUATE)
        predictions[name] = artifacts.read_predictions(tmp_path / f"{name}.json")
        # Plain Transformers reads it right, with none of our code.
        ask = pipeline("text-classification", model=str(out / "tasks" / "mnli"), device="cpu")
        answers[name] = [
            ask({"text": "the film was long", "text_pair": f"it was {word} film"})["label"]
            for word in WORDS
        ]
        assert (
            models_stages.predict(out, "mnli", "the film was long", "it was never film")["label"]
            == answers[name][2]
        )
    for name in ("named", "unnamed"):
        assert answers[name] == answers["plain"]
        for one, splits in predictions["plain"].items():
            for split, given_answers in splits.items():
                np.testing.assert_allclose(
                    predictions[name][one][split].predicted,
                    given_answers.predicted,
                    rtol=1e-3,
                    atol=1e-4,
                )


def test_without_names_and_data_the_outputs_are_taken_as_they_stand_and_it_is_said(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--expert", f"mnli={work / 'unnamed'}", f"stsb={work / 'stsb'}", "--method", "average"]
    cli.main(["merge", *asked, "--out", str(tmp_path / "merged")])
    assert "labels of mnli: NOT NAMED" in capsys.readouterr().out
    stated = recipe.read_recipe(tmp_path / "merged").labels
    assert {
        name: each.model_dump(by_alias=True, exclude_defaults=True) for name, each in stated.items()
    } == {
        "mnli": {"order": [0, 1, 2], "from": "identity"},
        "stsb": {"order": [0], "from": "names"},
    }

    alone = tmp_path / "validation"
    shutil.copytree(work / "data" / "mnli", alone)
    (alone / "train.parquet").unlink()
    cli.main(
        [
            "evaluate",
            str(work / "unnamed"),
            "--task",
            "mnli",
            "--data",
            str(alone),
            "--out",
            str(alone / "m.json"),
        ]
    )
    assert "labels of mnli: NOT NAMED" in capsys.readouterr().out


def test_an_order_that_was_found_is_said_by_the_command(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, says in (("unnamed", "not named; 512 training rows say contradiction, entailment, neutral"),
                       ("named", "the outputs are contradiction, entailment, neutral, as the names")):  # fmt: skip
        out = tmp_path / f"{name}.json"
        cli.main(
            [
                "evaluate",
                str(work / name),
                "--task",
                "mnli",
                "--data",
                str(work / "data"),
                "--out",
                str(out),
            ]
        )
        assert f"labels of mnli: {says}" in capsys.readouterr().out
    cli.main(
        [
            "evaluate",
            str(work / "plain"),
            "--task",
            "mnli",
            "--data",
            str(work / "data"),
            "--out",
            str(out),
        ]
    )
    assert "labels of mnli" not in capsys.readouterr().out


def test_other_training_data_decides_anew_and_names_need_none(work: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(work / "data", data)
    evaluate_stages.evaluate(work / "unnamed", ["mnli"], data, tmp_path / "unnamed.json", EVALUATE)
    evaluate_stages.evaluate(work / "named", ["mnli"], data, tmp_path / "named.json", EVALUATE)
    train = pq.read_table(data / "mnli" / "train.parquet")
    pq.write_table(train.slice(0, 500), data / "mnli" / "train.parquet")
    assert evaluate_stages.evaluate(
        work / "unnamed", ["mnli"], data, tmp_path / "unnamed.json", EVALUATE
    ).computed
    assert not evaluate_stages.evaluate(
        work / "named", ["mnli"], data, tmp_path / "named.json", EVALUATE
    ).computed


def test_an_unnamed_expert_that_knows_nothing_is_refused_and_leaves_nothing(
    work: Path, tmp_path: Path
) -> None:
    expert = tmp_path / "expert"
    shutil.copytree(work / "unnamed", expert)
    state = load_file(expert / "model.safetensors")
    state["classifier.weight"] = (
        torch.randn(state["classifier.weight"].shape, generator=torch.manual_seed(0)) * 1e-6
    )
    save_file(state, expert / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "fisher.parquet"
    with pytest.raises(UserError, match="no better than chance"):
        fisher_stages.fisher(
            expert,
            "mnli",
            work / "data",
            out,
            FisherSettings(samples=16, device="cpu", dtype="float32"),
        )
    with pytest.raises(UserError, match="no better than chance"):
        evaluate_stages.evaluate(expert, ["mnli"], work / "data", tmp_path / "m.json", EVALUATE)
    assert not out.exists()
    assert not [
        path for path in tmp_path.iterdir() if "m." in path.name and not path.name.startswith(".")
    ]


def test_ordered_changes_the_outputs_and_nothing_else(work: Path) -> None:
    plain, turned = (checkpoints.load_classifier(work / name) for name in ("plain", "named"))
    found = labels.decide(work / "named", MNLI, None)
    text = torch.tensor([[101, 2009, 2001, 2204, 102]])
    with torch.inference_mode():
        expected = plain(input_ids=text).logits
        torch.testing.assert_close(turned(input_ids=text).logits, expected[:, list(TURNED)])
        torch.testing.assert_close(labels.ordered(turned, found)(input_ids=text).logits, expected)
