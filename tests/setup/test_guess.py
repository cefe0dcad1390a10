"""`fmn init`: what experts' small files tell becomes settings that run; the rest is marked."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from fmn import params
from fmn.errors import UserError
from fmn.setup.guess import guess, settings_text
from fmn.setup.stages import init
from fmn.tasks.task import write_task
from tests.hub_server import Hub
from tests.models.experts import make_task

ROWS = "utterance,intent,text,label\n" + "\n".join(f"t{i},x,words {i},{i % 2}" for i in range(9))
CARD = """---
base_model: org/base
model-index:
- name: x
  results:
  - dataset: {name: Emotion, type: org/emotion, config: en}
    metrics: [{type: accuracy, value: 0.9}]
---
# A model
"""


def config(architecture: str, *labels: str, **more: Any) -> bytes:
    names = {"id2label": dict(enumerate(labels))} if labels else {}
    content = {"model_type": "bert", "architectures": [architecture], **names, **more}
    return json.dumps(content).encode()


def folder(path: Path, content: bytes, **files: bytes) -> str:
    path.mkdir(parents=True)
    (path / "config.json").write_bytes(content)
    for name, data in files.items():
        (path / name.replace("__", ".")).write_bytes(data)
    return str(path)


def read(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text())


@pytest.mark.parametrize(
    ("architecture", "files", "kind", "columns"),
    [
        ("BertForSequenceClassification", {}, "text-classification", {"text", "label"}),
        ("XLMRobertaForTokenClassification", {}, "token-classification", {"tokens", "label"}),
        ("ViTForImageClassification", {}, "image-classification", {"image", "label"}),
        ("LlamaForCausalLM", {}, "text-generation", {"prompt", "completion"}),
        ("GPT2LMHeadModel", {}, "text-generation", {"prompt", "completion"}),
        ("T5ForConditionalGeneration", {}, "text2text-generation", {"prompt", "completion"}),
        ("MPNetModel", {}, "sentence-similarity", {"text", "text_pair", "label"}),
        (
            "Qwen3ForCausalLM",
            {"modules__json": b"[]"},
            "sentence-similarity",
            {"text", "text_pair", "label"},
        ),
    ],
)
def test_the_architecture_tells_the_kind(
    architecture: str, files: dict[str, bytes], kind: str, columns: set[str], tmp_path: Path
) -> None:
    result = guess(folder(tmp_path / "expert-of-things", config(architecture), **files))
    assert (result.kind, result.task["task"]) == (kind, kind)
    assert set(result.task["columns"]) == columns
    assert {"dataset", "columns"} <= set(result.unknown)
    text, _ = settings_text([result], "base", "x")
    settings = params.validate(YAML(typ="safe").load(text), "x")
    assert settings.tasks[result.name].kind == kind


def test_an_architecture_of_no_kind_and_an_adapter(tmp_path: Path) -> None:
    result = guess(folder(tmp_path / "x", config("BertForMaskedLM")))
    assert result.kind is None
    assert "BertForMaskedLM" in result.unknown["task"]
    (tmp_path / "lora").mkdir()
    adapter = {"base_model_name_or_path": "org/base", "task_type": "SEQ_CLS"}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(adapter))
    result = guess(str(tmp_path / "lora"))
    assert (result.kind, result.base) == ("text-classification", "hf://org/base")
    named = guess(folder(tmp_path / "mini-lm-mood", config("MPNetModel")), "hf://org/mini-lm")
    assert (named.name, named.base) == ("mood", "hf://org/mini-lm")
    with pytest.raises(UserError, match=r"has no config\.json"):
        guess(str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "more", "expected"),
    [
        (("spam", "ham"), {}, {"labels": ["spam", "ham"]}),
        (("LABEL_0", "LABEL_1"), {}, {}),
        (("a", "a"), {}, {}),
        ((), {"id2label": {"x": "a"}, "num_labels": 10**12}, {}),
        (("LABEL_0",), {}, {"problem_type": "regression"}),
        (("a", "b"), {"problem_type": "multi_label_classification"},
         {"problem_type": "multi_label_classification", "labels": ["a", "b"]}),
    ],
)  # fmt: skip
def test_outputs_tell_labels_and_the_sort_of_problem(
    labels: tuple[str, ...], more: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    task = guess(folder(tmp_path / "x", config("BertForSequenceClassification", *labels, **more)))
    described = {key: task.task[key] for key in ("problem_type", "labels") if key in task.task}
    assert described == expected
    assert ("problem_type" in task.unknown) == (len(labels) == 1)


def test_of_the_hub_only_small_files_are_read_and_the_card_names_the_rows(hub: Hub) -> None:
    expert = {
        "config.json": config("BertForSequenceClassification", "joy", "fear"),
        "README.md": CARD.encode(),
        "model.safetensors": bytes(10_000),
    }
    hub.add("models", "me/bert-base-uncased-finetuned-emotion", expert)
    rows = "text,label\n" + "so glad,joy\nso afraid,fear\n" * 50_000
    data = {"en/train.csv": rows.encode(), "en/test.csv": rows.encode()}
    data["README.md"] = b"---\nconfigs:\n- {config_name: en, data_dir: en}\n---\n"
    hub.add("datasets", "org/emotion", data)
    result = guess("hf://me/bert-base-uncased-finetuned-emotion")
    assert (result.name, result.base) == ("emotion", "hf://org/base")
    assert result.task["columns"] == {"text": "text", "label": "label"}
    assert result.task["dataset"] == {"path": "org/emotion", "name": "en"}
    assert not result.unknown
    again = guess("https://huggingface.co/me/bert-base-uncased-finetuned-emotion")
    assert (again.name, again.source) == (result.name, result.source)
    assert not [request for request in hub.requests if "model.safetensors" in request]
    assert hub.sent < len(rows)


def test_the_settings_are_valid_where_all_is_known_and_are_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in ("intent", "intent_2"):
        Path(f"data/{name}.csv").write_text(ROWS)
    folder(Path("base"), config("BertModel"))
    kind, base = "BertForSequenceClassification", {"_name_or_path": "base"}
    first, second = config(kind, "a", "b", **base), config(kind, "negative", "positive", **base)
    sources = [folder(Path(f"{at}/bert-intent"), first) for at in "mn"]
    sources.append(folder(Path("bert-base-SST-2"), second))
    out = tmp_path / "params.yaml"
    info = init(sources[::2], out=out)
    assert info.unknown == {}
    assert info.tasks["sst2"] == "text-classification (GLUE, sst2)"
    settings = params.load(out)
    assert (settings.base, settings.experts.tasks) == ("base", ["intent", "sst2"])
    assert settings.tasks["intent"].columns.label == "label"
    assert settings.tasks["intent"].labels == ["a", "b"]
    before = out.read_bytes()
    with pytest.raises(UserError, match="is there already"):
        init(sources, out=out)
    assert out.read_bytes() == before
    assert list(init(sources, out=out, base="hf://org/b", force=True).tasks)[1] == "intent_2"
    assert params.load(out).base == "hf://org/b"


def test_what_is_unknown_is_marked_at_its_line_and_told(tmp_path: Path) -> None:
    classifier = config("BertForSequenceClassification", "a", "b")
    expert = folder(tmp_path / "expert", classifier)
    info = init([expert], out=tmp_path / "new.yaml")
    text = (tmp_path / "new.yaml").read_text()
    marked = re.findall(r"^ *(\w+):.*# fill in: ", text, re.MULTILINE)
    assert [setting.split(".")[-1] for setting in info.unknown] == ["base", "dataset", "columns"]
    assert sorted(marked) == sorted(["base", "dataset", "columns"])
    assert read(tmp_path / "new.yaml")["registry"] == {"name": "new"}
    others = [
        folder(tmp_path / name, config("BertModel", _name_or_path=f"org/base-{name}"))
        for name in "ab"
    ]
    assert (
        "bases: hf://org/base-a, hf://org/base-b"
        in settings_text([guess(each) for each in others], None, "x")[1]["base"]
    )


def test_conversations_need_no_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    messages = [{"role": role, "content": "fine"} for role in ("user", "assistant")]
    Path("data").mkdir()
    Path("data/chat.jsonl").write_text(json.dumps({"messages": messages}))
    result = guess(folder(tmp_path / "chat", config("LlamaForCausalLM")))
    assert result.task == {"task": "text-generation", "dataset": {"path": "data/chat.jsonl"}}


def test_a_definition_in_the_folder_says_all_but_the_rows(tmp_path: Path) -> None:
    expert = folder(tmp_path / "x", config("BertForSequenceClassification", "LABEL_0", "LABEL_1"))
    write_task(Path(expert), make_task(["low", "high"], metrics=("f1_macro",), max_length=64))
    result = guess(expert)
    assert result.name == "own"
    assert result.task["labels"] == ["low", "high"]
    assert (result.task["metrics"], result.task["max_length"]) == (["f1_macro"], 64)
    assert set(result.unknown) == {"dataset", "columns"}
