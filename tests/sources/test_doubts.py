"""What a checkpoint's files say against one another is settled, told, or refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

from fmn.errors import UserError
from fmn.models import loading
from fmn.sources.stages import fetch
from tests.folders import SIZES, WORDS, edit_config, save, tiny_bert, weights

CASED = (*WORDS[:5], "a", "A", "Paris", "paris", "\u00e9", "\u00c9", "##s")
TEXT = "Paris a A \u00c9 \u00e9"


def checkpoint(
    folder: Path,
    words: tuple[str, ...] = CASED,
    settings: Any = None,
    *,
    is_fast: bool = False,
    lowercase: bool = False,
) -> Path:
    """A checkpoint with these pieces in vocab.txt, or in tokenizer.json, and these settings."""
    tiny_bert(folder, words=words, vocab_size=len(words))
    (folder / "tokenizer_config.json").unlink()
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if is_fast:
        ids = {word: number for number, word in enumerate(words)}
        tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "vocab.txt").unlink()
    return folder


def notes(source: Path, out: Path) -> list[str]:
    return fetch(str(source), out=out).summary.notes


@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "BertTokenizer"}])
@pytest.mark.parametrize("is_fast", [False, True])
def test_a_cased_vocabulary_is_read_as_cased_where_nothing_says_so(
    settings: Any, is_fast: bool, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "source", settings=settings, is_fast=is_fast)
    assert AutoTokenizer.from_pretrained(source).tokenize("Paris") == ["paris"], "the fault"
    with pytest.raises(
        UserError, match=r"nothing says how .*\"do_lower_case\": false.* `fmn fetch`"
    ):
        loading.load_tokenizer(source)
    (note,) = notes(source, tmp_path / "out")
    assert "nothing says how its tokenizer treats case" in note
    for tokenizer in (
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        loading.load_tokenizer(tmp_path / "out"),
    ):
        assert tokenizer.tokenize(TEXT) == TEXT.split()
    assert notes(tmp_path / "out", tmp_path / "again") == []


@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.parametrize("settings", [None, {"do_lower_case": True}])
def test_an_uncased_vocabulary_needs_no_word(settings: Any, is_fast: bool, tmp_path: Path) -> None:
    source = checkpoint(
        tmp_path / "source", (*WORDS, "[NEW]"), settings, is_fast=is_fast, lowercase=True
    )
    assert notes(source, tmp_path / "out") == []
    assert loading.load_tokenizer(tmp_path / "out").tokenize("A Fine film") == [
        "a", "fine", "film",
    ]  # fmt: skip


def test_settings_that_the_vocabulary_contradicts_are_told(tmp_path: Path) -> None:
    lower = checkpoint(tmp_path / "lower", settings={"do_lower_case": True})
    (note,) = notes(lower, tmp_path / "a")
    assert "do_lower_case = true, but 3 of 7 pieces of vocab.txt have capital" in note
    upper = checkpoint(tmp_path / "upper", WORDS, {"do_lower_case": False})
    (note,) = notes(upper, tmp_path / "b")
    assert "do_lower_case = false, but 0 of 5 pieces of vocab.txt have capital" in note


@pytest.mark.parametrize("lowercase", [False, True])
def test_two_files_that_contradict_each_other_are_refused(lowercase: bool, tmp_path: Path) -> None:
    settings = {"do_lower_case": not lowercase}
    source = checkpoint(tmp_path / "source", CASED, settings, is_fast=True, lowercase=lowercase)
    values = [json.dumps(value) for value in (not lowercase, lowercase)]
    problem = f"{source}: .* do_lower_case = {values[0]}, but tokenizer.json has {values[1]}; corr"
    with pytest.raises(UserError, match=problem):
        fetch(str(source), out=tmp_path / "out")


def test_tokens_that_depend_on_a_default_are_told(tmp_path: Path) -> None:
    """tokenizer.json puts a blank before the text, which RoBERTa's does not by default."""
    source = tiny_bert(tmp_path / "source")
    config = RobertaConfig(**SIZES | {"vocab_size": 300}, num_labels=2, pad_token_id=1)
    RobertaForSequenceClassification(config).save_pretrained(source)
    for name in ("vocab.txt", "tokenizer_config.json"):
        (source / name).unlink()
    letters = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>"))
    post = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    for has_blank in (False, True):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=has_blank)
        tokenizer.post_processor = post
        tokenizer.save(str(source / "tokenizer.json"))
        own = notes(source, tmp_path / f"out-{has_blank}")
        assert len(own) == has_blank, own
    words = r"Transformers divides .* into <s> I t .*, tokenizer\.json into <s> \u0120 I t"
    assert re.match(words, own[0])


def test_an_expert_with_another_head_than_it_names_is_noted(bert: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bert, tmp_path / "copy"))
    edit_config(
        copy, architectures=["BertForQuestionAnswering"], id2label={0: "negative", 1: "positive"}
    )
    fetched = fetch(str(copy), out=tmp_path / "a", task="sst2").summary
    (note,) = fetched.notes
    assert note.startswith("sst2: config.json names BertForQuestionAnswering, but the weights have")
    edit_config(copy, architectures=["BertForSequenceClassification"])
    save(copy, weights(copy) | {"qa_outputs.weight": torch.ones(2, 8)})
    (note,) = fetch(str(copy), out=tmp_path / "b", task="sst2").summary.notes
    assert note == "sst2: the weights hold another head too, which is not used: qa_outputs.weight"


@pytest.mark.parametrize("named", ["BertForTokenClassification", "BertForMaskedLM"])
def test_a_head_that_is_not_of_the_task_is_refused(named: str, bert: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bert, tmp_path / "copy"))
    edit_config(copy, architectures=[named], id2label={0: "negative", 1: "positive"})
    if named == "BertForMaskedLM":
        save(copy, {n: value for n, value in weights(copy).items() if "classifier" not in n})
    with pytest.raises(UserError, match=f"is a {named}|has no classification head"):
        fetch(str(copy), out=tmp_path / "a", task="sst2")


@pytest.mark.parametrize(
    ("name", "is_noted"),
    [
        ("crf.transitions", True),
        ("lstm.weight_ih_l0", True),
        ("bert.embeddings.adapter.weight", True),
        ("cls.predictions.bias", False),
        ("bert.pooler.extra.weight", False),
        ("bert.embeddings.position_ids", False),
    ],
)
def test_tensors_that_the_class_has_not_are_told(
    name: str, is_noted: bool, bert: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bert, tmp_path / "copy"))
    save(copy, weights(copy) | {name: torch.ones(3, 3)})
    notes = fetch(str(copy), out=tmp_path / "out").summary.notes
    assert [f"no such tensors: {name};" in note for note in notes] == [True] * is_noted
    edit_config(copy, architectures=["BertForMaskedLM"])  # a base, whose head nobody needs
    assert fetch(str(copy), out=tmp_path / "base").summary.notes == []
