"""Many runs: launchers and search, which start them, claims about them, and their report.

This package talks to runs only through their files and the command line; see docs/sweeps.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

V = TypeVar("V")


def grouped(pairs: Iterable[tuple[Any, V]]) -> dict[Any, list[V]]:
    """The values of each key, both in order of appearance."""
    groups: dict[Any, list[V]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def digits(number: float) -> str:
    """A number in six digits, or in all of its digits if it has more."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)
