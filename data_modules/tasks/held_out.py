"""Tasks with questions that only validation asks; a hash of the question decides, for every seed.

A task with short questions soon has asked all of them, and a model that memorized the answers would
be right. A task with so many questions that none comes twice holds nothing out; ``val/seen``
reports the share of validation that training has shown (``answers.baselines``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np

from data_modules.tasks.base import STREAM, Draws, Example, Task, option
from mtp_lightning.errors import UserError
from mtp_lightning.settings import require

_TRIES = 1000
"""Draws per expected hit: a kind of question that is not found in that many does not exist."""
_GUESSED = 1024
"""Number of examples that the chance of a guess is averaged over."""


@dataclass(frozen=True, kw_only=True)
class HeldOutTask(Task):
    """A task whose questions have a size, and whose validation and training share no question.

    Attributes:
        sizes: the options with the least and the largest size; all sizes are equally frequent.
        larger: name of the test set with up to twice the largest size.
        held_out: n >= 2; one question in n is for validation, all others for training. None uses
            one stream for both, as in runs that were stored without this key.
    """

    sizes: ClassVar[tuple[str, str]]
    larger: ClassVar[str] = "longer"

    held_out: int | None = option(None, least=2, null="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        lower, upper = self.sizes
        least, most = getattr(self, lower), getattr(self, upper)
        require(least <= most, f"data.task.{lower}", least, f"at most data.task.{upper}={most}")

    @property
    def all_sizes(self) -> range:
        """The sizes of questions."""
        least, largest = (getattr(self, name) for name in self.sizes)
        return range(least, largest + 1)

    @abstractmethod
    def of_size(self, size: int, draws: Draws) -> Example:
        """An example of this size from the next random numbers."""

    def question(self, prompt: Sequence[int]) -> Sequence[int] | None:
        """The part of a prompt that is hashed; None for a prompt that is always for training."""
        return prompt

    def example(self, index: int) -> Example:
        """The first example drawn with this index that is for the split of the index.

        Raises:
            UserError: if there is none, because the questions are too few to divide.
        """
        draws, sizes, for_validation = self.draws(index), self.all_sizes, index < STREAM
        for _ in range(_TRIES * (self.held_out or 1)):
            example = self.of_size(sizes[draws.below(len(sizes))], draws)
            if self.held_out is None or self.is_held_out(example.prompt) == for_validation:
                return example
        split = "validation" if for_validation else "training"
        raise UserError(
            f"data.task.held_out={self.held_out} leaves no question of data={self.name} to "
            f"{split}: give another number, null for one stream of both, or longer examples."
        )

    def is_held_out(self, prompt: Sequence[int]) -> bool:
        """Whether a question is for validation."""
        question = self.question(prompt)
        if self.held_out is None or question is None:
            return False
        ids = np.asarray(question, dtype="<u4").tobytes()
        return int.from_bytes(blake2b(ids, digest_size=8).digest(), "little") % self.held_out == 0

    def variants(self) -> dict[str, Task]:
        least, largest = self.sizes
        most = getattr(self, largest)
        return {self.larger: replace(self, held_out=None, **{least: most + 1, largest: 2 * most})}

    def spec(self) -> dict[str, Any]:
        """Without ``held_out`` if nothing is held out, as before there was this option."""
        spec = super().spec()
        if self.held_out is None:
            del spec["held_out"]
        return spec

    def guess(self, symbols: int, lengths: Sequence[int]) -> float:
        """Exact match of random symbols, where all lengths of answers are equally frequent. The
        lengths of held-out questions are not, so those of the first examples are used."""
        if self.held_out is not None:
            lengths = [len(self.example(i).answer) for i in range(_GUESSED)]
        return sum(float(symbols) ** -n for n in lengths) / len(lengths)
