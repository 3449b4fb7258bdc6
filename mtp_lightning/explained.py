"""conf/ as a person reads it: what the options of a group are and what their keys do, told by the
comments of its files. ``python train.py --help GROUP`` and the documentation are made of it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mtp_lightning.errors import UserError
from mtp_lightning.paths import CONF, SWEEPS

_KEY = re.compile(r"( *)([A-Za-z]\w*):(?= |$)")
_SWEEPS = "sweeps"
# Plain data only; libyaml reads all of conf/ in a tenth of the time.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_WIDTH = 100


@dataclass(frozen=True)
class Key:
    """A key that may be set.

    Attributes:
        name: from its file's root, with dots.
        default: as YAML writes it; empty for a key of keys.
        says: its comment.
    """

    name: str
    default: str
    says: str


@dataclass(frozen=True)
class Option:
    """One file of a group.

    Attributes:
        group: its folder in conf/; empty for the root.
        name: what stands behind ``GROUP=``.
        says: the comment at its top, a line a line.
        keys: its own; those of the files that it includes are told there.
        content: of the file.
    """

    group: str
    name: str
    says: str
    keys: tuple[Key, ...]
    content: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def brief(self) -> str:
        """The first sentence of what it says."""
        text = " ".join(self.says.split())
        found = re.match(r".*?[.:;](?= |$)", text)
        return (found.group()[:-1] if found else text).strip()


def included(option: Option, files: Mapping[str, Option]) -> list[Option]:
    """A file and those of its group that it includes, the including one first."""
    found = [option]
    for name in option.content.get("defaults", []):
        if isinstance(name, str) and name in files and name != option.name:
            found += included(files[name], files)
    return found


@cache
def groups() -> dict[str, list[Option]]:
    """All options, by group, in alphabetical order; those of the root under the empty name."""
    files = [
        *((file.parent.relative_to(CONF).as_posix(), file) for file in CONF.rglob("*.yaml")),
        *((_SWEEPS, file) for file in SWEEPS.glob("*.yaml")),
    ]
    found: dict[str, list[Option]] = {}
    for group, file in sorted(files):
        name = "" if group == "." else group
        found.setdefault(name, []).append(read_option(file, name))
    return found


def read_option(file: Path, group: str) -> Option:
    """One file's comments and keys."""
    text = file.read_text(encoding="utf-8")
    says, lines = _head(text.splitlines())
    content = yaml.load(text, _LOADER) or {}
    keys = tuple(
        Key(".".join(path), _default(_value(content, path)), comment)
        for path, comment in _keys(lines)
        if path[0] not in ("defaults", "hydra")
        and (comment or not isinstance(_value(content, path), dict))
    )
    return Option(group, file.stem, says, keys, content)


def help_for(word: str) -> str:
    """What ``--help WORD`` says.

    Args:
        word: a group (``mtp``), or an option of one (``mtp=parallel``).

    Raises:
        UserError: there is no such group or option.
    """
    group, _, name = word.partition("=")
    known = groups()
    if not group or group not in known:
        names = ", ".join(filter(None, known))
        raise UserError(f"--help {word}: there is no group {group!r}; choose one of {names}.")
    options = {option.name: option for option in known[group]}
    if not name:
        width = max(map(len, options)) + 2
        rows = (_wrapped(option.brief, f"  {n:<{width}}") for n, option in options.items())
        told = f"--help {group}={next(iter(options))} explains an option's keys."
        return "\n".join([f"{group}=NAME, one of", "", *rows, "", told])
    if name not in options:
        raise UserError(
            f"--help {word}: {group} has no option {name!r}; choose one of {', '.join(options)}."
        )
    option = options[name]
    lines = [f"{group}={name}", "", option.says, ""]
    for key in option.keys:
        default = f" = {key.default}" if key.default else ""
        lines += [f"  {key.name}{default}", *filter(None, [_wrapped(key.says, "      ")])]
    return "\n".join(lines).rstrip()


def _wrapped(text: str, first: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first))


def _head(lines: list[str]) -> tuple[str, list[str]]:
    """The comment that a file begins with, and the lines behind it."""
    lines = [line for line in lines if not line.startswith("# @package")]
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end]), lines[end:]


def _keys(lines: list[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """The path of every key and the comment above it, in the file's order."""
    comment: list[str] = []
    path: list[tuple[int, str]] = []
    for line in lines:
        if (stripped := line.strip()).startswith("#"):
            comment.append(stripped.removeprefix("#").strip())
            continue
        if found := _KEY.match(line):
            indent = len(found.group(1))
            path = [(at, name) for at, name in path if at < indent] + [(indent, found.group(2))]
            yield tuple(name for _, name in path), " ".join(comment)
        comment = []


def _value(content: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _default(value: Any) -> str:
    if isinstance(value, dict):
        return ""
    if isinstance(value, str):
        fallback = re.fullmatch(r"\$\{oc\.select:[\w.]+,(.*)\}", value)
        return fallback[1] if fallback else value
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    )
