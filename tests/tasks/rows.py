"""Small tables of rows for tests."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def mrpc_columns(**changed: Any) -> dict[str, Any]:
    """Two good rows of mrpc, with some columns changed; None removes a column."""
    columns = {
        "sentence1": ["a", "b"],
        "sentence2": ["c", "d"],
        "label": [0, 1],
        "idx": [7, 9],
        **changed,
    }
    return {name: values for name, values in columns.items() if values is not None}


def write_split(folder: Path, columns: dict[str, Any], split: str = "train") -> Path:
    """Write a split's Parquet file; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    return folder
