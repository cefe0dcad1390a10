"""A tagger from beginning to end, merged with a text classifier of the same base."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from fmn.evaluate.bootstrap import resampled
from fmn.evaluate.files import predictions_path, read_metrics, read_predictions
from fmn.experiments.stages import ComparedSettings, CompareSettings, compare
from fmn.merge.stages import (
    CalibrateSettings,
    MergeSettings,
    RealignSettings,
    calibrate,
    merge,
    realign,
)
from fmn.models.labels import align
from fmn.report.comparison import answers
from fmn.rows.stages import data
from fmn.tasks.task import TaskSettings, read_task
from tests.folders import edit_config
from tests.pipeline import CPU, make_expert, merge_inputs, score

NAMES, PLACES, VERBS = ("anna", "bob", "carl"), ("paris", "rome", "new york"), ("sees", "likes")
LENGTH = 8  # tokens; the longest sentences lose words


def write_rows(folder: Path) -> None:
    """Sentences as CoNLL text, and the same with a class as CSV."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for split, count in (("train", 96), ("dev", 24)):
        tagged, texts = [], ["text,label"]
        for _ in range(count):
            name, verb = random.choice(NAMES), random.choice(VERBS)
            place = str(random.choice(PLACES)).split()
            tags = ["B-LOC", "I-LOC"][: len(place)]
            words = [
                *zip((name, verb), ("B-PER", "O"), strict=True),
                *zip(place, tags, strict=True),
            ]
            words += [("and", "O"), ("others", "O"), (str(random.choice(NAMES)), "B-PER")]
            tagged.append("\n".join(f"{word} X {tag}" for word, tag in words))
            texts.append(f"{' '.join(word for word, _ in words)},{verb}")
        (folder / f"{split}.conll").write_text("-DOCSTART- X O\n\n" + "\n\n".join(tagged) + "\n")
        (folder / f"{split}.csv").write_text("\n".join(texts) + "\n")


@pytest.fixture(scope="module")
def work(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, experts and statistics of a tagger and of a classifier."""
    work = tmp_path_factory.mktemp("tags")
    write_rows(work / "rows")
    for task, kind, end in (
        ("ner", "token-classification", "conll"),
        ("verb", "text-classification", "csv"),
    ):
        files = {split: f"{name}.{end}" for split, name in (("train",) * 2, ("validation", "dev"))}
        definition = TaskSettings.model_validate({
            "task": kind,
            "dataset": {"path": str(work / "rows"), "data_files": files},
            "max_length": LENGTH,
        })  # fmt: skip
        data(task, out=work / "data" / task, definition=definition)
        make_expert(work, task, tiny_base, epochs=16, learning_rate=5e-3)
    return work


def test_a_tagger_and_a_classifier_are_merged_fitted_and_scored(
    work: Path, tiny_base: Path, tmp_path: Path
) -> None:
    every, rows = merge_inputs(work, ("ner", "verb"), tiny_base), work / "data"
    merged, fitted, aligned = (tmp_path / name for name in ("merged", "fitted", "aligned"))
    how = MergeSettings(method="auto", **CPU)
    recipe = merge(**every, data=rows, out=merged, settings=how).summary
    assert recipe.auto
    options = {"experts": every["experts"], "data": rows}
    calibrate(merged, out=fitted, settings=CalibrateSettings(texts=48, **CPU), **options)
    realign(fitted, out=aligned, settings=RealignSettings(texts=48, **CPU), **options)
    scores = {model: score(model, work, model.name) for model in (merged, fitted, aligned)}
    metrics = read_metrics(scores[aligned])
    ner = metrics.tasks["ner"]
    assert (ner.score or 0) > 0.5
    assert ner.interval["seqeval_f1"]
    assert (metrics.tasks["verb"].score or 0) > 0.7

    # With Transformers alone, and the encoder put below the head by hand.
    classes = (AutoModelForTokenClassification, AutoModelForSequenceClassification)
    for task, auto in zip(("ner", "verb"), classes, strict=True):
        folder = merged / "tasks" / task
        model, report = auto.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]  # the classifier's pooler may be of no use
        by_hand = auto.from_pretrained(work / "experts" / task)
        encoder = auto.from_pretrained(merged / "encoder", num_labels=model.num_labels).base_model
        by_hand.base_model.load_state_dict(encoder.state_dict())
        batch = AutoTokenizer.from_pretrained(folder)(["anna sees rome"], return_tensors="pt")
        with torch.inference_mode():
            torch.testing.assert_close(model(**batch).logits, by_hand(**batch).logits)

    # The tags of the evaluation are those of Transformers, with O for words that were cut off.
    folder = aligned / "tasks" / "ner"
    definition = read_task(folder)
    assert definition
    model, tokenizer = classes[0].from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    own = read_predictions(scores[aligned])["ner"].splits["validation"]
    table = pq.read_table(rows / "ner" / "validation.parquet").to_pylist()
    cut = 0
    for row, predicted, labels in zip(table, own.predicted, own.labels, strict=True):
        encoded = tokenizer(
            [row["tokens"]], is_split_into_words=True, return_tensors="pt",
            truncation=True, max_length=LENGTH,
        )  # fmt: skip
        places = encoded.word_ids(0)
        with torch.inference_mode():
            best = model(**encoded).logits[0].argmax(-1).tolist()
        outside = definition.labels.index("O")
        wanted = [
            best[places.index(word)] if word in places else outside
            for word in range(len(row["tokens"]))
        ]
        cut += sum(word not in places for word in range(len(row["tokens"])))
        assert (predicted, labels) == (wanted, row["label"])
    assert cut, "some words do not fit"


@pytest.mark.parametrize("how", ["names", "data", "settings"])
def test_a_taggers_outputs_are_put_into_the_tasks_order(
    work: Path, tmp_path: Path, how: str
) -> None:
    folder = Path(shutil.copytree(work / "experts" / "ner", tmp_path / "ner"))
    task = read_task(folder)
    assert task
    (folder / "task.json").unlink()
    order = [2, 0, 3, 1, 4][: task.num_outputs]
    order = [place for place in order if place < task.num_outputs]
    names = [task.labels[label] for label in order]
    tensors = load_file(folder / "model.safetensors")
    before = {name: tensors[name] for name in ("classifier.weight", "classifier.bias")}
    save_file(
        {**tensors, **{name: value[order] for name, value in before.items()}},
        folder / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    shown = names if how == "names" else [f"LABEL_{n}" for n in range(len(order))]
    edit_config(
        folder, id2label=dict(enumerate(shown)), label2id={n: i for i, n in enumerate(shown)}
    )
    labels = align(folder, task, work / "data", names if how == "settings" else ())
    assert labels.origin == {"data": "training data"}.get(how, how)
    after = load_file(folder / "model.safetensors")
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)


def test_predictions_are_read_as_they_were_scored(work: Path) -> None:
    out = score(work / "experts" / "ner", work, "ner", ["ner"])
    content = json.loads(out.read_text())["tasks"]["ner"]
    low, high = content["interval"]["seqeval_f1"]
    task, splits = read_predictions(out)["ner"]
    draws = resampled(task, splits)["seqeval_f1"]
    assert np.quantile(draws, [0.025, 0.975]) == pytest.approx([low, high])
    table = pq.read_table(predictions_path(out))
    assert table["predictions"][0].as_py() == splits["validation"].predicted[0]


def test_a_comparison_has_the_tags_of_every_sentence(
    work: Path, tiny_base: Path, tmp_path: Path
) -> None:
    merging = ComparedSettings(method="average", realign={"texts": 32})
    settings = CompareSettings(methods={"average": merging}, **CPU)
    cell = compare(
        experts={task: work / "experts" / task for task in ("ner", "verb")},
        base=tiny_base, data=work / "data",
        out=tmp_path / "cell.json", merging=merging, settings=settings,
    ).summary  # fmt: skip
    again = answers(cell)["ner"]
    assert cell.tasks["ner"].score == pytest.approx(
        float(resampled(*again)["score"].mean()), abs=0.1
    )
    assert len(cell.tasks["ner"].labels) == 24
