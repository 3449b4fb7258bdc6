"""Countdown against an evaluation in fractions, over all possible answers."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import permutations, product

import pytest

from data_modules.tasks import Countdown


def right(prompt: str, answer: str) -> bool:
    """By a recursion from an expression's end, in fractions."""
    numbers, target = prompt.rstrip("= ").split(" : ")
    tokens = answer.split()
    if Counter(t for t in tokens if t.isdigit()) != Counter(numbers.split()):
        return False

    def value() -> Fraction:
        token = tokens.pop()
        if token.isdigit():
            return Fraction(token)
        b, a = value(), value()
        found = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[token]
        if found <= 0 or found.denominator != 1:
            raise ZeroDivisionError
        return found

    try:
        return value() == int(target) and not tokens
    except (IndexError, ZeroDivisionError):
        return False


@pytest.mark.parametrize("numbers", [2, 4, 7])
def test_the_drawn_expression_is_right(numbers: int) -> None:
    task = Countdown(numbers=numbers, largest=60)
    operators: Counter[str] = Counter()
    for i in range(800):
        example = task.example(i)
        answer = task.show(example.answer)
        assert right(task.show(example.prompt), answer)
        assert len(example.answer) == 2 * numbers - 1 == task.longest_answer
        assert len(example.prompt) == task.longest_prompt
        operators.update(t for t in answer.split() if not t.isdigit())
    assert set(operators) == set("+-*/")


def test_the_check_agrees_on_all_sequences() -> None:
    """Three numbers and two operators in every order, right or no expression at all."""
    task = Countdown(numbers=3, largest=12)
    found = 0
    for i in range(12):
        prompt = task.example(i).prompt
        for pair in product((3, 4, 5, 6), repeat=2):
            for answer in set(permutations([*prompt[:3], *pair])):
                expected = right(task.show(prompt), task.show(answer))
                assert task.check(prompt, answer) == expected
                found += expected
    assert found >= 12


def test_other_numbers_are_refused() -> None:
    task = Countdown(numbers=2, largest=9)
    prompt = [task.symbols.index(s) for s in ["2", "3", ":", "6", "="]]

    def says(answer: str) -> bool:
        return task.check(prompt, [task.symbols.index(s) for s in answer.split()])

    assert says("2 3 *") and says("3 2 *")
    assert not says("1 6 *") and not says("6") and not says("2 3 * 2 2 - +") and not says("2 3 +")
    assert not says("2 3") and not says("* 2 3") and not says("2 3 :") and not says("2 = *")


def test_chance_is_the_share_of_expressions() -> None:
    task = Countdown(numbers=2, largest=6)
    shares = []
    for i in range(2000):
        prompt = task.example(i).prompt
        pairs = (prompt[:2], prompt[1::-1])
        shares.append(sum(task.check(prompt, [*p, o]) for p in pairs for o in range(3, 7)) / 8)
    share = sum(shares) / len(shares)
    assert abs(task.chance - share) < 5 * (share / 4096) ** 0.5
