"""Every task's examples: pure functions of (seed, index), right by their own check, in bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data_modules.tasks import (
    HMM,
    Copy,
    Countdown,
    Group,
    Induction,
    Polynomial,
    Sat,
    Sibling,
    Task,
)
from data_modules.tasks.base import END, Draws

TASKS: list[Task] = [
    Copy(),
    Copy(letters=2, shortest=3, periods=5),
    Countdown(),
    Countdown(numbers=2, largest=5),
    Group(),
    Group(generators="all", running=False, length=3),
    HMM(),
    HMM(process="rrxor", length=5),
    Induction(),
    Induction(sentences=3, names=2, beginnings=2, endings=1),
    Polynomial(),
    Polynomial(operations=1),
    Sat(),
    Sat(variables=3, names=3, solutions=1),
    Sibling(),
    Sibling(parents=1, children=2, hash=0),
]
MANY = 2000


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_examples_are_right_and_in_bounds(task: Task) -> None:
    for i in range(MANY):
        example = task.example(i)
        assert task.check(example.prompt, example.answer)
        assert 1 <= len(example.prompt) <= task.longest_prompt
        assert 1 <= len(example.answer) <= task.longest_answer and any(example.asked)
        assert set(example.prompt + example.answer) <= set(range(1, len(task.symbols))) | {END}
        assert (example.answer[-1] == END) == task.ends
        assert len(task.groups(example)) in (0, len(example.answer))
        assert task.show(example.prompt).count(" ") == len(example.prompt) - 1


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_an_example_depends_on_seed_and_index_alone(task: Task) -> None:
    again = replace(task)
    backwards = {i: again.example(i) for i in reversed(range(50))}
    assert [task.example(i) for i in range(50)] == [backwards[i] for i in range(50)]
    assert task.example(1 << 60) == again.example(1 << 60)
    other = replace(task, seed=task.seed + 1)
    assert [task.example(i) for i in range(50)] != [other.example(i) for i in range(50)]


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_wrong_answers_are_refused(task: Task) -> None:
    random = np.random.default_rng(0)
    for i in range(200):
        example = task.example(i)
        answer = list(example.answer)
        place = int(random.choice(np.flatnonzero(example.asked)))
        assert not task.check(example.prompt, answer[:-1])
        assert not task.check(example.prompt, [*answer, answer[-1]])
        assert not task.check(example.prompt, [])
        answer[place] = END if answer[place] != END else 1
        assert not task.check(example.prompt, answer)


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_variants_share_symbols_and_are_other_examples(task: Task) -> None:
    for variant in task.variants().values():
        assert variant.symbols == task.symbols and variant.name == task.name
        assert variant.longest > task.longest


def test_the_numbers_of_two_examples_do_not_overlap() -> None:
    key = np.random.SeedSequence(0).generate_state(2, np.uint64)
    seen = [number for i in range(20) for number in Draws(key, i).many_below(1 << 60, 1000)]
    assert len(set(seen)) == len(seen)


def test_the_stream_never_changes() -> None:
    assert Copy().example(0).prompt == STREAM


STREAM = [7, 6, 15, 8, 9, 7, 13, 5, 14, 8, 1]
