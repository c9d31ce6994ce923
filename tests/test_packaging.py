"""Every distribution of the repository declares what it is and exactly what it imports.

That each wheel works with only those declarations installed is shown by `nox -s package`; this says at once which
declaration is missing, and which one is not needed.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(
    folder
    for pattern in ("miles-core", "miles-plugins/*", "miles-models/*")
    for folder in ROOT.glob(pattern)
    if folder.is_dir()
)


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest) -> Path:
    found = request.param
    assert isinstance(found, Path)
    return found


@pytest.fixture
def project(folder: Path) -> dict[str, Any]:
    tables = tomllib.loads((folder / "pyproject.toml").read_text())
    assert set(tables) == {"build-system", "project"}, "tools are set up once, in the root's pyproject.toml"
    table = tables["project"]
    assert isinstance(table, dict)
    return table


def _package(folder: Path) -> Path:
    return folder / "src" / folder.name.replace("-", "_")


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _runtime_imports(node: ast.AST) -> Iterator[str]:
    """The modules that running `node` may import, relative imports and `if TYPE_CHECKING:` left out."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        yield node.module
    inner = node.orelse if isinstance(node, ast.If) and _is_type_checking(node.test) else ast.iter_child_nodes(node)
    for child in inner:
        yield from _runtime_imports(child)


def _imported_distributions(folder: Path) -> set[str]:
    modules = {
        name.split(".")[0]
        for path in _package(folder).rglob("*.py")
        for name in _runtime_imports(ast.parse(path.read_text()))
    }
    installed = packages_distributions()
    foreign = modules - set(sys.stdlib_module_names) - {_package(folder).name}
    return {canonicalize_name(installed.get(module, [module])[0]) for module in foreign}


def _requirements(project: dict[str, Any], *, extras: bool) -> list[Requirement]:
    optional = project.get("optional-dependencies", {}).values() if extras else ()
    return [Requirement(text) for group in (project["dependencies"], *optional) for text in group]


def _names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def test_type_checking_imports_are_not_counted_and_nested_ones_are() -> None:
    tree = ast.parse(
        "import os.path\nfrom . import x\nif TYPE_CHECKING:\n import a\nelse:\n import b\ndef f():\n from c.d import e"
    )
    assert list(_runtime_imports(tree)) == ["os.path", "b", "c.d"]


def test_imports_are_declared(folder: Path, project: dict[str, Any]) -> None:
    assert _imported_distributions(folder) <= _names(_requirements(project, extras=True))


def test_declarations_are_imported(folder: Path, project: dict[str, Any]) -> None:
    assert _names(_requirements(project, extras=False)) <= _imported_distributions(folder)


def test_requirements_have_floors_and_miles_ones_a_ceiling(project: dict[str, Any]) -> None:
    for requirement in _requirements(project, extras=True):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators & {">=", "==", "~="}, f"{requirement} has no lowest version"
        if requirement.name.startswith("miles-"):
            assert "<" in operators, f"{requirement} has no version above which it is not tested"


def test_constraints_pin_every_dependency_within_its_range(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    for requirement in _requirements(project, extras=False):
        if not requirement.name.startswith("miles-"):
            version = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"constraints.txt has {requirement.name} {version}"


def test_metadata_is_complete(folder: Path, project: dict[str, Any]) -> None:
    assert project["name"] == folder.name
    assert project["license"] == "Apache-2.0"
    assert project["requires-python"] == ">=3.11"
    assert "miles-plugin" in project["keywords"]
    assert project["description"].startswith("Miles: ")


def test_readme_begins_with_the_name_and_says_more(folder: Path, project: dict[str, Any]) -> None:
    title, *rest = (folder / project["readme"]).read_text().splitlines()
    assert title == f"# {folder.name}"
    assert any(line.strip() for line in rest)


def test_package_is_typed(folder: Path) -> None:
    assert (_package(folder) / "py.typed").is_file()


def test_one_entry_point_names_a_module_of_the_package(folder: Path, project: dict[str, Any]) -> None:
    (module,) = project["entry-points"]["miles.plugins"].values()
    path = folder / "src" / module.replace(".", "/")
    assert path.is_relative_to(_package(folder))
    assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
