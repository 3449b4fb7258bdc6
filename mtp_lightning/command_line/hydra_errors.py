"""Explains unknown keys and options in one sentence with the likely intention, not with a ``+``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from traceback import walk_tb
from typing import Any

from mtp_lightning.command_line.conf_comments import (
    PARTS,
    Option,
    explained_key,
    groups,
    groups_of,
    included,
)
from mtp_lightning.errors import nearest, suggestion

# Values that Hydra does not read as words.
_NO_WORD = re.compile(r"\s*(null|true|false|inf|nan|[-+]?[\d.]+(e[-+]?\d+)?)\s*", re.IGNORECASE)


def sentence(error: Exception, overrides: Iterable[str] = (), app: str = "config") -> str:
    """Translate an error that Hydra or OmegaConf raised while composing an app's config into a
    sentence; empty for another error.

    The errors are recognized by names, texts and attributes, since importing the libraries here
    would slow the tools down.
    """
    of_group = str(error).startswith(("Config group override must be", "argument of type "))
    if of_group and (refusal := _not_a_name(overrides)):
        return refusal
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "YAMLError" in kinds:
        return f"a config is not YAML: {' '.join(str(error).split())}."
    text, cause = str(error), error.__cause__
    if not kinds & {"HydraException", "OmegaConfBaseException"}:
        *_, (frame, _) = walk_tb(error.__traceback__)
        if not frame.f_globals["__name__"].startswith("hydra."):
            return ""
        typed = " ".join(word for word in overrides if word.startswith(("hydra", "-")))
        return f"Hydra cannot use {typed}{text and f' ({text})'}: leave it out. (--hydra-help)"
    if file := getattr(error, "missing_cfg_file", None):
        group, _, name = file.rpartition("/")
        options = getattr(error, "options", None) or groups().get(group)
        if group and options:
            return unknown_option(group, name, options)
        return f"there is no config {file}: check its name, and --config-dir."
    if override := getattr(error, "override", None):
        key, equals, value = override.partition("=")
        if equals:
            known = groups()[""][app].content
            if (name := key.lstrip("+")).partition(".")[0] not in {*known, *groups()}:
                return unknown_key(name, known, app)
            quoted = f"""'{key}="{value}"'"""
            space = "leave a space between two settings, or " if "=" in value else ""
            return (
                f"{override} cannot be read: {space}put the value in quotes of its own, {quoted}."
            )
        if "/" in key or Path(key).exists():
            return f"{key} has no key: give it as checkpoint={key} (train.py: run_dir={key})."
        words = [*overrides]
        before = words[words.index(key) - 1] if key in words[1:] else ""
        hint = f", or put '{before} {key}' in quotes if it is one value" if "=" in before else ""
        return f"{key} has no value: give it as {key.partition(':')[0]}=...{hint}"
    if match := re.match(r"Could not override '([^']*)'", text):
        name = match[1]
        return unknown_key(*_last_known(name, getattr(cause, "parent_node", None)), app)
    if match := re.match(r"Could not delete from config\. '([^']*)' does not exist", text):
        return f"~{match[1]} deletes nothing: there is no {match[1]}. (--cfg job shows all)"
    if match := re.match(r"Could not append to config\. An item is already at '([^']*)'", text):
        return f"{match[1]} is a key already: give it as {match[1]}=..., without a plus sign."
    if match := re.match(r"Multiple values for (\S+)\. To override .* '\S+ \S+: (.*)'", text):
        return f"{match[1]} has an option: {match[1]}={match[2]} replaces it, without a plus."
    if match := re.match(r"Ambiguous value for argument '(([^=']*)=(.*?))'", text):
        about = explained_key(match[2], groups())
        takes_list = not about or "list" in about
        listed = f", or give the list '{match[2]}=[{match[3]}]'" if takes_list else ""
        return f"{match[1]} is several values: add -m to run each{listed}."
    if "unexpected keyword argument 'dry_run'" in text:
        launchers = ", ".join(groups()["hydra/launcher"])
        return f"--dry-run needs one of this project's launchers: hydra/launcher={launchers}."
    return _first(error if cause is None else cause, text)


def _not_a_name(overrides: Iterable[str]) -> str:
    """The sentence that refuses a group's value that is not a word (``mtp=null``), for which Hydra
    raises an error without the override; empty if there is none."""
    for override in overrides:
        group, _, value = override.lstrip("+").partition("=")
        if group in groups() and any(_NO_WORD.fullmatch(o) for o in value.strip("[]").split(",")):
            return (
                f"{override} is not the name of an option: choose one of --help {group}, or leave "
                f"{group}= out."
            )
    return ""


def _last_known(name: str, node: Any) -> tuple[str, list[str]]:
    """The shortest unknown part of a dotted key, and the keys that exist at its place."""
    level: Any = node._get_root() if hasattr(node, "_get_root") else {}
    parts = name.split(".")
    for end, part in enumerate(parts):
        keys = [str(key) for key in level] if hasattr(level, "keys") else []
        if part not in keys:
            return ".".join(parts[: end + 1]), [key for key in keys if key != "hydra"]
        level = level._get_node(part)
    return name, []


def _first(error: BaseException, text: str) -> str:
    key = getattr(error, "full_key", None)
    line = " ".join(text.partition("\n")[0].split()).removesuffix(".")
    cause = " ".join(str(error).partition("\n")[0].split()).removesuffix(".")
    reason = cause if cause == line or not cause else f"{line} ({cause})"
    return f"{key}: {reason}. (--help)" if key and key not in reason else f"{reason}. (--help)"


def unknown_key(name: str, siblings: Collection[str], app: str) -> str:
    """The sentence that refuses a dotted key of an app, not among the keys of its node."""
    parent, dot, key = name.rpartition(".")
    taken = groups_of(app)
    if name in groups() and name not in taken:
        return f"{name} is a group of train.py and no key here: leave it out. (--cfg job shows all)"
    if name == "sweeps":
        return "sweeps is not a key: a prepared sweep is added, as +sweeps=depth. (--help sweeps)"
    if name.partition(".")[0] == "hydra":
        return f"{name} is not a key of Hydra or the launcher, whose keys conf/hydra/launcher has."
    if name in groups():
        return f"{name} has no keys before an option is chosen: add {name}=NAME. (--help {name})"
    group = _group_of(name)
    if group and (options := _options_with(group, name)):
        choice = f"{group}={', '.join(options)}"
        if len(options) == 1:
            remedy = f"add that, or ~{name} where an experiment sets it. (--help {choice})"
        else:
            remedy = f"choose one, add it to your own YAML, or leave it out. (--help {group})"
        return f"{name} is a key of {choice}: {remedy}"
    choices = [f"{parent}{dot}{sibling}" for sibling in siblings]
    near = nearest(key, siblings)
    meant = f"{parent}{dot}{near}" if near else _elsewhere(key, app)
    hint = f"--help {group}" if group else "--help"
    if meant and meant != name:  # another program's
        return f"{name} is not a key: did you mean {meant}? ({hint})"
    if parent and choices:
        return f"{name} is not a key: choose one of {', '.join(sorted(choices))}. ({hint})"
    listed = "--help names the groups, " if taken else ""
    return f"{name} is not a key: {listed}--cfg job shows every key."


def unknown_option(group: str, name: str, options: Collection[str]) -> str:
    """The sentence that refuses an option of a group."""
    known = [option for option in options if option not in (*PARTS, name)]
    listed = f"choose one of {', '.join(known)}; one of your own needs --config-dir."
    others = [f"{other}={name}" for other in groups() if other and name in groups()[other]]
    if others and name not in (*PARTS, "default"):
        listed = f"did you mean {' or '.join(others)}?"
    remedy = suggestion(name, known, listed)
    return f"{group} has no option {name!r}: {remedy} (--help {group})"


def _options_with(group: str, key: str) -> list[str]:
    """The options of a key's group that have the dotted key."""
    inside = key.removeprefix(group.replace("/", ".") + ".")

    def has_key(option: Option) -> bool:
        return any(key.name == inside for part in included(option) for key in part.keys)

    return [name for name, o in groups()[group].items() if name not in PARTS and has_key(o)]


def _elsewhere(key: str, app: str) -> str | None:
    """An app's dotted key that ends in this name (``optimizer.lr`` for ``lr``) and follows no
    other."""
    roots = ("mtp", "model", "data", "optimizer", "trainer", "objective")
    for path in ("", *(root for root in roots if root in groups_of(app))):
        options = groups()[path].values() if path else [groups()[""][app]]
        keys = [k for option in options for k in option.keys]
        if any(k.name == key and not k.default.startswith("${") for k in keys):
            return f"{path}.{key}" if path else key
    return None


def _group_of(name: str) -> str:
    """The group of conf/ that a key belongs to; empty for a key of the root."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (group := "/".join(parts[:end])) in groups():
            return group
    return ""
