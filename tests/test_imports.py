"""What is imported when: a run in which nothing changed must not wait for libraries that it does not use."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fmn

HEAVY = (
    "torch",
    "transformers",
    "mlflow",
    "optuna",
    "sklearn",
    "scipy",
    "matplotlib",
    "prefect",
    "datasets",
    "huggingface_hub",
)
MODULES = sorted(Path(fmn.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize(
    "modules",
    ["fmn.cli, fmn.params", "fmn.models.sources", "fmn.models.headers", "fmn.merge.recipe"],
)
def test_stages_are_imported_without_what_only_computing_needs(modules: str) -> None:
    code = f"import sys, {modules}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("\n", "")


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports anywhere in it, a line each, as the linter sees to."""
    return set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE))


def test_the_package_knows_neither_prefect_nor_dvc() -> None:
    assert MODULES
    assert not {path.name for path in MODULES if imported(path) & {"prefect", "dvc"}}


def test_only_the_registry_and_the_served_model_know_mlflow() -> None:
    assert {path.name for path in MODULES if "mlflow" in imported(path)} == {
        "tracking.py",
        "served.py",
    }
