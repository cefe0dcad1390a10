"""The wheel, installed where no checkout is: `fmn run` in an empty folder does the quick start."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from fmn.store.yaml_file import read_yaml, to_yaml
from tests.conftest import ROOT
from tests.projects import environment
from tests.test_docs import read_blocks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that FMN_WHEEL names, or one that is built here."""
    if built := os.environ.get("FMN_WHEEL"):
        return Path(built)
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(ROOT)]
    subprocess.run(pip, check=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def fmn(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of a fresh environment, which shares the libraries of this one but not fmn."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = sysconfig.get_path("purelib", vars={"base": str(folder)})
    (Path(site) / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", str(wheel)]
    subprocess.run(pip, check=True)
    return folder / "bin" / "fmn"


def call(fmn: Path, folder: Path, *command: str) -> str:
    """What a command of the fresh environment prints in a folder that is no git repository."""
    variables = environment(folder)
    variables |= {"PATH": f"{fmn.parent}{os.pathsep}{variables['PATH']}"}
    del variables["PYTHONPATH"]
    process = subprocess.run(command, cwd=folder, env=variables, check=False, text=True,
                             capture_output=True)  # fmt: skip
    assert process.returncode == 0, process.stderr + process.stdout
    return process.stdout


def test_the_wheel_holds_the_licence_and_the_quick_start(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for name in ("params.yaml", "prefect.yaml", ".dvc/config", ".dvcignore"):
        assert f"fmn/quickstart/{name}" in names
    assert "fmn/quickstart/data/miniature_glue/topics/train.csv" in names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fmn", "flows"}


def test_the_version_is_that_of_the_wheel(fmn: Path, wheel: Path, tmp_path: Path) -> None:
    assert call(fmn, tmp_path, "fmn", "--version").strip() == wheel.name.split("-")[1]


@pytest.fixture(scope="module")
def quick(fmn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that was empty, with the quick start's settings cut to two experts of few rows."""
    folder = tmp_path_factory.mktemp("quick")
    code = "from fmn.setup.stages import *; write_quickstart(Path('params.yaml'))"
    call(fmn, folder, "python", "-c", code)
    params = folder / "params.yaml"
    content = read_yaml(params)
    for name in ("calibrate", "baselines", "merge"):
        del content[name]
    short = {"epochs": 1, "examples": 64, "learning_rate": 1.0e-4}
    content |= {
        "experts": {"tasks": ["sst2", "topics"]},
        "finetune": {"sst2": short, "topics": dict(short)},
        "fisher": {"samples": 32},
        "realign": {"realigned": {"texts": 32}},
    }
    params.write_text(to_yaml(content))
    return folder


def test_the_quick_start_runs_where_no_checkout_is(fmn: Path, quick: Path) -> None:
    checked = json.loads(call(fmn, quick, "fmn", "check", "--json"))
    assert checked["ok"], checked["findings"]
    results = json.loads(call(fmn, quick, "fmn", "run", "--json"))
    assert results["registered"]["version"] == "1"
    assert (quick / "data/quickstart/report/report.html").is_file()


def test_dvc_needs_no_checkout_and_repeats_nothing_of_a_run(fmn: Path, quick: Path) -> None:
    call(fmn, quick, "fmn", "dvc")

    def stages_run() -> list[str]:
        printed = call(fmn, quick, "python", "-m", "dvc", "repro")
        return re.findall(r"Running stage '(.*)'", printed)

    assert stages_run() == ["settings"]
    params = quick / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("samples: 32", "samples: 16"))
    assert {"fisher@sst2", "models", "register"} <= set(stages_run())
    params.write_text(before)
    assert "finetune@sst2" not in stages_run()


def test_the_notebook_goes_through(fmn: Path, quick: Path) -> None:
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = "import subprocess\n"
    for cell in cells:
        shell = cell.removeprefix("!")
        code += (
            f"subprocess.run({shell!r}, shell=True, check=True)\n" if shell != cell else f"{cell}\n"
        )
    printed = call(fmn, quick, "python", "-c", code)
    assert "% of the experts" in printed


def test_a_version_is_rebuilt_as_the_page_of_the_registry_says(fmn: Path, quick: Path) -> None:
    blocks = [block.text for block in read_blocks(ROOT / "docs" / "registry.md")]
    commands = next(text for text in blocks if "fmn reproduce" in text)
    assert "all digests are the same" in call(fmn, quick, "bash", "-euc", commands)


def test_the_tutorial_goes_through(fmn: Path, quick: Path) -> None:
    for block in read_blocks(ROOT / "docs" / "tutorial.md"):
        if block.language == "python":
            assert call(fmn, quick, "python", "-c", block.text)
        elif "pip install" not in block.text:
            assert call(fmn, quick, "bash", "-euc", block.text)
