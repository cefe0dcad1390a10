"""Embedding models give what Sentence Transformers gives, or are refused in one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sentence_transformers import SentenceTransformer

from fmn.errors import UserError
from fmn.models.checkpoints import kind_in
from fmn.models.embedding import POOLINGS, check_agreement, notes, read_modules
from fmn.models.loading import load_model, load_processor
from fmn.tasks.batches import Examples, pad_batch
from fmn.tasks.encoding import encode
from fmn.tasks.task import Columns, Task
from tests.sentences import TEXTS, TYPES, add_dense, embedding_model, encoded, write_json

TASK = Task(
    name="near",
    task="sentence-similarity",
    problem_type=None,
    columns=Columns(text="text", label=None),
    metrics=(),
)


def examples_of(folder: Path, texts: list[str]) -> Examples:
    return encode(load_processor(folder), TASK, pa.table({"text": texts}))


def embeddings(folder: Path, texts: list[str]) -> Any:
    batch = pad_batch(examples_of(folder, texts), np.arange(len(texts)))
    with torch.inference_mode():
        return load_model(folder)(**batch.inputs)


@pytest.mark.parametrize("is_normalised", [True, False])
@pytest.mark.parametrize("modes", [*POOLINGS, ("cls", "max", "mean"), "old", "none"])
def test_embeddings_are_those_of_sentence_transformers(
    modes: Any, is_normalised: bool, tmp_path: Path
) -> None:
    pooling = {"pooling_mode": modes}
    if modes == "old":
        pooling = {"pooling_mode_cls_token": False, "pooling_mode_mean_sqrt_len_tokens": True}
    if modes == "none":
        pooling = {"pooling_mode_cls_token": False}
    paths = tuple(TYPES) if is_normalised else tuple(TYPES)[:2]
    folder = embedding_model(tmp_path / "m", pooling, paths=paths)
    assert kind_in(folder) == "sentence-similarity"
    output, wanted = embeddings(folder, TEXTS), torch.from_numpy(encoded(folder, TEXTS))
    torch.testing.assert_close(output.sentence_embedding, wanted, rtol=0, atol=1e-5)
    unit = torch.nn.functional.normalize(wanted, dim=-1)
    torch.testing.assert_close(output.logits, unit, rtol=0, atol=1e-5)


@pytest.mark.parametrize("paths", [tuple(TYPES), tuple(TYPES)[:2]])
def test_what_sentence_transformers_saves_today_is_read(paths: Any, tmp_path: Path) -> None:
    folder = embedding_model(tmp_path / "m", {"pooling_mode": ["cls", "max"]}, paths=paths)
    model = SentenceTransformer(str(folder), device="cpu", prompts={"query": "a film "})
    model.save_pretrained(str(tmp_path / "saved"))
    saved = read_modules(tmp_path / "saved")
    assert (saved.pooling, saved.normalise) == (("cls", "max"), len(paths) == 3)
    assert saved.prompts == (("query", "a film "),)
    wanted = torch.from_numpy(encoded(folder, TEXTS))
    own = embeddings(tmp_path / "saved", TEXTS).sentence_embedding
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_normalised", [True, False])
@pytest.mark.parametrize(
    "layers", [[("Tanh", 12, True)], [("Identity", 20, False), ("GELU", 16, True)]]
)
def test_dense_layers_are_part_of_the_embedding(
    layers: list[tuple[str, int, bool]], is_normalised: bool, tmp_path: Path
) -> None:
    paths = tuple(TYPES) if is_normalised else tuple(TYPES)[:2]
    folder = embedding_model(tmp_path / "m", {"pooling_mode": "mean"}, paths=paths)
    size = 16
    for activation, width, bias in layers:
        add_dense(folder, activation, size, width, bias=bias)
        size = width
    wanted = torch.from_numpy(encoded(folder, TEXTS))
    model = load_model(folder)
    batch = pad_batch(examples_of(folder, TEXTS), np.arange(len(TEXTS)))
    with torch.inference_mode():
        own = model(**batch.inputs).sentence_embedding
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-5)
    assert read_modules(folder).normalise == is_normalised
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path / "saved")
    load_processor(folder).save_pretrained(tmp_path / "saved")
    with torch.inference_mode():
        own = model(**batch.inputs).sentence_embedding
    saved = torch.from_numpy(encoded(tmp_path / "saved", TEXTS))
    torch.testing.assert_close(own, saved, rtol=0, atol=1e-5)


def test_a_default_prompt_begins_every_text(tmp_path: Path) -> None:
    folder = embedding_model(tmp_path / "m", {"pooling_mode": "mean"})
    prompts = {"prompts": {"query": "a film ", "plain": ""}, "default_prompt_name": "query"}
    write_json(folder / "config_sentence_transformers.json", prompts)
    wanted = torch.from_numpy(encoded(folder, TEXTS))
    torch.testing.assert_close(embeddings(folder, TEXTS).logits, wanted, rtol=0, atol=1e-5)
    assert read_modules(folder).prompts == (("query", "a film "),)


def test_a_plain_folder_is_mean_pooling_and_that_is_said(tmp_path: Path) -> None:
    folder = embedding_model(tmp_path / "m", {})
    assert notes(folder) == []
    (folder / "modules.json").unlink()
    (note,) = notes(folder)
    assert "plain mean over the tokens" in note
    model = load_model(folder, "sentence-similarity")
    batch = pad_batch(
        encode(load_processor(folder, "sentence-similarity"), TASK, pa.table({"text": TEXTS})),
        np.arange(len(TEXTS)),
    )
    with torch.inference_mode():
        own = model(**batch.inputs).sentence_embedding
    torch.testing.assert_close(own, torch.from_numpy(encoded(folder, TEXTS)), rtol=0, atol=1e-5)


def _layer_norm(folder: Path) -> None:
    kinds = {**TYPES, "2_Normalize": "LayerNorm"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"}
               for path, kind in kinds.items()]  # fmt: skip
    write_json(folder / "modules.json", modules)


def _dense(**changes: Any) -> Any:
    """Add a dense layer with these settings; without settings, its weights are not there."""

    def change(folder: Path) -> None:
        file = add_dense(folder) / "2_Dense/config.json"
        write_json(file, json.loads(file.read_text()) | changes)
        if not changes:
            (folder / "2_Dense/model.safetensors").unlink()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_layer_norm, "LayerNorm in 2_Normalize"),
        (_dense(), "2_Dense/model.safetensors: its weights do not fit its config.json: No such"),
        (_dense(out_features=3), "size mismatch"),
        (
            lambda folder: add_dense(folder, size=20),
            "2_Dense: it takes 20 numbers, and .* gives 16",
        ),
        (_dense(out_features="x"), "do not fit its config.json: invalid literal"),
        (_dense(activation_function="my.ReLU"), "the activation ReLU or a residual connection"),
        (_dense(use_residual=True), "a residual connection"),
        (_dense(module_input_name="token_embeddings"), "2_Dense: it is of tokens"),
        (
            lambda folder: write_json(folder / "modules.json", [{"type": 1}]),
            "its modules are 1 in .",
        ),
        (lambda folder: write_json(folder / "modules.json", "x"), "not as SentenceTransformer"),
        (lambda folder: (folder / "modules.json").write_text("{"), "not JSON"),
        (
            lambda folder: write_json(folder / "1_Pooling/config.json", {"pooling_mode": "attn"}),
            "unknown pooling 'attn'",
        ),
        (lambda folder: (folder / "1_Pooling/config.json").unlink(), "cannot be read"),
        (
            lambda folder: write_json(
                folder / "config_sentence_transformers.json", {"truncate_dim": 4}
            ),
            "truncate_dim",
        ),
        (
            lambda folder: write_json(
                folder / "sentence_bert_config.json", {"transformer_task": "fill-mask"}
            ),
            "of no text encoder",
        ),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(
    change: Any, message: str, tmp_path: Path
) -> None:
    folder = embedding_model(tmp_path / "m", {"pooling_mode": "mean"})
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pooling", "paths", "message"),
    [
        ("cls", tuple(TYPES), "b: .* cannot be merged: pooling is cls, not mean"),
        ("mean", tuple(TYPES)[:2], "normalise is False, not True"),
    ],
)
def test_models_that_pool_differently_are_refused(
    pooling: str, paths: Any, message: str, tmp_path: Path
) -> None:
    folders = {
        "a": embedding_model(tmp_path / "a", {"pooling_mode": "mean"}),
        "b": embedding_model(tmp_path / "b", {"pooling_mode": pooling}, paths=paths),
    }
    check_agreement({"a": folders["a"], "same": folders["a"]})
    with pytest.raises(UserError, match=message):
        check_agreement(folders)


def test_statistics_take_one_text_of_each_row_and_scores_take_both(tmp_path: Path) -> None:
    folder = embedding_model(tmp_path / "m", {"pooling_mode": "mean"})
    task = Task(
        name="pairs",
        task="sentence-similarity",
        problem_type="regression",
        columns=Columns(text="left", text_pair="right"),
        metrics=("spearmanr_cosine",),
    )
    left, right = ["fine", "dull", "of"], ["a a", "winter winter", "film film"]
    labels = pa.array([1.0, 2.0, 3.0], pa.float32())
    table = pa.table({"left": left, "right": right, "label": labels})
    tokenizer = load_processor(folder)

    def texts(examples: Examples) -> list[str]:
        ids = examples.inputs["input_ids"]
        return [tokenizer.decode(row, skip_special_tokens=True) for row in ids]

    assert texts(encode(tokenizer, task, table)) == ["fine", "winter winter", "of"]
    some = encode(tokenizer, task, table, rows=np.array([2, 1]))
    assert texts(some) == ["", "winter winter", "of"]
    scored = encode(tokenizer, task, table, scored=True)
    assert texts(scored) == [*left, *right]
    assert scored.labels.tolist() == [1, 2, 3, 1, 2, 3]
