"""The tables of the documentation are those of the stored results."""

import json
from pathlib import Path

import pytest

from benchmarks import quickstart, results, scale


@pytest.mark.parametrize("page", results.PAGES, ids=lambda page: page.name)
def test_no_table_was_typed_by_hand(page: Path) -> None:
    text = page.read_text()
    assert results.with_tables(text) == text, "run `make results`"


def test_the_page_of_scale_is_as_its_benchmark_writes_it() -> None:
    stored = json.loads(scale.KEPT.read_text())
    tables = {"measured": scale.measured(stored), "computed": scale.computed(stored)}
    text = scale.PAGE.read_text()
    assert results.with_tables(text, lambda name: tables[name] + "\n") == text, "run `make results`"


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
