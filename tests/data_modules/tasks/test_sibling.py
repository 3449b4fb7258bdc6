"""Siblings against a graph that is built from the examples alone."""

from __future__ import annotations

import re
from collections import Counter
from itertools import product

import pytest

from data_modules.tasks import Sibling


def children_by_parent(task: Sibling, n_examples: int) -> dict[str, set[str]]:
    """Every parent's children, from the first examples."""
    children: dict[str, set[str]] = {}
    for i in range(n_examples):
        one, other, parent = task.show(task.example(i).answer).split()
        assert one != other
        children.setdefault(parent, set()).update((one, other))
    return children


def test_examples_are_of_one_graph_which_the_seed_decides() -> None:
    task = Sibling(parents=4, children=30)
    families = children_by_parent(task, 3000)
    assert sorted(families) == ["P0", "P1", "P2", "P3"]
    assert all(len(children) == 30 for children in families.values())
    assert len(set().union(*families.values())) == 120
    assert children_by_parent(Sibling(parents=4, children=30, seed=1), 3000) != families


def test_the_check_against_all_triples() -> None:
    task = Sibling(parents=3, children=3)
    families = children_by_parent(task, 2000)
    right = 0
    for answer in product(range(len(task.symbols)), repeat=3):
        one, other, parent = (task.symbols[i] for i in answer)
        expected = one != other and {one, other} <= families.get(parent, set())
        assert task.check([], answer) == expected
        right += expected
    # Of two random children of 9, and a random parent of 3.
    assert task.chance == pytest.approx(right / (9 * 9 * 3))
    assert not task.check([], []) and not task.check([], [*task.example(0).answer, 0])


def test_triples_are_uniform() -> None:
    task = Sibling(parents=2, children=3)
    counts = Counter(tuple(task.example(i).answer) for i in range(6000))
    assert len(counts) == 2 * 3 * 2
    assert all(abs(n - 500) < 5 * 500**0.5 for n in counts.values())


def test_strings_are_of_all_letters_and_differ() -> None:
    strings = [Sibling().show(Sibling().example(i).prompt) for i in range(2000)]
    assert len(set(strings)) == 2000
    assert all(re.fullmatch("([a-z] ){10}=", string) for string in strings)
    assert len(set("".join(strings))) == 28
    assert Sibling(hash=0).example(0).prompt == [1]
