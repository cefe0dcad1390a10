"""The stage that writes a task's rows."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

import fmn
from fmn.errors import UserError
from fmn.tasks import dataset
from fmn.tasks.rows import schema
from fmn.tasks.stages import DataSettings, data
from fmn.tasks.task import TASKS, get_task, load_task
from tests.tasks.rows import mrpc_columns, write_split

EMBEDDED = DataSettings(source="embedded")


def test_the_miniature_glue_has_the_hubs_schema(tmp_path: Path) -> None:
    for name in ("sst2", "stsb"):
        info = data(name, out=tmp_path / name, settings=EMBEDDED).summary
        assert (info.task, info.source) == (name, "embedded")
        assert dataset.read_data_info(tmp_path, get_task(name)) == info
        assert load_task(tmp_path, name) == get_task(name)
        for split in ("train", "validation"):
            table = pq.read_table(tmp_path / name / f"{split}.parquet")
            assert table.num_rows == info.rows[split]
            assert table.schema.equals(schema(get_task(name)))
            assert table["idx"].to_pylist() == list(range(table.num_rows))


def test_the_same_rows_make_the_same_bytes_and_are_not_written_again(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for split in ("train", "validation"):
        write_split(tmp_path / "rows", mrpc_columns(), split)
    settings = DataSettings(source=str(tmp_path / "rows"))
    assert data("mrpc", out=first, settings=settings).computed
    data("mrpc", out=second, settings=DataSettings(source=str(first)))
    for name in ("train.parquet", "validation.parquet", "task.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert not data("mrpc", out=first, settings=settings).computed
    write_split(tmp_path / "rows", mrpc_columns(label=[1, 1]))
    assert data("mrpc", out=first, settings=settings).computed


def test_a_task_that_its_folder_defines_needs_no_other_definition(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for split in ("train", "validation"):
        write_split(source, {"text": ["a", "b"], "intent": [0, 1]}, split)
    (source / "task.json").write_text(
        '{"name": "intents", "columns": {"text": "text", "label": "intent"}, "labels": ["x", "y"]}'
    )
    data("intents", out=tmp_path / "out", settings=DataSettings(source=str(source)))
    task = load_task(tmp_path / "out", "intents")
    assert dataset.read_split(tmp_path / "out", task, "train")["label"].to_pylist() == [0, 1]


def test_nothing_is_written_if_one_split_is_wrong(tmp_path: Path) -> None:
    write_split(tmp_path / "in", mrpc_columns())
    write_split(tmp_path / "in", mrpc_columns(label=[0, 9]), "validation")
    with pytest.raises(UserError, match="label is 9"):
        data("mrpc", out=tmp_path / "out", settings=DataSettings(source=str(tmp_path / "in")))
    assert not (tmp_path / "out").exists()


def test_a_source_is_a_folder_which_the_environment_may_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in ("https://user:password@host/data", "nowhere"):
        message = r"^data (https://host/data|nowhere): not a folder; name one"
        with pytest.raises(UserError, match=message):
            data("sst2", out=tmp_path / "sst2", settings=DataSettings(source=source))
    monkeypatch.setenv("MY_DATA", "/some/folder")
    assert DataSettings(source="$MY_DATA").source == "/some/folder"
    monkeypatch.delenv("MY_DATA")
    with pytest.raises(ValidationError, match="MY_DATA is not set"):
        DataSettings(source="$MY_DATA")


def test_the_miniature_glue_is_found_or_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fmn, "__file__", str(tmp_path / "site" / "fmn" / "__init__.py"))
    with pytest.raises(UserError, match="no mrpc in data/miniature_glue or in a checkout; set"):
        data("mrpc", out=tmp_path / "out", settings=EMBEDDED)
    with pytest.raises(UserError, match="did you mean 'mrpc'"):
        data("mprc", out=tmp_path / "out", settings=EMBEDDED)
    for split in ("train", "validation"):
        write_split(tmp_path / "data" / "miniature_glue" / "mrpc", mrpc_columns(), split)
    assert data("mrpc", out=tmp_path / "out", settings=EMBEDDED).summary.rows["train"] == 2
    monkeypatch.setenv("FMN_MINIATURE_GLUE", str(tmp_path / "mine"))
    with pytest.raises(UserError, match=r"no mrpc in /.*/mine or"):
        data("mrpc", out=tmp_path / "out", settings=EMBEDDED)


def test_real_glue_is_read_as_it_is(glue: Path, tmp_path: Path) -> None:
    for name in ("cola", "mrpc", "stsb", "rte", "wnli", "mnli"):
        task = TASKS[name]
        info = data(name, out=tmp_path / name, settings=DataSettings(source=str(glue))).summary
        for split in info.rows:
            original = pq.read_table(glue / name / f"{split}.parquet")
            columns = [*task.text_columns, "label", "idx"]
            rows = dataset.read_split(tmp_path, task, split)
            assert rows.equals(original.select(columns).combine_chunks())
