"""A LoRA adapter becomes what PEFT makes of its base, or one clear line."""

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import sentence_transformers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer import modules as parts
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fmn.errors import UserError
from fmn.models import checkpoints, loading
from fmn.models.provenance import CheckpointInfo
from fmn.sources import stages
from tests import readers
from tests.folders import edit_config
from tests.hub_server import Hub
from tests.models.experts import TEXTS, expert
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT, as the tests build adapters with it
BERT = ["query", "value"]
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("bert", {"target_modules": BERT}),
    "all linear maps": ("bert", {"target_modules": "all-linear"}),
    "regular expression": ("bert", {"target_modules": r".*layer\.1\..*dense"}),
    "rslora": ("bert", {"target_modules": BERT, "use_rslora": True, "lora_alpha": 5}),
    "patterns": (
        "bert",
        {
            **{"target_modules": BERT, "rank_pattern": {"layer.0.attention.self.query": 2}},
            "alpha_pattern": {"value": 3},
        },
    ),
    "dora": ("bert", {"target_modules": BERT, "use_dora": True}),
    "pissa": ("bert", {"target_modules": BERT, "init_lora_weights": "pissa"}),
    "biases": ("bert", {"target_modules": BERT, "bias": "all"}),
    "biases of the adapted": ("bert", {"target_modules": BERT, "bias": "lora_only"}),
    "bias of B": ("bert", {"target_modules": BERT, "lora_bias": True}),
    "embeddings": ("bert", {"target_modules": [*BERT, "word_embeddings"]}),
    "some layers": ("bert", {"target_modules": BERT, "layers_to_transform": [1]}),
    "token rows": ("bert", {"target_modules": BERT, "trainable_token_indices": [3, 5]}),
    "a module to save": ("bert", {"target_modules": BERT, "modules_to_save": ["pooler"]}),
    "fan in, fan out": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "roberta": ("roberta", {"target_modules": BERT}),
    "distilbert": ("distilbert", {"target_modules": ["q_lin", "lin2"]}),
    "llama": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "t5": ("t5", {"target_modules": ["q", "wo"], "modules_to_save": ["classification_head"]}),
}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a base model without a head, with a tokenizer, by architecture."""
    folders: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in folders:
            folder = tmp_path_factory.mktemp("bases") / architecture
            expert(folder, 2, architecture=architecture)
            (folder / "model.safetensors").unlink()
            tiny_model(architecture, dtype=torch.float32).base_model.save_pretrained(folder)
            folders[architecture] = folder
        return folders[architecture]

    return make


def adapter(folder: Path, base: Path, outputs: int = 3, **lora: Any) -> Path:
    """A random adapter of a classifier on a base."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "task_type": "SEQ_CLS", **lora}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def base(base_of: Callable[[str], Path]) -> Path:
    return base_of("bert")


@pytest.fixture(scope="module")
def bert_adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of `base`; not to be changed by a test."""
    return adapter(tmp_path_factory.mktemp("adapter") / "adapter", base, target_modules=BERT)


@pytest.fixture
def source(bert_adapter: Path, tmp_path: Path) -> Path:
    """A copy of that adapter."""
    return Path(shutil.copytree(bert_adapter, tmp_path / "adapter"))


def edit_adapter(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    copies = {name: value.clone() for name, value in tensors.items()}
    safetensors.torch.save_file(copies, folder / "adapter_model.safetensors")


def logits(model: Any, tokens: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(tokens)
    inputs = tokenizer(TEXTS[:20], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.inference_mode():
        answer: torch.Tensor = model.eval()(**inputs).logits
    return answer


def by_peft(folder: Path, base: Path, outputs: int = 3) -> Any:
    """The model that PEFT itself merges."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs)
    return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def fetch(source: str | Path, out: Path, base: Path | None = None) -> CheckpointInfo:
    return stages.fetch(str(source), out=out, base=base).summary


def assert_refused(source: Path, out: Path, base: Path | None, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        fetch(source, out, base)
    assert "\n" not in str(caught.value)
    assert ".source." not in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_becomes_what_peft_merges(
    form: str, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    architecture, lora = FORMS[form]
    base = base_of(architecture)
    source = adapter(tmp_path / "adapter", base, **lora)
    with warnings.catch_warnings(action="error"):
        info = fetch(source, tmp_path / "out", base)
    assert info.notes == []
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    oracle = by_peft(source, base)
    state = merged.state_dict()
    for name, value in oracle.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(
        logits(merged, tmp_path / "out"), logits(oracle, base), rtol=1e-4, atol=1e-5
    )
    config = checkpoints.load_config(tmp_path / "out")
    assert config.architectures == [type(oracle).__name__]
    assert config.num_labels == 3
    checkpoints.check_tensors(tmp_path / "out", config, head=True)


def test_the_class_is_known_without_the_type_of_task(
    base: Path, source: Path, tmp_path: Path
) -> None:
    edit_adapter(source, task_type=None)
    fetch(source, tmp_path / "by tensors", base)
    config = checkpoints.load_config(tmp_path / "by tensors")
    assert config.architectures == ["BertForSequenceClassification"]
    encoder = transformers.AutoModel.from_pretrained(base)
    lora = peft.LoraConfig(target_modules=BERT, init_lora_weights=False)
    adapted = peft.get_peft_model(encoder, lora)
    adapted.save_pretrained(str(tmp_path / "encoder"))
    fetch(tmp_path / "encoder", tmp_path / "out", base)
    merged = transformers.BertModel.from_pretrained(tmp_path / "out").state_dict()
    for name, value in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], value)


def test_a_tagger_and_an_embedding_model_are_what_they_were_trained_as(
    base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of("bert")
    tagger = transformers.AutoModelForTokenClassification.from_pretrained(base, num_labels=5)
    lora = peft.LoraConfig(target_modules=BERT, task_type="TOKEN_CLS", init_lora_weights=False)
    peft.get_peft_model(tagger, lora).save_pretrained(str(tmp_path / "tagger"))
    fetch(tmp_path / "tagger", tmp_path / "tags", base)
    config = checkpoints.load_config(tmp_path / "tags")
    assert (config.architectures, config.num_labels) == (["BertForTokenClassification"], 5)
    unpooled = Path(shutil.copytree(base, tmp_path / "unpooled"))
    transformers.BertModel.from_pretrained(base, add_pooling_layer=False).save_pretrained(unpooled)
    for folder in (base, unpooled):
        modules = [parts.Transformer(str(folder)), parts.Pooling(24)]
        model = sentence_transformers.SentenceTransformer(modules=modules, device="cpu")
        lora = peft.LoraConfig(target_modules=BERT, init_lora_weights=False)
        model.add_adapter(lora)
        expected = model.encode(TEXTS[:9])
        source, out = tmp_path / f"from {folder.name}", tmp_path / f"to {folder.name}"
        model.save(str(source))
        fetch(source, out, folder)
        loaded = sentence_transformers.SentenceTransformer(str(out), device="cpu")
        np.testing.assert_allclose(loaded.encode(TEXTS[:9]), expected, atol=1e-5)
        stored = safetensors.torch.load_file(out / "model.safetensors")
        assert ("pooler.dense.weight" in stored) == (folder == base)


def test_names_of_older_versions_are_todays(tmp_path: Path) -> None:
    base, source = tmp_path / "base", tmp_path / "adapter"
    tiny_model("vit", dtype=torch.float32).base_model.save_pretrained(base)
    auto = transformers.AutoModelForImageClassification
    model = auto.from_pretrained(base, num_labels=4)
    targets, old = ["q_proj", "fc1"], {"q_proj": "attention.query", "fc1": "intermediate.dense"}
    lora = peft.LoraConfig(target_modules=targets, modules_to_save=["classifier"])
    lora.init_lora_weights = False
    adapted = peft.get_peft_model(model, lora)
    adapted.save_pretrained(str(source))
    expected = adapted.merge_and_unload().state_dict()

    def old_name(name: str) -> str:
        name = name.replace("vit.layers.", "vit.encoder.layer.").replace("mlp.fc1", "fc1")
        return name.replace("q_proj", old["q_proj"]).replace("fc1", old["fc1"])

    write_tensors(source, {old_name(name): value for name, value in tensors_of(source).items()})
    edit_adapter(source, target_modules=["query", "intermediate.dense"])
    fetch(source, tmp_path / "out", base)
    loaded = auto.from_pretrained(tmp_path / "out").state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(loaded[name], value)
    edit_adapter(source, rank_pattern={"query": 8})
    assert_refused(source, tmp_path / "no", base, "names modules as an older Transformers did")


def test_an_adapter_of_the_base_model_fits_the_model_around_it(
    base: Path, source: Path, tmp_path: Path
) -> None:
    fetch(source, tmp_path / "plain", base)
    names = {name: name.replace(".model.bert.", ".model.") for name in tensors_of(source)}
    write_tensors(source, {names[name]: value for name, value in tensors_of(source).items()})
    fetch(source, tmp_path / "out", base)
    plain, out = (tmp_path / name / "model.safetensors" for name in ("plain", "out"))
    assert plain.read_bytes() == out.read_bytes()
    other = adapter(tmp_path / "other", base, target_modules=BERT)
    write_tensors(source, tensors_of(source) | tensors_of(other))
    assert_refused(source, tmp_path / "no", base, "would both be")


def test_what_wrappers_leave_in_names_is_taken_off(
    base: Path, source: Path, tmp_path: Path
) -> None:
    fetch(source, tmp_path / "plain", base)
    expected = safetensors.torch.load_file(tmp_path / "plain" / "model.safetensors")
    tensors = tensors_of(source)
    renamed = {
        f"module.{name}".replace("lora_A.", "lora_A.default.").replace(
            ".layer.0.", ".layer.0._checkpoint_wrapped_module."
        ): value
        for name, value in tensors.items()
    }
    write_tensors(source, renamed)
    fetch(source, tmp_path / "out", base)
    actual = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    (source / "adapter_model.safetensors").unlink()
    torch.save(tensors, source / "adapter_model.bin")
    info = fetch(source, tmp_path / "pickled", base)
    assert info.is_converted
    actual = safetensors.torch.load_file(tmp_path / "pickled" / "model.safetensors")
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_no_tensor_of_an_adapter_is_passed_over(base: Path, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tensors = tensors_of(source)
    name = next(name for name in tensors if "layer.1" in name and "lora_B" in name)
    head = "base_model.model.classifier.weight"
    write_tensors(source, {**tensors, name.replace("layer.1", "layer.7"): tensors[name]})
    assert_refused(source, out, base, "adapts bert.encoder.layer.7.* has not; give the base")
    write_tensors(source, {k: v for k, v in tensors.items() if k != name})
    assert_refused(source, out, base, "lacks .*layer.1.*lora_B")
    write_tensors(source, {k: v for k, v in tensors.items() if "classifier" not in k})
    assert_refused(source, out, base, "neither the adapter nor the base .* has classifier.bias")
    other = {**tensors, name.replace("attention.self.query", "output.dense"): tensors[name]}
    write_tensors(source, other)
    assert_refused(source, out, base, "output.dense.lora_B.* has no place in the base")
    write_tensors(source, {**tensors, name: tensors[name][:-1].contiguous()})
    assert_refused(source, out, base, "does not fit the base .*size mismatch")
    write_tensors(source, {**tensors, head: tensors[head][:, :5].contiguous()})
    assert_refused(source, out, base, "does not fit the base .*size mismatch")
    write_tensors(source, {**tensors, name: tensors[name][:0].contiguous()})
    assert_refused(source, out, base, "empty tensors, as DeepSpeed ZeRO-3 leaves them")
    write_tensors(source, {**tensors, name: tensors[name] * torch.inf})
    assert_refused(source, out, base, "NaN")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"peft_type": "IA3"}, "of the kind IA3; only LoRA adapters"),
        ({"peft_type": "PROMPT_TUNING"}, "of the kind PROMPT_TUNING; only LoRA adapters"),
        ({"alora_invocation_tokens": [1]}, "for a part of a text only"),
        ({"layer_replication": [[0, 1]]}, "repeats layers"),
        ({"init_lora_weights": "loftq"}, "starts from changed weights of its base"),
        ({"init_lora_weights": "pissa_niter_16"}, "starts from changed weights of its base"),
        ({"use_newest_lora": True}, "'use_newest_lora', which this PEFT does not know"),
        ({"r": "many"}, "does not fit the base"),
        ({"target_modules": ["nothing"]}, "does not fit the base .*No modules were targeted"),
    ],
)
def test_adapters_that_are_no_full_models_are_refused(
    base: Path, source: Path, changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    edit_adapter(source, **changes)
    assert_refused(source, tmp_path / "out", base, problem)


HOSTILE: list[Any] = [
    *(None, True, -1, 0, 1e400, "", "x\ny", "../../x", [], [[]], {}, {"a": {"b": None}}, 10**30),
    *(["query", 5], "(a+)+$", "[", "\ud800", "x" * 9999),
]
SETTINGS = (
    *("base_model_name_or_path", "target_modules", "r", "lora_alpha", "rank_pattern"),
    *("modules_to_save", "auto_mapping", "task_type", "layers_to_transform", "peft_type"),
)


@given(st.sampled_from(SETTINGS), st.sampled_from(HOSTILE), st.data())
@settings(max_examples=8, derandomize=True)
def test_changed_settings_and_weights_are_read_or_refused_in_a_line(
    base_of: Callable[[str], Path], tmp_path_factory: Any, name: str, value: Any, data: Any
) -> None:
    folder, base = tmp_path_factory.mktemp("changed"), base_of("bert")
    source = adapter(folder / "adapter", base, target_modules=BERT)
    config = (source / "adapter_config.json").read_text()
    edit_adapter(source, **{name: value})
    weights = bytearray((source / "adapter_model.safetensors").read_bytes())
    for number, change in enumerate(("settings", "weights")):
        if change == "weights":
            (source / "adapter_config.json").write_text(config)
            weights[data.draw(st.integers(0, 400))] ^= 1 << data.draw(st.integers(0, 7))
            (source / "adapter_model.safetensors").write_bytes(weights)
        try:
            fetch(source, folder / f"out {number}", base)
        except UserError as error:
            readers.check(error, source)


def test_an_adapter_beside_a_model_or_without_its_weights_is_refused(
    base: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copyfile(base / "model.safetensors", source / "model.safetensors")
    for _ in range(2):
        assert_refused(source, out, base, "a PEFT adapter beside a full model; move adapter_config")
        shutil.copyfile(base / "config.json", source / "config.json")
    (source / "model.safetensors").unlink()
    monkeypatch.setitem(sys.modules, "peft", None)
    assert_refused(source, out, base, r"is a LoRA adapter; `pip install peft`")
    (source / "adapter_model.safetensors").unlink()
    assert_refused(source, out, base, "no adapter_model.safetensors")
    (tmp_path / "deep").mkdir()
    shutil.move(source, tmp_path / "deep" / "default")
    assert_refused(tmp_path / "deep", out, base, "but default has; give that folder")


# The base


def changed(folder: Path, base: Path, name: str = "embeddings.word_embeddings.weight") -> Path:
    """A copy of a base with one value changed."""
    shutil.copytree(base, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] += 1
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_base_must_be_the_runs_by_content(
    base: Path, source: Path, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    same = Path(shutil.copytree(base, tmp_path / "same"))
    assert fetch(source, out, same).notes == [], "a copy elsewhere is the same base"
    half = tmp_path / "half"
    transformers.AutoModel.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, half / name)
    assert fetch(source, tmp_path / "out half", half).notes == []
    state = safetensors.torch.load_file(tmp_path / "out half" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    other = changed(tmp_path / "other", base)
    assert_refused(source, tmp_path / "no", other, "is not the base .*word_embeddings.* has other")
    smaller = Path(shutil.copytree(base_of("distilbert"), tmp_path / "smaller"))
    assert_refused(source, tmp_path / "no", smaller, "is not the base .*: embeddings")


def test_without_a_base_the_adapter_names_it(base: Path, source: Path, tmp_path: Path) -> None:
    info = fetch(source, tmp_path / "out")
    assert info.notes == [f"the adapter's base is {base}, as the adapter says"]
    with_base = safetensors.torch.load_file(
        stages.fetch(str(source), out=tmp_path / "with", base=base).out / "model.safetensors"
    )
    without = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(with_base[name], value) for name, value in without.items())
    tensors = tensors_of(source)
    write_tensors(source, {name: v for name, v in tensors.items() if "classifier" not in name})
    assert_refused(source, tmp_path / "no", None, "nor the base it names has classifier.bias")
    write_tensors(source, tensors)
    for name, problem in ((None, "give it, --base"), ("/gone/bert", "no such folder")):
        edit_adapter(source, base_model_name_or_path=name)
        assert_refused(source, tmp_path / "no", None, problem)
        (note,) = fetch(source, tmp_path / "unknown", base).notes
        assert "could not be compared" in note
        assert "only names and shapes" in note


def test_a_base_of_the_hub_is_compared_at_its_revision(
    base: Path, source: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmn.store.hub.RETRY_SECONDS", 0.6)
    edit_adapter(source, base_model_name_or_path="org/base", revision="v1")
    hub.add("models", "org/adapter", source)
    commit = hub.add("models", "org/base", base, revision="v1")
    hub.add("models", "org/base", changed(tmp_path / "main", base), revision="main")
    stages.fetch("hf://org/base@v1", out=tmp_path / "base")
    hub.requests.clear()
    assert fetch("hf://org/adapter", tmp_path / "out", tmp_path / "base").notes == []
    assert not [request for request in hub.requests if "/org/base/resolve" in request]
    (note,) = fetch("hf://org/adapter", tmp_path / "alone").notes
    assert note == f"the adapter's base is hf://org/base@{commit}, as the adapter says"
    stages.fetch("hf://org/base", out=tmp_path / "base of main")
    problem = "hf://org/base@v1, on which the adapter was trained, is not the base"
    with pytest.raises(UserError, match=problem):
        fetch("hf://org/adapter", tmp_path / "no", tmp_path / "base of main")
    edit_adapter(source, base_model_name_or_path="org/private", revision=None)
    (note,) = fetch(source, tmp_path / "private", tmp_path / "base").notes
    assert "(hf://org/private) could not be compared" in note
    assert "no such repository" in note


def test_the_base_is_part_of_the_key(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    base, out = Path(shutil.copytree(base_of("bert"), tmp_path / "base")), tmp_path / "out"
    source = adapter(tmp_path / "adapter", base, target_modules=BERT)

    def is_computed() -> bool:
        return stages.fetch(str(source), out=out, base=base).computed

    assert [is_computed(), is_computed()] == [True, False]
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    safetensors.torch.save_file({k: v + 1 for k, v in tensors.items()}, base / "model.safetensors")
    assert is_computed()
    edit_adapter(source, lora_alpha=1)
    assert is_computed()


# What belongs to the model beside its weights


def test_labels_beside_the_adapter_are_the_experts(
    base: Path, source: Path, tmp_path: Path
) -> None:
    shutil.copyfile(base / "config.json", source / "config.json")
    names = {"0": "no", "1": "maybe", "2": "yes"}
    edit_config(source, id2label=names, label2id={v: int(k) for k, v in names.items()})
    stages.fetch(str(source), out=tmp_path / "out", task="own", base=base)
    config = checkpoints.load_config(tmp_path / "out")
    assert config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert (tmp_path / "out" / "task.json").is_file()
    loading.load_model(tmp_path / "out")


def test_tokens_that_the_adapter_adds_come_with_it(
    base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base, source = base_of("bert"), tmp_path / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<new>"])
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.resize_token_embeddings(len(tokenizer))
    lora = peft.LoraConfig(
        target_modules=BERT, task_type="SEQ_CLS", modules_to_save=["word_embeddings"]
    )
    adapted = peft.get_peft_model(model, lora)
    adapted.save_pretrained(str(source))
    tokenizer.save_pretrained(source)
    fetch(source, tmp_path / "out", base)
    assert checkpoints.load_config(tmp_path / "out").vocab_size == len(tokenizer)
    assert "<new>" in loading.load_tokenizer(tmp_path / "out").get_vocab()
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    for name, value in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], value)
    text = (source / "tokenizer.json").read_text()
    swapped = text.replace('"w3": 3', '"w3": 4').replace('"w4": 4', '"w4": 3')
    assert swapped != text
    (source / "tokenizer.json").write_text(swapped)
    assert_refused(source, tmp_path / "no", base, "tokenizer has the token 'w3' at 4")


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},  # PEFT merges it into the embeddings too
        {"target_modules": ["embed_tokens"]},
    ],
)
def test_weights_that_the_adapter_unties_stay_apart(lora: dict[str, Any], tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        **{"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 32},
    )
    torch.manual_seed(0)
    base = expert(tmp_path / "base", 2, architecture="llama")
    (base / "model.safetensors").unlink()
    transformers.LlamaForCausalLM(config).save_pretrained(base)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    is_untied = bool(lora)
    lora = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **lora}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**lora))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    oracle = peft.PeftModel.from_pretrained(
        transformers.LlamaForCausalLM.from_pretrained(base), str(tmp_path / "adapter")
    )
    info = fetch(tmp_path / "adapter", tmp_path / "out", base)
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged, base), logits(oracle, base), rtol=1e-4, atol=1e-5)
    assert any("tied" in note for note in info.notes) == is_untied
