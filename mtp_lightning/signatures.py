"""The arguments of this project's classes, read from their source: importing them takes seconds."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from mtp_lightning.parts import homes
from mtp_lightning.paths import ROOT

_PACKAGES = ("mtp_lightning", "data_modules")
# Bases from elsewhere that take no argument.
_BARE = {"ABC", "Generic", "NamedTuple", "Protocol", "object"}


@dataclass(frozen=True)
class Signature:
    """What a class or a class method takes.

    Attributes:
        names: of its arguments.
        open: whether it takes others as well, which somebody else's code knows.
    """

    names: frozenset[str] = frozenset()
    open: bool = False

    def __or__(self, other: Signature) -> Signature:
        return Signature(self.names | other.names, self.open or other.open)


_ANYTHING = Signature(open=True)


@cache
def signature(target: str) -> Signature:
    """What a ``_target_`` takes; anything, if it is not this project's.

    Args:
        target: as in a config: ``mtp_lightning.mtp.none.NoMTPConfig``.
    """
    parts = target.split(".")
    for end in range(len(parts) - 1, 0, -1):
        file = _file(parts[:end])
        if file is not None:
            return _of(file, parts[end:])
    return _ANYTHING


@cache
def trainer_arguments() -> Signature:
    """What ``lightning.pytorch.Trainer`` takes."""
    found = importlib.util.find_spec("lightning")
    for folder in (found and found.submodule_search_locations) or ():
        file = Path(folder, "pytorch", "trainer", "trainer.py")
        if file.is_file():
            return replace(_of(file, ["Trainer"]), open=False)
    return _ANYTHING


def _file(module: list[str]) -> Path | None:
    if module[0] not in _PACKAGES:
        return None
    path = ROOT.joinpath(*module)
    found = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in found if file.is_file()), None)


@cache
def _names(file: Path) -> dict[str, ast.ClassDef | ast.FunctionDef | str]:
    """What the names of a file stand for: a class, a function, or what it imports."""
    found: dict[str, ast.ClassDef | ast.FunctionDef | str] = {}
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):  # those for the type checker, too, and those of a late import
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    if file.name == "__init__.py":
        found |= homes(".".join(file.parent.relative_to(ROOT).parts))
    definitions = (n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef))
    return found | {node.name: node for node in definitions}


def _of(file: Path, path: list[str]) -> Signature:
    node = _names(file).get(path[0])
    if isinstance(node, str):
        return signature(".".join([node, *path[1:]]))
    if isinstance(node, ast.FunctionDef) and len(path) == 1:
        return _arguments(node)
    if not isinstance(node, ast.ClassDef):
        return _ANYTHING
    methods = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
    if len(path) > 1:
        found = _arguments(methods[path[1]], bound=True) if path[1] in methods else _ANYTHING
        return replace(found, open=False) | _of(file, path[:1]) if found.open else found
    bases = [ast.unparse(base).partition("[")[0] for base in node.bases]
    inherited = [_base(file, base) for base in bases if base not in _BARE]
    if "__init__" in methods:
        own = _arguments(methods["__init__"], bound=True)
        if not (own.open and inherited):
            return own
        inherited.append(replace(own, open=False))
    elif any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        inherited.append(Signature(frozenset(_fields(node))))
    else:
        inherited = inherited[:1]
    total = Signature()
    for part in inherited:
        total |= part
    return total


def _base(file: Path, name: str) -> Signature:
    return _of(file, [name]) if name in _names(file) else _ANYTHING


def _fields(node: ast.ClassDef) -> list[str]:
    return [
        line.target.id
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and "ClassVar" not in ast.unparse(line.annotation)
        and "init=False" not in ast.unparse(line)
    ]


def _arguments(node: ast.FunctionDef, *, bound: bool = False) -> Signature:
    positional = [*node.args.posonlyargs, *node.args.args][1 if bound else 0 :]
    names = [argument.arg for argument in (*positional, *node.args.kwonlyargs)]
    return Signature(frozenset(names), open=node.args.kwarg is not None)
