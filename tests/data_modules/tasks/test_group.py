"""Products in A5 against matrices of permutations."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from data_modules.tasks import Group
from data_modules.tasks.group import ELEMENTS, GENERATORS, PRODUCT


@cache
def matrix(symbol: str) -> np.ndarray:
    """The matrix that maps the row vector of a place to that of its image."""
    return np.eye(5, dtype=int)[[int(digit) for digit in symbol]]


def products(word: list[str]) -> list[str]:
    """Running products; by rows, a product's first factor acts first."""
    results, product = [], np.eye(5, dtype=int)
    for symbol in word:
        product = product @ matrix(symbol)
        results.append("".join(map(str, product.argmax(1))))
    return results


def test_the_elements_are_the_even_permutations_that_two_generate() -> None:
    symbols = Group().symbols[2:]
    assert len(set(symbols)) == 60
    assert all(round(np.linalg.det(matrix(symbol))) == 1 for symbol in symbols)
    reached = {ELEMENTS.index((0, 1, 2, 3, 4))}
    while more := {PRODUCT[a][g] for a in reached for g in GENERATORS["two"]} - reached:
        reached |= more
    assert reached == set(range(60))


@pytest.mark.parametrize("generators, kinds", [("two", 2), ("all", 60)])
def test_answers_are_the_running_products(generators: str, kinds: int) -> None:
    task, symbols = Group(generators=generators), set()
    for i in range(600):
        example = task.example(i)
        word = task.show(example.prompt).split()[:-1]
        symbols.update(word)
        assert task.show(example.answer).split() == products(word)
        wrong = list(example.answer)
        wrong[i % len(wrong)] = 2 + (wrong[i % len(wrong)] - 1) % 60
        assert not task.check(example.prompt, wrong)
    assert len(symbols) == kinds


def test_without_running_only_the_last_product_is_the_answer() -> None:
    task, running = Group(running=False), Group()
    for i in range(500):
        example, whole = task.example(i), running.example(i)
        assert example.prompt == whole.prompt and example.answer == whole.answer[-1:]
        assert task.groups(example)[0] == running.groups(whole)[-1]
    assert task.chance == 1 / 60 and task.longest_answer == 1


def test_the_chance_and_the_groups_of_answers() -> None:
    assert Group(length=2).chance == pytest.approx((1 / 60 + 1 / 3600) / 2)
    task = Group(shortest=5, length=5)
    names = ["factors_1", "factors_2-3", "factors_2-3", "factors_4-7", "factors_4-7"]
    assert task.groups(task.example(0)) == names
