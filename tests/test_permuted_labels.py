"""An expert whose outputs are in another order gives the same results, whatever stage reads it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import pipeline

from fmn.errors import UserError
from fmn.evaluate.files import read_predictions
from fmn.evaluate.stages import EvaluateSettings, evaluate
from fmn.fisher.files import read_fisher
from fmn.fisher.stages import Estimator, FisherSettings, fisher
from fmn.merge.stages import merge
from fmn.models.stages import FinetuneSettings, finetune, predict
from fmn.sources.stages import fetch

EVALUATE = EvaluateSettings(device="cpu")
LABEL_OF_OUTPUT = [2, 0, 1]  # of the permuted expert; not its own inverse
ORDER = [1, 2, 0]
WORDS = ("good", "green", "never")  # what a hypothesis must hold for each label


@pytest.fixture(scope="module")
def work(tiny_base: Path, tiny_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNLI of one deciding word per label; an expert of it, and permuted ones, named and not."""
    folder = tmp_path_factory.mktemp("permuted")
    (folder / "data" / "mnli").mkdir(parents=True)
    sizes = {"train": 600, "validation_matched": 120, "validation_mismatched": 90}
    for split, rows in sizes.items():
        random = np.random.default_rng(rows)
        labels = random.integers(0, 3, rows)
        hinted = np.where(random.random(rows) < 0.85, labels, random.integers(0, 3, rows))
        very = [int(random.integers(4)) for _ in range(rows)]
        hypotheses = [
            f"it was {WORDS[hint]} {'very ' * count}film"
            for hint, count in zip(hinted, very, strict=True)
        ]
        table = {"premise": ["the film was long"] * rows, "hypothesis": hypotheses, "label": labels}
        pq.write_table(pa.table(table), folder / "data" / "mnli" / f"{split}.parquet")
    settings = FinetuneSettings(epochs=6, learning_rate=5e-3, device="cpu", dtype="float32")
    data, out = folder / "data", folder / "plain"
    finetune(tiny_base, task="mnli", data=data, out=out, settings=settings)
    permute(folder / "plain", folder / "named", ["Contradict", "entails", "NEUTRAL"])
    permute(folder / "plain", folder / "unnamed", ["LABEL_0", "LABEL_1", "LABEL_2"])
    shutil.copytree(tiny_work / "experts" / "stsb", folder / "stsb")
    shutil.copytree(tiny_work / "data" / "stsb", folder / "data" / "stsb")
    shutil.copyfile(tiny_work / "fisher" / "stsb.parquet", folder / "stsb.parquet")
    return folder


def permute(expert: Path, out: Path, names: list[str]) -> None:
    """A copy of an MNLI expert with its outputs in another order, under these names."""
    shutil.copytree(expert, out)
    (out / "fmn.json").unlink()
    state = load_file(out / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = state[name][LABEL_OF_OUTPUT].clone()
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["id2label"] = {str(output): name for output, name in enumerate(names)}
    config["label2id"] = {name: output for output, name in enumerate(names)}
    (out / "config.json").write_text(json.dumps(config))


def compute_fisher(
    work: Path, expert: str, out: Path, estimator: Estimator, data: Path | None = None
) -> None:
    settings = FisherSettings(estimator=estimator, samples=64, device="cpu", dtype="float32")
    data = data or work / "data"
    fisher(work / expert, task="mnli", data=data, out=out, settings=settings)


@pytest.mark.parametrize("expert", ["named", "unnamed"])
def test_the_scores_are_the_same(work: Path, tmp_path: Path, expert: str) -> None:
    predictions, data = [], work / "data"
    for name in ("plain", expert):
        out = tmp_path / f"{name}.json"
        evaluate(work / name, tasks=["mnli"], data=data, out=out, settings=EVALUATE)
        predictions.append(read_predictions(out)["mnli"].splits)
    for split, answers in predictions[0].items():
        assert (answers.predicted == answers.labels).mean() > 0.7
        np.testing.assert_array_equal(predictions[1][split].predicted, answers.predicted)


@pytest.mark.parametrize("estimator", ["empirical", "expected", "sampled", "batch"])
def test_the_fisher_is_the_same(work: Path, tmp_path: Path, estimator: Estimator) -> None:
    values = {}
    for name in ("plain", "named", "unnamed"):
        out = tmp_path / f"{name}.parquet"
        compute_fisher(work, name, out, estimator)
        values[name] = read_fisher(out)[0]
    for site, nodes in values["plain"].items():
        for name in ("named", "unnamed"):
            np.testing.assert_allclose(values[name][site], nodes, rtol=1e-4, atol=1e-12)


def test_the_merged_model_of_experts_that_came_through_the_door_is_the_same(
    work: Path, tmp_path: Path
) -> None:
    predictions, answers = {}, {}
    for name in ("plain", "named", "unnamed"):
        expert, out = tmp_path / name / "expert", tmp_path / name / "merged"
        info = fetch(str(work / name), out=expert, task="mnli", data=work / "data").summary
        assert info.labels is not None
        assert info.labels.order == ([0, 1, 2] if name == "plain" else ORDER)
        assert info.labels.origin == ("training data" if name == "unnamed" else "names")
        file, metrics = tmp_path / name / "fisher.parquet", tmp_path / f"{name}.json"
        compute_fisher(tmp_path / name, "expert", file, "empirical", work / "data")
        merge(
            experts={"mnli": expert, "stsb": work / "stsb"},
            fisher={"mnli": file, "stsb": work / "stsb.parquet"},
            out=out,
        )
        evaluate(out, data=work / "data", out=metrics, settings=EVALUATE)
        predictions[name] = {t: each.splits for t, each in read_predictions(metrics).items()}
        # Plain Transformers reads it right, with none of our code.
        ask = pipeline("text-classification", model=str(out / "tasks" / "mnli"), device="cpu")
        pairs = [("the film was long", f"it was {word} film") for word in WORDS]
        answers[name] = [ask({"text": text, "text_pair": pair})["label"] for text, pair in pairs]
        ours = [predict(out, *pair, task="mnli").model_dump() for pair in pairs]
        assert [answer["label"] for answer in ours] == answers[name]
    for name in ("named", "unnamed"):
        assert answers[name] == answers["plain"]
        for task, splits in predictions["plain"].items():
            for split, plain in splits.items():
                predicted = predictions[name][task][split].predicted
                np.testing.assert_allclose(predicted, plain.predicted, rtol=1e-3, atol=1e-4)


def test_other_training_rows_decide_anew_and_names_need_none(work: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(work / "data", tmp_path / "data"))

    def is_evaluated(expert: str) -> bool:
        out, model = tmp_path / f"{expert}.json", work / expert
        return evaluate(model, tasks=["mnli"], data=data, out=out, settings=EVALUATE).computed

    assert [is_evaluated("unnamed"), is_evaluated("named")] == [True, True]
    train = pq.read_table(data / "mnli" / "train.parquet")
    pq.write_table(train.slice(0, 500), data / "mnli" / "train.parquet")
    assert [is_evaluated("unnamed"), is_evaluated("named")] == [True, False]


def test_an_unnamed_expert_that_knows_nothing_is_refused(work: Path, tmp_path: Path) -> None:
    expert = Path(shutil.copytree(work / "unnamed", tmp_path / "expert"))
    state = load_file(expert / "model.safetensors")
    shape = state["classifier.weight"].shape
    state["classifier.weight"] = torch.randn(shape, generator=torch.manual_seed(0)) * 1e-6
    save_file(state, expert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no better than chance"):
        fisher(expert, task="mnli", data=work / "data", out=tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
