"""Reads the comments of ``conf/`` as rules for the values that each key takes.

A rule is a type with its bounds (``int >= 1``, ``float in [0, 1)``, ``number``, ``bool``, ``path``)
and words that the key takes as well (``bool, or auto``), or it is words alone (``min | max``). It
begins the comment, or follows a semicolon or a parenthesis. A key with a class in its value takes a
mapping. Comments name keys that no file sets as ``+KEY=``, and a file's first lines name a package
that it needs (``needs datasets: pip install -e '.[hf]'``).
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mtp_lightning.command_line.conf_comments import Option, groups, included, value_at
from mtp_lightning.settings import (
    require,
    require_bool,
    require_choice,
    require_number,
    require_whole,
)

# Groups whose keys are explained in other files, or are Hydra's.
_ELSEWHERE = ("experiment", "debug", "sweeps", "hydra")
SEVERAL = ("callbacks", "logger")  # groups of which a run has several options; null removes one
OWN = ("mtp_lightning.", "data_modules.")
_NUMBER = r"(-?\d+(?:\.\d+)?)"
# A type; its lower bound, its upper bound and whether that one is included; and the text after it.
_TYPE = re.compile(
    r"(?:^|[;(])\s*(int|float|number|bool|true \| false)\b"
    rf"(?: (>=|>|in \[|in \() ?{_NUMBER}(?:, {_NUMBER}([\])]))?)?(.*)",
    re.DOTALL,
)
_OTHER_TYPE = re.compile(r"(?:^|[;(])\s*(mapping|list|str|path|name|tag)\b")
_CLASSES: dict[str, Any] = {"mapping": Mapping, "list": list | tuple}  # the others are texts
_STR = "text, in quotes if it looks like a number"
# A word that a number's key takes too, with its meaning: ``(int >= 1; all: the whole split)``.
_WORD = re.compile(r"; (\w+): ([^();]+)\)")
NEEDS = re.compile(r"needs (\w+): pip install -e '\.\[(\w+)\]'")
_NAMED = re.compile(r"\+([\w.]+)=")


@dataclass
class KeyRules:
    """The rules in ``conf/`` for the keys of a class, or of a node without a class."""

    keys: dict[str, str] = field(default_factory=dict)  # with their comments, which may be empty
    open: bool = False  # whether any other key is passed to a class that is not this project's
    needs: tuple[str, str, str] | None = None  # (option, package, extra) if it needs a package


def of_class(target: str) -> KeyRules:
    """The rules for the keys of a class; a class that ``conf/`` does not build has none."""
    return _read_conf().get(target, KeyRules(open=True))


def of_node(path: str, app: str) -> KeyRules:
    """The rules for the keys of a node without a class, by its dotted path in the config (empty for
    the root); ``app`` is the app's root config in conf/."""
    rules_by_name = _read_conf()
    rules = rules_by_name.get(f"{app}:{path}") or rules_by_name.get(path) or KeyRules()
    if path == "trainer":
        return KeyRules(dict.fromkeys(_trainer_arguments(), "") | rules.keys)
    return rules


@cache
def _read_conf() -> dict[str, KeyRules]:
    """The rules by class, and of nodes without one by path: ``trainer``, ``evaluate:decode``."""
    rules_by_name: dict[str, KeyRules] = {}
    for group, options in groups().items():
        if group.partition("/")[0] in _ELSEWHERE:
            continue
        for option in options.values():
            for part in reversed(included(option)):
                for key, comment in _rules(part):
                    owner, _, name = key.rpartition(".")
                    target = _target(option, owner)
                    path = ".".join(filter(None, [group.replace("/", "."), owner]))
                    path = path if group else f"{option.name}:{owner}"
                    rules = rules_by_name.setdefault(target or path, KeyRules())
                    rules.keys[name] = comment or rules.keys.get(name, "")
                    if target:
                        rules.open |= not target.startswith(OWN) or "More keys" in part.comment
                    needs = NEEDS.search(part.comment)
                    if needs is not None and name == "_target_":  # the file's own class
                        rules.needs = (f"{group}={option.name}", needs[1], needs[2])
    return rules_by_name


def _rules(option: Option) -> Iterator[tuple[str, str]]:
    """Yield a file's keys with their comments; a comment is empty for keys that have none."""
    yield from ((group, "mapping") for group in option.chosen)  # groups within this one
    prefix = f"{option.group.replace('/', '.')}."
    for text in (option.comment, *(key.comment for key in option.keys)):
        yield from ((key.removeprefix(prefix), "") for key in _NAMED.findall(text))
    comments = {key.name: key.comment for key in option.keys}
    mapping = "mapping, or null" if option.group in SEVERAL else "mapping"
    for path, node in nodes(option.content, ""):
        for key, value in node.items():
            if key != "defaults":
                builds = any("_target_" in inner for _, inner in nodes(value, key))
                parts = (comments.get(join(path, key)), mapping if builds else None)
                yield join(path, key), "; ".join(filter(None, parts))


def _target(option: Option, owner: str) -> str | None:
    """The class of the node ``owner`` of a file, which a file that it includes may name."""
    for part in included(option):
        target = value_at(part.content, join(owner, "_target_"))
        if target is not None:
            return str(target)
    return None


@cache
def _trainer_arguments() -> frozenset[str]:
    """The arguments of ``lightning.pytorch.Trainer``, parsed from its source, since importing it
    takes seconds; without one that it ignores when a module clips its own gradients."""
    spec = importlib.util.find_spec("lightning")
    for folder in (spec and spec.submodule_search_locations) or ():
        tree = ast.parse(Path(folder, "pytorch", "trainer", "trainer.py").read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                names = {a.arg for a in (*node.args.args, *node.args.kwonlyargs)[1:]}
                return frozenset(names - {"gradient_clip_algorithm"})
    return frozenset()


def nodes(node: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield all mappings of a config with their dotted paths."""
    if isinstance(node, Mapping):
        yield path, node
        for key, value in node.items():
            if path or key != "hydra":
                yield from nodes(value, join(path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from nodes(value, f"{path}.{index}")


def join(path: str, key: object) -> str:
    """A key's dotted path below that of its node."""
    return f"{path}.{key}" if path else str(key)


def require_allowed(name: str, value: Any, comment: str, option: str = "this option") -> None:
    """Refuse a value that a key's comment does not allow, and name those that it does. ``option``
    owns the key, for messages."""
    looked_up = isinstance(value, str) and "${" in value
    if looked_up or (value is None and re.search(r"\bnull\b", comment)):
        return
    if constant := re.match(r"always (\d+) here", comment):
        require(value == int(constant[1]), name, value, f"{constant[1]} with {option}")
    match = _TYPE.search(comment)
    if match is None:
        if choices := _choices(comment):
            require_choice(name, value, choices)
        elif other := _OTHER_TYPE.search(comment):
            allowed, wanted = _CLASSES.get(other[1], str), f"a {other[1].replace('str', _STR)}"
            # Objects of other classes, which Python may pass, are checked by those that use them.
            plain = isinstance(value, str | int | float | list | tuple | Mapping | None)
            require(not plain or isinstance(value, allowed), name, value, wanted)
        return
    kind, lower, low, high, closed, rest = match.groups()
    words = re.findall(r", or (\w+)", rest)
    if isinstance(value, str) and words:  # the checks below know types and bounds alone
        name = f"{name} (unless {' or '.join(words)})"
    if word := _WORD.search(comment):
        name = f"{name} ({word[1]} for {word[2]})"
        words.append(word[1])
    if isinstance(value, str) and value in words:
        return
    if isinstance(value, list) and re.search(r"\blist\b|floats", comment):
        return
    bounds: dict[str, Any] = {}
    if low:
        bounds["least" if lower in (">=", "in [") else "above"] = ast.literal_eval(low)
    if high:
        bounds["most" if closed == "]" else "below"] = ast.literal_eval(high)
    if kind in ("bool", "true | false"):
        require_bool(name, value)
    elif kind == "int" and bounds.keys() <= {"least", "most"}:
        require_whole(name, value, **bounds)
    else:
        require_number(name, require_whole(name, value) if kind == "int" else value, **bounds)


def _choices(comment: str) -> list[str]:
    """The words of ``fraction (of the run) | steps | tokens``; empty if others are allowed."""
    while (bare := re.sub(r"\([^()]*\)", "", comment)) != comment:
        comment = bare
    parts = [re.findall(r"[\w.-]+", part) for part in comment.split("|")]
    if len(parts) == 1 or not all(parts):
        return []
    words = [parts[0][-1], *(part[0] for part in parts[1:])]
    return [] if {"a", "an"} & set(words) else words
