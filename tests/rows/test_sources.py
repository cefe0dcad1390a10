"""Where a data set lies, which of its files are which split, and which splits are read."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest

from fmn.errors import UserError
from fmn.rows.sources import choose_splits, find_files, hub_name, local_files
from fmn.tasks.task import DatasetSettings, SplitSettings, TaskSettings
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
        ({"data_files": {"dev": "a.csv", "x": ["b.csv"]}}, {"dev": ["a.csv"], "x": ["b.csv"]}),
        ({"data_dir": "sub"}, {"c": ["sub/c.csv"]}),
        ({"data_dir": "sub", "data_files": "*.csv"}, {"train": ["sub/c.csv"]}),
    ],
)
def test_settings_name_files_as_load_dataset_does(
    tmp_path: Path, rows: dict[str, Any], splits: dict[str, list[str]]
) -> None:
    make(tmp_path / "my [data]", "a.csv", "b.csv", "sub/c.csv")
    assert split_names(tmp_path / "my [data]", **rows) == splits


@pytest.mark.parametrize(
    ("path", "patterns", "message"),
    [
        ("data/train.csv", None, r"data/train\.csv: no such .*there are dev\.tsv, train\.tsv; did"),
        ("data", {"train": "t.csv"}, r"data/t\.csv: no such file; there are dev"),
        ("data", "x*.csv", r"data/x\*\.csv: no such file; there are dev\.tsv"),
        ("data/notes.md", None, r"notes\.md: the ending of its name is not one of \.csv"),
        ("data", {"train": []}, "data: data_files names no file for a split"),
        ("http://127.0.0.1:9/x.csv", None, r"http://127.0.0.1:9/x.csv: "),
        (".", None, r"\.: no data file in this folder; there are data/, two/; rows are"),
        ("nowhere/x.csv", None, r"nowhere/x\.csv: no such file or folder; nor is there"),
        ("two", None, r"two/a\.csv and two/a\.tsv are both a; say data_files"),
    ],
)
def test_a_missing_file_is_told_with_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, patterns: Any, message: str
) -> None:
    make(tmp_path, "data/train.tsv", "data/dev.tsv", "data/notes.md", "two/a.csv", "two/a.tsv")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        find_files(DatasetSettings(path=path, data_files=patterns))


@pytest.mark.parametrize(
    ("path", "patterns", "expected"),
    [
        ("rows.csv", None, ["rows.csv"]),
        ("more", None, ["more/a.csv", "more/b.csv"]),
        ("more", "b*.csv", ["more/b.csv"]),
        ("FOLDER/rows.csv", None, ["rows.csv"]),
        ("file://FOLDER/rows.csv", None, ["rows.csv"]),
        ("memory://watched/rows.csv", None, []),
        ("org/name", None, []),
    ],
)
def test_the_files_that_dvc_watches_are_those_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, patterns: Any, expected: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "rows.csv", "more/a.csv", "more/b.csv")
    fsspec.filesystem("memory").pipe("/watched/rows.csv", ROWS.encode())
    rows = DatasetSettings(path=path.replace("FOLDER", str(tmp_path)), data_files=patterns)
    assert list(map(str, local_files(TaskSettings(dataset=rows)))) == expected
    assert local_files(TaskSettings()) == []


def test_every_file_of_a_saved_data_set_is_watched(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    definition = TaskSettings(dataset=DatasetSettings(path=str(tmp_path / "saved")))
    assert sorted(local_files(definition)) == sorted((tmp_path / "saved").iterdir())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("org/name", "org/name"),
        ("imdb", "imdb"),
        ("hf://datasets/data/x", "data/x"),
        *((path, None) for path in ("data", "data/reviews", "other/reviews.csv", "a/b/c")),
        ("https://host/x.csv", None),
    ],
)
def test_a_name_on_the_hub_is_told_from_a_file_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, name: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "data/x.csv")
    assert hub_name(DatasetSettings(path=path)) == name


MNLI = ["validation_matched", "validation_mismatched"]


@pytest.mark.parametrize(
    ("splits", "rows", "train", "validation"),
    [
        (["train", "validation"], {}, "train", ["validation"]),
        (["train", "test", "dev"], {}, "train", ["dev"]),
        (["my_train", "my-val", "my_test"], {}, "my_train", ["my-val"]),
        (["train", *MNLI], {}, "train", MNLI),
        (["only"], {}, "only", []),
        (["train", "unsupervised"], {}, "train", []),
        (["train", "test"], {"validation_size": 5}, "train", []),
        (["a", "b"], {"splits": {"train": "b", "validation": "a"}}, "b", ["a"]),
        (["train", "dev", "test"], {"splits": {"validation": ["test", "dev"]}}, "train",
         ["test", "dev"]),
        (["dev", "test"], {"splits": {"train": None}}, None, ["dev"]),
    ],
)  # fmt: skip
def test_splits_are_chosen_or_guessed(
    splits: Sequence[str], rows: Mapping[str, Any], train: str | None, validation: list[str]
) -> None:
    dataset = DatasetSettings(path="x", **rows)
    assert choose_splits(dataset, splits, "here") == (train, validation)


@pytest.mark.parametrize(
    ("splits", "train", "validation", "message"),
    [
        (["a", "b"], "train", "validation", "no split train; say data_files: .* for a and b"),
        (["train", "dev"], "tran", "validation", "no split tran; .*did you mean 'train'"),
        (["train", "dev"], "train", "devel", "no split devel; there are train and"),
        (["a", "train"], "a", "train", "train is for training; name another"),
        (["train"], "train", "train", "train is for training; name another"),
    ],
)
def test_splits_that_are_not_there_are_refused(
    splits: Sequence[str], train: str, validation: str, message: str
) -> None:
    named = SplitSettings(train=train, validation=validation)
    with pytest.raises(UserError, match=f"here: .*{message}"):
        choose_splits(DatasetSettings(path="x", splits=named), splits, "here")


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
import json, sys; from fmn.errors import UserError
from fmn.rows import sources; from fmn.tasks import task
for line in sys.stdin:
    rows = task.DatasetSettings(**json.loads(line))
    try:
        commit = sources.pin(rows, "org/name")
        files = sources.hub_files(rows, sources.download(rows, "org/name", commit))
        answer = {s: [[f.name, dict(f.classes)] for f in each] for s, each in files.items()}
        print(json.dumps(answer), flush=True)
    except UserError as error: print(error, flush=True)"""


def test_a_data_set_of_the_hub_is_downloaded_as_its_card_says(tmp_path: Path) -> None:
    def files(**rows: Any) -> str:
        print(json.dumps({"path": "org/name", **rows}), file=process.stdin, flush=True)
        assert process.stdout is not None
        return process.stdout.readline().strip()

    content = {
        "README.md": CARD.encode(),
        "en/train-0.jsonl": b'{"text": "a", "label": 0}',
        "en/devel.jsonl": b'{"text": "b", "label": 1}',
        "de/rows.csv": ROWS.encode(),
    }
    with (
        Hub() as hub,
        subprocess.Popen(  # in a process: the Hub's address is read once
            [sys.executable, "-c", CODE],
            env=hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
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
        for card in (b"---\nconfigs: [3]\n---\n", b"---\na: b: c\n---\n"):
            hub.add("datasets", "org/name", {**content, "README.md": card})
            assert "org/name: its card or files cannot be read" in files()
        del content["README.md"]
        hub.add("datasets", "org/name", content)  # without a card
        assert files(data_dir="de") == '{"train": [["org/name/de/rows.csv", {}]]}'
        assert '"train": [["org/name/en/train-0.jsonl", {}]]' in files(data_dir="en")
