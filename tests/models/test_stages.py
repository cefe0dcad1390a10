"""Fine-tuning an expert, and a merged model's answers."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from fmn.errors import UserError
from fmn.models import stages
from fmn.store.artifacts import digest_files
from fmn.store.stage import Outcome
from fmn.tasks.task import write_task
from tests.conftest import TUNING
from tests.kinds import TASKS as KINDS
from tests.kinds import TEXTS, images, merged_model
from tests.models.experts import answers, expert, make_task, write_rows

# finetune, predict


def finetune(work: Path, out: Path, **changes: object) -> Outcome:
    settings = TUNING.model_copy(update=changes)
    base, data = work / "base", work / "data"
    return stages.finetune(base, task="sst2", data=data, out=out, settings=settings)


@pytest.fixture
def merged(tiny_work: Path, tmp_path: Path) -> Path:
    """The folder of a model that could have been merged: two tasks, their names and no more."""
    for task in ("sst2", "stsb"):
        shutil.copytree(tiny_work / "experts" / task, tmp_path / "merged" / "tasks" / task)
    return tmp_path / "merged"


def test_an_expert_is_computed_once_for_the_same_settings_and_rows(
    tiny_work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "expert"
    first = finetune(tiny_work, out)
    assert first.computed
    assert digest_files(out) == digest_files(tiny_work / "experts" / "sst2"), "it is repeatable"
    again = finetune(tiny_work, out, device="auto")  # where to compute changes no key
    assert not again.computed
    assert again.summary == first.summary
    assert finetune(tiny_work, out, seed=1).computed
    (out / "config.json").write_text("{}")
    assert finetune(tiny_work, out, seed=1).computed
    data = shutil.copytree(tiny_work / "data", tmp_path / "data")
    shutil.copyfile(data / "sst2" / "validation.parquet", data / "sst2" / "train.parquet")
    outcome = stages.finetune(tiny_work / "base", task="sst2", data=data, out=out, settings=TUNING)
    assert outcome.computed
    for inside in ("base/expert", "data", "data/sst2"):
        with pytest.raises(UserError, match="would change"):
            finetune(tiny_work, tiny_work / inside)


def test_a_task_without_labels_is_not_fine_tuned(tiny_base: Path, tmp_path: Path) -> None:
    labelled = make_task(["a", "b"])
    columns = labelled.columns.model_copy(update={"label": None})
    task = labelled.model_copy(update={"columns": columns, "metrics": ()})
    data = write_rows(tmp_path / "data", labelled, np.zeros(9, np.int64))
    write_task(data, task)
    with pytest.raises(UserError, match="task own: its rows have no labels to fine-tune on"):
        stages.finetune(tiny_base, task="own", data=data, out=tmp_path / "out")


def test_a_merged_model_answers_in_the_tasks_own_words(merged: Path) -> None:
    answer: Any = stages.predict(merged, "a warm and funny film", task="sst2")
    names = AutoConfig.from_pretrained(merged / "tasks" / "sst2").id2label
    assert answer.probabilities.keys() == set(names.values()) == {"negative", "positive"}
    assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert answer.score == answer.probabilities[answer.label] >= 0.5
    value: Any = stages.predict(merged, "one text", "another", task="stsb")
    assert (value.label, value.probabilities) == ("score", {})
    for task, texts, problem in (
        ("stsb", ("one text",), "task stsb: it takes 2 texts"),
        ("sst2", ("one text", "another"), "task sst2: it takes 1 text"),
        ("rte", ("one text", "another"), "has no task rte"),
    ):
        with pytest.raises(UserError, match=problem):
            stages.predict(merged, *texts, task=task)


def test_of_several_labels_those_above_the_threshold_are_the_answer(tmp_path: Path) -> None:
    folder = expert(tmp_path / "merged" / "tasks" / "own", 3, names=["a", "b", "c"])
    text = "w3 w4 w5 w6"
    shares = 1 / (1 + np.exp(-answers(folder, [text])[0].astype(float)))
    for threshold in (float(np.sort(shares)[:2].mean()), 0.999):
        kind: Any = "multi_label_classification"
        write_task(folder, make_task(["a", "b", "c"], kind, threshold=threshold))
        answer: Any = stages.predict(tmp_path / "merged", text, task="own")
        above = [name for name, share in zip("abc", shares, strict=True) if share >= threshold]
        assert answer.labels == above
        assert answer.label == (", ".join(above) or "none")
        assert list(answer.probabilities.values()) == pytest.approx(shares.tolist(), abs=1e-6)
        assert answer.score == max(answer.probabilities.values())


def test_a_text_is_cut_at_the_tasks_length(tmp_path: Path) -> None:
    folder = expert(tmp_path / "merged" / "tasks" / "own", 2, names=["no", "yes"])
    words = "w3 w4 w5 w6 w7 w8"
    answered = []
    for length in (128, 3):
        write_task(folder, make_task(["no", "yes"], max_length=length))
        answered.append(stages.predict(tmp_path / "merged", words, task="own"))
    assert answered[0] != answered[1]
    assert answered[1] == stages.predict(tmp_path / "merged", "w3 w4 w5", task="own")


@pytest.fixture(scope="module")
def berts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier, a tagger and an embedding model, merged."""
    names = ("mood", "ner", "similar")
    return merged_model(tmp_path_factory.mktemp("berts"), {name: KINDS[name] for name in names})


def of_kind(folder: Path, name: str, seed: int = 0) -> Path:
    """Two experts of one kind, merged."""
    other = KINDS[name].model_copy(update={"name": "other"})
    return merged_model(folder, {name: KINDS[name], "other": other}, seed)


def test_a_tagger_answers_with_spans_of_the_text(berts: Path) -> None:
    text = "  w12  v3\tw9 .  w45"
    answer = stages.predict(berts, text, task="ner")
    assert isinstance(answer, stages.Tags)
    tokenizer = AutoTokenizer.from_pretrained(berts / "tasks" / "ner")
    model = AutoModelForTokenClassification.from_pretrained(berts / "tasks" / "ner").eval()
    inputs = tokenizer(text.split()[:4], is_split_into_words=True, return_tensors="pt")
    with torch.inference_mode():
        shares = model(**inputs).logits[0].softmax(-1)
    places = [inputs.word_ids().index(word) for word in range(4)]
    labels = [model.config.id2label[int(shares[place].argmax())] for place in places]
    assert answer.labels == [*labels, None], "the last word is beyond 12 tokens"
    assert answer.spans
    for span in answer.spans:
        assert span.text == text[span.start : span.end]
        assert 0 < span.score <= 1
        assert any(label.endswith(f"-{span.entity}") for label in labels)


def test_an_embedding_model_answers_with_the_embedding_or_the_cosine(berts: Path) -> None:
    plain = SentenceTransformer(str(berts / "tasks" / "similar"), device="cpu")
    expected = plain.encode(TEXTS[:2])
    answer = stages.predict(berts, TEXTS[0], task="similar")
    assert isinstance(answer, stages.Embedding)
    np.testing.assert_allclose(answer.embedding, expected[0], atol=1e-5)
    pair = stages.predict(berts, *TEXTS[:2], task="similar")
    assert isinstance(pair, stages.Similarity)
    assert pair.score == pytest.approx(float(expected[0] @ expected[1]), abs=1e-5)


def test_an_image_is_answered_by_its_class(tmp_path: Path) -> None:
    merged = of_kind(tmp_path, "flowers")
    file = tmp_path / "flower.png"
    file.write_bytes(images(1)[0])
    answer = stages.predict(merged, task="flowers", image=file)
    folder = merged / "tasks" / "flowers"
    inputs = AutoImageProcessor.from_pretrained(folder)(Image.open(file), return_tensors="pt")
    with torch.inference_mode():
        plain = AutoModelForImageClassification.from_pretrained(folder).eval()
        shares = plain(**inputs).logits[0].softmax(-1)
    assert isinstance(answer, stages.Prediction)
    assert list(answer.probabilities.values()) == pytest.approx(shares.tolist(), abs=1e-5)
    file.write_text("no image")
    with pytest.raises(UserError, match="image"):
        stages.predict(merged, task="flowers", image=file)
    for options, problem in (
        ({"text": "w1"}, "task flowers: it takes an image and no text; give --image FILE"),
        ({}, "task flowers: it takes an image and no text; give --image FILE"),
        ({"image": tmp_path / "none.png"}, "none.png: no such file; give --image the file"),
    ):
        with pytest.raises(UserError, match=problem):
            stages.predict(merged, task="flowers", **options)


@pytest.mark.parametrize(
    ("name", "auto"), [("chat", AutoModelForCausalLM), ("sums", AutoModelForSeq2SeqLM)]
)
def test_a_generative_model_answers_with_a_text(name: str, auto: Any, tmp_path: Path) -> None:
    merged = of_kind(tmp_path, name, seed=36)
    tokenizer = AutoTokenizer.from_pretrained(merged / "tasks" / name)
    model = auto.from_pretrained(merged / "tasks" / name).eval()
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    ids = ids[:, :-1] if name == "chat" else ids  # without </s>
    with torch.inference_mode():
        output = model.generate(ids, max_new_tokens=24 - ids.shape[1] * (name == "chat"))[0]
    text = tokenizer.decode(output[ids.shape[1] * (name == "chat") :], skip_special_tokens=True)
    assert stages.predict(merged, TEXTS[0], task=name) == stages.Completion(text=text)
    if name == "chat":
        with pytest.raises(UserError, match="task chat: the prompt has 61 tokens of the 24"):
            stages.predict(merged, "w12 " * 20, task=name)


@pytest.mark.parametrize(
    ("task", "arguments", "problem"),
    [
        ("ner", {"text": "a", "text_pair": "b"}, "task ner: it takes 1 text; give tokens"),
        ("ner", {"text": " "}, "task ner: the text is empty; give one with words"),
        ("ner", {}, "task ner: it takes 1 text"),
        ("similar", {}, "task similar: it takes 1 text or 2; give text, text_pair"),
        ("mood", {"text": "a", "image": Path("x")}, "task mood: it takes text and no image"),
    ],
)
def test_what_does_not_fit_the_kind_is_refused(
    berts: Path, task: str, arguments: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        stages.predict(berts, task=task, **arguments)
