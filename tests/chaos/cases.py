"""A case of fault injection, and its result."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


class Broken(Exception):
    """A promise that did not hold; the message says which."""


def hold(true: bool, broken: str) -> None:
    """Raise :class:`Broken` unless ``true``."""
    if not true:
        raise Broken(broken)


# Tries something in an empty folder with its own randomness; returns the outcome in a few words, or
# raises :class:`Broken` if a promise did not hold.
Attempt = Callable[[Path, random.Random], str]


@dataclass(frozen=True)
class Case:
    """One thing to try.

    Attributes:
        kind: kills, bad input, hostile input or faults.
        name: the fault; with the seed, it determines the attempt.
        attempt: the function that tries it.
        several: whether it starts other processes, which takes seconds.
        timed: whether it depends on the clock, so that no two attempts are the same.
    """

    kind: str
    name: str
    attempt: Attempt
    several: bool = False
    timed: bool = False


@dataclass(frozen=True)
class Result:
    """The result of a case."""

    kind: str
    name: str
    seed: str
    held: bool
    outcome: str
    seconds: float


def shuffled(cases: list[Case], seed: int) -> Iterator[tuple[Case, str]]:
    """Cases and their seeds without end, each round in another order, the kinds in turn."""
    round_ = 0
    while True:
        order = random.Random(f"{seed}/{round_}")
        kinds: dict[str, list[Case]] = {}
        for case in cases:
            kinds.setdefault(case.kind, []).append(case)
        for each in kinds.values():
            order.shuffle(each)
        for turn in range(max(map(len, kinds.values()))):
            for each in kinds.values():
                if turn < len(each):
                    yield each[turn], f"{seed}/{round_}/{each[turn].kind}/{each[turn].name}"
        round_ += 1
