"""`fmn predict`: texts from the command line, a file or standard input; a folder or a version."""

import io
import json
import re
from pathlib import Path

import pytest

from fmn.cli import main
from fmn.evaluate.stages import EvaluateSettings, evaluate
from fmn.merge.recipe import MergeSettings
from fmn.merge.stages import merge
from fmn.registry.stages import RegistrySettings, register
from tests.conftest import TASKS

TEXTS = ("a warm film", "the plot makes no sense", "one, two: three")


@pytest.fixture(scope="module")
def merged(tiny_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("predict") / "merged"
    experts = {task: tiny_work / "experts" / task for task in TASKS}
    merge(experts=experts, out=out, settings=MergeSettings(method="average"))
    return out


def lines(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    main(["predict", *map(str, arguments)])
    return capsys.readouterr().out.splitlines()


def test_texts_of_files_and_of_standard_input_are_answered_a_line_each(
    merged: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = [lines(capsys, merged, text, "--task", "sst2")[0] for text in TEXTS]
    assert all(re.fullmatch(r"(positive|negative) \(0\.\d{3}\)", line) for line in expected)
    files = {
        "texts.txt": "\n".join(TEXTS) + "\n",
        "texts.csv": "text\n" + "".join(f'"{text}"\n' for text in TEXTS),
        "texts.tsv": "text\n" + "".join(f"{text}\n" for text in TEXTS),
        "texts.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        assert lines(capsys, merged, "--task", "sst2", "-f", tmp_path / name) == expected, name
    for arguments in (("--file", "-"), ()):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS)))
        assert lines(capsys, merged, *arguments, "--task", "sst2") == expected
    answers = lines(capsys, merged, "--task", "sst2", "-f", tmp_path / "texts.txt", "--json")
    labels = [json.loads(answer)["label"] for answer in answers]
    assert labels == [line.split()[0] for line in expected]
    (tmp_path / "pairs.txt").write_text("one\tother\n")
    pair = lines(capsys, merged, "one", "other", "--task", "mrpc")
    assert lines(capsys, merged, "--task", "mrpc", "-f", tmp_path / "pairs.txt") == pair


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"text\n" + b"x" * 200_000, "texts.csv: not csv (field larger than"),
        (b"body\nx\n", "texts.csv:2: no column text but body; call the texts text, text_pair"),
    ],
)
def test_files_that_cannot_be_answered_are_a_line(
    merged: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    message: str,
) -> None:
    file = tmp_path / "texts.csv"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit):
        lines(capsys, merged, "--task", "sst2", "-f", file)
    problem = capsys.readouterr().err
    assert message in problem
    assert problem.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "task", "message"),
    [
        ("caf\udce9", "sst2", r"text 'caf\udce9': is not UTF-8; write it as UTF-8"),
        ("good", "nothing", "has no task nothing; its tasks are mrpc, sst2"),
    ],
)
def test_what_is_no_text_or_no_task(
    merged: Path, capsys: pytest.CaptureFixture[str], text: str, task: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        lines(capsys, merged, "--task", task, text)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_registered_version_answers_like_its_folder(
    merged: Path,
    tiny_work: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    metrics = tmp_path / "metrics.json"
    settings = EvaluateSettings(device="cpu", dtype="float32")
    evaluate(merged, data=tiny_work / "data", out=metrics, settings=settings)
    register(merged, metrics=metrics, settings=RegistrySettings(name="demo"))
    for task, texts in (("sst2", TEXTS[:1]), ("mrpc", TEXTS[:2]), ("stsb", TEXTS[1:])):
        here = lines(capsys, merged, *texts, "--task", task)
        for version in ("models:/demo/1", "models:/demo/latest", "models:/demo@champion"):
            assert lines(capsys, version, *texts, "--task", task) == here
    with pytest.raises(SystemExit):
        lines(capsys, "models:/demo/1", "a text", "--task", "none")
    assert "none" in capsys.readouterr().err
