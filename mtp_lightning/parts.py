"""The parts that come off: folders and files that the core works without.

The core finds them by looking for them and imports none of them unasked. Removing a part's folder
takes away what it brings, and nothing else: whoever asks for it is told so in one sentence. This
file alone names them.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mtp_lightning.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part.

    Attributes:
        module: its package, or the module of a part of one file.
        brings: what nobody has without it.
        extends: a package of the core whose names it adds to; empty if it adds to none.
    """

    module: str
    brings: str
    extends: str = ""


PARTS = {
    "distributed": Part(
        module="mtp_lightning.distributed",
        brings="training by several processes",
    ),
    "plan": Part(module="mtp_lightning.plan", brings="estimates for machines that are not here"),
    "token_files": Part(
        module="data_modules.token_files",
        brings="token files that other programs wrote",
        extends="data_modules",
    ),
    "corpora": Part(
        module="data_modules.corpora",
        brings="corpora of others",
        extends="data_modules.sources",
    ),
    "search": Part(module="sweeps.search", brings="the search for good settings"),
    "report": Part(module="sweeps.report", brings="the report on runs"),
    "claims": Part(module="sweeps.claims", brings="claims and their verdicts"),
}


@cache
def is_there(name: str) -> bool:
    """Whether a part is here; it is looked for, and not imported."""
    spec = importlib.util.find_spec(PARTS[name].module)
    # A folder from which all files were removed is still a namespace to Python.
    return spec is not None and spec.origin is not None


def need(name: str, what: str) -> ModuleType:
    """A part, imported.

    Args:
        name: of the part.
        what: asks for it, as a person would type it.

    Raises:
        UserError: the part is not here.
    """
    if not is_there(name):
        raise UserError(missing(name, what))
    return importlib.import_module(PARTS[name].module)


def missing(name: str, what: str) -> str:
    """The sentence about a part that is not here; arguments as :func:`need`."""
    part = PARTS[name]
    folder = part.module.replace(".", "/")
    return (
        f"{what} needs {folder} ({part.brings}), which was taken out of this installation: put it "
        "back, or leave that out."
    )


def of_module(module: str) -> str | None:
    """The name of the part that a module belongs to; None if it is of the core."""
    found = (n for n, p in PARTS.items() if f"{module}.".startswith(f"{p.module}."))
    return next(found, None)


def on_demand(package: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package whose names are imported when they are asked for.

    Args:
        package: whose file imports its names for the type checker alone; parts that extend it add
            theirs.
    """

    def find(name: str) -> Any:
        home = homes(package).get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, name = home.rpartition(".")
        return getattr(importlib.import_module(module), name)

    return find


@cache
def homes(package: str) -> dict[str, str]:
    """Where the names of a package of :func:`on_demand` are defined, its parts' names included."""
    packages = [package]
    packages += [p.module for n, p in PARTS.items() if p.extends == package and is_there(n)]
    found: dict[str, str] = {}
    for name in packages:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(f"{name}."):
                found |= {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found
