"""The packages that .ci/run installs by hash meet the requirements of pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def required(extras: set[str]) -> Iterator[Requirement]:
    """The requirements of the project with some extras, and of the extras that these include."""
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][e] for e in extras)]
    for requirement in map(Requirement, sum(lists, [])):
        if requirement.name == PROJECT["name"]:
            yield from required(requirement.extras)
        elif requirement.name != "torch":
            yield requirement


@pytest.mark.parametrize(
    "name, extras",
    [
        ("test", {"test"}),
        ("extras", {"test", "hf", "corpora", "loggers", "serve", "docs", "engines"}),
    ],
)
def test_every_requirement_is_locked(name: str, extras: set[str]) -> None:
    text = (ROOT / ".ci" / f"{name}.txt").read_text()
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+) \\$", text, flags=re.MULTILINE))
    assert len(pins) == text.count("==") and "://" not in text
    for requirement in required(extras):
        version = pins[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), requirement
    # torch and its packages for GPUs are the machine's.
    assert not [pin for pin in pins if pin == "torch" or pin.startswith("nvidia-")]
    # Every file of a package has a hash.
    assert all("--hash=sha256:" in part for part in re.split(r"^\S+==", text, flags=re.M)[1:])
