"""Reads the comments of conf/'s files as documentation of its groups, options and keys.

``python train.py --help WORD`` and the documentation's pages of settings are made from it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mtp_lightning.errors import UserError
from mtp_lightning.paths import CONF

_KEY = re.compile(r"( *)([A-Za-z]\w*):(?= |$)")
# libyaml, if it is there, reads conf/ ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Files that options include, and that are not options themselves.
PARTS = ("base", "task", "deepseek_base")


@dataclass(frozen=True)
class Key:
    """A key that may be set, with the comment above it."""

    name: str  # dotted, from the root of its file
    default: str  # the value in YAML; empty for a mapping
    comment: str


@dataclass(frozen=True)
class Option:
    """One file of a group, the option ``GROUP=NAME``."""

    group: str  # the file's folder in conf/; empty for the root
    name: str
    comment: str  # at the top of the file, with its line breaks
    keys: tuple[Key, ...]  # of this file, without those of the files that it includes
    content: dict[str, Any] = field(default_factory=dict, repr=False)  # the parsed YAML

    @property
    def brief(self) -> str:
        """The comment's first sentence (".." as in 1 .. D ends none); without one, the class."""
        text = " ".join(self.comment.split()) or str(self.content.get("_target_", "no comment"))
        return re.sub(r"((?<! al)(?<!\.)[.:;?]) .*", r"\1", text).rstrip(".:; ")

    @property
    def chosen(self) -> dict[str, str]:
        """The options of groups in its ``defaults``: ``override /tokenizer: byte``."""
        entries = [entry for entry in self.content.get("defaults", []) if isinstance(entry, dict)]
        return {str(group): str(name) for entry in entries for group, name in entry.items()}


@cache
def groups(added: Path | None = None) -> dict[str, dict[str, Option]]:
    """Group -> name -> option, in alphabetical order, with those of a further folder ``added``
    (``--config-dir``). The root's group has the empty name; its options are the apps' configs."""
    files = [
        ("/".join(file.parent.relative_to(root).parts), file)
        for root in filter(None, (CONF, added))
        for file in root.rglob("*.yaml")
    ]
    by_group: dict[str, dict[str, Option]] = {}
    for group, file in sorted(files, key=lambda pair: (pair[0], pair[1].name)):
        by_group.setdefault(group, {})[file.stem] = read_option(file, group)
    return by_group


def groups_of(app: str) -> set[str]:
    """The groups that an app takes: train.py (``config``) all, another those of its root config."""
    if app == "config":
        return set(groups())
    return {name for name in groups()[""][app].chosen if not name.startswith("override ")}


def included(option: Option) -> list[Option]:
    """A file, followed by the files of its group that it includes."""
    files, options = groups()[option.group], [option]
    for name in option.content.get("defaults", []):
        if isinstance(name, str) and name in files and name != option.name:
            options += included(files[name])
    return options


def read_option(file: Path, group: str) -> Option:
    """Read one file's comments and keys."""
    text = file.read_text(encoding="utf-8")
    comment, lines = _head(text.splitlines())
    content = yaml.load(text, _LOADER) or {}
    keys = tuple(
        Key(key, _default(value_at(content, key)), comment)
        for key, comment in _keys(lines)
        if key.partition(".")[0] not in ("defaults", "hydra")
        and (comment or not isinstance(value_at(content, key), dict))
    )
    return Option(group, file.stem, comment, keys, content)


def help_for(word: str, added: Path | None = None, app: str = "config") -> str:
    """The text of ``--help WORD`` of an app about a group (``mtp``), an option of one
    (``mtp=parallel``) or a key (``mtp.depth``); ``added`` as for :func:`groups`.

    Raises:
        UserError: there is no such group, option or key.
    """
    group, _, name = word.partition("=")
    all_options = groups(added)
    if not group or group not in all_options:
        root = all_options[""][app]
        if explained := explained_key(group, {**all_options, "": {app: root}}):
            return explained
        known = all_options if app == "config" else [key.name for key in root.keys]
        names = ", ".join(filter(None, known))
        raise UserError(
            f"--help {word}: there is no group or key {group!r}; choose one of {names}."
        )
    options = all_options[group]
    if not name:
        briefs = {n: option.brief for n, option in options.items() if n not in PARTS}
        width = max(map(len, briefs)) + 2
        rows = (_wrapped(brief, f"  {n:<{width}}") for n, brief in briefs.items())
        usual = groups()[""]["config"].chosen.get(group)
        default = f" (default {usual})" if usual in options else ""
        hint = f"--help {group}={next(iter(briefs))} explains an option's keys."
        return "\n".join([f"{group}=NAME{default}, one of", "", *rows, "", hint])
    if name not in options:
        raise UserError(
            f"--help {word}: {group} has no option {name!r}; choose one of {', '.join(options)}."
        )
    option = options[name]
    lines = [f"{group}={name}", "", option.comment, ""]
    lines += [f"  {g}={choice}".replace("override /", "") for g, choice in option.chosen.items()]
    comments = {key.name: key.comment for part in included(option) for key in part.keys}
    for key in option.keys:  # one that an included file explains may have no comment
        lines += _described(replace(key, comment=key.comment or comments[key.name]), key.name)
    lines += [f"  further keys: --help {group}={part.name}" for part in included(option)[1:]]
    return "\n".join(lines).rstrip()


def explained_key(name: str, all_options: Mapping[str, Mapping[str, Option]]) -> str:
    """A dotted key's defaults and comments, with the options that have them; empty for none."""
    found: dict[Key, list[str]] = {}
    for group, options in all_options.items():
        prefix = group.replace("/", ".") + "." if group else ""
        for option in options.values():
            for key in option.keys:
                if prefix + key.name == name:
                    found.setdefault(key, []).append(f"{group}={option.name}" if group else "")
    return "\n".join(
        line
        for key, of in found.items()
        for line in _described(key, name, f"  ({', '.join(of)})" if all(of) else "")
    )


def _described(key: Key, name: str, where: str = "") -> list[str]:
    """The lines about a key, under a name and after its default with the options that have it."""
    default = f" = {key.default}" if key.default else ""
    return [f"  {name}{default}{where}", *filter(None, [_wrapped(key.comment, "      ")])]


def _wrapped(text: str, first: str) -> str:
    return textwrap.fill(text, 100, initial_indent=first, subsequent_indent=" " * len(first))


def _head(lines: list[str]) -> tuple[str, list[str]]:
    """The comment at the top of a file, and the lines after it."""
    lines = [line for line in lines if not line.startswith("# @package")]
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end]), lines[end:]


def _keys(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yield every dotted key and the comment above it, in the file's order."""
    comment: list[str] = []
    path: list[tuple[int, str]] = []
    for line in lines:
        if (stripped := line.strip()).startswith("#"):
            comment.append(stripped.removeprefix("#").strip())
            continue
        if match := _KEY.match(line):
            indent = len(match.group(1))
            path = [(n, name) for n, name in path if n < indent] + [(indent, match.group(2))]
            yield ".".join(name for _, name in path), " ".join(comment)
        comment = []


def value_at(node: Any, key: str) -> Any:
    """The value at a dotted key in nested mappings; None if there is none."""
    for name in key.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _default(value: Any) -> str:
    if isinstance(value, dict):
        return ""
    if isinstance(value, str):
        return re.sub(r"\A\$\{oc\.select:[\w.]+,(.*)\}\Z", r"\1", value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()
