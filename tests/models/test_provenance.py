"""Where a checkpoint comes from, and how it was fine-tuned, as its sidecar says."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fmn.errors import UserError
from fmn.models.provenance import Lineage, lineage, rows_tuned_on, training_metadata, tuning
from fmn.store.artifacts import digest_folder
from fmn.store.stage import read_sidecar
from tests.conftest import TUNING


def test_provenance_says_where_an_expert_comes_from(
    tiny_base: Path, tiny_work: Path, tmp_path: Path
) -> None:
    expert, base = tiny_work / "experts" / "sst2", tiny_work / "base"
    training = training_metadata(expert)
    assert training is not None
    assert training.base == lineage(base)
    assert lineage(base).source == lineage(base).revision == str(tiny_base)
    assert (training.task, training.steps, training.threads) == ("sst2", 4, torch.get_num_threads())
    sidecar = read_sidecar(expert)
    assert sidecar is not None
    assert training.data_digest == sidecar.inputs["train"]
    output = f"finetune:{sidecar.key[:16]}"
    assert lineage(expert) == Lineage(source=output, revision=output)
    assert tuning(expert) == TUNING.model_dump(exclude={"device"})
    assert rows_tuned_on(expert) == (128, 0)

    foreign = Path(shutil.copytree(expert, tmp_path / "foreign"))
    (foreign / "fmn.json").unlink()
    digest = f"sha256:{digest_folder(foreign)}"
    assert lineage(foreign) == Lineage(source="folder", revision=digest)
    for folder in (foreign, base):
        assert training_metadata(folder) is None
        assert tuning(folder) == {}
        assert rows_tuned_on(folder) == (None, 0)
    content = json.loads((expert / "fmn.json").read_text())
    content["info"]["examples"] = "many"
    (foreign / "fmn.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"fmn\.json: examples is 'many'"):
        rows_tuned_on(foreign)
