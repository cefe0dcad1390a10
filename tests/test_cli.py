"""The command line: explicit paths, JSON for machines, one line for a mistake."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fmn import cli
from tests.conftest import TASKS

COMMANDS = (
    *("run", "compare", "stage", "fetch", "data", "finetune", "fisher", "full-fisher", "gram"),
    *("search", "merge", "realign", "evaluate", "report", "predict"),
    *("register", "rollback", "reproduce", "tasks", "init", "check", "push"),
    "dvc",
)


def fmn(*arguments: object) -> None:
    cli.main([str(argument) for argument in arguments])


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What a command prints with --json."""
    fmn(*arguments, "--json")
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a mistake prints: one line on standard error, with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        fmn(*arguments)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.err.startswith("fmn: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    return printed.err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    fmn("--help")
    help_text = capsys.readouterr().out
    for command in (*COMMANDS, "schema", "schedule", "mlflow"):
        assert f" {command} " in help_text


@pytest.fixture(scope="module")
def work(tiny_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands from `fetch` to `fisher` were run; not to be changed."""
    work = tmp_path_factory.mktemp("commands")
    fmn("fetch", tiny_work / "base", "--out", work / "base")
    for task in ("sst2", "stsb"):
        expert, data = work / "experts" / task, work / "data"
        of = ("--task", task, "--data", data)
        fmn("data", task, "--source", "embedded", "--out", data / task)
        tuning = ["--epochs", "1", "--examples", "32", "--learning_rate", "1e-3", "--device", "cpu"]
        fmn("finetune", work / "base", *of, "--out", expert, *tuning)
        how = [
            "--samples",
            "16",
            "--estimator",
            "expected",
            "--dtype",
            "float32",
            "--device",
            "cpu",
        ]
        fmn("fisher", expert, *of, "--out", work / "fisher" / f"{task}.parquet", *how)
        fmn(
            "gram",
            expert,
            *of,
            "--samples",
            8,
            "--out",
            work / "fisher" / f"{task}.gram.safetensors",
        )
    return work


def test_the_schema_of_the_settings_describes_every_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fmn("schema")
    schema = json.loads(capsys.readouterr().out)
    assert {"tasks", "experts", "merge"} <= set(schema["properties"])
    for name in ("DatasetSettings", "ColumnSettings", "TaskSettings", "DividedFisherSettings"):
        fields = schema["$defs"][name]["properties"]
        described = {
            field for field, about in fields.items() if "$ref" in about or "description" in about
        }
        assert described >= set(fields) - {"splits", "columns"}


def test_experts_are_named_one_by_one_or_by_their_folder(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ("--out", tmp_path / "merged", "--coefficient", "sst2=2", "--mapping", "paper")
    folders = ("--expert", work / "experts", "--fisher", work / "fisher")
    recipe = answer(capsys, "merge", *folders, *how)
    assert (recipe["stage"], recipe["computed"]) == ("merge", True)
    assert (recipe["coefficients"], recipe["mapping"]) == ({"sst2": 2.0, "stsb": 1.0}, "paper")
    names = [f"{task}={work / 'experts' / task}" for task in ("sst2", "stsb")]
    files = [f"{task}={work / 'fisher' / task}.parquet" for task in ("sst2", "stsb")]
    repeated = ("--fisher", files[0], "--fisher", files[1])
    again = answer(capsys, "merge", "--expert", *names, *repeated, *how)
    assert not again["computed"], "both ways to name experts are the same request"
    alone = answer(capsys, "merge", "--expert", names[0], *folders[2:], "--out", tmp_path / "alone")
    assert list(alone["fisher"]) == ["sst2"], "of a folder, the experts' files are taken"
    grams = ("--gram", work / "fisher", "--method", "regmean")
    recipe = answer(capsys, "merge", "--expert", *names, *grams, "--out", tmp_path / "regmean")
    assert (set(recipe["gram"]), recipe["fisher"]) == ({"sst2", "stsb"}, {})


def test_auto_shows_what_it_tried(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ("--expert", work / "experts", "--data", work / "data", "--out", tmp_path / "merged")
    fmn("merge", *folders, "--method", "auto", "--device", "cpu")
    shown = capsys.readouterr().out
    for words in ("average", "scale", "chosen by auto among 1 merges on 256 texts a task"):
        assert words in shown, words


def test_a_merged_model_is_realigned_scored_reported_and_asked(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged, metrics, report = tmp_path / "merged", tmp_path / "merged.json", tmp_path / "report"
    experts = ("--expert", work / "experts")
    fmn("merge", *experts, "--fisher", work / "fisher", "--out", merged)
    assert "coefficient" in capsys.readouterr().out
    data = ("--data", work / "data", "--device", "cpu")
    scored = answer(capsys, "evaluate", merged, *data, "--out", metrics)
    assert set(scored["tasks"]) == {"sst2", "stsb"}
    realign = ("realign", merged, *experts, *data, "--texts", 20, "--out", tmp_path / "realigned")
    fits = answer(capsys, *realign)["realign"]["tasks"]
    assert [fit["texts"] for fit in fits.values()] == [20, 20]
    fmn(*realign)
    assert "already there" in capsys.readouterr().out
    how = ("--merged", f"mine={metrics}", "--model", f"mine={merged}", "--out", report)
    reported = answer(capsys, "report", *how, "--fisher", work / "fisher")
    score = scored["tasks"]["sst2"]["score"]
    assert reported["results"]["tasks"]["sst2"]["mine"]["score"] == score
    assert "mask-fisher" in (report / "report.html").read_text()
    question = ("predict", merged, "a warm film", "--task", "sst2")
    label = answer(capsys, *question)["label"]
    assert label in ("negative", "positive")
    fmn(*question)
    assert capsys.readouterr().out.startswith(label)


def test_a_search_shows_its_coefficients(
    tiny_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = [f"{task}={tiny_work / 'experts' / task}" for task in TASKS[:2]]
    how = ["--method", "average", "--trials", "2", "--rows", "16", "--device", "cpu", "--out"]
    data = ("--data", tiny_work / "data")
    fmn("search", "--expert", *experts, *data, *how, tmp_path / "coefficients.json")
    printed = capsys.readouterr().out
    assert "best, % of expert" in printed
    assert "scale: 1.0" in printed


def test_a_stage_of_the_pipeline_runs_alone(
    tiny_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "params.yaml"
    profile.write_text(
        f"work: {tmp_path / 'work'}\nbase: {tiny_work / 'base'}\nexperts: {{tasks: [sst2, mrpc]}}\n"
        "finetune: {sst2: {}, mrpc: {}}\ndata: {source: embedded}\nregistry: {name: demo}\n"
    )
    rows = answer(capsys, "stage", "data", "sst2", "--params", profile)
    assert (rows["stage"], rows["out"]) == ("data", str(tmp_path / "work" / "data" / "sst2"))
    assert "did you mean 'data'" in mistake(capsys, "stage", "dta", "--params", profile)
    assert "sst2, mrpc" in mistake(capsys, "stage", "data", "rte", "--params", profile)


def test_settings_mean_the_same_files_wherever_a_command_is_given(
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "params.yaml").write_text(
        f"work: work\nbase: {tiny_base}\nexperts: {{tasks: [sst2, mrpc]}}\n"
        "finetune: {sst2: {}, mrpc: {}}\ndata: {source: embedded}\nregistry: {name: demo}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert answer(capsys, "stage", "data", "sst2")["computed"]
    monkeypatch.chdir(tmp_path / "sub")
    again = answer(capsys, "stage", "data", "sst2", "-p", "../params.yaml")
    assert (again["computed"], again["out"]) == (False, "work/data/sst2")
    assert again["seconds"] >= 0
    fmn("stage", "data", "--params", tmp_path / "params.yaml", "--json")
    assert [each["stage"] for each in json.loads(capsys.readouterr().out)] == ["data", "data"]
    assert not list((tmp_path / "sub").iterdir())
    assert Path.cwd() == tmp_path / "sub"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("data mprc --source embedded --out x", "mrpc"),
        ("data mrpc --sorce embedded --out x", "--sorce"),
        ("data mrpc --source embedded --out .", "--out ."),
        ("fisher x --task mrpc --data x --out y --samples 0", "--samples: at least one example"),
        ("merge --expert mrpc=a --out x --method average", "a: no such file"),
        ("push nowhere org/name", "write hf://ORG/NAME"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in mistake(capsys, *command.split())
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


def test_a_reader_that_ends_early_is_no_mistake() -> None:
    command = f"{sys.executable} -m fmn schema | true; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (141, "")
