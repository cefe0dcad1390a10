"""The stages that compute statistics: what they write, and what a killed run leaves."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from fmn.errors import UserError
from fmn.fisher import read_fisher, stages
from fmn.fisher.files import GramMetadata, StatisticMetadata, read_statistic
from fmn.fisher.stages import Estimator, FisherSettings, FullFisherSettings, GramSettings
from fmn.models import devices
from fmn.store import artifacts
from fmn.store.stage import Outcome, read_sidecar
from tests.conftest import FISHER
from tests.pipeline import CPU

RUN = """
import sys
from pathlib import Path
from fmn.fisher import stages
stages.SAVE_SECONDS = 0.0
work, out = map(Path, sys.argv[1:])
stages.fisher(
    work / "experts" / "sst2", task="sst2", data=work / "data", out=out,
    settings=stages.FisherSettings(samples="all", device="cpu", dtype="float32"),
    progress=lambda done, total: print(done, flush=True),
)
"""


def run(stage: Callable[..., Outcome], work: Path, out: Path, **options: Any) -> Outcome:
    """A stage on the expert of sst2."""
    return stage(work / "experts" / "sst2", task="sst2", data=work / "data", out=out, **options)


@pytest.mark.parametrize("estimator", ["empirical", "expected", "sampled", "batch"])
def test_the_fisher_artifact_says_what_it_was_computed_from(
    tiny_work: Path, tmp_path: Path, estimator: Estimator
) -> None:
    out = tmp_path / "f.parquet"
    settings = FisherSettings(estimator=estimator, samples=32, **CPU)
    outcome = run(stages.fisher, tiny_work, out, settings=settings)
    fisher, stderr, metadata = read_fisher(out)
    assert outcome.computed
    assert outcome.summary == metadata
    assert (metadata.task, metadata.estimator, metadata.samples) == ("sst2", estimator, 32)
    assert (metadata.layers, metadata.heads, metadata.neurons) == (2, 4, 24)
    assert (metadata.device, metadata.dtype) == ("cpu", "float32")
    expert = artifacts.digest_folder(tiny_work / "experts" / "sst2")
    assert metadata.checkpoint.digest == expert
    assert metadata.checkpoint.revision.startswith("finetune:")
    sidecar = read_sidecar(out)
    assert sidecar is not None
    assert (sidecar.stage, sidecar.key) == ("fisher", metadata.key)
    assert sidecar.inputs == {"checkpoint": expert, "train": metadata.data_digest}
    if estimator == "batch":
        assert stderr is None
        assert metadata.relative_stderr is None
    else:
        assert stderr is not None
        assert {site: len(nodes) for site, nodes in fisher.items()} == {
            site: len(nodes) for site, nodes in stderr.items()
        }
    assert not run(stages.fisher, tiny_work, out, settings=settings).computed


def test_a_fisher_in_parts_is_that_of_one_stage(tiny_work: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    parts = {f"{number}": tmp_path / f"{number}.parquet" for number in (1, 2, 3)}

    def compute(number: int) -> Outcome:
        option = {"part": (number, 3), "whole": out, "settings": FISHER}
        return run(stages.fisher_part, tiny_work, parts[f"{number}"], **option)

    assert [compute(number).summary.samples for number in (1, 2, 3)] == [10, 11, 11]
    parts["2"].unlink()
    assert [compute(number).computed for number in (1, 2, 3)] == [False, True, False]
    parts["3"].unlink()
    before = parts["1"].stat()
    assert run(stages.fisher_of_parts, tiny_work, out, parts=parts, settings=FISHER).computed
    assert parts["1"].stat() == before
    assert parts["3"].is_file(), "what is missing is computed"

    run(stages.fisher, tiny_work, whole, settings=FISHER)
    (values, errors, metadata), (others, other_errors, other) = map(read_fisher, (whole, out))
    assert metadata.model_copy(update={"relative_stderr": other.relative_stderr}) == other
    assert errors is not None
    assert other_errors is not None
    for site, nodes in values.items():
        np.testing.assert_allclose(others[site], nodes, rtol=1e-5)
        np.testing.assert_allclose(other_errors[site], errors[site], rtol=1e-5)
    assert pq.read_schema(whole).remove_metadata() == pq.read_schema(out).remove_metadata()
    for path in parts.values():
        path.unlink()
    assert not run(stages.fisher, tiny_work, out, settings=FISHER).computed, "of the same key"
    assert not compute(1).computed, "the whole is there"
    assert not parts["1"].exists()


def test_a_fisher_of_which_a_part_is_in_bfloat16_says_so(
    tiny_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {"settings": FisherSettings(samples=40, device="cpu", dtype="auto")}
    parts, out = {f"{n}": tmp_path / f"{n}.parquet" for n in (1, 2)}, tmp_path / "f.parquet"
    for number in (1, 2):
        monkeypatch.setattr(devices, "_has_native_bfloat16", lambda device, n=number: n == 2)
        monkeypatch.setattr(stages, "MAX_ROUNDING", 1e9)
        own = {"part": (number, 2), "whole": out, **options}
        run(stages.fisher_part, tiny_work, parts[f"{number}"], **own)
    metadata = run(stages.fisher_of_parts, tiny_work, out, parts=parts, **options).summary
    assert (metadata.dtype, metadata.samples) == ("bfloat16", 40)
    assert metadata.precision.startswith("bfloat16, and float32 for the 20 heaviest examples; ")


@pytest.mark.parametrize(
    ("limit", "estimator", "dtype", "precision"),
    [
        (1e9, "empirical", "bfloat16", "bfloat16, and float32 for the 32 heaviest examples; rou"),
        (0.0, "empirical", "float32", "float32, as bfloat16 was too far off; rounding of the o"),
        (0.0, "sampled", "bfloat16", "bfloat16, and float32 for the 32 heaviest examples"),
        (1e9, "batch", "float32", "float32, as always for batch"),
    ],
)
def test_a_dtype_that_is_chosen_is_checked_and_the_artifact_says_so(
    tiny_work: Path, tmp_path: Path, limit: float, estimator: Estimator, dtype: str,
    precision: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(devices, "_has_native_bfloat16", lambda device: True)
    monkeypatch.setattr(stages, "MAX_ROUNDING", limit)
    settings = FisherSettings(samples=40, device="cpu", dtype="auto", estimator=estimator)
    metadata = run(stages.fisher, tiny_work, tmp_path / "f.parquet", settings=settings).summary
    assert (metadata.dtype, metadata.precision[:55]) == (dtype, precision)
    settings = settings.model_copy(update={"dtype": "bfloat16"})  # as it is asked for
    metadata = run(stages.fisher, tiny_work, tmp_path / "g.parquet", settings=settings).summary
    assert (metadata.dtype, metadata.precision) == ("bfloat16", None)


def test_full_fisher_and_gram_matrices_say_what_they_were_computed_from(
    tiny_work: Path, tmp_path: Path
) -> None:
    full, gram = tmp_path / "full.safetensors", tmp_path / "gram.safetensors"
    run(stages.full_fisher, tiny_work, full, settings=FullFisherSettings(samples=8, **CPU))
    run(stages.gram, tiny_work, gram, settings=GramSettings(samples=8, **CPU))
    headers, of_full = read_statistic(full, StatisticMetadata)
    assert headers["encoder.layer.0.output.dense.weight"].shape == (16, 24)
    assert (of_full.task, of_full.samples, of_full.estimator) == ("sst2", 8, "empirical")
    headers, of_gram = read_statistic(gram, GramMetadata)
    assert set(headers) == set(of_gram.inputs.values())
    assert (of_gram.samples, of_gram.transposed) == (8, [])
    assert of_gram.checkpoint == of_full.checkpoint
    assert not run(stages.gram, tiny_work, gram, settings=GramSettings(samples=8, **CPU)).computed


def test_a_damaged_statistic_is_refused_and_computed_again(tiny_work: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.parquet"
    run(stages.fisher, tiny_work, out, settings=FISHER)
    before = out.read_bytes()
    for place in range(0, len(before), len(before) // 20):
        changed = bytearray(before)
        changed[place] ^= 1
        out.write_bytes(changed)
        with pytest.raises(UserError, match=r"f\.parquet: not what was written"):
            read_fisher(out)
    assert run(stages.fisher, tiny_work, out, settings=FISHER).computed
    assert out.read_bytes() == before


def test_a_killed_fisher_run_goes_on_and_gives_the_same_bytes(
    tiny_work: Path, tmp_path: Path
) -> None:
    settings = FisherSettings(samples="all", **CPU)
    run(stages.fisher, tiny_work, tmp_path / "whole.parquet", settings=settings)
    killed = tmp_path / "killed.parquet"
    command = [sys.executable, "-c", RUN, str(tiny_work), str(killed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = [int(next(process.stdout)) for _ in range(4)][-1]
        process.kill()
    assert not killed.exists()
    reported: list[int] = []

    def progress(done: int, _total: int) -> None:
        reported.append(done)

    run(stages.fisher, tiny_work, killed, settings=settings, progress=progress)
    assert reported[0] >= seen  # the last batch that was reported may not have been saved
    assert killed.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_damaged_partial_sums_are_ignored(tiny_work: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.parquet"
    (tmp_path / ".f.parquet.partial-sums").write_bytes(b"not sums")
    run(stages.fisher, tiny_work, out, settings=FISHER)
    assert out.read_bytes() == (tiny_work / "fisher" / "sst2.parquet").read_bytes()
