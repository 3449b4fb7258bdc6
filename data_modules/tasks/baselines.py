"""Scores on a task without learning it: the share of validation that was seen in training, and the
exact match of a constant, of the most frequent tokens and of a table of training's answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from data_modules.tasks.base import END, Example, Task, question_of

T = TypeVar("T")
TRIED = 1 << 14
"""Number of training examples that are used: the first of a run."""


def baselines(
    task: Task, examples: Sequence[Example], training: Sequence[Example]
) -> dict[str, float]:
    """``seen``, the share of examples whose content occurs in training, and ``trivial``, the best
    exact match of three strategies that do not know the task:

    - a constant: training's most frequent answer of the same length;
    - the majority: training's most frequent token at each position;
    - a table: training's most frequent answer to the same question, else the constant.

    Given tokens are read, as a model reads them.

    Args:
        task: the task, which checks answers.
        examples: validation examples, at least one.
        training: training examples, at least one.
    """
    contents = {task.content(example) for example in training}
    of_size: dict[int, Counter[tuple[int, ...]]] = {}
    at_position: dict[int, Counter[int]] = {}
    to_question: dict[tuple[int | None, ...], Counter[tuple[int, ...]]] = {}
    for example in training:
        said = _said(example)
        of_size.setdefault(len(said), Counter())[said] += 1
        to_question.setdefault(question_of(example), Counter())[said] += 1
        for position, token in enumerate(said):
            at_position.setdefault(position, Counter())[token] += 1

    def constant(example: Example) -> Sequence[int]:
        return _most(of_size.get(sum(example.asked))) or ()

    def majority(example: Example) -> Sequence[int]:
        return [_most(at_position.get(position)) or END for position in range(sum(example.asked))]

    def table(example: Example) -> Sequence[int]:
        return _most(to_question.get(question_of(example))) or constant(example)

    n = len(examples)
    return {
        "seen": sum(task.content(example) in contents for example in examples) / n,
        "trivial": max(
            sum(_is_right(task, example, strategy(example)) for example in examples) / n
            for strategy in (constant, majority, table)
        ),
    }


def _said(example: Example) -> tuple[int, ...]:
    """The asked tokens of an answer."""
    return tuple(t for t, asked in zip(example.answer, example.asked, strict=True) if asked)


def _is_right(task: Task, example: Example, said: Sequence[int]) -> bool:
    """Whether an answer with these asked tokens is right."""
    left = iter(said)
    answer = [
        next(left, END) if asked else token
        for token, asked in zip(example.answer, example.asked, strict=True)
    ]
    return task.check(example.prompt, answer)


def _most(counted: Counter[T] | None) -> T | None:
    """The most frequent value; of several, the one that was counted first."""
    return None if counted is None else counted.most_common(1)[0][0]
