"""What the comments of ``conf/`` say that every key takes, and values that it does not take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Key:
    """A key of the configuration, and what its comment says that it takes."""

    path: str
    takes: str


def keys(file: Path, package: str) -> Iterator[Key]:
    """The keys of a file of ``conf/`` that have a comment.

    Args:
        file: of YAML with a comment before each key.
        package: where its keys stand in the composed config.
    """
    comment: list[str] = []
    stack: list[tuple[int, str]] = []
    for line in file.read_text().splitlines():
        text = line.strip()
        if text.startswith("#"):
            comment.append(text.lstrip("# "))
            continue
        found = re.match(r"( *)([A-Za-z_]\w*):(.*)$", line)
        if found is None:
            comment = []
            continue
        indent, name = len(found[1]), found[2]
        while stack and stack[-1][0] >= indent:
            stack.pop()
        path = ".".join([part for part in (package, *(n for _, n in stack), name) if part])
        stack.append((indent, name))
        if comment and not name.startswith("_") and name not in ("defaults", "hydra"):
            yield Key(path, " ".join(comment))
        comment = []


def wrong_values(takes: str) -> list[str]:
    """Values that a key whose comment ends so does not take, as they are typed."""
    kind = re.search(r"\b(int|float|bool|number)\b", takes)
    options = re.findall(r"[\w.-]+(?: \([^)]*\))? \| ", takes)
    if kind is None:
        return ["no_such_choice"] if options else []
    rest = takes[kind.start() :]
    if kind[0] == "bool":
        return [] if "auto" in takes else ["perhaps", "[1,2]"]
    values = ["many"] if not options else ["no_such_choice"]
    if kind[0] == "int":
        values.append("1.5")
    if kind[0] == "float" and "list" not in rest:
        values.append("nan")
    if bound := re.match(r"\w+ (>=|>) (-?[\d.]+)", rest):
        least = float(bound[2])
        below = least - 1 if bound[1] == ">=" else least
        values.append(f"{below:g}")
    if span := re.search(
        r"\b(?:in ([\[(])|between |from )?([\d.]+)(?:, | and | to )([\d.]+)([\])])?", rest
    ):
        values += [f"{float(span[2]) - 1:g}", f"{float(span[3]) + 1:g}"]
    return values
