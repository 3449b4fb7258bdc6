"""Readable names of config keys, their values, tags, and the arms of claims, in figures and pages.

``names.yaml`` has the names, ``texts.yaml`` the other words of a report. Tables of a report and
``--reference`` use the keys as typed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mtp_lightning.run.config import read_yaml, values_by_key

RUN = "run"  # the key that names settings of unrelated runs, which differ in too many others


@cache
def _words(file: str) -> Any:
    return read_yaml(Path(__file__).with_name(file))


def texts(part: str) -> dict[str, Any]:
    """A part of ``texts.yaml``: ``figures``, ``tables`` or ``sentences``."""
    return _words("texts.yaml")[part]


def sentence(name: str, **values: Any) -> str:
    """A sentence of ``texts.yaml`` with values for its names in braces."""
    return str(texts("sentences")[name]).format(**values)


def _key(key: str) -> tuple[str, str, dict[str, str]]:
    """The name of a key's axis, the form of its values (empty for an unknown key), and its values
    with names of their own."""
    axis, form, *values = _words("names.yaml")["keys"].get(key, (key, ""))
    return axis, form, values[0] if values else {}


def name_of(key: str, value: str) -> str:
    """A readable name of a value: ``D = 2`` for ``mtp.depth=2``; unknown keys stay as typed."""
    _, form, values = _key(key)
    return values.get(value) or (form.format(value) if form else f"{key}={value}")


def axis_of(key: str) -> str:
    """A readable name of a key: ``D`` for ``mtp.depth``."""
    return _key(key)[0]


def in_words(tag: str) -> tuple[str, str]:
    """A tag in words with its unit, and the direction in which it improves; a tag that has no words
    stays as it is."""
    for pattern, (words, better) in _words("names.yaml")["tags"].items():
        if match := re.fullmatch(pattern, tag):
            return words.format(*match.groups()), better
    return tag, ""


def arm_names(arms: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Readable names of a claim's arms, whose overrides are given. A name has the values of the
    first keys that distinguish the arm from all others; where the keys of ``names.yaml`` do not
    suffice, it is the arm's own name. A class (``mtp._target_``) replaces its group's choice."""
    by_arm = {arm: values_by_key(values) for arm, values in arms.items()}
    for values in by_arm.values():
        for key in [key for key in values if key.endswith("._target_")]:
            class_name = values[key].rpartition(".")[2]  # GatedConfig of my_ideas.heads
            values[key.removesuffix("._target_")] = class_name.removesuffix("Config")
    known = _words("names.yaml")["keys"]
    keys = [key for key in known if len({v.get(key) for v in by_arm.values()}) > 1]
    names = {}
    for arm, arm_values in by_arm.items():
        names[arm] = arm.replace("_", " ")
        others = [values for other, values in by_arm.items() if other != arm]
        parts: list[str] = []
        for key in keys:
            alike = [v for v in others if v.get(key) == arm_values.get(key)]
            if len(alike) < len(others) or not parts:
                value = arm_values.get(key, "")
                has_name = value or "" in _key(key)[2]
                parts += [name_of(key, value)] if has_name else []
            others = alike
            if not others and parts:
                names[arm] = ", ".join(parts)
                break
    return names


def joined(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def question(varied: Sequence[str], metric: Any, *, task: bool) -> str:
    """The question that a report answers; empty if no key varies."""
    if not varied:
        return ""
    varied = [RUN] if RUN in varied else varied
    end = "" if len(varied) > 1 else "s"
    answer = f"solve{end} the task" if task else f"give{end} the lowest loss in {metric.unit}"
    return f"Which {joined([axis_of(key) for key in varied])} {answer}?"
