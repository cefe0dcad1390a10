"""Generative models through all stages, and the merged model against one put together by hand."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fmn.errors import UserError
from fmn.evaluate.files import read_metrics, read_predictions
from fmn.experiments.stages import ComparedSettings, CompareSettings, compare
from fmn.fisher.files import read_fisher
from fmn.fisher.stages import FisherSettings, fisher
from fmn.merge.model import write_model
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
from fmn.report.stages import report
from fmn.sources.stages import fetch
from fmn.tasks.dataset import read_split
from fmn.tasks.encoding import encode
from fmn.tasks.task import load_task
from tests.pipeline import CPU, make_expert, merge_inputs, prepare, score

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]
WORDS = ["<pad>", "<s>", "</s>", "?", *NUMBERS, *(f"{word}s" for word in NUMBERS), "then", "all"]
SIZES = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(WORDS)}
BASES: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, **SIZES},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_inner=24, n_positions=64, **SIZES)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            **{"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
            **{"decoder_start_token_id": 0, **SIZES},
        )
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "decoder_ffn_dim": 24},
            **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24},
            **{"decoder_start_token_id": 2, "max_position_embeddings": 64, **SIZES},
            forced_eos_token_id=None,
        )
    ),
}
RULES: Mapping[str, Callable[[int], str]] = {  # what is asked of the first number, by task
    "next": lambda n: f"{NUMBERS[(n + 1) % 7]}s",
    "twice": lambda n: f"{NUMBERS[n]} then {NUMBERS[n]}",
}


def make_base(folder: Path, name: str) -> Path:
    """A random model with a tokenizer of words."""
    torch.manual_seed(0)
    model: transformers.PreTrainedModel = BASES[name]()
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"llama": ("<s> $A", [("<s>", 1)]), "t5": ("$A </s>", [("</s>", 2)])}
    special |= {"bart": ("<s> $A </s>", [("<s>", 1), ("</s>", 2)])}
    if name in special:
        single, tokens = special[name]
        words.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="?"
    ).save_pretrained(folder)
    return folder


def write_tasks(work: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    for task, rule in RULES.items():
        numbers = rng.integers(0, 7, (96, 3))
        lines = [
            {"ask": " ".join(NUMBERS[n] for n in row) + " ", "answer": rule(row[0])}
            for row in numbers
        ]
        path = work / f"{task}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        options = {"prompt": "ask", "completion": "answer", "validation_size": 24}
        metric = ["perplexity", "exact_match"]
        prepare(task, work, dataset=str(path), kind=kind, metric=metric, **options)


def make_experts(work: Path, name: str) -> None:
    """A base, data and experts of two tasks, with their statistics."""
    is_pair = name in ("t5", "bart")
    fetch(str(make_base(work / "source", name)), out=work / "base")
    write_tasks(work, "text2text-generation" if is_pair else "text-generation")
    for task in RULES:
        make_expert(work, task, work / "base", epochs=12, learning_rate=1e-2, batch_size=16)


@pytest.fixture(scope="module", params=BASES)
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_experts(folder, request.param)
    return folder


def inputs(work: Path) -> dict[str, Any]:
    return merge_inputs(work, RULES, work / "base")


def auto_class(folder: Path) -> Any:
    is_pair = json.loads((folder / "config.json").read_text()).get("is_encoder_decoder")
    return transformers.AutoModelForSeq2SeqLM if is_pair else transformers.AutoModelForCausalLM


def state(folder: Path) -> dict[str, torch.Tensor]:
    model, info = auto_class(folder).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return dict(model.state_dict())


def test_a_merge_is_that_by_hand_and_loads_without_our_code(work: Path) -> None:
    merge(**inputs(work), out=work / "average", settings=MergeSettings(method="average"))
    folders = [work / "average" / "encoder", *(work / "average/tasks" / task for task in RULES)]
    experts = [state(folder) for folder in inputs(work)["experts"].values()]
    for folder in folders:
        for name, tensor in state(folder).items():
            by_hand = sum(each[name] for each in experts) / 2
            torch.testing.assert_close(tensor, by_hand, msg=name)
    config = json.loads((folders[0] / "config.json").read_text())
    assert config["architectures"] == [type(load_model(work / "base")).__name__]
    assert (folders[0] / "generation_config.json").is_file()
    assert set(load_file(folders[0] / "model.safetensors")) == set(
        load_file(work / "base" / "model.safetensors")
    )


@pytest.mark.parametrize("work", ["llama", "t5"], indirect=True)
@pytest.mark.parametrize(
    "method", ["mask-fisher", "regmean", "fisher-regmean", "ties", "wudi", "tsv-m", "fisher-wudi"]
)
def test_every_method_gives_a_model_that_generates(work: Path, method: str) -> None:
    out = work / method
    merge(**inputs(work), out=out, settings=MergeSettings(method=method))
    model = auto_class(out / "encoder").from_pretrained(out / "encoder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "encoder")
    ids = tokenizer("two four five", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[0] == 1


def test_stages_after_the_merge(work: Path) -> None:
    experts, rows = inputs(work)["experts"], work / "data"
    out = work / "auto"
    merge(**inputs(work), out=out, data=rows, settings=MergeSettings(method="auto", **CPU))
    scores = {}
    for task, expert in experts.items():
        scores[task] = score(expert, work, task, [task])
        own = read_metrics(scores[task]).tasks[task]
        assert own.interval["perplexity"]
        assert own.score is not None
        assert own.score < 5  # of 20 words
    merged = {"merged": score(out, work, "merged")}
    written = report(
        merged=merged, models={"merged": out}, experts=scores, fisher=inputs(work)["fisher"],
        out=work / "report",
    )  # fmt: skip
    assert written.computed
    page = (work / "report/report.html").read_text()
    assert "perplexity (less is better)" in page
    assert "re-aligned heads" not in page
    options = RealignSettings(device="cpu", dtype="float32")
    realign(out, experts=experts, data=rows, out=work / "as before", settings=options)
    same = state(work / "as before" / "tasks/next")
    assert all(torch.equal(same[name], own) for name, own in state(out / "tasks/next").items())
    refit = CalibrateSettings(texts=32, **CPU)
    if not json.loads((work / "base/config.json").read_text()).get("is_encoder_decoder"):
        calibrate(out, experts=experts, data=rows, out=work / "calibrated", settings=refit)
        state(work / "calibrated" / "encoder")
        score(work / "calibrated", work, "calibrated")
        both = [read_metrics(work / f"{name}.json").tasks for name in ("merged", "calibrated")]
        for task in RULES:
            before, after = (each[task].score or 0.0 for each in both)
            assert 1 < after < 1.5 * before
    else:
        with pytest.raises(UserError, match="has a decoder"):
            calibrate(out, experts=experts, data=rows, out=work / "no", settings=refit)


def test_an_exact_match_is_what_greedy_generation_gives(work: Path) -> None:
    rows, expert = work / "data", work / "experts" / "next"
    task = load_task(rows, "next")
    processor = load_processor(expert)
    table = read_split(rows, task, "validation")
    model = load_model(expert)
    scores = predict(model, encode(processor, task, table, scored=True), device="cpu")
    answers = []
    for row in table.to_pylist():
        ids = processor(row["ask"], return_tensors="pt").input_ids
        greedy = model.generate(ids, max_new_tokens=8, do_sample=False)[0]
        text = greedy if model.config.is_encoder_decoder else greedy[ids.shape[1] :]
        answers.append(processor.decode(text, skip_special_tokens=True) == row["answer"])
    assert (scores[:, 1] == scores[:, 2]).tolist() == answers
    assert any(answers)
    out = score(expert, work, "exact", ["next"])
    written = read_predictions(out)["next"].splits["validation"]
    assert (written.predicted == written.labels).tolist() == answers
    own = read_metrics(out).tasks["next"]
    losses = [  # by Transformers' own loss, row by row
        model(**inputs_of_row(processor, model, row)).loss.item() for row in table.to_pylist()
    ]
    total = sum(loss * count for loss, count in zip(losses, written.labels, strict=True))
    assert own.score == pytest.approx(np.exp(total / written.labels.sum()), rel=1e-4)


def inputs_of_row(processor: Any, model: Any, row: dict[str, str]) -> dict[str, torch.Tensor]:
    """What Transformers' loss of one example takes."""
    prompt = processor(row["ask"], return_tensors="pt").input_ids
    if model.config.is_encoder_decoder:
        return {
            "input_ids": prompt,
            "labels": processor(text_target=row["answer"], return_tensors="pt").input_ids,
        }
    text = processor(row["answer"], add_special_tokens=False, return_tensors="pt").input_ids
    whole = torch.cat([prompt, text, torch.tensor([[processor.eos_token_id]])], 1)
    return {
        "input_ids": whole,
        "labels": torch.where(torch.arange(whole.shape[1]) < prompt.shape[1], -100, whole),
    }


@pytest.mark.parametrize("work", ["t5", "gpt2"], indirect=True)
def test_an_output_map_that_is_stored_beside_the_embeddings_is_merged_if_it_differs(
    work: Path, tmp_path: Path
) -> None:
    experts = {}
    for number, (task, folder) in enumerate(inputs(work)["experts"].items()):
        own = experts[task] = tmp_path / task
        own.mkdir()
        for file in folder.iterdir():
            if file.name != "fmn.json":
                (own / file.name).write_bytes(file.read_bytes())
        tensors = load_file(own / "model.safetensors")
        torch.manual_seed(number)
        tensors["lm_head.weight"] = torch.randn(len(WORDS), 16)
        save_file(tensors, own / "model.safetensors", {"format": "pt"})
    merge(experts=experts, out=tmp_path / "merged", settings=MergeSettings(method="average"))
    loaded = auto_class(tmp_path / "merged/encoder").from_pretrained(tmp_path / "merged/encoder")
    heads = [
        load_file(folder / "model.safetensors")["lm_head.weight"] for folder in experts.values()
    ]
    torch.testing.assert_close(loaded.lm_head.weight.data, sum(heads) / 2)
    tied = {**experts, "next": inputs(work)["experts"]["next"]}
    with pytest.raises(UserError, match=r"lm_head.weight"):
        merge(experts=tied, out=tmp_path / "no", settings=MergeSettings(method="average"))


def test_a_sharded_merge_and_half_precision_statistics(work: Path, tmp_path: Path) -> None:
    experts = inputs(work)["experts"]
    write_model(tmp_path / "cut", experts, MergeSettings(method="average"), shard_bytes=4000)
    write_model(tmp_path / "whole", experts, MergeSettings(method="average"))
    assert len(list((tmp_path / "cut/encoder").glob("*.safetensors"))) > 2
    whole = state(tmp_path / "whole/encoder")
    for folder in ("encoder", "tasks/next"):
        for name, tensor in state(tmp_path / "cut" / folder).items():
            assert torch.equal(tensor, whole[name]), name
    values = []
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.parquet"
        settings = FisherSettings(samples=32, device="cpu", dtype=dtype)
        fisher(experts["next"], task="next", data=work / "data", out=out, settings=settings)
        values.append(np.concatenate(list(read_fisher(out)[0].values())))
    assert np.corrcoef(*np.log(np.maximum(values, 1e-12)))[0, 1] > 0.9


def test_a_cell_of_a_comparison_has_the_scores_of_the_written_merge(work: Path) -> None:
    merging = ComparedSettings(method="mask-fisher")
    sources = inputs(work) | {"data": work / "data"}
    cell = compare(
        **sources, out=work / "cell.json", merging=merging,
        settings=CompareSettings(methods={"own": merging}, **CPU),
    ).summary  # fmt: skip
    merge(**inputs(work), out=work / "compared", settings=MergeSettings(method="mask-fisher"))
    written = read_metrics(score(work / "compared", work, "compared")).tasks
    for task, of_task in cell.tasks.items():
        assert of_task.score == pytest.approx(written[task].score, rel=1e-4)
        assert of_task.score
        assert of_task.expert
        assert of_task.relative == pytest.approx(of_task.expert / of_task.score)
