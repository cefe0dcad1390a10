"""Where a data set lies, which of its files are which split, and which splits are read."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest

from fmn.errors import UserError
from fmn.tasks.sources import choose_splits, find_files, hub_name, local_files
from fmn.tasks.task import DatasetSettings, TaskSettings
from tests.conftest import ROOT
from tests.hub_server import Hub

ROWS = "text,label\na,x\nb,y\n"


def make(folder: Path, *names: str) -> None:
    """Files with these names; "" makes the folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ROWS)


def split_names(path: object, **rows: Any) -> dict[str, list[str]]:
    """The names of the files of each split, relative to the path."""
    files = find_files(DatasetSettings(path=str(path), **rows))
    return {
        split: [file.name.removeprefix(f"{path}").lstrip("/") for file in each]
        for split, each in files.items()
    }


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train.csv", "dev.tsv", "README.md", ".hidden.csv", "task.json"], {"dev": 1, "train": 1}),
        (["train-0-of-2.csv", "train-1-of-2.csv", "test.jsonl"], {"test": 1, "train": 2}),
        (["Reviews train.CSV", "reviews_dev.csv.gz"], {"Reviews train": 1, "reviews_dev": 1}),
        (["only.csv"], {"only": 1}),
    ],
)
def test_the_files_of_a_folder_name_its_splits(
    tmp_path: Path, names: list[str], splits: dict[str, int]
) -> None:
    make(tmp_path, *names)
    assert {split: len(files) for split, files in split_names(tmp_path).items()} == splits
    definition = TaskSettings(dataset=DatasetSettings(path=str(tmp_path)))
    assert len(local_files(definition)) == sum(splits.values())


@pytest.mark.parametrize(
    ("rows", "splits"),
    [
        ({"data_files": "a.csv"}, {"train": ["a.csv"]}),
        ({"data_files": ["b.csv", "a.csv"]}, {"train": ["b.csv", "a.csv"]}),
        ({"data_files": "[ab].csv"}, {"train": ["a.csv", "b.csv"]}),
        (
            {"data_files": {"train": "a.csv", "dev": ["b.csv"]}},
            {"train": ["a.csv"], "dev": ["b.csv"]},
        ),
        ({"data_dir": "sub"}, {"c": ["sub/c.csv"]}),
        ({"data_dir": "sub", "data_files": "*.csv"}, {"train": ["sub/c.csv"]}),
    ],
)
def test_settings_name_files_as_load_dataset_does(
    tmp_path: Path, rows: dict[str, Any], splits: dict[str, list[str]]
) -> None:
    make(tmp_path / "my [data]", "a.csv", "b.csv", "sub/c.csv")
    assert split_names(tmp_path / "my [data]", **rows) == splits


def test_a_missing_file_is_told_with_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "data", "train.tsv", "dev.tsv", "notes.txt")
    make(tmp_path / "empty", "notes.txt")
    monkeypatch.chdir(tmp_path)
    for rows, message in (
        (
            {"path": "data/train.csv"},
            r"data/train\.csv: no such .*there are dev\.tsv, train\.tsv; did",
        ),
        (
            {"path": "data", "data_files": {"train": "t.csv"}},
            r"data/t\.csv: no such file; there are dev",
        ),
        (
            {"path": "data", "data_files": "x*.csv"},
            r"data/x\*\.csv: no such file; there are dev\.tsv",
        ),
        ({"path": "data/notes.txt"}, r"notes\.txt: the ending of its name is not one of \.csv"),
        (
            {"path": "data", "data_files": {"train": []}},
            "data: data_files names no file for a split",
        ),
        ({"path": "http://127.0.0.1:9/x.csv"}, r"http://127.0.0.1:9/x.csv: "),
        ({"path": "empty"}, r"empty: no data file in this folder; there is notes\.txt; rows are"),
        ({"path": "nowhere/x.csv"}, r"nowhere/x\.csv: no such file or folder; nor is there"),
    ):
        with pytest.raises(UserError, match=message):
            find_files(DatasetSettings(**rows))
    make(tmp_path / "data", "train.csv")
    with pytest.raises(UserError, match=r"data/train\.csv and data/train\.tsv are both train; say"):
        find_files(DatasetSettings(path="data"))


def test_the_files_that_dvc_watches_are_those_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "rows.csv", "more/a.csv", "more/b.csv")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk("saved")
    fsspec.filesystem("memory").pipe("/watched/rows.csv", ROWS.encode())
    for path, expected in (
        ("rows.csv", {"rows.csv"}),
        ("more", {"more/a.csv", "more/b.csv"}),
        (f"file://{tmp_path}/rows.csv", {"rows.csv"}),
        ("saved", {f"saved/{name}" for name in os.listdir("saved")}),  # noqa: PTH208
        ("memory://watched/rows.csv", set()),
        ("more", {"more/b.csv"}),
        ("org/name", set()),
    ):
        patterns = "b*.csv" if len(expected) == 1 and path == "more" else None
        rows = DatasetSettings(path=path, data_files=patterns)
        files = local_files(TaskSettings(dataset=rows))
        assert {str(file) for file in files} == expected
    assert local_files(TaskSettings()) == []


def test_a_name_on_the_hub_is_told_from_a_file_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "data/x.csv")
    names = {
        "org/name": "org/name",
        "imdb": "imdb",
        "hf://datasets/data/x": "data/x",
        "data": None,
        "data/reviews": None,
        "other/reviews.csv": None,
        "https://host/x.csv": None,
        "a/b/c": None,
    }
    assert {path: hub_name(DatasetSettings(path=path)) for path in names} == names


@pytest.mark.parametrize(
    ("splits", "rows", "train", "validation"),
    [
        (["train", "validation"], {}, "train", ["validation"]),
        (["train", "test", "dev"], {}, "train", ["dev"]),
        (["train", "test"], {}, "train", ["test"]),
        (["my_train", "my-val", "my_test"], {}, "my_train", ["my-val"]),
        (
            ["train", "validation_matched", "validation_mismatched"],
            {},
            "train",
            ["validation_matched", "validation_mismatched"],
        ),
        (["only"], {}, "only", []),
        (["train", "unsupervised"], {}, "train", []),
        (["train", "test"], {"validation_size": 5}, "train", []),
        (["a", "b"], {"splits": {"train": "b", "validation": "a"}}, "b", ["a"]),
        (
            ["train", "dev", "test"],
            {"splits": {"validation": ["test", "dev"]}},
            "train",
            ["test", "dev"],
        ),
        (["dev", "test"], {"splits": {"train": None}}, None, ["dev"]),
    ],
)
def test_splits_are_chosen_or_guessed(
    splits: Sequence[str], rows: Mapping[str, Any], train: str | None, validation: list[str]
) -> None:
    dataset = DatasetSettings(path="x", **rows)
    assert choose_splits(dataset, splits, "here") == (train, validation)


@pytest.mark.parametrize(
    ("splits", "rows", "message"),
    [
        (["a", "b"], {}, "no split train; say data_files: .* for a and b"),
        (["train", "dev"], {"splits": {"train": "tran"}}, "no split tran; .*did you mean 'train'"),
        (
            ["train", "dev"],
            {"splits": {"validation": "devel"}},
            "no split devel; there are train and",
        ),
        (["a", "train"], {"splits": {"train": "a", "validation": "train"}}, "train is for train"),
        (["train"], {"splits": {"validation": "train"}}, "train is for training; name another"),
    ],
)
def test_splits_that_are_not_there_are_refused(
    splits: Sequence[str], rows: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"here: .*{message}"):
        choose_splits(DatasetSettings(path="x", **rows), splits, "here")


CARD = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/train-*}
  - {split: devel, path: en/devel.jsonl}
- config_name: de
  data_files: de/rows.csv
dataset_info:
- config_name: en
  features:
  - {name: text, dtype: string}
  - name: label
    dtype: {class_label: {names: {'0': neg, '1': pos}}}
---
"""
CODE = """
import json, sys; from fmn.errors import UserError; from fmn.tasks import sources, task
rows = task.DatasetSettings(**json.loads(sys.argv[1]))
try:
    commit = sources.pin(rows, "org/name")
    files = sources.hub_files(rows, sources.download(rows, "org/name", commit))
    print(json.dumps({s: [[f.name, dict(f.classes)] for f in each] for s, each in files.items()}))
except UserError as error: print(error)"""


def test_a_data_set_of_the_hub_is_downloaded_as_its_card_says(tmp_path: Path) -> None:
    def files(number: int = 0, **rows: Any) -> str:  # in a process: the Hub's address is read once
        environment = hub.environment(tmp_path / f"home{number}") | {"PYTHONPATH": str(ROOT)}
        arguments = json.dumps({"path": "org/name", **rows})
        command = [sys.executable, "-c", CODE, arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    content = {
        "README.md": CARD.encode(),
        "en/train-0.jsonl": b'{"text": "a", "label": 0}',
        "en/devel.jsonl": b'{"text": "b", "label": 1}',
        "de/rows.csv": ROWS.encode(),
    }
    with Hub() as hub:
        hub.add("datasets", "org/name", content)
        classes = '{"label": ["neg", "pos"]}'
        assert files(name="en") == (
            f'{{"train": [["org/name/en/train-0.jsonl", {classes}]],'
            f' "devel": [["org/name/en/devel.jsonl", {classes}]]}}'
        )
        assert not [request for request in hub.requests if "de/rows" in request]
        assert files(name="de") == '{"train": [["org/name/de/rows.csv", {}]]}'
        assert (
            files(data_files={"train": "de/*.csv"}) == '{"train": [["org/name/de/rows.csv", {}]]}'
        )
        for wrong in (None, "fr"):
            assert files(name=wrong) == "org/name: say one of its configurations, name: en, de"
        assert "org/name@nothing: no such data set" in files(revision="nothing")
        del content["README.md"]
        hub.add("datasets", "org/name", content)  # without a card
        assert files(1, data_dir="de") == '{"train": [["org/name/de/rows.csv", {}]]}'
        assert '"train": [["org/name/en/train-0.jsonl", {}]]' in files(2, data_dir="en")
