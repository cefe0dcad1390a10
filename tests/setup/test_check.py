"""`fmn check` lists every problem of a run before anything large is downloaded or computed."""

import json
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ruamel.yaml import YAML

from fmn.cli import main
from fmn.setup.stages import check
from tests.folders import edit_config, save, tiny_bert, weights
from tests.hub_server import Hub

ROWS = "text,label\n" + "".join(f"fine {i},good\ndull {i},bad\n" for i in range(20))
WIDE: dict[str, Any] = {"intermediate_size": 20_000}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> dict[str, Any]:
    """Settings of two experts on the Hub, one base and rows in files, which can run."""
    monkeypatch.chdir(tmp_path)
    hub.add("models", "org/base", tiny_bert(tmp_path / "source" / "base", **WIDE))
    for name in ("one", "two"):
        folder = tiny_bert(tmp_path / "source" / name, **WIDE)
        edit_config(folder, id2label={0: "bad", 1: "good"})
        hub.add("models", f"org/{name}", folder)
    Path("rows.csv").write_text(ROWS)
    return {
        "base": "hf://org/base",
        "work": "work",
        "experts": {"tasks": ["one", "two"]},
        "tasks": {name: {"dataset": {"path": "rows.csv"}} for name in ("one", "two")},
        "sources": {name: f"hf://org/{name}" for name in ("one", "two")},
        "registry": {"name": "x"},
    }


def written(settings: dict[str, Any]) -> Path:
    path = Path("params.yaml")
    with path.open("w") as file:
        YAML(typ="safe").dump(settings, file)
    return path


def problems(settings: dict[str, Any]) -> list[str]:
    return [finding.message for finding in check(written(settings)).findings if finding.is_error]


def test_a_run_that_can_go_is_told_what_it_needs(
    project: dict[str, Any], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = check(written(project))
    assert (checked.findings, checked.is_ok) == ([], True)
    file = Path("source/base/model.safetensors").stat().st_size
    assert checked.need.download == 3 * file
    assert checked.need.disk > 3 * file
    assert checked.need.moved > checked.need.download
    assert "minutes" in checked.need.in_words["time"]
    assert hub.sent < file / 2
    assert not Path("work").exists()
    assert all("@" in source for source in checked.sources.values())
    main(["check", "--json"])
    assert json.loads(capsys.readouterr().out)["ok"] is True
    main(["check"])
    assert "the run can start" in capsys.readouterr().out


def test_all_problems_are_listed_and_the_status_tells(
    project: dict[str, Any], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("models", "org/two", tiny_bert(Path("three"), outputs=3, hidden_size=12))
    project["tasks"]["one"]["columns"] = {"text": "review"}
    project["base"] = "hf://org/none"
    lines = problems(project)
    for words in (
        "tasks.one: rows.csv: no column review for one; there are text, label",
        "base: hf://org/none@main: no such repository",
        "hidden_size is 12, not 8",
        "has a head of 3 outputs, two needs 2",
    ):
        assert sum(words in line for line in lines) == 1, (words, lines)
    with pytest.raises(SystemExit) as stopped:
        main(["check", "--json"])
    assert stopped.value.code == 1
    printed = json.loads(capsys.readouterr().out)
    assert [each["message"] for each in printed["findings"] if each["is_error"]] == lines
    assert all(each["place"] and each["problem"] for each in printed["findings"])
    folder = tempfile.gettempdir()
    assert not any(folder in line for line in lines), "sources are named, not their outlines"


def test_settings_that_are_wrong_in_two_places(project: dict[str, Any]) -> None:
    project |= {"mrege": {}, "fisher": {"samples": 0}}
    lines = problems(project)
    assert any("mrege: unknown setting; did you mean 'merge'?" in line for line in lines)
    assert any("fisher.samples: at least one example" in line for line in lines)
    assert [line.split("; ")[0] for line in problems({})] == [
        f"params.yaml: {name}: missing" for name in ("base", "experts", "registry")
    ]
    Path("params.yaml").write_text("a: [")
    assert "not valid YAML" in check(Path("params.yaml")).findings[0].message


def change_vocabulary(folder: Path) -> None:
    words = (folder / "vocab.txt").read_text().split()
    (folder / "vocab.txt").write_text("\n".join([*words[:-2], words[-1], words[-2]]) + "\n")


def drop_a_tensor(folder: Path) -> None:
    tensors = weights(folder)
    del tensors["bert.encoder.layer.0.output.dense.weight"]
    save(folder, tensors)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (change_vocabulary, "the id of token"),
        (drop_a_tensor, "encoder.layer.0.output.dense.weight is missing"),
        (lambda folder: edit_config(folder, id2label={0: "x", 1: "y"}), "outputs are named x, y"),
        (lambda folder: edit_config(folder, model_type="none"), "unknown to Transformers"),
        (lambda folder: (folder / "vocab.txt").unlink(), "has no tokenizer files"),
    ],
)
def test_each_misfit_of_an_expert_is_a_line(
    change: Any, problem: str, project: dict[str, Any], hub: Hub
) -> None:
    change(Path("source/two"))
    hub.add("models", "org/two", Path("source/two"))
    lines = problems(project)
    assert any(problem in line and line.startswith("sources.two: ") for line in lines), lines
    assert not any(line.startswith("sources.one") for line in lines)


def test_rows_on_the_hub_are_checked_by_the_first_ones(project: dict[str, Any], hub: Hub) -> None:
    hub.add("datasets", "org/rows", {"train.csv": ROWS.encode(), "test.csv": ROWS.encode()})
    rows = {"dataset": {"path": "org/rows"}}
    project["tasks"]["two"] = rows
    assert problems(project) == []
    project["tasks"]["two"] = rows | {"columns": {"label": "stars"}}
    assert any("no column stars for two; there are text, label" in x for x in problems(project))
    lines = [{"role": role, "content": "fine"} for role in ("user", "assistant")]
    for messages, is_right in ((lines, True), (lines[:1], False)):
        row = json.dumps({"messages": messages}).encode()
        hub.add(
            "datasets", f"org/chat{is_right}", {"train.jsonl": row + b"\n" + row, "test.jsonl": row}
        )
        chat = {"dataset": {"path": f"org/chat{is_right}"}, "task": "text-generation"}
        project["tasks"]["two"] = chat
        assert any("the last of the role assistant" in x for x in problems(project)) != is_right
    project["tasks"]["two"] = rows | {"labels": ["a", "b", "c"]}
    assert any("2 outputs, and the task 3 labels" in line for line in problems(project))


def test_too_little_room_is_told(
    project: dict[str, Any], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project["work"] = str(small_disk / "work")
    project["baselines"] = {f"b{number}": {"method": "average"} for number in range(40)}
    assert any(line.startswith("work: about") for line in problems(project))


def test_memory_is_compared_with_what_is_free(project: dict[str, Any]) -> None:
    need = check(written(project)).need
    assert 0 < need.free_memory <= psutil.virtual_memory().total
    tuned = {**project, "sources": {"one": "hf://org/one"}, "finetune": {"two": {}}}
    assert check(written(tuned)).need.memory > need.memory


def adapter(folder: Path, base: str, kind: str = "LORA", width: int = 8) -> Path:
    folder.mkdir()
    facts = {"peft_type": kind, "task_type": "SEQ_CLS", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(facts))
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    save(folder, {name: torch.zeros(2, width)}, "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"kind": "IA3"}, "of the kind IA3"), ({"width": 9}, r"has shape [2, 9], and what it adapts")],
)
def test_an_adapter_that_does_not_fit_is_told(
    changes: dict[str, Any], problem: str, project: dict[str, Any], hub: Hub
) -> None:
    hub.add("models", "org/two", adapter(Path("adapter"), "org/base", **changes))
    (line,) = problems(project)
    assert line.startswith("sources.two: hf://org/two: ")
    assert problem in line


def test_poolings_are_compared(project: dict[str, Any], hub: Hub) -> None:
    Path("rows.csv").write_text("text,text_pair,label\n" + "fine,dull,0.5\ndull,fine,1\n" * 20)
    for name, mode in (("one", "mean"), ("two", "cls")):
        columns = {"text_pair": "text_pair"}
        project["tasks"][name] |= {"task": "sentence-similarity", "columns": columns}
        folder = Path("source") / name
        parts = [("Transformer", ""), ("Pooling", "1_Pooling")]
        listed = [{"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.{kind}"}
                  for n, (kind, path) in enumerate(parts)]  # fmt: skip
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
        edit_config(folder, architectures=["BertModel"])
        hub.add("models", f"org/{name}", folder)
    (line,) = problems(project)
    assert "pooling is cls, not mean; choose models that agree" in line


@pytest.mark.parametrize("base", ["org/base", "org/one"])
def test_of_an_adapter_its_base_is_compared(base: str, project: dict[str, Any], hub: Hub) -> None:
    hub.add("models", "org/two", adapter(Path("adapter"), base))
    checked = check(written(project))
    lines = [finding.message for finding in checked.findings]
    assert checked.is_ok
    assert any("which must be the run's by content" in line for line in lines) == (
        base == "org/one"
    )


def test_a_statistic_beside_an_expert_is_downloaded_too(project: dict[str, Any], hub: Hub) -> None:
    before = check(written(project)).need.download
    Path("source/two/fmn").mkdir()
    Path("source/two/fmn/fisher.parquet").write_bytes(bytes(1000))
    hub.add("models", "org/two", Path("source/two"))
    assert check(written(project)).need.download == before + 1000


@pytest.mark.parametrize("definition", [None, {"max_length": 64}])
def test_rows_of_glue_are_checked_on_the_hub(
    definition: dict[str, Any] | None, project: dict[str, Any], hub: Hub
) -> None:
    for split in ("train", "validation"):
        path = Path(f"glue/sst2/{split}-0.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"sentence": ["a"], "label": [1], "idx": [0]}), path)
    hub.add("datasets", "nyu-mll/glue", Path("glue"))
    edit_config(Path("source/two"), id2label={0: "negative", 1: "positive"})
    hub.add("models", "org/two", Path("source/two"))
    project["experts"]["tasks"] = ["one", "sst2"]
    project["tasks"] = {"one": project["tasks"]["one"]}
    project["tasks"] |= {"sst2": definition} if definition else {}
    project["sources"] = {"one": "hf://org/one", "sst2": "hf://org/two"}
    assert problems(project) == []
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), "glue/sst2/train-0.parquet")
    hub.add("datasets", "nyu-mll/glue", Path("glue"))
    assert any("no column sentence for sst2" in line for line in problems(project))
