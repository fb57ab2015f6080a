"""What lies at the top, and which package may import which."""

import ast
import graphlib
from pathlib import Path

import pytest
from conftest import ROOT

from pic import draw

# a package may import those before it, never those after
ORDER = (
    "runtime", "patches", "storage", "template", "data", "model", "config", "train", "infer", "memory", "tasks", "run",
    "evaluate", "export", "args", "doctor", "explain", "prove", "script",
)  # fmt: skip
SOURCES = sorted((ROOT / "utils").rglob("*.py"))
PACKAGES = {f"utils.{package}" for package in ORDER}  # an __init__ re-exports what its modules have


def place(module: str) -> int:
    """Where a module's package stands in the order."""
    package = module.split(".")[1]
    assert package in ORDER, f"{module} is in no package of {ORDER}"
    return ORDER.index(package)


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports_of(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module != "utils":
                yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)  # an alias may be a module, too
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", [p for p in SOURCES if module_of(p) != "utils"], ids=module_of)
def test_a_package_imports_only_from_those_before_it(path):
    here = place(module_of(path))
    for name in imports_of(path):
        assert name != "main_train", f"{path} imports main_train"
        if name.startswith("utils."):
            assert place(name) <= here, f"{path} imports {name}, whose package comes after its own"


def test_no_modules_import_each_other_in_a_circle():
    """Imports within functions count as well: they only hide a circle."""
    names = {module_of(path) for path in SOURCES}
    imported = {module_of(path): set(imports_of(path)) & names - {module_of(path)} for path in SOURCES}
    graph = graphlib.TopologicalSorter({name: found for name, found in imported.items() if name not in PACKAGES})
    graph.prepare()  # raises CycleError, which names the circle


def test_top_level_names():
    wanted = {
        "main_train.py",
        "utils",
        "train_args",
        "data",
        "pic",
        "README.md",
        "README_zh.md",
        "CONTRIBUTING.md",
        "docs",
        ".pre-commit-config.yaml",
        "requirements.txt",
        "requirements-dev.txt",
        "LICENSE",
        "pyproject.toml",
        "tests",
        ".ci",
    }
    assert wanted <= {path.name for path in ROOT.iterdir()}


def test_the_picture_shows_the_packages_there_are(tmp_path):
    assert draw.drawn_in(draw.PICTURE) == draw.layers(), "pic/architecture.png is stale: run python -m pic.draw"
    draw.draw_architecture(tmp_path / "again.png")
    assert draw.drawn_in(tmp_path / "again.png") == draw.layers()


def test_the_picture_has_the_order_of_the_imports():
    assert [package.name.removesuffix(".py") for layer in draw.layers() for package in layer] == list(ORDER)
    assert all(package.does for layer in draw.layers() for package in layer)
