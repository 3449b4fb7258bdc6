"""Countdown against an evaluation in fractions, over all possible answers."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import permutations, product

import pytest

from data_modules.tasks import Countdown


def is_right(prompt: str, answer: str) -> bool:
    """Whether an answer is right, by recursion from its end, in fractions."""
    numbers, target = prompt.rstrip("= ").split(" : ")
    tokens = answer.split()
    if Counter(t for t in tokens if t.isdigit()) != Counter(numbers.split()):
        return False

    def value() -> Fraction:
        token = tokens.pop()
        if token.isdigit():
            return Fraction(token)
        b, a = value(), value()
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[token]
        if result <= 0 or result.denominator != 1:
            raise ZeroDivisionError
        return result

    try:
        return value() == int(target) and not tokens
    except (IndexError, ZeroDivisionError):
        return False


@pytest.mark.parametrize("numbers", [2, 4, 7])
def test_answers_are_right_expressions(numbers: int) -> None:
    task = Countdown(numbers=numbers, largest=60)
    operators: Counter[str] = Counter()
    for i in range(800):
        example = task.example(i)
        answer = task.show(example.answer)
        assert is_right(task.show(example.prompt), answer)
        assert len(example.answer) == 2 * numbers - 1 == task.longest_answer
        assert len(example.prompt) == task.longest_prompt
        operators.update(t for t in answer.split() if not t.isdigit())
    assert set(operators) == set("+-*/")


def test_the_check_against_brute_force() -> None:
    """Three numbers and two operators in every order."""
    task = Countdown(numbers=3, largest=12)
    n_right = 0
    for i in range(12):
        prompt = task.example(i).prompt
        for pair in product((3, 4, 5, 6), repeat=2):
            for answer in set(permutations([*prompt[:3], *pair])):
                expected = is_right(task.show(prompt), task.show(answer))
                assert task.check(prompt, answer) == expected
                n_right += expected
    assert n_right >= 12


def test_wrong_expressions_are_refused() -> None:
    task = Countdown(numbers=2, largest=9)
    prompt = [task.symbols.index(s) for s in ["2", "3", ":", "6", "="]]

    def accepts(answer: str) -> bool:
        return task.check(prompt, [task.symbols.index(s) for s in answer.split()])

    assert accepts("2 3 *") and accepts("3 2 *")
    wrong = ("1 6 *", "6", "2 3 * 2 2 - +", "2 3 +", "2 3", "* 2 3", "2 3 :", "2 = *")
    assert not any(accepts(answer) for answer in wrong)


def test_chance_is_the_share_of_right_expressions() -> None:
    task = Countdown(numbers=2, largest=6)
    shares = []
    for i in range(2000):
        prompt = task.example(i).prompt
        pairs = (prompt[:2], prompt[1::-1])
        shares.append(sum(task.check(prompt, [*p, o]) for p in pairs for o in range(3, 7)) / 8)
    share = sum(shares) / len(shares)
    assert abs(task.chance - share) < 5 * (share / 4096) ** 0.5
