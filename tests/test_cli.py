"""The command line: explicit paths, JSON for machines, one line for a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fmn import cli
from tests.conftest import TASKS

COMMANDS = (
    "run",
    "fetch",
    "data",
    "finetune",
    "fisher",
    "full-fisher",
    "gram",
    "compare",
    "search",
    "merge",
    "realign",
    "evaluate",
    "register",
    "rollback",
    "reproduce",
    "predict",
    "report",
)


def fmn(*arguments: object) -> None:
    cli.main([str(argument) for argument in arguments])


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    fmn(*arguments, "--json")
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a mistake prints: one line on standard error, with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        fmn(*arguments)
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.err.startswith("fmn: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
    return said.err


def test_help_names_every_command_and_is_quick_to_import() -> None:
    code = (
        "import sys; from fmn import cli; cli.main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'prefect', 'datasets', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in COMMANDS:
        assert f" {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_options(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    fmn(command, "--help")
    assert "--json" in capsys.readouterr().out


def test_the_stages_work_one_after_the_other(
    tiny_work: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    assert answer(capsys, "fetch", tiny_base, "--out", tmp_path / "base")["model_type"] == "bert"
    for task in ("sst2", "stsb"):
        made = answer(capsys, "data", task, "--source", "embedded", "--out", data / task)
        assert set(made["rows"]) == {"train", "validation"}
        expert = tmp_path / "experts" / task
        tuning = ("--epochs", 1, "--examples", 32, "--learning_rate", "1e-3", "--device", "cpu")
        tuned = answer(
            capsys,
            "finetune",
            tmp_path / "base",
            "--task",
            task,
            "--data",
            data,
            "--out",
            expert,
            *tuning,
        )
        assert (tuned["computed"], tuned["examples"], tuned["learning_rate"]) == (True, 32, 1e-3)
        out = tmp_path / "fisher" / f"{task}.parquet"
        asked = ("--samples", 16, "--estimator", "expected", "--dtype", "float32")
        found = answer(
            capsys, "fisher", expert, "--task", task, "--data", data / task, "--out", out, *asked
        )
        assert (found["estimator"], found["samples"]) == ("expected", 16)
    merged = tmp_path / "merged"
    wholes = ("--expert", tmp_path / "experts", "--fisher", tmp_path / "fisher")
    recipe = answer(
        capsys, "merge", *wholes, "--out", merged, "--coefficient", "sst2=2", "--mapping", "paper"
    )
    assert recipe["coefficients"] == {"sst2": 2.0, "stsb": 1.0}
    again = answer(
        capsys, "merge", "--expert", f"sst2={tmp_path / 'experts/sst2'}", f"stsb={tmp_path / 'experts/stsb'}",
        "--fisher", f"sst2={tmp_path / 'fisher/sst2.parquet'}", "--fisher", f"stsb={tmp_path / 'fisher/stsb.parquet'}",
        "--out", merged, "--coefficient", "sst2=2", "--mapping", "paper",
    )  # fmt: skip
    assert not again["computed"], "both ways to name experts are the same request"
    metrics = tmp_path / "metrics.json"
    scored = answer(capsys, "evaluate", merged, "--data", data, "--out", metrics, "--device", "cpu")
    assert set(scored["tasks"]) == {"sst2", "stsb"}
    given = ("--expert", tmp_path / "experts", "--data", data, "--texts", 20, "--device", "cpu")
    realigned = answer(capsys, "realign", merged, *given, "--out", tmp_path / "realigned")
    assert {name: fit["texts"] for name, fit in realigned["realign"]["tasks"].items()} == {
        "sst2": 20,
        "stsb": 20,
    }
    fmn("realign", merged, *given, "--out", tmp_path / "realigned")
    assert "already there" in capsys.readouterr().out
    reported = answer(
        capsys, "report", "--merged", f"merged={metrics}", "--fisher", tmp_path / "fisher", "--work", tmp_path,
        "--out", tmp_path / "report",
    )  # fmt: skip
    assert "merged with mask-fisher" in (tmp_path / "report" / "report.html").read_text()
    assert (
        reported["results"]["tasks"]["sst2"]["merged"]["score"] == scored["tasks"]["sst2"]["score"]
    )
    said = answer(capsys, "predict", merged, "--task", "sst2", "a warm film")
    assert said["label"] in ("negative", "positive")


def test_a_summary_without_json_is_for_people(
    tiny_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fmn(
        "merge",
        "--expert",
        tiny_work / "experts",
        "--out",
        tmp_path / "m",
        "--method",
        "average",
        "--tasks",
        *TASKS[:2],
    )
    said = capsys.readouterr().out
    assert "coefficient" in said
    assert "sst2" in said
    assert "stsb" not in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fetch", "nowhere", "--out", "x"], "nowhere"),
        (["fetch", "package:none_such/model", "--out", "x"], "none_such"),
        (["data", "mprc", "--source", "embedded", "--out", "x"], "mrpc"),
        (["data", "mrpc", "--source", "nowhere", "--out", "x"], "nowhere"),
        (["data", "mrpc", "--source", "embedded"], "--out"),
        (["data", "mrpc", "--sorce", "embedded", "--out", "x"], "--sorce"),
        (["fisher", "nowhere", "--task", "mrpc", "--data", "x", "--out", "y"], "nowhere"),
        (
            ["fisher", "x", "--task", "mrpc", "--data", "x", "--out", "y", "--estimator", "best"],
            "best",
        ),
        (
            ["fisher", "x", "--task", "mrpc", "--data", "x", "--out", "y", "--samples", "0"],
            "samples",
        ),
        (["data", "mrpc", "--source", "embedded", "--out", "."], "--out ."),
        (["merge", "--expert", "nowhere", "--out", "x"], "nowhere"),
        (["merge", "--expert", "mrpc=nowhere", "--out", "x"], "nowhere"),
        (["merge", "--expert", "mrpc=a", "mrpc=b", "--out", "x"], "twice"),
        (
            ["merge", "--expert", "mrpc=a", "--out", "x", "--coefficient", "mrpc=much"],
            "fmn: coefficient 'much' is not a number",
        ),
        (
            ["merge", "--expert", "mrpc=a", "--out", "x", "--coefficients", "nowhere.json"],
            "a: no such folder",
        ),
        (
            [
                "search",
                "--expert",
                "mrpc=a",
                "sst2=b",
                "--data",
                "x",
                "--out",
                "y",
                "--method",
                "average",
            ],
            "a: no such",
        ),
        (
            [
                "search",
                "--expert",
                "mrpc=a",
                "sst2=b",
                "--data",
                "x",
                "--out",
                "y",
                "--scale_range",
                "2",
                "1",
            ],
            "LOW must be zero or more, and HIGH above it",
        ),
        (
            ["search", "--expert", "mrpc=a", "sst2=b", "--data", "x", "--out", "y", "--rows", "0"],
            "rows",
        ),
        (["evaluate", "nowhere", "--data", "x", "--out", "y"], "nowhere"),
        (["register", "nowhere", "--metrics", "x", "--name", "demo"], "nowhere"),
        (["register", "nowhere", "--metrics", "x", "--name", "../demo"], "name"),
        (["reproduce", "demo"], "write models:/NAME/VERSION"),
        (["predict", "nowhere", "--task", "sst2", "text"], "nowhere"),
        (["report", "--merged", "merged=nowhere.json", "--out", "x"], "nowhere.json"),
        (["run", "--params", "nowhere.yaml"], "nowhere.yaml"),
        (["marge"], "marge"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in mistake(capsys, *arguments)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


def test_no_traceback_reaches_a_terminal(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fmn", "merge", "--expert", "nowhere", "--out", "x"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_methods_with_statistics_of_their_own(
    tiny_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [f"{task}={tiny_work / 'experts' / task}" for task in TASKS]
    statistics = tmp_path / "statistics"
    for task in TASKS:
        of = (
            tiny_work / "experts" / task,
            "--task",
            task,
            "--data",
            tiny_work / "data",
            "--device",
            "cpu",
        )
        full = answer(
            capsys, "full-fisher", *of, "--samples", 4, "--out", statistics / f"{task}.safetensors"
        )
        assert (full["kind"], full["samples"], full["computed"]) == ("full-fisher", 4, True)
        made = answer(
            capsys, "gram", *of, "--samples", 16, "--out", statistics / f"{task}.gram.safetensors"
        )
        assert (made["kind"], made["task"], made["samples"]) == ("gram", task, 16)
    given = ("--expert", *pairs, "--base", tiny_work / "base")
    nodes = ("--fisher", tiny_work / "fisher")
    options: dict[str, tuple[object, ...]] = {
        "fisher": ("--fisher", statistics),
        "regmean": ("--gram", statistics),
        "fisher-regmean": (*nodes, "--gram", statistics),
        "mask-fisher": nodes,
    }
    for method, more in options.items():
        stated = answer(
            capsys, "merge", *given, "--method", method, *more, "--out", tmp_path / method
        )
        assert stated["method"] == method
        assert {kind for kind in ("fisher", "gram") if stated[kind]} == {
            option.removeprefix("--") for option in map(str, more) if option.startswith("--")
        }
    assert "--gram mrpc=FILE is missing" in mistake(
        capsys, "merge", *given, "--method", "regmean", "--out", tmp_path / "without"
    )
    other = statistics / "mrpc.gram.safetensors"
    assert "the Gram matrices of task mrpc, given for sst2" in mistake(
        capsys, "merge", *given, "--method", "regmean", "--gram", *(f"{task}={other}" for task in TASKS),
        "--out", tmp_path / "without",
    )  # fmt: skip
    assert not (tmp_path / "without").exists()
