"""Reach a target from given numbers by arithmetic, each number used once: the game Countdown.

Gandhi et al. 2024, "Stream of search" (arXiv 2404.03683), test search in language models with it.
Their answer is the trace of a search; here it is only the expression, in postfix form, which needs
no brackets and always has 2 k - 1 tokens.

    3 8 2 5 : 27 = 8 5 2 - * 3 +        numbers : target = expression
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from data_modules.tasks.base import ONCE, Draws, Example, Task, option

TO, EQUALS, PLUS, MINUS, TIMES, OVER = range(1, 7)
ZERO = OVER  # the id of a number n >= 1 is ZERO + n
OPERATORS = (PLUS, MINUS, TIMES, OVER)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Countdown(Task):
    """Numbers, and the value of a random expression of all of them as the target.

    As in the game, every intermediate result is a positive whole number, and divisions leave no
    remainder.

    Attributes:
        numbers: k, >= 2.
        largest: bound of the numbers, the target, and the intermediate results of the drawn
            expression, >= 2; the intermediate results of an answer may be larger.
    """

    name = "countdown"

    numbers: int = option(4, least=2)
    largest: int = option(100, least=2)

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        return (".", ":", "=", "+", "-", "*", "/", *map(str, range(1, self.largest + 1)))

    @property
    def longest_prompt(self) -> int:
        return self.numbers + 3

    @property
    def longest_answer(self) -> int:
        return 2 * self.numbers - 1

    @cached_property
    def chance(self) -> float:
        """Exact match of random expressions, which combine two random operands by a random operator
        until one is left; over 4,096 tries."""
        return sum(map(self._guess, range(4096))) / 4096

    def example(self, index: int) -> Example:
        draws = self.draws(index)
        numbers = [1 + n for n in draws.many_below(self.largest, self.numbers)]
        pool = [(n, [ZERO + n]) for n in numbers]
        while len(pool) > 1:
            (a, left), (b, right) = _take_two(pool, draws)
            # Never empty: the smaller can be subtracted from the larger, or equals divided.
            results = [
                (value, [*first, *second, operator])
                for x, y, first, second in ((a, b, left, right), (b, a, right, left))
                for operator in OPERATORS
                if (value := _apply(operator, x, y)) is not None and value <= self.largest
            ]
            pool.append(results[draws.below(len(results))])
        target, answer = pool[0]
        return Example([*(ZERO + n for n in numbers), TO, ZERO + target, EQUALS], answer)

    def check(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether it is an expression of each of the prompt's numbers once, equal to the target."""
        *numbers, _, target, _ = prompt
        if sorted(t for t in answer if t not in OPERATORS) != sorted(numbers):
            return False
        return _evaluate(answer) == target - ZERO

    def variants(self) -> dict[str, Task]:
        """One number more."""
        return {"more": replace(self, numbers=self.numbers + 1)}

    def _guess(self, number: int) -> bool:
        """Whether a random expression of an example's numbers is right."""
        prompt = self.example(number).prompt
        draws = self.draws(ONCE + number)
        pool = [[token] for token in prompt[: self.numbers]]
        while len(pool) > 1:
            left, right = _take_two(pool, draws)
            pool.append([*left, *right, OPERATORS[draws.below(4)]])
        return self.check(prompt, pool[0])


def _take_two(pool: list[T], draws: Draws) -> tuple[T, T]:
    """Removes two random items from a pool, in random order."""
    return pool.pop(draws.below(len(pool))), pool.pop(draws.below(len(pool)))


def _apply(operator: int, a: int, b: int) -> int | None:
    """a operator b, of positive numbers; None if the result is not a positive whole number."""
    if operator == PLUS:
        return a + b
    if operator == MINUS:
        return a - b if a > b else None
    if operator == TIMES:
        return a * b
    return a // b if a % b == 0 else None


def _evaluate(tokens: Sequence[int]) -> int | None:
    """The value of a postfix expression; None if it is invalid or leaves the positive numbers."""
    stack: list[int] = []
    for token in tokens:
        value: int | None = token - ZERO
        if token in OPERATORS:
            if len(stack) < 2:
                return None
            b, a = stack.pop(), stack.pop()
            value = _apply(token, a, b)
        if value is None:
            return None
        stack.append(value)
    return stack[0] if len(stack) == 1 else None
