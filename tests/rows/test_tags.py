"""Words and tags, in the forms that they come in."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmn.errors import UserError
from fmn.rows.prepare import Prepared, prepare
from fmn.rows.sources import find_files
from fmn.rows.stages import DataSettings, TaskOptions, data, definition_of
from fmn.rows.view import describe
from fmn.tasks.task import TaskSettings

CONLL = """-DOCSTART- -X- -X- O

Anna NNP I-NP B-PER
left VBD I-VP O

# NN I-NP O
1\u00a0000 CD I-NP O
"""
ROWS = [{"w": ["Anna", "left"], "t": ["B-PER", "O"]}, {"w": ["#", "1\u00a0000"], "t": ["O", "O"]}]


def prepared(path: Path, **fields: Any) -> Prepared:
    fields = {"task": "token-classification", **fields}
    definition = TaskSettings.model_validate({"dataset": {"path": str(path)}, **fields})
    assert definition.dataset
    return prepare("ner", definition, find_files(definition.dataset), str(path))


def rows(result: Prepared) -> list[tuple[list[str], list[str]]]:
    """Words and named tags of all rows, in the order of the file."""
    names, (words,) = result.task.labels, result.task.text_columns
    every = [row for table in result.tables.values() for row in table.to_pylist()]
    return [
        (row[words], [names[tag] for tag in row["label"]])
        for row in sorted(every, key=lambda row: int(row["idx"]))
    ]


WANTED = [(row["w"], row["t"]) for row in ROWS]


@pytest.mark.parametrize("name", ["a.conll", "a.bio", "a.iob", "a.iob2", "a.txt"])
@pytest.mark.parametrize("form", [CONLL, CONLL.replace(" ", "\t"), CONLL.replace("\n", "\r\n")])
def test_text_files_of_words(tmp_path: Path, name: str, form: str) -> None:
    (tmp_path / name).write_bytes(form.encode())
    result = prepared(tmp_path / name)
    assert rows(result) == WANTED
    assert (result.task.task, result.task.metrics) == ("token-classification", ("seqeval_f1",))
    result = prepared(tmp_path / name, columns={"label": "column 2"})
    assert rows(result)[0] == (["Anna", "left"], ["NNP", "VBD"])
    assert result.task.metrics == ("accuracy",)


def test_comments_and_numbers_of_words_are_no_words(tmp_path: Path) -> None:
    file = tmp_path / "a.conll"
    file.write_text("# id 4\tdomain=en\nAnna _ _ B-PER\nleft _ _ O\n\n# x\nRome _ _ O\n")
    assert [words for words, _ in rows(prepared(file))] == [["Anna", "left"], ["Rome"]]
    file.write_text("# text = du\n1-2\tdu\t_\n1\tde\tADP\n2\tle\tDET\n\n1\tRome\tPROPN\n")
    columns = {"tokens": "column 2", "label": "column 3"}
    result = prepared(file, columns=columns)
    assert [row[1] for row in rows(result)] == [["ADP", "DET"], ["PROPN"]]
    with pytest.raises(UserError, match="no column label for ner; there are column 1, column 2"):
        prepared(file, metrics=["accuracy"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv", "classes.parquet"])
def test_lists_of_words_and_tags(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif name == "a.csv":
        datasets.Dataset.from_list(ROWS).to_pandas().map(list).to_csv(path, index=False)
    else:  # ids, as on the Hub
        tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER", "I-PER"]))
        features = datasets.Features({"w": datasets.Sequence(datasets.Value("string")), "t": tags})
        datasets.Dataset.from_list(ROWS, features=features).to_parquet(path)
    result = prepared(path, columns={"tokens": "w", "label": "t"})
    assert rows(result) == WANTED
    names = ("O", "B-PER", "I-PER") if "classes" in name else ("B-PER", "O")
    assert result.task.labels == names


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        ([{"tokens": ["a", "b"], "label": ["O"]}], {}, "row 0 has 2 words and 1 tags in column"),
        ([{"tokens": "a b", "label": ["O"]}], {}, "tokens is 'a b' in row 0, not a list of words"),
        ([{"tokens": ["a"], "label": "O"}], {}, "label is 'O' in row 0, not a list of tags"),
        ([{"tokens": ["a"], "label": ["X"]}], {"labels": ["O", "B-X"]}, "another tag in row 0"),
        ([{"tokens": ["a", "b"], "label": ["N", "V"]}], {"metrics": ["seqeval_f1"]}, "of spans"),
    ],
)
def test_what_is_not_a_tag_for_each_word_is_refused(
    tmp_path: Path, content: Any, fields: Any, message: str
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content * 2))
    with pytest.raises(UserError, match=message):
        prepared(tmp_path / "a.json", **fields)


def test_broken_text_files_are_refused_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "a.conll"
    file.write_text("Anna B-PER\nleft\n")
    with pytest.raises(UserError, match="line 2 is 'left', of 1 columns"):
        prepared(file)
    file.write_text("Anna\nleft\n")
    with pytest.raises(UserError, match="'Anna' is not a word and its tag"):
        prepared(file)
    file.write_text(CONLL)
    with pytest.raises(UserError, match="say task: token-classification"):
        prepared(file, task="text-classification")


def test_options_describe_a_tagger_and_its_first_example_is_shown(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    options = TaskOptions(dataset=str(tmp_path / "a.jsonl"), tokens="w", label="t")
    definition = definition_of("ner", options, DataSettings())
    assert definition
    assert definition.kind == "token-classification"
    data("ner", out=tmp_path / "ner", definition=definition)
    example = describe("ner", None, None, tmp_path).example
    assert (example["w"], example["label"]) in WANTED
    kind = TaskOptions(dataset="x.txt", kind="token-classification")
    of_kind = definition_of("ner", kind, DataSettings())
    assert of_kind
    assert of_kind.kind == "token-classification"
