"""A fixed set of a task's examples, to be answered and judged.

Shapes: B batch, W tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data_modules.tasks.base import END, Example, Task
from data_modules.tasks.baselines import baselines
from data_modules.tasks.measures import Measure, Training
from data_modules.tasks.windows import lay_out
from data_modules.windows import WindowBatch

SAMPLES = 1 << 126
"""Index behind all examples and before what tasks draw once, of the draws of sampled answers."""


class AnswerSet:
    """Examples 0 .. n - 1 of a task, one a window. It knows nothing of models.

    Args:
        task: of the examples; an out-of-distribution variant, maybe.
        n: how many, >= 1.
        depth: D of the model that is to answer.
        stride: of its depths.
        training: the answers that it was trained on again and again; None for fresh ones.
        trained: examples of the training; None for a set that is not of its distribution.
    """

    def __init__(
        self,
        task: Task,
        n: int,
        *,
        depth: int,
        stride: int = 1,
        training: Training | None = None,
        trained: Callable[[], Sequence[Example]] | None = None,
    ) -> None:
        self.task = task
        self.n = n
        self.depth = depth
        self.stride = stride
        self.training = training
        self._trained = trained

    def __len__(self) -> int:
        return self.n

    @cached_property
    def baselines(self) -> dict[str, float]:
        """By name, what exact match is to be compared with: ``chance``, and what
        :func:`~data_modules.tasks.baselines.baselines` has."""
        found = {"chance": self.task.chance}
        if self._trained is not None:
            found |= baselines(self.task, self.examples, self._trained())
        return found

    def measures(self, d_model: int) -> Sequence[Measure]:
        """What the task reports beside exact match, new and empty.

        Args:
            d_model: of the model that is to answer.
        """
        return self.task.measures(n=self.n, d_model=d_model, training=self.training)

    def uniforms(self, numbers: np.ndarray, width: int) -> Tensor:
        """Random numbers to draw the tokens of answers by, [B, W] float64 of [0, 1).

        Args:
            numbers: of the examples; each has its own stream, of the task's seed.
            width: W of their batch, which does not matter to the numbers.
        """
        rows = [self.task.draws(SAMPLES + i).uniform(width) for i in numbers.tolist()]
        return torch.from_numpy(np.stack(rows))

    @cached_property
    def examples(self) -> list[Example]:
        """In the order of their indices."""
        return [self.task.example(i) for i in range(self.n)]

    @cached_property
    def group_names(self) -> list[str]:
        """What accuracies are reported by, in the order of first use."""
        return list(dict.fromkeys(n for e in self.examples for n in self.task.groups(e) if n))

    @cached_property
    def n_positions(self) -> int:
        """Most tokens that an answer is asked for."""
        return max(sum(example.asked) for example in self.examples)

    def batch(self, numbers: np.ndarray) -> WindowBatch:
        """Some of the examples, with :attr:`WindowBatch.scored` where the model is to speak.

        Where answers close themselves, it may speak as long as the longest does.
        """
        held = [self.examples[i] for i in numbers.tolist()]
        longest = max(len(example.prompt) for example in held) + self.task.longest_answer
        width = longest + self.stride * self.depth
        batch = lay_out([[e] for e in held], width=width, depth=self.depth, stride=self.stride)
        if self.task.ends:
            assert batch.scored is not None
            for row, example in enumerate(held):
                start = len(example.prompt)
                batch.scored[row, start : start + self.task.longest_answer] = True
        return batch

    def places(self, numbers: np.ndarray, width: int) -> tuple[Tensor, Tensor]:
        """Which of its answer's asked tokens each token of a :meth:`batch` is, from 0, and its
        group's number, both [B, W] int64 and -1 elsewhere.

        Args:
            numbers: of the examples.
            width: W of their batch.
        """
        number = {name: i for i, name in enumerate(self.group_names)}
        position_BW = torch.full((len(numbers), width), -1)
        group_BW = torch.full_like(position_BW, -1)
        for row, i in enumerate(numbers.tolist()):
            example = self.examples[i]
            asked = torch.tensor(example.asked)
            place = slice(len(example.prompt), len(example))
            position_BW[row, place] = torch.where(asked, asked.cumsum(0) - 1, -1)
            if names := self.task.groups(example):
                group_BW[row, place] = torch.tensor([number.get(name, -1) for name in names])
        return position_BW, group_BW

    def right(self, numbers: np.ndarray, said_BW: Tensor) -> Tensor:
        """Which answers are right, [B] bool, by the task's own check.

        Args:
            numbers: of the examples.
            said_BW: their windows with what the model said.
        """
        found = []
        for i, row in zip(numbers.tolist(), said_BW.tolist(), strict=True):
            prompt = self.examples[i].prompt
            found.append(self.task.check(prompt, self.answer(i, row)))
        return torch.tensor(found)

    def answer(self, number: int, said: list[int]) -> list[int]:
        """The answer in a window, up to its end."""
        example, start = self.examples[number], len(self.examples[number].prompt)
        if not self.task.ends:
            return said[start : len(example)]
        answer = said[start : start + self.task.longest_answer]
        return answer[: answer.index(END) + 1] if END in answer else answer
