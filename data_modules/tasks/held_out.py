"""Questions that validation alone asks: a hash of the question decides, whatever the seed.

A task with short questions soon has asked all of them, and a model that learned them by heart would
be right of those that it has read. Where questions are so many that none comes twice, nothing needs
to be held out; ``val/seen`` says which it is (``baselines.py``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np

from data_modules.tasks.base import TRAINING, Draws, Example, Task
from mtp_lightning.errors import UserError
from mtp_lightning.settings import require_whole

_TRIES = 100
"""Draws for each that is expected: what is not found then is not there."""
_GUESSED = 1024
"""Examples that the chance of who guesses is a mean over."""


@dataclass(frozen=True, kw_only=True)
class HeldOutTask(Task):
    """A task whose validation and training share no question.

    Attributes:
        held_out: n >= 2; one question in n is validation's, and all others are training's. None
            for one stream of both, as runs have it that were stored without this key.
    """

    held_out: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.held_out is not None:
            require_whole("data.task.held_out (null for none)", self.held_out, least=2)

    @abstractmethod
    def draw(self, draws: Draws) -> Example:
        """An example, by the next random numbers."""

    def question(self, prompt: Sequence[int]) -> Sequence[int] | None:
        """What is hashed of a prompt; None for one that is training's in any case."""
        return prompt

    def example(self, index: int) -> Example:
        """The first that is on the side of its index, of those that its random numbers give.

        Raises:
            UserError: there is none, for the questions are too few to share.
        """
        draws = self.draws(index)
        if self.held_out is None:
            return self.draw(draws)
        of_validation = index < 1 << TRAINING
        for _ in range(_TRIES * self.held_out):
            example = self.draw(draws)
            if self.is_held_out(example.prompt) == of_validation:
                return example
        whose = "validation" if of_validation else "training"
        raise UserError(
            f"data.task.held_out={self.held_out} leaves no question of data={self.name} to "
            f"{whose}: give another number, null for one stream of both, or longer examples."
        )

    def is_held_out(self, prompt: Sequence[int]) -> bool:
        """Whether a question is validation's."""
        question = self.question(prompt)
        if self.held_out is None or question is None:
            return False
        ids = np.asarray(question, dtype="<u4").tobytes()
        return int.from_bytes(blake2b(ids, digest_size=8).digest(), "little") % self.held_out == 0

    def spec(self) -> dict[str, Any]:
        """As :class:`Task` has it; what holds nothing out is what it was without the option."""
        spec = super().spec()
        if self.held_out is None:
            del spec["held_out"]
        return spec

    @cached_property
    def _validation(self) -> list[Example]:
        """The first examples, whose lengths are not those of all questions."""
        return [self.example(i) for i in range(_GUESSED)]
