"""The Python files of the project, and the imports of each."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


def sources(*folders: str) -> list[str]:
    """Python files below the folders, as paths from the root."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


@cache
def imports(file: str, *, top_only: bool = False) -> tuple[str, ...]:
    """Full names of the modules that a file imports, and of the names that it takes from them.

    Imports for the type checker count, since a reader follows them. ``top_only`` leaves out imports
    that do not run when the file is loaded.
    """
    return tuple(_imports(ast.parse((ROOT / file).read_text(encoding="utf-8")), top_only))


def _imports(node: ast.AST, top_only: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "a relative import hides its package"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif not (top_only and _waits(child)):
            yield from _imports(child, top_only)


def _waits(node: ast.AST) -> bool:
    """Whether the code inside a node does not run when the file is loaded."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def takes(name: str, *packages: str) -> bool:
    """Whether an imported name lies in one of the packages."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)
