"""From two experts to a run: `fmn init` writes settings, `fmn check` lets them pass, they run."""

import json
from pathlib import Path

import pytest

from fmn.cli import main
from fmn.setup.stages import write_quickstart
from tests.conftest import ROOT
from tests.projects import FMN, MOODS, fine_tune_elsewhere, flow, run

QUICKSTART = ROOT / "params.yaml"
GLUE_NAMES = ("negative", "positive")


def make_experts(folder: Path, base: Path) -> None:
    """Two experts of plain Transformers, and rows where `fmn init` looks for them."""
    for name, labels in {"tone": GLUE_NAMES, "mood": MOODS}.items():
        rows = [(f"{labels[n % len(labels)]} is what {n} wrote", labels[n % len(labels)])
                for n in range(60)]  # fmt: skip
        fine_tune_elsewhere(base, folder / "models" / f"tiny-bert-{name}", labels, rows)
        (folder / "data").mkdir(exist_ok=True)
        lines = "".join(f"{text},{label}\n" for text, label in rows)
        (folder / "data" / f"{name}.csv").write_text(f"text,label\n{lines}")


@pytest.mark.slow
def test_two_experts_become_settings_that_pass_the_check_and_run(
    tiny_base: Path, tmp_path: Path
) -> None:
    make_experts(tmp_path, tiny_base)
    sources = ("models/tiny-bert-tone", "models/tiny-bert-mood")
    printed = run(tmp_path, *FMN, "init", *sources, "--base", str(tiny_base), PYTHONPATH=str(ROOT))
    assert "fill in" not in printed
    checked = json.loads(run(tmp_path, *FMN, "check", "--json", stdout=True, PYTHONPATH=str(ROOT)))
    assert (checked["ok"], [each for each in checked["findings"] if each["is_error"]]) == (True, [])
    assert list(checked["data"]) == ["tone", "mood"]
    results = json.loads(flow(tmp_path, "--json", stdout=True, PYTHONPATH=str(ROOT)))
    assert "tone" in json.dumps(results)
    merged = tmp_path / "data/fmn/models/realigned"
    assert run(
        tmp_path, *FMN, "predict", str(merged), "glad", "--task", "mood", PYTHONPATH=str(ROOT)
    )


def test_what_init_prints(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    make_experts(tmp_path, tiny_base)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    main(["init", "models/tiny-bert-mood"])
    printed = capsys.readouterr().out
    assert "mood" in printed
    assert "fill in base: the model that the experts were fine-tuned from" in printed
    assert "then: fmn check --params params.yaml" in printed
    with pytest.raises(SystemExit):
        main(["init", "models/tiny-bert-mood"])
    assert "replace it with --force" in capsys.readouterr().err
    main(["init", "models/tiny-bert-mood", "--force", "--base", str(tiny_base), "--json"])
    assert json.loads(capsys.readouterr().out)["unknown"] == {}
    main(["check"])
    assert "the run can start" in capsys.readouterr().out


def test_an_empty_folder_gets_the_quick_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    default = Path("params.yaml")
    assert write_quickstart(default) == [default, Path("data/miniature_glue")]
    assert default.read_bytes() == QUICKSTART.read_bytes()
    rows = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*") if path.is_file())
    assert Path("data/miniature_glue/topics/dev.csv") in rows
    assert all(path.read_bytes() == (ROOT / path).read_bytes() for path in rows)
    assert len(rows) == 1 + 6 * 2


def test_a_folder_with_settings_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert write_quickstart(Path("other.yaml")) == []
    Path("mine.yaml").write_text("work: data/mine")
    assert write_quickstart(Path("params.yaml")) == []
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
