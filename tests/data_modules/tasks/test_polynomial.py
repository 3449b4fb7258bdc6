"""Polynomials over F7 against numpy's convolutions of integers, reduced after each operation."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from data_modules.tasks import Polynomial


def reduced(p: np.ndarray) -> np.ndarray:
    """Modulo 7 and X^5."""
    return np.pad(p[:5], (0, max(5 - len(p), 0))) % 7


def value(tokens: list[str]) -> np.ndarray:
    """Coefficients, by recursion from the front, which eats the tokens."""
    if tokens[0].isdigit():
        return np.array([int(tokens.pop(0)) for _ in range(5)])
    operation = tokens.pop(0)
    p = value(tokens)
    if operation == "-":
        return reduced(-p)
    q = value(tokens)
    if operation == "o":
        whole, power = np.zeros(17, dtype=int), np.array([1])
        for c in p:
            whole[: len(power)] += c * power
            power = np.convolve(power, q)[:17]
        return reduced(whole)
    return reduced(p + q if operation == "+" else np.convolve(p, q))


@pytest.mark.parametrize("least, most", [(1, 5), (6, 12)])
def test_answers_are_the_reduced_polynomials(least: int, most: int) -> None:
    task = Polynomial(least=least, operations=most)
    counts: Counter[str] = Counter()
    for i in range(800):
        example = task.example(i)
        tokens = task.show(example.prompt).split()
        operations = [t for t in tokens if t in ("-", "+", "*", "o")]
        assert least <= len(operations) <= most
        assert task.groups(example) == [f"operations_{len(operations)}"] * 5
        counts.update(operations)
        assert tokens.pop() == "="
        expected = value(tokens).tolist()
        assert not tokens, "an expression and nothing else"
        assert [int(t) for t in task.show(example.answer).split()] == expected
        example.answer[i % 5] = 6 + (example.answer[i % 5] - 5) % 7
        assert not task.check(example.prompt, example.answer)
    # Each of the four equally often.
    total = sum(counts.values())
    assert all(abs(counts[o] - total / 4) < 4 * (total * 3 / 16) ** 0.5 for o in "-+*o")


def test_the_example_of_the_docstring_is_right() -> None:
    task = Polynomial()

    def read(text: str) -> list[int]:
        return [task.symbols.index(symbol) for symbol in text.split()]

    prompt = read("+ 1 0 0 0 0 o 3 1 0 0 0 0 2 0 0 0 =")
    assert task.check(prompt, read("4 2 0 0 0"))
    assert task.chance == 1 / 16807
