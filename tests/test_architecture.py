"""Layers (docs/method/design.md): imports point down, and every helper has a name.

main, demo  >  training  >  callbacks  >  lightning_modules | datamodules  >  stair
"""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {
    "stair": set(),
    "datamodules": {"stair"},
    "lightning_modules": {"stair"},
    "callbacks": {"lightning_modules", "datamodules", "stair"},
    "training": {"callbacks", "lightning_modules", "datamodules", "stair"},
    "main": {"training", "callbacks", "lightning_modules", "datamodules", "stair"},
    "demo": {"callbacks", "lightning_modules", "datamodules", "stair"},
}
OURS = set(BELOW) | {"tests", "benchmarks"}
# the command `stair fit` imports the entry point, when it runs
CLI = ROOT / "stair" / "cli.py"
FILES = {
    family: sorted((ROOT / family).rglob("*.py")) if (ROOT / family).is_dir() else [ROOT / f"{family}.py"]
    for family in BELOW
}


def imports(nodes: Iterator[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written out from the top"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> set[str]:
    return set(imports(ast.walk(ast.parse(path.read_text(encoding="utf-8")))))


def families(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("family", BELOW)
def test_imports_point_down(family: str):
    for path in FILES[family]:
        reached = families(imports_of(path)) & OURS - {family}
        if path != CLI:
            assert reached <= BELOW[family], f"{path.relative_to(ROOT)} reaches {sorted(reached - BELOW[family])}"


def test_the_package_never_imports_the_trainer():
    for path in FILES["stair"]:
        if path != CLI:
            assert not families(imports_of(path)) & {"lightning", "pytorch_lightning"}, path


def test_the_command_imports_nothing_heavy_or_higher_until_it_runs():
    module = ast.parse(CLI.read_text(encoding="utf-8"))
    light = {"sys", "os", "signal", "importlib", "stair", "argparse", "collections", "typing", "warnings"}
    light |= {"ast", "contextlib", "functools", "io", "pathlib", "re"}
    assert families(set(imports(iter(module.body)))) <= light
    assert families(imports_of(CLI)) & OURS <= {"stair", "main"}


def test_the_package_has_no_circle_of_imports():
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES["stair"]
    }
    graph = {}
    for path in FILES["stair"]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = (imports_of(path) & names) - {name, "stair"}
    # a package imports its own modules, which may import one another: that is a circle only between modules
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", ["ranking", "batch", "images"])
def test_modules_that_everybody_needs_need_none_of_ours(name: str):
    assert "stair" not in families(imports_of(ROOT / "stair" / f"{name}.py"))


def test_every_python_file_lives_in_a_known_place():
    top = {path.name for path in ROOT.glob("*.py")}
    assert top <= {f"{family}.py" for family in BELOW}, "a new roof module: add it to BELOW and docs/method/design.md"


@pytest.mark.parametrize("family", BELOW)
def test_no_module_is_named_after_nothing(family: str):
    nameless = {"utils", "util", "common", "helpers", "helper", "misc", "components"}
    for path in FILES[family]:
        assert not nameless & set(path.relative_to(ROOT).with_suffix("").parts), f"{path}: what is it?"


def test_no_test_imports_another():
    """What several tests use is in tests/support."""
    for path in (ROOT / "tests").rglob("*.py"):
        shared = {name for name in imports_of(path) if name.startswith(("tests.test_", "tests.conftest"))}
        assert shared <= {f"tests.{path.stem}.{name}" for name in ("Numbers",)} | {f"tests.{path.stem}"}, path
