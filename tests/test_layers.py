"""Imports go downward only: a module uses the layers above it, and neighbours leave each other alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "triptych"

# One line is one layer; a module may import from lines above its own and from its own folder.
LAYERS = (
    ("errors", "models", "diffusion"),
    ("sizes", "images", "checkpoints"),
    ("conditioning", "data"),
    ("pipelines",),
    ("training",),
    ("evaluation",),
    ("apps",),
    ("__main__",),
)
# Neighbours on a line that may meet.
FRIENDS = {("models", "errors"), ("diffusion", "errors")}
HEAVY = {"torch", "numpy", "PIL", "transformers", "safetensors", "rich", "pydantic", "triptych.pipelines"}

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def part_of(path: Path) -> str:
    """The first name below the package: a folder, or a module at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Full names of the modules that a file imports anywhere, type checking included."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.append(str(node.module))
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def layer(part: str) -> int:
    return next(index for index, parts in enumerate(LAYERS) if part in parts)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_downward(path: Path) -> None:
    own = part_of(path)
    for name in imports(path):
        if not name.startswith("triptych."):
            continue
        other = name.split(".")[1]
        if other.startswith("__"):
            continue
        allowed = other == own or layer(other) < layer(own) or (own, other) in FRIENDS
        assert allowed, f"{own} must not import {name}"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.parent.name == "cli"], ids=lambda path: path.name
)
def test_commands_import_heavy_things_only_inside(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            )
            assert not any(name.split(".")[0] in HEAVY or name.startswith(tuple(HEAVY)) for name in names)


def test_every_part_has_a_layer() -> None:
    known = {part for parts in LAYERS for part in parts}
    assert {part_of(path) for path in MODULES} <= known


def test_no_module_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "common", "core", "misc", "helpers", "manager", "base"}
    assert not {path.stem for path in MODULES} & empty
