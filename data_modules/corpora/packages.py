"""The source code of installed Python packages: 100 MB of code and prose on every machine."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from packaging.utils import canonicalize_name

from data_modules.corpora.manifests import manifest_of, say_differences
from data_modules.sources.base import FileSource
from data_modules.sources.installed import Package, installed, python_text
from mtp_lightning.errors import UserError

RULES = 1
"""Version of the rules below; raise it when they change, since the documents change."""
DEFAULT = (
    *("torch", "sympy", "numpy", "networkx", "pygments", "huggingface-hub", "lightning"),
    *("torchmetrics", "mpmath", "pillow", "setuptools", "tensorboard", "rich", "werkzeug"),
    *("fsspec", "filelock", "grpcio", "anyio", "packaging", "protobuf", "antlr4-python3-runtime"),
    *("absl-py", "jinja2", "click", "hydra-core", "markdown", "omegaconf", "markdown-it-py"),
    *("pyyaml", "typing-extensions", "tqdm"),
)
"""Packages that this project needs anyway, so nothing else has to be installed."""
VENDORED = frozenset({"_vendor", "vendor", "vendored", "_vendored", "extern", "third_party"})
"""Names of folders with copies of other packages, whose originals may be held out."""
_GENERATED = re.compile(
    r"generated (by|from|file)|auto-?generated|do not (edit|modify)", re.IGNORECASE
)
_HEAD = 1000  # characters at the start in which a generator names itself
_WORDS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_ \n"
_LEAST_WORDS = 0.6
_LONGEST_LINE = 2000
_COUNTED_LINE = 20
_MOST_SEEN = 0.5


class PackagesSource(FileSource):
    """The ``*.py`` of installed packages that people wrote, sorted by package and path. Each
    package is a group. docs/data.md lists the files that are left out.

    Args:
        packages: names of distributions, as pip knows them; None for :data:`DEFAULT`.

    Raises:
        UserError: for an empty list or a repeated name; from ``documents`` and ``fingerprint``, for
            a package that is not installed or lists no Python files.
    """

    name = "packages"

    def __init__(self, packages: Sequence[str] | None = None) -> None:
        chosen = DEFAULT if packages is None else packages
        names = [chosen] if isinstance(chosen, str) else list(chosen)
        if not names or not all(isinstance(name, str) and name for name in names):
            raise UserError(
                "data.source.packages must be a list of names such as [torch,sympy], got "
                f"{packages!r}"
            )
        if twice := [name for name, n in Counter(map(canonicalize_name, names)).items() if n > 1]:
            raise UserError(f"data.source.packages names {twice[0]} twice: leave one out")
        self.names = sorted(names, key=canonicalize_name)

    @cached_property
    def packages(self) -> list[Package]:
        """The installed packages, in order, before files are left out for their content."""
        packages = [installed(name, _is_source, needed_by="data=packages") for name in self.names]
        say_differences(self.name, packages)
        return packages

    @cached_property
    def files(self) -> list[tuple[str, Path]]:
        return [
            (f"{package.name}:{path}", file)
            for package in self.packages
            for path, file in package.files
        ]

    @property
    def rules(self) -> tuple[object, ...]:
        versions = (f"{package.name} {package.version}" for package in self.packages)
        return ("packages", RULES, *versions)

    def documents(self) -> Iterator[str]:
        return (text for _, text in self.grouped())

    def grouped(self) -> Iterator[tuple[str, str]]:
        for package, file in self._cleaned.files:
            yield canonicalize_name(package.name), python_text(file.read_bytes(), str(file))

    def summary(self) -> dict[str, Any]:
        """Also the manifests of the packages, and the bytes that each rule left out."""
        left_out = dict(sorted(self._cleaned.left_out.items()))
        return super().summary() | {"packages": self._cleaned.manifests, "left_out": left_out}

    @cached_property
    def _cleaned(self) -> _Cleaned:
        cleaned = _Cleaned([], {}, Counter())
        line_hashes: set[int] = set()
        for package in self.packages:
            contents = []
            for _, file in package.files:
                data = file.read_bytes()
                rule = _excluding_rule(data, str(file), line_hashes)
                if rule is None:
                    cleaned.files.append((package, file))
                    contents.append(data)
                else:
                    cleaned.left_out[rule] += len(data)
            cleaned.manifests[package.name] = manifest_of(package, contents)
        return cleaned


class _Cleaned(NamedTuple):
    files: list[tuple[Package, Path]]  # those that are kept
    manifests: dict[str, Any]
    left_out: Counter[str]  # bytes, by rule


def _excluding_rule(data: bytes, where: str, line_hashes: set[int]) -> str | None:
    """The rule that leaves a file out, or None. ``line_hashes`` holds the hashes of the lines of
    the files before it, to which those of a kept file are added."""
    try:
        text = python_text(data, where)
    except (UserError, SyntaxError, UnicodeDecodeError):
        return "undecodable"
    if not text.strip():
        return "empty"
    if _GENERATED.search(text, 0, _HEAD):
        return "generated"
    n_other = len(data.translate(None, _WORDS))
    lines = text.split("\n")
    if n_other > (1 - _LEAST_WORDS) * len(data) or max(map(len, lines)) > _LONGEST_LINE:
        return "tables"
    # Equal lines have equal hashes within one process, and no hash outlives it.
    hashes = {hash(line) for line in map(str.strip, lines) if len(line) >= _COUNTED_LINE}
    if hashes and len(hashes & line_hashes) >= _MOST_SEEN * len(hashes):
        return "near_duplicates"
    line_hashes |= hashes
    return None


def _is_source(path: PurePosixPath) -> bool:
    return path.suffix == ".py" and not VENDORED.intersection(path.parts)
