"""Each direct dependency is used by the code, and each upper bound has something that breaks."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = [
    Requirement(each)
    for name in ("dask", "lora")
    for each in PROJECT["optional-dependencies"][name]
]
CALLED = {"PIL": "pillow", "ruamel": "ruamel-yaml"}  # packages that have another name in code
BOUNDS_ALONE = {"fastapi"}  # not used itself
COMMANDS = {"dvc"}  # run as a command


def imports() -> Iterator[tuple[str, Path]]:
    """The packages of others that the code imports."""
    for path in [*(ROOT / "fmn").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            for module in modules:
                top = module.partition(".")[0]
                if top not in {*sys.stdlib_module_names, "fmn", "flows"}:
                    yield canonicalize_name(CALLED.get(top, top)), path


def test_every_direct_dependency_is_used_and_every_import_is_one() -> None:
    used = {name for name, _ in imports()}
    declared = {canonicalize_name(each.name) for each in [*DIRECT, *EXTRAS]}
    assert declared - BOUNDS_ALONE - COMMANDS == used - BOUNDS_ALONE - COMMANDS


def test_an_extra_is_imported_where_it_is_needed_alone() -> None:
    extras = {canonicalize_name(each.name) for each in EXTRAS}
    places = {path.relative_to(ROOT).as_posix() for name, path in imports() if name in extras}
    assert places == {"flows/cluster.py", "fmn/sources/adapters.py"}


def bounds() -> dict[str, str]:
    """The upper bounds of the project, by package."""
    groups = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for name in groups for line in groups[name])]
    listed = {}
    for each in map(Requirement, lines):
        for bound in each.specifier:
            if bound.operator in ("<", "<=", "~="):
                listed[each.name] = bound.version
    return listed


def excluded_by(package: str, name: str, number: str) -> bool:
    """Whether a package itself asks for an older version than `number` of another."""
    own = [Requirement(line) for line in requires(package) or []]
    return any(each.name.lower() == name and number not in each.specifier for each in own)


def test_every_upper_bound_has_a_test() -> None:
    assert bounds() == {"fastapi": "0.151", "sqlalchemy": "2.1"}


def test_fastapi_is_held_back_while_prefect_says_min_items() -> None:
    """`Body(min_items=1)` is refused by FastAPI 0.151 and later; Prefect says it in its server."""
    files = distribution("prefect").files or []
    server = [path for path in files if path.as_posix().startswith("prefect/server/api/")]
    sources = [Path(str(path.locate())).read_text() for path in server if path.suffix == ".py"]
    assert sources
    assert any(re.search(r"\bBody\([^()]*min_items=", text) for text in sources), (
        "Prefect may work with newer versions now; try one, and remove fastapi<0.151"
    )
    assert not excluded_by("prefect", "fastapi", "0.151"), "remove fastapi<0.151, Prefect has it"


@pytest.mark.parametrize("package", ["prefect", "mlflow"])
def test_sqlalchemy_is_held_back_until_a_newer_prefect_was_tried(package: str) -> None:
    """With SQLAlchemy 2.1, schedules of Prefect 3.8 do not fire, and only its log says so."""
    assert not excluded_by(package, "sqlalchemy", "2.1.0"), (
        f"remove sqlalchemy<2.1, {package} has it"
    )
    assert version("prefect").startswith("3.8."), (
        "install sqlalchemy 2.1 and run tests/flows/test_schedule.py (slow): remove the bound, or"
        " name this version of Prefect here"
    )
