"""Optional parts: folders and files of this project that the core works without.

This file lists them. The core looks whether a part's folder exists, and imports the part when its
function is needed. Without the folder, an error of one sentence says that the part is missing,
and everything else works.
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


@dataclass(frozen=True)
class Part:
    """An optional part."""

    module: str  # the part's package, or its module if it is one file
    brings: str  # the part's function, for messages
    extends: str = ""  # the package of the core to which the part adds names
    # The module whose ``main`` is the part's command of ``mtp-lightning``, and the command's help.
    command: tuple[str, str] | tuple[()] = ()
    # The kinds of paths that the part's ``read`` opens as a model (``opening.py``): for each name,
    # a function that says whether a path is of that kind, without opening a file.
    formats: Mapping[str, Callable[[Path], bool]] = field(default_factory=dict)


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its name."""
    return path.suffix.lower() == ".gguf" and path.is_file()


PARTS = {
    "cpu": Part("mtp_lightning.cpu", "C++ for layers on a CPU"),
    "distributed": Part("mtp_lightning.distributed", "training by several processes"),
    "interop": Part(
        "mtp_lightning.interop",
        "models of other programs",
        formats={
            "a folder in Hugging Face's layout": lambda path: (path / "config.json").is_file(),
            "a GGUF file": is_gguf,
        },
    ),
    "serving": Part("mtp_lightning.serving", "answers over HTTP"),
    "certify": Part(
        "mtp_lightning.certify",
        "the test whether drafts change a text",
        command=("mtp_lightning.certify.__main__", "test whether drafts change a model's text"),
    ),
    "heads": Part(
        "mtp_lightning.heads",
        "heads for a finished model in one command",
        command=(
            "mtp_lightning.heads.__main__",
            "train, measure, certify and export heads for a finished model",
        ),
    ),
    "notebook": Part("mtp_lightning.notebook", "runs in a notebook", extends="mtp_lightning"),
    "plan": Part("mtp_lightning.plan", "estimates for other machines"),
    "token_files": Part(
        "data_modules.token_files", "token files that other programs wrote", extends="data_modules"
    ),
    "corpora": Part(
        "data_modules.corpora", "corpora from other packages", extends="data_modules.sources"
    ),
    "search": Part(
        "sweeps.search",
        "hyperparameter search",
        command=("sweeps.search", "search for good hyperparameters with Optuna"),
    ),
    "report": Part(
        "sweeps.report",
        "the report on runs",
        command=("sweeps.report.__main__", "compare the runs of one or more sweeps"),
    ),
    "claims": Part("sweeps.claims", "claims and their verdicts"),
}


@cache
def load_cpu() -> None:
    """Import the part ``cpu``, which registers its layers with the core, if it is installed."""
    if is_there("cpu"):
        importlib.import_module(PARTS["cpu"].module)


@cache
def is_there(name: str) -> bool:
    """Whether a part is installed. The part is not imported."""
    spec = importlib.util.find_spec(PARTS[name].module)
    # A folder from which all files were removed is still a namespace to Python.
    return spec is not None and spec.origin is not None


def need(name: str, what: str) -> ModuleType:
    """Import a part; a :class:`UserError` if it is not installed, whose message begins with the
    setting, command or file that needs it (``what``)."""
    if not is_there(name):
        raise UserError(missing(name, what))
    return importlib.import_module(PARTS[name].module)


def reader(path: Path) -> Callable[..., Any] | None:
    """The function of a part that reads the model at a path; None for a path of no part's kind,
    such as a run. Errors as for :func:`need`."""
    for name, part in PARTS.items():
        for kind, fits in part.formats.items():
            if fits(path):
                return need(name, f"{path}, {kind},").read
    return None


def missing(name: str, what: str) -> str:
    """The message about a part that is not installed; arguments as for :func:`need`."""
    part = PARTS[name]
    folder = part.module.replace(".", "/")
    return (
        f"{what} needs {folder} ({part.brings}), which was taken out of this installation: put it "
        "back, or leave that out."
    )


def absent(target: str) -> str | None:
    """The missing part that a ``_target_`` or a module belongs to; None if none is missing."""
    package, _, name = target.rpartition(".")
    for part, entry in PARTS.items():
        inside = f"{target}.".startswith(f"{entry.module}.")
        added = bool(entry.extends) and package == entry.extends and name not in homes(package)
        if (inside or added) and not is_there(part):
            return part
    return None


def on_demand(package: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package whose names are imported on first use. The package's file
    imports its names for the type checker only, and parts that extend it add theirs."""

    def find(name: str) -> Any:
        home = homes(package).get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, name = home.rpartition(".")
        return getattr(importlib.import_module(module), name)

    return find


@cache
def homes(package: str) -> dict[str, str]:
    """The dotted path of each name in a package of :func:`on_demand`, including names that parts
    add."""
    packages = [package]
    packages += [p.module for n, p in PARTS.items() if p.extends == package and is_there(n)]
    paths: dict[str, str] = {}
    for name in packages:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(f"{name}."):
                paths |= {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return paths
