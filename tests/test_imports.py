"""What is imported when: a run in which nothing changed must not wait for libraries that it does not use."""

import ast
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
MODULES = sorted(Path(fmn.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("modules", ["fmn.cli, fmn.stages", "fmn.sources", "fmn.headers", "fmn.recipe"])
def test_stages_are_imported_without_what_only_computing_needs(modules: str) -> None:
    code = f"import sys, {modules}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("\n", "")


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names}


def test_the_package_knows_neither_prefect_nor_dvc() -> None:
    assert MODULES
    assert not {path.name for path in MODULES if imported(path) & {"prefect", "dvc"}}


def test_only_the_registry_and_the_served_model_know_mlflow() -> None:
    assert {path.name for path in MODULES if "mlflow" in imported(path)} == {"registry.py", "served.py"}
