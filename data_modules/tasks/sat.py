"""Satisfy a formula in conjunctive normal form: random 3-SAT where it is hardest.

With 4.26 clauses per variable, half of the formulas can be satisfied and search takes longest
(Mitchell, Selman & Levesque 1992; Crawford & Auton 1996). Only formulas with few solutions are
asked: formulas are drawn until one has few, by trying every assignment.

    1 -3 4 | -1 2 3 | -2 3 -4 = 1 2 -3 -4        clauses = a literal for each variable
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product

from data_modules.tasks.base import Draws, Example, Task, option

BAR, EQUALS, FIRST = 1, 2, 3
RATIO = 4.26
"""Clauses per variable."""
MOST = 16
"""Most variables; formulas are tables of 2^n bits."""


@dataclass(frozen=True, kw_only=True)
class Sat(Task):
    """Formulas of ``round(4.26 n)`` clauses, each of three variables, with repetition of clauses.

    The example's own answer is a random solution; all solutions are right.

    Attributes:
        variables: n of a formula, in 3 .. 16.
        names: number of names that the variables are drawn from, >= n, so that the symbols cover
            larger formulas.
        solutions: most solutions of a formula, >= 1; the least is one.
    """

    name = "sat"

    variables: int = option(8, least=3, most=MOST)
    names: int = option(12, least=1)
    solutions: int = option(3, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_enough("names", of="variables")

    @property
    def clauses(self) -> int:
        """Number of clauses of a formula."""
        return round(RATIO * self.variables)

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        literals = (f"{sign}{i + 1}" for i in range(self.names) for sign in ("", "-"))
        return (".", "|", "=", *literals)

    @property
    def longest_prompt(self) -> int:
        return 4 * self.clauses

    @property
    def longest_answer(self) -> int:
        return self.variables

    @cached_property
    def chance(self) -> float:
        """Exact match of random values for the variables: solutions / 2^n, over 256 formulas."""
        tables = (self._formula(self.draws(i))[1] for i in range(256))
        return sum(table.bit_count() for table in tables) / 256 / 2**self.variables

    def example(self, index: int) -> Example:
        draws = self.draws(index)
        formula, table = self._formula(draws)
        for _ in range(draws.below(table.bit_count())):
            table &= table - 1
        solution = (table & -table).bit_length() - 1
        names = sorted(draws.permutation(self.names)[: self.variables])

        def literal(variable: int, negative: int) -> int:
            return FIRST + 2 * names[variable] + negative

        prompt: list[int] = []
        for clause in formula:
            prompt += [*(literal(v, negative) for v, negative in clause), BAR]
        prompt[-1] = EQUALS
        answer = [literal(v, ~solution >> v & 1) for v in range(self.variables)]
        return Example(prompt, answer)

    def check(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether it has one literal for each of the prompt's variables, in order, and a true one
        in each clause."""
        clauses = [set(prompt[i : i + 3]) for i in range(0, len(prompt), 4)]
        variables = sorted({(literal - FIRST) // 2 for clause in clauses for literal in clause})
        assigns_all = [(literal - FIRST) // 2 for literal in answer] == variables
        return assigns_all and all(not clause.isdisjoint(answer) for clause in clauses)

    def variants(self) -> dict[str, Task]:
        """Two more variables, if there are enough names."""
        n = self.variables + 2
        return {"larger": replace(self, variables=n)} if n <= min(self.names, MOST) else {}

    def _formula(self, draws: Draws) -> tuple[list[Clause], int]:
        """Clauses, and a table whose bit a says whether assignment a satisfies all of them; bit v
        of an assignment is the value of variable v."""
        while True:
            numbers = draws.many_below(len(self._all_clauses), self.clauses)
            table = -1
            for i in numbers:
                table &= self._all_clauses[i][1]
                if not table:
                    break
            if not 1 <= table.bit_count() <= self.solutions:
                continue
            formula = [self._all_clauses[i][0] for i in numbers]
            # A variable in no clause could not be asked for.
            if len({v for clause in formula for v, _ in clause}) == self.variables:
                return formula, table

    @cached_property
    def _all_clauses(self) -> list[tuple[Clause, int]]:
        """Every clause of n variables, with its own table."""
        n = self.variables
        full = (1 << (1 << n)) - 1
        # Blocks of 2^v zeros and 2^v ones.
        true = [full // ((1 << (1 << v)) + 1) << (1 << v) for v in range(n)]
        clauses = []
        for variables in combinations(range(n), 3):
            for signs in product((0, 1), repeat=3):
                clause = tuple(zip(variables, signs, strict=True))
                table = 0
                for v, negative in clause:
                    table |= true[v] ^ full if negative else true[v]
                clauses.append((clause, table))
        return clauses


Clause = tuple[tuple[int, int], ...]
"""Variables from 0, each with whether it is negated."""
