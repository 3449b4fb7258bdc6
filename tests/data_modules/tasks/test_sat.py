"""3-SAT against a table of all assignments, parsed from the text."""

from __future__ import annotations

from itertools import product

import pytest

from data_modules.tasks import Sat


def solutions(formula: str) -> list[str]:
    """Every assignment that satisfies a formula, as an answer is shown."""
    clauses = [[int(n) for n in clause.split()] for clause in formula.rstrip("= ").split("|")]
    assert all(len({abs(n) for n in clause}) == 3 for clause in clauses)
    names = sorted({abs(n) for clause in clauses for n in clause})
    satisfying = []
    for signs in product((1, -1), repeat=len(names)):
        literals = [n * sign for n, sign in zip(names, signs, strict=True)]
        if all(set(clause) & set(literals) for clause in clauses):
            satisfying.append(" ".join(map(str, literals)))
    return satisfying


@pytest.mark.parametrize("variables, n", [(3, 400), (5, 400), (8, 80), (12, 5)])
def test_formulas_have_few_solutions_and_the_answer_is_one(variables: int, n: int) -> None:
    task = Sat(variables=variables)
    for i in range(n):
        example = task.example(i)
        formula = task.show(example.prompt)
        assert formula.count("|") + 1 == round(4.26 * variables) == task.clauses
        satisfying = solutions(formula)
        assert 1 <= len(satisfying) <= 3
        assert task.show(example.answer) in satisfying and len(example.answer) == variables


def test_the_check_finds_every_solution_and_no_other() -> None:
    task = Sat(variables=4, names=6)
    for i in range(100):
        example = task.example(i)
        names = [(literal - 3) // 2 for literal in example.answer]
        answers = [
            [3 + 2 * n + sign for n, sign in zip(names, signs, strict=True)]
            for signs in product((0, 1), repeat=4)
        ]
        right = [task.show(answer) for answer in answers if task.check(example.prompt, answer)]
        assert right == solutions(task.show(example.prompt))
        assert not task.check(example.prompt, example.answer[::-1])
        assert not task.check(example.prompt, [*example.answer[:-1], example.answer[0]])


def test_every_number_of_solutions_occurs_and_each_solution_is_asked() -> None:
    task = Sat(variables=6, solutions=2)
    counts, first = [], 0
    for i in range(500):
        example = task.example(i)
        satisfying = solutions(task.show(example.prompt))
        counts.append(len(satisfying))
        first += len(satisfying) == 2 and task.show(example.answer) == satisfying[0]
    assert set(counts) == {1, 2}
    twos = counts.count(2)
    assert abs(first - twos / 2) < 4 * (twos / 4) ** 0.5
    assert task.chance == pytest.approx(sum(counts[:256]) / 256 / 2**6)


def test_larger_formulas_use_the_same_names() -> None:
    larger = Sat().variants()["larger"]
    assert isinstance(larger, Sat) and larger.variables == 10
    assert Sat(variables=11).variants() == {} == Sat(variables=15, names=20).variants()
    used = {n for i in range(200) for n in Sat().example(i).answer}
    assert used == set(range(3, 3 + 2 * 12))
