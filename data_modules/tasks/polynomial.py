"""Reduce an expression of polynomials over F7, modulo X^5: arithmetic of adjustable length.

Gloeckle et al. 2024, "Better & faster large language models via multi-token prediction" (arXiv
2404.19737), section 4.2: negation, addition, multiplication and composition, with a random number
of operations. Coefficients and operations are uniform. Expressions are in prefix form, which needs
no brackets, and coefficients begin with the constant one.

    + 1 0 0 0 0 o 3 1 0 0 0 0 2 0 0 0 = 4 2 0 0 0        1 + (3 + X)(2 X)

A composition p o q is p(q(X)) of p as written: if q has a constant term, other polynomials of p's
class modulo X^5 would give another result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_modules.tasks.base import Draws, Example, option
from data_modules.tasks.held_out import HeldOutTask

EQUALS, MINUS, PLUS, TIMES, OF, FIRST = range(1, 7)
Q, N = 7, 5
"""Size of the field, and number of coefficients of a polynomial."""


@dataclass(frozen=True, kw_only=True)
class Polynomial(HeldOutTask):
    """Expressions of ``least`` .. ``operations`` operations, every number equally often.

    Attributes:
        least: least number of operations of an expression, >= 1.
        operations: largest number of operations of an expression.
    """

    name = "polynomial"
    symbols = (".", "=", "-", "+", "*", "o", *map(str, range(Q)))
    longest_answer = N
    chance = float(Q**-N)
    sizes = ("least", "operations")
    larger = "more"

    least: int = option(1, least=1)
    operations: int = option(5, least=1)

    @property
    def longest_prompt(self) -> int:
        """The length for binary operations only, which have one more operand than operations."""
        return self.operations + N * (self.operations + 1) + 1

    def of_size(self, size: int, draws: Draws) -> Example:
        prompt = [*_expression(size, draws), EQUALS]
        return Example(prompt, _reduce(prompt))

    def check(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        return list(answer) == _reduce(prompt)

    def groups(self, example: Example) -> Sequence[str]:
        """The number of operations of the expression."""
        number = sum(MINUS <= token <= OF for token in example.prompt)
        return [f"operations_{number}"] * N


def _expression(operations: int, draws: Draws) -> list[int]:
    """An expression in prefix form; a binary operation's left side has a random share of the
    remaining operations."""
    if operations == 0:
        return [FIRST + c for c in draws.many_below(Q, N)]
    operation = MINUS + draws.below(4)
    if operation == MINUS:
        return [MINUS, *_expression(operations - 1, draws)]
    left = draws.below(operations)
    return [operation, *_expression(left, draws), *_expression(operations - 1 - left, draws)]


def _reduce(prompt: Sequence[int]) -> list[int]:
    """Tokens of the polynomial that an expression, ended by ``=``, equals."""
    # Read from the end, operands come before their operation, the left one on top.
    stack: list[list[int]] = []
    digits: list[int] = []
    for token in reversed(prompt[:-1]):
        if token >= FIRST:
            digits.insert(0, token - FIRST)
            if len(digits) == N:
                stack.append(digits)
                digits = []
            continue
        p = stack.pop()
        result = [-c % Q for c in p] if token == MINUS else BINARY[token](p, stack.pop())
        stack.append(result)
    (result,) = stack
    return [FIRST + c for c in result]


def _add(p: list[int], q: list[int]) -> list[int]:
    return [(a + b) % Q for a, b in zip(p, q, strict=True)]


def _multiply(p: list[int], q: list[int]) -> list[int]:
    return [sum(p[j] * q[i - j] for j in range(i + 1)) % Q for i in range(N)]


def _compose(p: list[int], q: list[int]) -> list[int]:
    """By Horner's rule."""
    result = [0] * N
    for coefficient in reversed(p):
        result = _multiply(result, q)
        result[0] = (result[0] + coefficient) % Q
    return result


BINARY = {PLUS: _add, TIMES: _multiply, OF: _compose}
