"""Who may import whom: rooms in the order of the pipeline, no circle, nothing heavy too early."""

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

HEAVY = {
    *("torch", "transformers", "datasets", "huggingface_hub", "sklearn", "scipy", "pandas"),
    *("mlflow", "optuna", "prefect", "matplotlib"),
}
# From the bottom to the top: a module imports its own layer and those before it.
LAYERS = (
    ("fmn.__init__", "fmn.environment", "fmn.errors", "fmn.lazy", "fmn.terminal"),
    *(("fmn.store",), ("fmn.tasks",), ("fmn.rows",), ("fmn.models",), ("fmn.sources",)),
    *(("fmn.fisher",), ("fmn.merge",)),
    *(("fmn.evaluate",), ("fmn.experiments",), ("fmn.report",), ("fmn.registry",)),
    *(
        ("fmn.params",),
        ("fmn.setup",),
        ("flows",),
        ("fmn.commands",),
        ("fmn.cli",),
        ("fmn.__main__",),
    ),
)
PURE = ("fisher/mask_nodes", "fisher/architectures", "merge/rules")
ROOMS = sorted(path for path in (ROOT / "fmn").iterdir() if (path / "__init__.py").is_file())


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {
    module_name(path): path
    for package in ("fmn", "flows")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(path: Path) -> set[str]:
    """The modules that a file imports anywhere in it, with the names that it takes of them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def own_imports(path: Path) -> set[str]:
    """The modules of this project among what a file imports."""
    return {name for name in imports(path) if name in MODULES}


def layer(module: str) -> int:
    for number, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return number
    raise AssertionError(f"{module} is in no layer")


def test_imports_run_one_way_and_in_no_circle() -> None:
    graph = {module: own_imports(path) - {module} for module, path in MODULES.items()}
    assert list(TopologicalSorter(graph).static_order())
    for module, names in graph.items():
        assert not {name for name in names if layer(name) > layer(module)}, module


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.name)
def test_a_room_has_a_public_face_and_at_most_ten_files(room: Path) -> None:
    assert len(list(room.glob("*.py"))) - 1 <= 10
    assert (room / "stages.py").is_file() or room.name in ("store", "tasks")
    package = importlib.import_module(f"fmn.{room.name}")
    assert all(hasattr(package, name) for name in package.__all__)


def packages(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(MODULES[module])}


def test_libraries_stay_where_they_belong() -> None:
    ours = [module for module in MODULES if module.startswith("fmn")]
    assert not {module for module in ours if packages(module) & {"prefect", "dvc", "distributed"}}
    with_mlflow = {module for module in MODULES if "mlflow" in packages(module)}
    assert all(module.startswith("fmn.registry.") for module in with_mlflow)


@pytest.mark.parametrize("name", PURE)
def test_numbers_know_nothing_of_files(name: str) -> None:
    module = "fmn." + name.replace("/", ".")
    assert not packages(module) & {"pathlib", "json", "os", "pyarrow", "safetensors", "shutil"}
    assert not {other for other in own_imports(MODULES[module]) if other.startswith("fmn.store")}


def test_help_and_stages_load_nothing_heavy() -> None:
    modules = "fmn.cli, fmn.sources.origin, fmn.merge.recipe"
    code = f"import sys, {modules}; fmn.cli.main(['--help']); assert not {HEAVY} & {{*sys.modules}}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Merge Transformers" in done.stdout
