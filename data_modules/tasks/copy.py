"""Copy a string of random symbols: ``r = r``. The simplest test of memory in the context.

Olsson et al. 2022 (arXiv 2209.11895) measure in-context memory on repeated random tokens; the
period is the distance to look back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from data_modules.tasks.base import Draws, Example, log_bucket, option
from data_modules.tasks.held_out import HeldOutTask


@dataclass(frozen=True, kw_only=True)
class Copy(HeldOutTask):
    """Strings of ``shortest`` .. ``periods`` symbols, every length equally often.

    Attributes:
        letters: number of different symbols, >= 1.
        shortest: least length of a string, >= 1.
        periods: largest length of a string.
    """

    name = "copy"
    sizes = ("shortest", "periods")

    letters: int = option(16, least=1)
    shortest: int = option(1, least=1)
    periods: int = option(16, least=1)

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        return (".", "=", *(f"s{i}" for i in range(self.letters)))

    @property
    def longest_prompt(self) -> int:
        return self.periods + 1

    @property
    def longest_answer(self) -> int:
        return self.periods

    @cached_property
    def chance(self) -> float:
        return self.guess(self.letters, self.all_sizes)

    def of_size(self, size: int, draws: Draws) -> Example:
        string = [2 + letter for letter in draws.many_below(self.letters, size)]
        return Example([*string, 1], string)

    def check(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        return [*answer, 1] == [*prompt]

    def groups(self, example: Example) -> Sequence[str]:
        period = len(example.answer)
        return [f"period_{log_bucket(period)}"] * period
