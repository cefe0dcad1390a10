"""Files are whole or absent, and say what they were made from."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fmn.errors import UserError
from fmn.fisher.architectures import NodeValues, Site
from fmn.store import artifacts

FISHER: NodeValues = {
    Site(layer, node): np.arange(count, dtype=np.float64) / 7 + layer
    for layer in (0, 1, 10)
    for node, count in (("head", 4), ("neuron", 6))
}


def test_a_file_keeps_its_old_content_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with suppress(RuntimeError), artifacts.whole_file(path) as partial:
        partial.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old"
    with artifacts.whole_file(path) as partial:
        partial.write_text("new")
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "new"


def test_a_folder_is_replaced_whole_and_what_a_kill_left_is_cleared(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    (tmp_path / ".folder.partial" / "inner").mkdir(parents=True)
    (tmp_path / ".folder.old").mkdir()
    for content in ("one", "two"):
        with artifacts.whole_folder(path) as partial:
            assert not list(partial.iterdir())
            (partial / content).write_text(content)
    with pytest.raises(RuntimeError), artifacts.whole_folder(path):
        raise RuntimeError
    assert [item.name for item in tmp_path.iterdir()] == ["folder"]
    assert [item.name for item in path.iterdir()] == ["two"]


def test_a_content_key_depends_on_every_part_but_not_on_order() -> None:
    key = artifacts.content_key("stage", 1, {"a": 1, "b": 2}, {"x": "1", "y": "2"})
    assert key == artifacts.content_key("stage", 1, {"b": 2, "a": 1}, {"y": "2", "x": "1"})
    others = [
        artifacts.content_key("other", 1, {"a": 1, "b": 2}, {"x": "1", "y": "2"}),
        artifacts.content_key("stage", 2, {"a": 1, "b": 2}, {"x": "1", "y": "2"}),
        artifacts.content_key("stage", 1, {"a": 1, "b": 3}, {"x": "1", "y": "2"}),
        artifacts.content_key("stage", 1, {"a": 1, "b": 2}, {"x": "1", "y": "3"}),
    ]
    assert len({key, *others}) == 5


@pytest.mark.parametrize("damage", ["change", "delete", "add", "manifest", "empty"])
def test_a_folder_is_current_only_while_it_is_what_was_written(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "folder"
    with artifacts.whole_folder(folder) as partial:
        (partial / "a").write_text("a")
        (partial / "b").write_text("b")
        artifacts.write_manifest(partial, "stage", "key", {"said": 1})
    assert artifacts.folder_is_current(folder, "key")
    assert not artifacts.folder_is_current(folder, "other")
    assert artifacts.read_manifest(folder) is not None
    before = artifacts.digest_folder(folder)
    match damage:
        case "change":
            (folder / "a").write_text("x")
        case "delete":
            (folder / "a").unlink()
        case "add":
            (folder / "c").write_text("c")
        case "manifest":
            (folder / artifacts.MANIFEST).write_text("{")
        case "empty":
            (folder / "b").write_text("")
    assert not artifacts.folder_is_current(folder, "key")
    if damage == "manifest":
        assert artifacts.digest_folder(folder) == before
    else:
        with pytest.raises(UserError, match="not what was written"):
            artifacts.digest_folder(folder)


def test_a_file_that_was_rewritten_has_a_new_digest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("a")
    first = artifacts.digest_file(path)
    path.write_text("b")
    assert artifacts.digest_file(path) != first
    path.write_text("a")
    assert artifacts.digest_file(path) == first


def test_json_knows_its_key_and_notices_a_change(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    artifacts.write_json(path, "evaluate", "key", {"score": 0.5})
    assert artifacts.json_is_current(path, "key")
    assert not artifacts.json_is_current(path, "other")
    assert artifacts.read_json(path) == {"score": 0.5}
    path.write_text(path.read_text().replace("0.5", "0.9"))
    assert not artifacts.json_is_current(path, "key")
    with pytest.raises(UserError, match="not what was written"):
        artifacts.read_json(path)
    with pytest.raises(UserError, match="no such file"):
        artifacts.read_json(tmp_path / "none")


def test_the_fisher_artifact_is_plain_parquet_in_the_agreed_schema(tmp_path: Path) -> None:
    path = tmp_path / "fisher.parquet"
    artifacts.write_fisher(path, FISHER, FISHER, {"key": "k", "task": "sst2"})
    table = pq.read_table(path)
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("layer", "int16"),
        ("node", "dictionary<values=string, indices=int32, ordered=0>"),
        ("index", "int32"),
        ("fisher", "double"),
        ("stderr", "double"),
    ]
    rows = list(zip(*(table[name].to_pylist() for name in ("layer", "node", "index")), strict=True))
    assert rows == sorted(rows)
    assert len(rows) == 30
    assert json.loads(table.schema.metadata[b"fmn"])["task"] == "sst2"


def test_the_batch_estimator_has_no_standard_errors(tmp_path: Path) -> None:
    path = tmp_path / "fisher.parquet"
    artifacts.write_fisher(path, FISHER, None, {"key": "k"})
    assert pq.read_table(path)["stderr"].null_count == 30
    assert artifacts.read_fisher(path)[1] is None


@given(
    st.dictionaries(
        st.builds(Site, st.integers(0, 40), st.sampled_from(["head", "neuron", "cross_head"])),
        arrays.arrays(np.float64, st.integers(1, 5), elements=st.floats(0, 1e300)),
        min_size=1,
        max_size=6,
    )
)
def test_fisher_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, fisher: NodeValues
) -> None:
    path = tmp_path_factory.mktemp("fisher") / "fisher.parquet"
    artifacts.write_fisher(path, fisher, fisher, {"key": "k"})
    found, errors, metadata = artifacts.read_fisher(path)
    assert list(found) == sorted(fisher)
    assert metadata["key"] == "k"
    for values in (found, errors):
        assert values is not None
        for site, nodes in fisher.items():
            np.testing.assert_array_equal(values[site], nodes)


def _rewrite(path: Path, change: str) -> None:
    table = pq.read_table(path)
    fisher = table["fisher"].to_numpy().copy()
    match change:
        case "value":
            fisher[3] += 1e-9
        case "negative":
            fisher[3] = -1
        case "swap":
            fisher[[0, 1]] = fisher[[1, 0]]
    table = table.set_column(3, "fisher", pa.array(fisher))
    if change == "column":
        table = table.drop_columns(["index"])
    if change == "metadata":
        stated = json.loads(table.schema.metadata[b"fmn"])
        table = table.replace_schema_metadata({"fmn": json.dumps({**stated, "task": "rte"})})
    pq.write_table(table, path)


@pytest.mark.parametrize(
    "change", ["value", "negative", "swap", "column", "metadata", "truncate", "empty", "flip"]
)
def test_a_damaged_fisher_artifact_is_refused_by_name(tmp_path: Path, change: str) -> None:
    path = tmp_path / "fisher.parquet"
    artifacts.write_fisher(path, FISHER, FISHER, {"key": "k", "task": "sst2"})
    data = bytearray(path.read_bytes())
    match change:
        case "truncate":
            path.write_bytes(data[:-20])
        case "empty":
            path.write_bytes(b"")
        case "flip":
            data[len(data) // 3] ^= 1
            path.write_bytes(data)
        case _:
            _rewrite(path, change)
    assert not artifacts.fisher_is_current(path, "k")
    with pytest.raises(UserError, match=r"fisher\.parquet"):
        artifacts.read_fisher(path)


@pytest.mark.parametrize(
    "columns",
    [
        {"sentence": ["a"], "label": [1]},
        {"layer": ["0"], "node": ["head"], "index": [0], "fisher": [1.0], "stderr": [None]},
        {"layer": [2**40], "node": ["head"], "index": [0], "fisher": [1.0], "stderr": [None]},
        {"layer": [0], "node": [None], "index": [0], "fisher": ["x"], "stderr": [None]},
        {"layer": [0], "node": ["head"], "index": [0], "fisher": [[1.0]], "stderr": [None]},
        {"layer": [], "node": [], "index": [], "fisher": [], "stderr": []},
    ],
)
@pytest.mark.parametrize(
    "stated", [None, b"", b"[]", b"[" * 10**5, b"{}", b'{"digest": 1, "format": 1}', b"\xff"]
)
def test_parquet_of_another_schema_is_refused(
    tmp_path: Path, columns: Any, stated: bytes | None
) -> None:
    table = pa.table(columns).replace_schema_metadata(None if stated is None else {"fmn": stated})
    pq.write_table(table, tmp_path / "fisher.parquet")
    with pytest.raises(UserError, match=r"fisher\.parquet: ") as caught:
        artifacts.read_fisher(tmp_path / "fisher.parquet")
    assert "\n" not in str(caught.value)


def test_json_of_any_depth_is_no_manifest(tmp_path: Path) -> None:
    for text in (
        "[" * 10**5,
        '{"files":' * 10**5,
        '{"files": {}}',
        '{"files": {}, "info": [], "stage": "x", "key": "y"}',
    ):
        (tmp_path / artifacts.MANIFEST).write_text(text)
        assert artifacts.read_manifest(tmp_path) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_a_value_that_no_fisher_information_has_is_refused(tmp_path: Path, value: float) -> None:
    path = tmp_path / "fisher.parquet"
    artifacts.write_fisher(path, {Site(0, "head"): np.array([1.0, value])}, None, {"key": "k"})
    with pytest.raises(UserError, match="layer 0, head 1"):
        artifacts.read_fisher(path)


def test_what_an_output_took_stands_beside_it_and_goes_with_it(tmp_path: Path) -> None:
    out = tmp_path / "experts" / "sst2"
    out.mkdir(parents=True)
    artifacts.write_cost(out, "finetune", 12.3456)
    (tmp_path / "experts" / ".other.cost").write_text("not JSON")
    assert artifacts.read_costs(tmp_path) == {out: ("finetune", 12.346)}
    assert artifacts.digest_files(tmp_path) == {}
    out.rmdir()
    assert artifacts.read_costs(tmp_path) == {}


@pytest.mark.parametrize("stderr", [None, {Site(0, "head"): np.array([0.1, 0.2])}])
def test_no_bit_of_a_fisher_artifact_flips_unnoticed(
    tmp_path: Path, stderr: dict[Site, np.ndarray] | None
) -> None:
    path = tmp_path / "fisher.parquet"
    artifacts.write_fisher(path, {Site(0, "head"): np.array([1.0, 2.0])}, stderr, {"key": "k"})
    written = path.read_bytes()
    assert artifacts.fisher_is_current(path, "k")
    for place in range(0, len(written), 7):
        changed = bytearray(written)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        assert not artifacts.fisher_is_current(path, "k"), place


@pytest.mark.parametrize(
    "text", ['{"a": NaN, "fmn": {"key": "k"}}', '{"a": 1e999, "fmn": {"key": "k"}}', '{"fmn": []}']
)
def test_a_file_that_holds_no_number_or_no_mark_is_not_current(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(text)
    assert not artifacts.json_is_current(path, "k")
    with pytest.raises(UserError, match="not what was written"):
        artifacts.read_json(path)
