"""Statistics come back as they were written, or are refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file

from fmn.errors import UserError
from fmn.fisher.architectures import NodeValues, Site
from fmn.fisher.files import (
    CheckpointOrigin,
    FisherMetadata,
    GramMetadata,
    StatisticMetadata,
    digest_values,
    read_fisher,
    read_statistic,
    write_fisher,
    write_statistic,
)
from fmn.tasks.task import get_task

FISHER: NodeValues = {
    Site(layer, node): np.arange(count, dtype=np.float64) / 7 + layer
    for layer in (0, 1, 10)
    for node, count in (("head", 4), ("neuron", 6))
}
ORIGIN = CheckpointOrigin(source="hf://org/sst2", revision="abc", digest="d")
COMMON: dict[str, Any] = {"task": "sst2", "checkpoint": ORIGIN, "samples": 32}
METADATA = FisherMetadata(
    **COMMON, estimator="expected", definition=get_task("sst2"), relative_stderr=0.1
)
GRAM = GramMetadata(**COMMON, inputs={"key": "query"}, transposed=[])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A mask Fisher."""
    write_fisher(tmp_path / "fisher.parquet", FISHER, FISHER, METADATA)
    return tmp_path / "fisher.parquet"


@pytest.fixture
def matrices(tmp_path: Path) -> Path:
    """Gram matrices."""
    tensors = {"b": torch.eye(3), "a": torch.arange(6.0).reshape(2, 3)}
    write_statistic(tmp_path / "a.safetensors", tensors, GRAM)
    return tmp_path / "a.safetensors"


def test_the_fisher_artifact_is_plain_parquet_in_the_agreed_schema(path: Path) -> None:
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
    content = json.loads(table.schema.metadata[b"fmn"])
    assert (content["format"], content["task"]) == (1, "sst2")
    assert content["definition"]["labels"] == ["negative", "positive"]


def test_the_batch_estimator_has_no_standard_errors(path: Path) -> None:
    write_fisher(path, FISHER, None, METADATA)
    assert pq.read_table(path)["stderr"].null_count == 30
    assert read_fisher(path)[1] is None


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
    write_fisher(path, fisher, fisher, METADATA)
    values, errors, metadata = read_fisher(path)
    assert list(values) == sorted(fisher)
    assert metadata == METADATA
    assert errors is not None
    for site, nodes in fisher.items():
        np.testing.assert_array_equal(values[site], nodes)
        np.testing.assert_array_equal(errors[site], nodes)


def change_value(table: pa.Table, value: float) -> pa.Table:
    values = table["fisher"].to_numpy().copy()
    values[3] = value
    return table.set_column(3, "fisher", pa.array(values))


def change_metadata(table: pa.Table, **entries: Any) -> pa.Table:
    content = json.loads(table.schema.metadata[b"fmn"]) | entries
    return table.replace_schema_metadata({"fmn": json.dumps(content)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: change_value(t, -1), "layer 0, head 3: a Fisher information of -1.0"),
        (lambda t: change_value(t, np.nan), "layer 0, head 3: a Fisher information of nan"),
        (lambda t: change_value(t, np.inf), "layer 0, head 3: a Fisher information of inf"),
        (lambda t: t.take([1, 0, *range(2, 30)]), "layer 0, head: rows are not numbered"),
        (lambda t: t.drop_columns(["index"]), "not a Fisher artifact"),
        (lambda t: change_metadata(t, format=7), "format is 7"),
        (lambda t: change_metadata(t, samples="many"), "samples is 'many'"),
    ],
)
def test_wrong_content_is_refused_by_name(
    path: Path, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(UserError, match=rf"fisher\.parquet: {message}"):
        read_fisher(path)


def test_a_damaged_or_absent_fisher_artifact_is_refused_by_name(path: Path) -> None:
    for content in (path.read_bytes()[:-20], b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"fisher\.parquet: not a Fisher artifact"):
            read_fisher(path)
    path.unlink()
    with pytest.raises(UserError, match=r"fisher\.parquet: no such Fisher artifact"):
        read_fisher(path)


def test_a_flipped_bit_in_a_page_is_found_without_a_sidecar(path: Path) -> None:
    column = pq.ParquetFile(path).metadata.row_group(0).column(3)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"fisher\.parquet: not a Fisher artifact, or damaged"):
        read_fisher(path)


@pytest.mark.parametrize(
    "columns",
    [
        {"sentence": ["a"], "label": [1]},
        {"layer": ["x"], "node": ["head"], "index": [0], "fisher": [1.0], "stderr": [None]},
        {"layer": [2**40], "node": ["head"], "index": [0], "fisher": [1.0], "stderr": [None]},
        {"layer": [0], "node": [None], "index": [0], "fisher": [1.0], "stderr": [None]},
        {"layer": [0], "node": ["head"], "index": [0], "fisher": [[1.0]], "stderr": [None]},
        {"layer": [], "node": [], "index": [], "fisher": [], "stderr": []},
    ],
)
@pytest.mark.parametrize("content", [None, b"", b"[]", b"[" * 10**5, b"{}", b"\xff", "own"])
def test_parquet_of_another_schema_is_refused(
    tmp_path: Path, columns: Any, content: bytes | str | None
) -> None:
    own = METADATA.model_dump_json(by_alias=True).encode()
    metadata = None if content is None else {"fmn": own if content == "own" else content}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), tmp_path / "fisher.parquet")
    with pytest.raises(UserError, match=r"fisher\.parquet: ") as caught:
        read_fisher(tmp_path / "fisher.parquet")
    assert "\n" not in str(caught.value)


def test_matrices_are_plain_safetensors_and_come_back(matrices: Path) -> None:
    headers, metadata = read_statistic(matrices, GramMetadata)
    assert {name: header.shape for name, header in headers.items()} == {"a": (2, 3), "b": (3, 3)}
    assert metadata == GRAM
    assert torch.equal(load_file(matrices)["b"], torch.eye(3))


def test_matrices_that_are_damaged_or_something_else_are_refused(
    matrices: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"a\.safetensors: .*`fmn full-fisher`"):
        read_statistic(matrices, StatisticMetadata)
    matrices.write_bytes(matrices.read_bytes()[:-4])
    with pytest.raises(UserError, match="not a gram file, or damaged; make it with `fmn gram`"):
        read_statistic(matrices, GramMetadata)
    with pytest.raises(UserError, match="no such gram file; make it with `fmn gram`"):
        read_statistic(tmp_path / "b.safetensors", GramMetadata)
    for metadata in ({"format": "pt"}, {"fmn": '{"kind": "gram", "samples": NaN}'}, {"fmn": "[1]"}):
        save_file({"a": torch.ones(2)}, matrices, metadata)
        with pytest.raises(UserError, match=r"a\.safetensors: "):
            read_statistic(matrices, GramMetadata)


def test_the_digest_of_values_does_not_depend_on_metadata(path: Path, matrices: Path) -> None:
    before = digest_values(path), digest_values(matrices)
    write_fisher(path, FISHER, FISHER, METADATA.model_copy(update={"threads": 9}))
    write_statistic(matrices, load_file(matrices), GRAM.model_copy(update={"threads": 9}))
    assert (digest_values(path), digest_values(matrices)) == before
    write_fisher(path, FISHER, None, METADATA)
    write_statistic(matrices, {"a": torch.eye(3)}, GRAM)
    assert not {digest_values(path), digest_values(matrices)} & set(before)
