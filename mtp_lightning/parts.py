"""Optional packages: folders and files that the core works without.

The core finds them by looking for them and imports none of them unasked. Removing a part's folder
takes away what it brings, and nothing else: whoever asks for it is told so in one sentence. This
file alone names them.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
        command: of ``mtp-lightning``, where its ``main`` is, and what it does; empty without one.
        formats: the kinds of paths that its ``read`` opens as a model (see ``opening.py``), by the
            name of each: whether a path is of that kind, told without opening a file.
    """

    module: str
    brings: str
    extends: str = ""
    command: tuple[str, str, str] | tuple[()] = ()
    formats: Mapping[str, Callable[[Path], bool]] = field(default_factory=dict)


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its name."""
    return path.suffix == ".gguf" and path.is_file()


PARTS = {
    "cpu": Part(module="mtp_lightning.cpu", brings="C++ for layers on a CPU"),
    "distributed": Part(module="mtp_lightning.distributed", brings="training by several processes"),
    "interop": Part(
        module="mtp_lightning.interop",
        brings="models of other programs",
        formats={
            "a folder in Hugging Face's layout": lambda path: (path / "config.json").is_file(),
            "a GGUF file": is_gguf,
        },
    ),
    "serving": Part(module="mtp_lightning.serving", brings="answers over HTTP"),
    "certify": Part(
        module="mtp_lightning.certify",
        brings="the proof that drafts change no text",
        command=(
            "certify",
            "mtp_lightning.certify.__main__",
            "prove that drafts change no text of a model",
        ),
    ),
    "heads": Part(
        module="mtp_lightning.heads",
        brings="heads for a finished model in one command",
        command=(
            "heads",
            "mtp_lightning.heads.__main__",
            "train, measure, certify and export heads for a finished model",
        ),
    ),
    "notebook": Part(
        module="mtp_lightning.notebook",
        brings="runs in a notebook",
        extends="mtp_lightning",
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
    "search": Part(
        module="sweeps.search",
        brings="the search for good settings",
        command=("search", "sweeps.search", "look for good settings with Optuna"),
    ),
    "report": Part(
        module="sweeps.report",
        brings="the report on runs",
        command=("report", "sweeps.report.__main__", "compare the runs of one or more sweeps"),
    ),
    "claims": Part(module="sweeps.claims", brings="claims and their verdicts"),
}


@cache
def load() -> None:
    """Import the part with faster layers, which registers them with the core, if it is here. Cheap
    after the first call."""
    if is_there("cpu"):
        importlib.import_module(PARTS["cpu"].module)


def commands() -> dict[str, tuple[str, str]]:
    """The commands of all parts, here or not: each with its module and what it does."""
    return {part.command[0]: part.command[1:] for part in PARTS.values() if part.command}


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


def reader(path: Path) -> Callable[..., Any]:
    """What reads a path as a model: the part that knows its kind, or what reads runs, which says of
    any other path what is missing there.

    Raises:
        UserError: that part is not here.
    """
    for name, part in PARTS.items():
        for kind, fits in part.formats.items():
            if fits(path):
                return need(name, f"{path}, {kind},").read  # type: ignore[no-any-return]
    return importlib.import_module("mtp_lightning.run.loading").read  # type: ignore[no-any-return]


def missing(name: str, what: str) -> str:
    """The sentence about a part that is not here; arguments as :func:`need`."""
    part = PARTS[name]
    folder = part.module.replace(".", "/")
    return (
        f"{what} needs {folder} ({part.brings}), which was taken out of this installation: put it "
        "back, or leave that out."
    )


def absent(target: str) -> str | None:
    """The part that would bring a ``_target_`` or a module, where it is not here; else None."""
    package, _, name = target.rpartition(".")
    for part, of in PARTS.items():
        inside = f"{target}.".startswith(f"{of.module}.")
        added = bool(of.extends) and package == of.extends and name not in homes(package)
        if (inside or added) and not is_there(part):
            return part
    return None


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
