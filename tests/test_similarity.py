"""Embedding models through all stages, alone and in one encoder with a text classifier."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForSequenceClassification

from fmn.errors import UserError
from fmn.evaluate.files import read_metrics
from fmn.fisher.files import read_fisher
from fmn.fisher.stages import FisherSettings, FullFisherSettings, fisher, full_fisher
from fmn.merge.recipe import read_recipe
from fmn.merge.stages import (
    CalibrateSettings,
    MergeSettings,
    RealignSettings,
    calibrate,
    merge,
    realign,
)
from fmn.models.loading import load_model, load_processor
from fmn.models.predict import predict
from fmn.models.stages import Embedding
from fmn.models.stages import predict as answer_of
from fmn.report.stages import report
from fmn.sources.stages import fetch
from fmn.tasks.dataset import read_split
from fmn.tasks.encoding import encode
from fmn.tasks.task import load_task
from tests.pipeline import CPU, METHODS, make_expert, merge_inputs, prepare, score
from tests.sentences import TEXTS, WORDS, add_dense, embedding_model, encoded, write_json

NEAR = ("alike", "near")  # embedding models
TASKS = (*NEAR, "mood")
PAIR: dict[str, Any] = {"text": "a", "text_pair": "b", "label": "score"}
PAIR["kind"] = "sentence-similarity"


def write_data(work: Path) -> None:
    """Pairs of texts that are alike if they share words, and texts that are dull or not."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict[str, Any]]] = {task: [] for task in TASKS}
    for _ in range(120):
        left, right = rng.choice(WORDS[5:], (2, 4))
        shared = len({*left} & {*right})
        pair = {"a": " ".join(left), "b": " ".join(right)}
        rows["near"].append({**pair, "score": shared})
        rows["alike"].append({**pair, "score": int(shared > 1)})
        rows["mood"].append({"text": pair["a"], "label": "bad" if "dull" in left else "good"})
    for task, own in rows.items():
        path = work / f"{task}.jsonl"
        path.write_text("\n".join(map(json.dumps, own)))
        options = PAIR if task in NEAR else {}
        prepare(task, work, dataset=str(path), validation_size=30, **options)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, data, experts and statistics; not to be changed by a test."""
    work = tmp_path_factory.mktemp("similarity")
    source = embedding_model(work / "source", {"pooling_mode": "mean"})
    fetch(str(source), out=work / "base")
    write_data(work)
    for task in TASKS:
        make_expert(work, task, work / "base", epochs=3, learning_rate=3e-3, batch_size=16)
    return work


def inputs(work: Path, tasks: tuple[str, ...] = NEAR) -> dict[str, Any]:
    return merge_inputs(work, tasks, work / "base")


def test_rows_are_pairs_with_a_number(work: Path) -> None:
    for task in NEAR:
        definition = load_task(work / "data", task)
        assert (definition.problem_type, definition.metrics) == (
            "regression",
            ("spearmanr_cosine",),
        )
    assert read_fisher(work / "near.parquet")[-1].estimator == "sampled"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_model_for_sentence_transformers(work: Path, method: str) -> None:
    out = work / method
    merge(**inputs(work), out=out, settings=MergeSettings(method=method))
    folders = [out / "encoder", *(out / "tasks" / task for task in NEAR)]
    wanted = encoded(folders[0], TEXTS)
    for folder in folders:
        np.testing.assert_array_equal(encoded(folder, TEXTS), wanted)
    if method == "average":  # put together by hand
        experts = [
            load_file(folder / "model.safetensors") for folder in inputs(work)["experts"].values()
        ]
        by_hand = {name: (tensor + experts[1][name]) / 2 for name, tensor in experts[0].items()}
        merged = load_file(out / "encoder/model.safetensors")
        for name, tensor in by_hand.items():
            torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7)


def test_rows_are_split_off_whatever_their_numbers(tmp_path: Path) -> None:
    validation = []
    for name, scores in (("up", np.linspace(0, 5, 40)), ("down", np.linspace(5, 0, 40))):
        rows = [{"a": f"film {n}", "b": "film", "score": x} for n, x in enumerate(scores)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        path, written = tmp_path / f"{name}.jsonl", tmp_path / "data"
        prepare(name, tmp_path, dataset=str(path), validation_size=10, **PAIR)
        table = read_split(written, load_task(written, name), "validation")
        validation.append(table["a"].to_pylist())
    assert validation[0] == validation[1]


def test_the_fisher_information_of_all_parameters_merges_too(work: Path, tmp_path: Path) -> None:
    arguments = inputs(work)
    for task, expert in arguments["experts"].items():
        arguments["fisher"][task] = tmp_path / f"{task}.safetensors"
        settings = FullFisherSettings(samples=4, **CPU)
        out = arguments["fisher"][task]
        full_fisher(expert, task=task, data=work / "data", out=out, settings=settings)
    merge(**arguments, out=tmp_path / "merged", settings=MergeSettings(method="fisher"))
    assert np.isfinite(encoded(tmp_path / "merged/encoder", TEXTS)).all()


def cosines(folder: Path, work: Path, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of the validation pairs by Sentence Transformers alone, and their labels."""
    table = read_split(work / "data", load_task(work / "data", task), "validation").to_pydict()
    left, right = encoded(folder, table["a"]), encoded(folder, table["b"])
    return (left * right).sum(1), np.array(table["label"])


def test_the_score_is_the_rank_correlation_of_cosines(work: Path) -> None:
    expert = work / "experts" / "near"
    scores = read_metrics(score(expert, work, "expert", ["near"])).tasks["near"]
    wanted = spearmanr(*cosines(expert, work, "near")).statistic
    assert scores.score == pytest.approx(wanted, abs=1e-6)
    assert wanted > 0.3
    assert wanted > spearmanr(*cosines(work / "base", work, "near")).statistic
    assert scores.model_dump()["examples"] == 30


def test_a_merge_is_chosen_calibrated_scored_and_reported(work: Path) -> None:
    rows, experts = work / "data", inputs(work)["experts"]
    auto = work / "auto"
    merge(**inputs(work), out=auto, data=rows, settings=MergeSettings(method="auto", **CPU))
    candidates = read_recipe(auto).auto
    assert candidates is not None
    model = load_model(auto / "encoder")
    for task, expert in experts.items():  # the error is that of embeddings, in their variance
        table = read_split(rows, load_task(rows, task), "train").slice(0, 90)
        examples = encode(load_processor(expert), load_task(rows, task), table)
        own, merged = (predict(each, examples, **CPU) for each in (load_model(expert), model))
        error = float(np.square(merged - own).mean() / own.var(0).mean())
        assert candidates.chosen.tasks[task] == pytest.approx(error, rel=1e-3)
    settings = CalibrateSettings(texts=64, **CPU)
    calibrate(auto, experts=experts, data=rows, out=work / "calibrated", settings=settings)
    scores = {name: score(work / name, work, name) for name in ("auto", "calibrated")}
    realign(auto, experts=experts, data=rows, out=work / "as_it_is", settings=RealignSettings())
    for folder in ("encoder", *(f"tasks/{task}" for task in experts)):  # there are no heads to fit
        files = [work / name / folder / "model.safetensors" for name in ("auto", "as_it_is")]
        assert len({file.read_bytes() for file in files}) == 1
    of_experts = {task: score(expert, work, task, [task]) for task, expert in experts.items()}
    written = report(
        merged=scores, models={name: work / name for name in scores}, experts=of_experts,
        fisher=inputs(work)["fisher"], out=work / "report",
    )  # fmt: skip
    assert written.computed
    wanted = spearmanr(*cosines(work / "calibrated/encoder", work, "near")).statistic
    assert read_metrics(scores["calibrated"]).tasks["near"].score == pytest.approx(wanted, abs=1e-6)


def test_a_classifier_and_embedding_models_become_one_encoder(work: Path) -> None:
    merged, out, rows = work / "mixed", work / "realigned", work / "data"
    arguments = inputs(work, TASKS)
    merge(**arguments, out=merged)
    settings = RealignSettings(texts=64, device="cpu")
    realign(merged, experts=arguments["experts"], data=rows, out=out, settings=settings)
    wanted = encoded(out / "encoder", TEXTS)
    for task in NEAR:
        np.testing.assert_array_equal(encoded(out / "tasks" / task, TEXTS), wanted)
    classifier = AutoModelForSequenceClassification.from_pretrained(out / "tasks/mood")
    assert list(classifier.config.id2label.values()) == ["bad", "good"]
    encoder = AutoModel.from_pretrained(out / "encoder").state_dict()
    for name, tensor in classifier.bert.state_dict().items():
        is_own = name.startswith("pooler.")  # of the classifier, as it was re-aligned
        assert torch.equal(encoder[name], tensor) != is_own
    assert set(read_metrics(score(out, work, "mixed")).tasks) == set(TASKS)


def test_the_encoder_pools_whatever_the_names_of_tasks(work: Path, tmp_path: Path) -> None:
    experts = {"a": tmp_path / "a", "near": work / "experts/near"}  # a classifier comes first
    shutil.copytree(work / "experts/mood", experts["a"])
    for name in ("fmn.json", "task.json"):
        (experts["a"] / name).unlink()
    merge(experts=experts, out=tmp_path / "out", settings=MergeSettings(method="average"))
    whole, own = (encoded(tmp_path / "out" / name, TEXTS) for name in ("encoder", "tasks/near"))
    np.testing.assert_array_equal(whole, own)


def test_each_task_has_its_own_dense_layers(work: Path, tmp_path: Path) -> None:
    source = add_dense(embedding_model(tmp_path / "source", {"pooling_mode": "mean"}))
    layer = source / "2_Dense/model.safetensors"
    torch.save(load_file(layer), source / "2_Dense/pytorch_model.bin")
    layer.unlink()  # as LaBSE is stored
    fetch(str(source), out=tmp_path / "base")
    before = load_file(tmp_path / "base/2_Dense/model.safetensors")["linear.weight"]
    (tmp_path / "data").symlink_to(work / "data")
    for task in NEAR:
        make_expert(tmp_path, task, tmp_path / "base", epochs=0.5, learning_rate=3e-3, batch_size=9)
    inputs, out = merge_inputs(tmp_path, NEAR, tmp_path / "base"), tmp_path / "merged"
    merge(**inputs, out=out, settings=MergeSettings(method="mask-fisher"))
    own = {"experts": inputs["experts"], "data": work / "data"}
    calibrated, realigned = tmp_path / "calibrated", tmp_path / "realigned"
    calibrate(out, **own, out=calibrated, settings=CalibrateSettings(texts=8, **CPU))
    realign(calibrated, **own, out=realigned, settings=RealignSettings())
    for folder in (out, calibrated, realigned):
        _check_dense(folder, inputs["experts"], before)
    score(realigned, tmp_path, "realigned")


def _check_dense(out: Path, experts: dict[str, Path], before: torch.Tensor) -> None:
    """Check that tasks have their experts' dense layers on a common encoder."""
    modules = list(SentenceTransformer(str(out / "encoder"), device="cpu"))
    assert len(modules) == 3  # without the layer, which is a task's
    states = SentenceTransformer(modules=modules[:2], device="cpu").encode(TEXTS)
    for task, expert in experts.items():
        own = load_file(expert / "2_Dense/model.safetensors")
        assert not torch.equal(own["linear.weight"], before)
        layer_output = np.tanh(states @ own["linear.weight"].T.numpy() + own["linear.bias"].numpy())
        by_hand = layer_output / np.linalg.norm(layer_output, axis=1, keepdims=True)
        np.testing.assert_allclose(encoded(out / "tasks" / task, TEXTS), by_hand, atol=1e-6)
        answer = answer_of(out, TEXTS[0], task=task)
        assert isinstance(answer, Embedding)
        np.testing.assert_allclose(answer.embedding, by_hand[0], atol=1e-5)


def test_texts_alone_suffice_to_merge_and_other_pooling_is_refused(
    work: Path, tmp_path: Path
) -> None:
    path = tmp_path / "texts.csv"
    path.write_text("text\n" + "\n".join(f"a fine film {n}" for n in range(20)))
    prepare("texts", tmp_path, dataset=str(path), kind="sentence-similarity")
    fetch(str(work / "experts/near"), out=tmp_path / "texts", task="texts", data=tmp_path / "data")
    out = tmp_path / "f.parquet"
    settings = FisherSettings(samples=8, **CPU)
    fisher(tmp_path / "texts", task="texts", data=tmp_path / "data", out=out, settings=settings)
    experts = {"texts": tmp_path / "texts", "alike": work / "experts/alike"}
    average = MergeSettings(method="average")
    merge(experts=experts, out=tmp_path / "merged", settings=average)
    (tmp_path / "texts/fmn.json").unlink()
    write_json(tmp_path / "texts/1_Pooling/config.json", {"pooling_mode": "cls"})
    with pytest.raises(UserError, match="pooling is cls, not mean"):
        merge(experts=experts, out=tmp_path / "no", settings=average)
