"""A fixed set of a task's examples to answer and judge, and scores without learning the task.

Shapes: B batch, W tokens of a window.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cache, cached_property
from itertools import compress
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from data_modules.tasks.base import END, ONCE, Example, Task, question_of
from data_modules.tasks.measures import TaskMeasure, Training
from data_modules.tasks.windows import TaskWindows, lay_out
from data_modules.windows import WindowBatch

SAMPLES = ONCE >> 1
"""First index of the draws of sampled answers: above the indices of all examples and below those of
a task's one-time draws."""
K = TypeVar("K")
T = TypeVar("T")
TRIED = 1 << 14
"""Number of training examples, the first of a run, that answers are compared with."""


@dataclass(eq=False)
class AnswerSet:
    """Examples 0 .. n - 1 of a task, one per window. It knows nothing of models."""

    task: Task  # the task, or an out-of-distribution variant of it
    n: int  # number of examples, >= 1
    _: KW_ONLY
    depth: int  # D of the model that answers
    stride: int = 1  # s, tokens from one depth's target to the next one's
    # Its training windows; None for a set from another distribution.
    trained: TaskWindows | None = None

    def __len__(self) -> int:
        return self.n

    @cached_property
    def baselines(self) -> dict[str, float]:
        """Values to compare exact match with: ``chance``, and those of :func:`baselines`."""
        scores = {"chance": self.task.chance}
        if self.trained is not None:
            scores |= baselines(self.task, self.examples, self.trained.read(0, TRIED))
        return scores

    def measures(self, d_model: int) -> Sequence[TaskMeasure]:
        """The metrics of :meth:`Task.measures`, new and empty."""
        return self.task.measures(n=self.n, d_model=d_model, training=self.training)

    @cached_property
    def training(self) -> Training | None:
        """The answers of its fixed training set; None if it trains on fresh examples."""
        if self.trained is None or self.trained.examples is None:
            return None
        windows, n = self.trained, self.trained.examples
        return cache(lambda: [example.answer for example in windows.read(0, n)])

    def uniforms(self, numbers: np.ndarray, width: int) -> Tensor:
        """Random numbers to draw the tokens of answers with, [B, W] float64 in [0, 1). Each example
        has its own stream, from the task's seed, which does not depend on the width W."""
        rows = [self.task.draws(SAMPLES + i).uniform(width) for i in numbers.tolist()]
        return torch.from_numpy(np.stack(rows))

    @cached_property
    def examples(self) -> list[Example]:
        return [self.task.example(i) for i in range(self.n)]

    @cached_property
    def group_names(self) -> list[str]:
        """Names of the groups that accuracies are reported for, in the order of first use."""
        return list(dict.fromkeys(n for e in self.examples for n in self.task.groups(e) if n))

    @cached_property
    def n_positions(self) -> int:
        """Largest number of asked tokens in an answer."""
        return max(sum(example.asked) for example in self.examples)

    def batch(self, numbers: np.ndarray) -> WindowBatch:
        """The batch of some examples, with :attr:`WindowBatch.scored` where the model answers, up
        to the longest length if it ends its answers itself."""
        examples = [self.examples[i] for i in numbers.tolist()]
        longest = max(len(example.prompt) for example in examples) + self.task.longest_answer
        rows = [[example] for example in examples]
        tokens, scored, _ = map(torch.from_numpy, lay_out(rows, longest + self.stride * self.depth))
        if self.task.ends:
            for row, example in enumerate(examples):
                start = len(example.prompt)
                scored[row, start : start + self.task.longest_answer] = True
        return WindowBatch(tokens, self.depth, scored=scored, stride=self.stride)

    def answer_positions(self, numbers: np.ndarray, width: int) -> tuple[Tensor, Tensor]:
        """For each token of a :meth:`batch` of width W, its index among the asked tokens of its
        answer, and the number of its group, both [B, W] int64 and -1 elsewhere."""
        number = {name: i for i, name in enumerate(self.group_names)}
        position_BW = torch.full((len(numbers), width), -1)
        group_BW = torch.full_like(position_BW, -1)
        for row, i in enumerate(numbers.tolist()):
            example = self.examples[i]
            asked = torch.tensor(example.asked)
            span = slice(len(example.prompt), len(example))
            position_BW[row, span] = torch.where(asked, asked.cumsum(0) - 1, -1)
            if names := self.task.groups(example):
                group_BW[row, span] = torch.tensor([number.get(name, -1) for name in names])
        return position_BW, group_BW

    def right(self, numbers: np.ndarray, answers_BW: Tensor) -> Tensor:
        """Which answers, in the windows of these examples, are right by the task's own check: [B]
        bool."""
        rows = zip(numbers.tolist(), answers_BW.tolist(), strict=True)
        check, examples = self.task.check, self.examples
        return torch.tensor([check(examples[i].prompt, self.answer(i, row)) for i, row in rows])

    def answer(self, number: int, row: list[int]) -> list[int]:
        """The answer in a window, up to its end."""
        example, start = self.examples[number], len(self.examples[number].prompt)
        if not self.task.ends:
            return row[start : len(example)]
        answer = row[start : start + self.task.longest_answer]
        return answer[: answer.index(END) + 1] if END in answer else answer


def baselines(
    task: Task, examples: Sequence[Example], training: Sequence[Example]
) -> dict[str, float]:
    """``seen``, the share of examples whose content occurs in training, and ``trivial``, the best
    exact match of three strategies that do not know the task:

    - a constant: training's most frequent answer of the same length;
    - the majority: training's most frequent token at each position;
    - a table: training's most frequent answer to the same question, else the constant.

    Given tokens are read, as a model reads them. There is at least one example of each kind.
    """
    contents = {task.content(example) for example in training}
    answers = [tuple(compress(example.answer, example.asked)) for example in training]
    by_length = _most_frequent((len(answer), answer) for answer in answers)
    by_position = _most_frequent(pair for answer in answers for pair in enumerate(answer))
    by_question = _most_frequent(zip(map(question_of, training), answers, strict=True))

    def constant(example: Example) -> Sequence[int]:
        return by_length.get(sum(example.asked), ())

    def majority(example: Example) -> Sequence[int]:
        return [by_position.get(position, END) for position in range(sum(example.asked))]

    def table(example: Example) -> Sequence[int]:
        return by_question.get(question_of(example)) or constant(example)

    n = len(examples)
    return {
        "seen": sum(task.content(example) in contents for example in examples) / n,
        "trivial": max(
            sum(_is_right(task, example, strategy(example)) for example in examples) / n
            for strategy in (constant, majority, table)
        ),
    }


def _is_right(task: Task, example: Example, tokens: Sequence[int]) -> bool:
    """Whether an answer with these asked tokens is right."""
    remaining = iter(tokens)
    answer = [
        next(remaining, END) if is_asked else token
        for token, is_asked in zip(example.answer, example.asked, strict=True)
    ]
    return task.check(example.prompt, answer)


def _most_frequent(pairs: Iterable[tuple[K, T]]) -> dict[K, T]:
    """The most frequent value of each key; of several, the one that came first."""
    counts: defaultdict[K, Counter[T]] = defaultdict(Counter)
    for key, value in pairs:
        counts[key][value] += 1
    return {key: counter.most_common(1)[0][0] for key, counter in counts.items()}
