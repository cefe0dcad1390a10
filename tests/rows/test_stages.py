"""The stage that writes a task's rows."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

import fmn
from fmn.errors import UserError
from fmn.rows.stages import DataSettings, TaskOptions, data, definition_of
from fmn.store.stage import read_sidecar
from fmn.tasks import dataset
from fmn.tasks.rows import schema
from fmn.tasks.task import TASKS, TaskSettings, get_task, load_task
from tests.conftest import ROOT
from tests.hub_server import Hub
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
    source, out = DataSettings(source=str(tmp_path / "source")), tmp_path / "out"
    for split in ("train", "validation"):
        write_split(tmp_path / "source", {"text": ["a", "b"], "intent": [0, 1]}, split)
    (tmp_path / "source" / "task.json").write_text(
        '{"name": "intents", "columns": {"text": "text", "label": "intent"}, "labels": ["x", "y"]}'
    )
    data("intents", out=out, settings=source)
    rows = dataset.read_split(out, load_task(out, "intents"), "train")
    assert rows["label"].to_pylist() == [0, 1]
    write_split(tmp_path / "source", {"text": ["a"], "intent": [9]}, "validation")
    with pytest.raises(UserError, match="intent is 9"):
        data("intents", out=tmp_path / "none", settings=source)
    assert not (tmp_path / "none").exists()


def test_a_source_is_a_folder_which_the_environment_may_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in ("https://user:password@host/data", "nowhere"):
        message = r"^data (https://host/data|nowhere): not a folder; name one"
        with pytest.raises(UserError, match=message):
            data("sst2", out=tmp_path / "sst2", settings=DataSettings(source=source))
    monkeypatch.setenv("MY_DATA", "/some/folder")
    assert DataSettings(source="$MY_DATA").source == "/some/folder"
    with pytest.raises(ValidationError, match="OTHER_DATA is not set"):
        DataSettings(source="$OTHER_DATA")


def test_the_miniature_glue_is_found_or_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fmn, "__file__", str(tmp_path / "site" / "fmn" / "__init__.py"))
    with pytest.raises(UserError, match="no mrpc in data/miniature_glue or in the package; set"):
        data("mrpc", out=tmp_path / "out", settings=EMBEDDED)
    with pytest.raises(UserError, match="did you mean 'mrpc'"):
        data("mprc", out=tmp_path / "out", settings=EMBEDDED)
    for split in ("train", "validation"):
        write_split(tmp_path / "mine" / "mrpc", mrpc_columns(), split)
    monkeypatch.setenv("FMN_MINIATURE_GLUE", "mine")
    assert data("mrpc", out=tmp_path / "out", settings=EMBEDDED).summary.rows["train"] == 2


def test_real_glue_is_read_as_it_is(glue: Path, tmp_path: Path) -> None:
    for name in ("cola", "mrpc", "stsb", "rte", "wnli", "mnli"):
        task = TASKS[name]
        info = data(name, out=tmp_path / name, settings=DataSettings(source=str(glue))).summary
        for split in info.rows:
            original = pq.read_table(glue / name / f"{split}.parquet")
            columns = [*task.text_columns, "label", "idx"]
            rows = dataset.read_split(tmp_path, task, split)
            assert rows.equals(original.select(columns).combine_chunks())


# ---------------------------------------------------------------------------------------------
# Tasks of one's own


ROWS = "review,stars\n" + "".join(f"text {row},{row % 5 + 1}\n" for row in range(40))


def settings_of(path: object, **changes: Any) -> TaskSettings:
    fields = {"columns": {"text": "review", "label": "stars"}, **changes}
    return TaskSettings.model_validate({"dataset": {"path": str(path)}, **fields})


def test_a_table_becomes_a_task(tmp_path: Path) -> None:
    path, out = tmp_path / "reviews.csv", tmp_path / "stars"
    path.write_text(ROWS)
    info = data("stars", out=out, definition=settings_of(path)).summary
    assert (info.source, info.rows) == (str(path), {"train": 36, "validation": 4})
    task = load_task(tmp_path, "stars")
    assert (task.labels, task.columns.text) == (("1", "2", "3", "4", "5"), "review")
    rows = dataset.read_split(tmp_path, task, "train")
    source = ROWS.splitlines()[1:]
    assert [f"{row['review']},{task.labels[row['label']]}" for row in rows.to_pylist()] == [
        source[row] for row in rows["idx"].to_pylist()
    ]
    assert not data("stars", out=out, definition=settings_of(path)).computed
    again = tmp_path / "again"
    data("stars", out=again, settings=DataSettings(source=str(out)))
    for name in ("train.parquet", "validation.parquet", "task.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    path.write_text(ROWS + "text 40,1\n")
    assert data("stars", out=out, definition=settings_of(path)).summary.rows["train"] == 37
    assert data("stars", out=out, definition=settings_of(path, max_length=9)).computed


def test_a_file_at_a_url_is_read_again_when_it_changes_and_its_password_is_not_written_down(
    tmp_path: Path,
) -> None:
    memory, path, out = fsspec.filesystem("memory"), "me:secret@bucket/x.csv", tmp_path / "stars"
    memory.pipe(f"/{path}", ROWS.encode())
    definition = settings_of(f"memory://{path}")
    first = data("stars", out=out, definition=definition)
    assert (first.computed, first.summary.source) == (True, "memory://bucket/x.csv")
    sidecar = read_sidecar(out)
    assert sidecar
    assert "secret" not in sidecar.model_dump_json()
    assert not data("stars", out=out, definition=definition).computed
    memory.pipe(f"/{path}", f"{ROWS}more,1\n".encode())
    assert data("stars", out=out, definition=definition).computed


def test_a_definition_without_a_data_set_is_of_the_rows_that_the_settings_name(
    tmp_path: Path,
) -> None:
    (tmp_path / "stars").mkdir()
    (tmp_path / "stars" / "train.csv").write_text(ROWS)
    folder = DataSettings(source=str(tmp_path))
    columns = {"text": "review", "label": "stars"}
    definition = TaskSettings.model_validate({"columns": columns})
    info = data("stars", out=tmp_path / "out", settings=folder, definition=definition).summary
    assert info.rows == {"train": 36, "validation": 4}
    shorter = TaskSettings(max_length=64, metrics=["f1_macro"])
    data("sst2", out=tmp_path / "sst2", settings=EMBEDDED, definition=shorter)
    task = load_task(tmp_path, "sst2")
    expected = get_task("sst2").model_copy(update={"max_length": 64, "metrics": ("f1_macro",)})
    assert task == expected
    with pytest.raises(UserError, match="task stars: nothing says where its rows are"):
        data("stars", out=tmp_path / "out", definition=definition)


def test_rows_without_labels_are_written_and_read_again(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("review\na\nb\n")
    definition = settings_of(tmp_path / "texts.csv", columns={"text": "review", "label": None})
    data("plain", out=tmp_path / "plain", definition=definition)
    settings = DataSettings(source=str(tmp_path / "plain"))
    assert data("plain", out=tmp_path / "again", settings=settings).summary.rows == {"train": 2}
    task = load_task(tmp_path / "again", "plain")
    assert (task.has_labels, task.problem_type) == (False, None)
    with pytest.raises(UserError, match="no rows to score plain on"):
        dataset.validation_splits(tmp_path / "again", task)


def run_data(hub: Hub, home: Path, *arguments: object) -> str:
    """`fmn data` in a process of its own, as the Hub's address is read once."""
    environment = hub.environment(home) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fmn", "data", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_glue_comes_from_the_hub_at_its_revision_and_then_from_the_cache(tmp_path: Path) -> None:
    def download(number: int, revision: str) -> Any:
        out = ("--out", tmp_path / f"out{number}", "--revision", revision, "--json")
        printed = run_data(hub, tmp_path / "home", "mrpc", *out)
        return json.loads(printed)["revision"] if printed.startswith("{") else printed

    for split in ("train", "validation", "test"):
        write_split(tmp_path / "repo" / "mrpc", mrpc_columns(), f"{split}-00000-of-00001")
    with Hub() as hub:
        commit = hub.add("datasets", dataset.HUB, tmp_path / "repo")
        assert download(0, "main") == commit
        assert not [request for request in hub.requests if "mrpc/test" in request]
        assert "fmn: nyu-mll/glue@0000" in download(1, "0" * 40)
    assert download(2, commit) == commit, "the Hub is not needed any more"
    assert load_task(tmp_path / "out0", "mrpc") == get_task("mrpc")


def test_a_data_set_of_the_hub_is_pinned_to_its_commit(tmp_path: Path) -> None:
    how = ("--dataset", "org/name", "--text", "review", "--label", "stars", "--json")
    with Hub() as hub:
        commit = hub.add("datasets", "org/name", {"train.csv": ROWS.encode()})
        info = json.loads(run_data(hub, tmp_path, "stars", *how, "--out", tmp_path / "stars"))
        assert (info["source"], info["revision"]) == ("org/name", commit)
        assert info["rows"] == {"train": 36, "validation": 4}
        again = json.loads(run_data(hub, tmp_path, "stars", *how, "--out", tmp_path / "stars"))
        assert not again["computed"]
        other = hub.add("datasets", "org/name", {"train.csv": f"{ROWS}x,1\n".encode()})
        newer = json.loads(run_data(hub, tmp_path, "stars", *how, "--out", tmp_path / "stars"))
        assert (newer["revision"], newer["rows"]["train"]) == (other, 37)


def of_options(task: str = "stars", source: str | None = None, **options: Any) -> Any:
    settings = DataSettings(source=source) if source else DataSettings()
    return definition_of(task, TaskOptions(**options), settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"definition": "x.yaml", "text": "a"}, "--definition x.yaml: .* give it alone"),
        ({"dataset": "x.csv", "source": "embedded"}, "--dataset and --source contradict"),
        ({"validation": "x.csv"}, "task stars: dataset.path: "),
        ({"validation_size": 3}, "task stars: dataset.path: "),
        ({"dataset": "x", "validation": "y", "validation_size": 3}, "validation_size .*contradict"),
        ({"dataset": "x.csv", "metric": ["acc"]}, "task stars: unknown metric 'acc'"),
        ({"definition": "nowhere.yaml"}, "nowhere.yaml: no such file"),
    ],
)
def test_options_that_contradict_one_another_are_refused(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        of_options(**options)


DESCRIPTION = """
    dataset: {path: reviews.csv, validation_size: 7, seed: 1}
    columns: {text: review, label: stars}
    labels: {1: bad, 5: good}
    metrics: [f1_macro]
    max_length: 64
"""


def test_options_and_files_say_what_settings_say(tmp_path: Path) -> None:
    file = tmp_path / "stars.yaml"
    options: dict[str, Any] = {
        **{"dataset": "reviews.csv", "validation_size": 7, "seed": 1, "text": "review"},
        **{"label": "stars", "labels": ["1=bad", "5=good"], "metric": ["f1_macro"]},
    }
    expected = of_options(max_length=64, **options)
    for content in (DESCRIPTION, f"work: x\ntasks:\n  stars:{DESCRIPTION}"):
        file.write_text(content)
        assert of_options(definition=file) == expected
    with pytest.raises(UserError, match=r"stars\.yaml: no task star; there are stars; did you"):
        of_options("star", definition=file)
    file.write_text("dataset: {path: x, nam: y}")
    with pytest.raises(UserError, match=r"stars\.yaml: dataset\.nam: "):
        of_options(definition=file)
    assert of_options() is None


def test_training_and_validation_rows_may_be_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("a/one.csv").write_text(ROWS)
    Path("two.tsv").write_text(ROWS.replace(",", "\t"))
    files = {"dataset": "a/one.csv", "validation": str(tmp_path / "two.tsv")}
    definition = of_options(**files, text="review", label="stars")
    info = data("stars", out=Path("out"), definition=definition).summary
    assert (info.source, info.rows) == ("a/one.csv", {"train": 40, "validation": 40})
    assert "validation: 40 of 40 texts are also in training" in info.warnings
