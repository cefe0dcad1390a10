"""The tables of the documentation are those of the stored results."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu, quickstart, results, scale


@pytest.mark.parametrize("page", results.PAGES, ids=lambda page: page.name)
def test_no_table_was_typed_by_hand(page: Path) -> None:
    text = page.read_text()
    assert results.with_tables(text) == text, "run `make results`"


def test_the_page_of_scale_is_as_its_benchmark_writes_it() -> None:
    text = scale.PAGE.read_text()
    assert results.with_tables(text, scale.tables().__getitem__) == text, "run `make results`"


def test_the_readme_shows_the_stored_run() -> None:
    text = quickstart.README.read_text()
    assert results.with_tables(text, quickstart.table) == text, "run `make results`"
    numbers = json.loads((results.STORE / "quickstart.json").read_text())["results"]
    for name, theme in quickstart.THEMES.items():
        picture = (quickstart.PICTURES / f"quickstart-{name}.svg").read_text()
        assert picture == quickstart.picture(numbers, theme), "run `make results`"
    assert f">{100 * numbers['mean'][quickstart.HEADLINE]['relative']:.1f}</text>" in picture


def test_what_a_benchmark_leaves_is_stored_with_its_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "STORE", tmp_path / "stored")
    results.keep(tmp_path / "measured", {"seconds": 2.5}, "| seconds |\n| --- |\n| 2.5 |\n")
    results.add("speed", tmp_path / "measured", "python -m benchmarks.speed")
    stored = json.loads((tmp_path / "stored" / "speed.json").read_text())
    assert stored["results"]["seconds"] == 2.5
    assert stored["commit"]
    page = "Before.\n<!-- speed -->\nan old table\n<!-- end -->\nAfter.\n"
    written = results.with_tables(page)
    assert "an old table" not in written
    assert written.startswith("Before.\n<!-- speed -->\n`python -m benchmarks.speed`, commit ")
    assert written.endswith("| 2.5 |\n<!-- end -->\nAfter.\n")
    assert results.with_tables(written) == written
    assert results.spread(results.summary([3.0, 1.0, 2.0])) == "2.00 (1.00 to 3.00)"


@pytest.mark.slow
def test_the_benchmark_of_gpus_runs_whole_with_tiny_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["gpu", "--small", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", options)
    gpu.main()
    figures = json.loads((tmp_path / "results.json").read_text())["figures"]
    assert figures.keys() == gpu.GOALS.keys() - {"llama GiB"} | {
        f"minilm {dtype} {other}" for dtype in gpu.DTYPES for other in ("full", "floor", "forward")
    }
    assert min(figures.values()) > 0
    assert (tmp_path / "table.md").read_text().count("not measured") == 1  # a CPU's peak memory
    rows = gpu.table("", {"llama GiB": 81, "bert-base float32 full": 322}, []).splitlines()
    verdicts = {row.split(" | ")[0].strip("| "): row.split(" | ")[-1].strip("| ") for row in rows}
    assert verdicts["the same: peak memory, GiB"] == "no"
    assert verdicts["bert-base, float32: mask Fisher / full Fisher"] == "yes"
