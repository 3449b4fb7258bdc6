"""Multiply a word in the alternating group A5: the smallest test of state tracking.

The word problem of A5, which is not solvable, is complete for NC1, so unless TC0 = NC1 no
transformer of fixed depth computes long products at once (Liu et al. 2023, arXiv 2210.10749;
Merrill et al. 2024, arXiv 2404.08819). Here the model reads the earlier products, and the next one
takes one step more; a head that predicts k tokens further has to take k more steps at once. With
``running=false`` the whole word has to be multiplied at once, as in the papers.

    12340 12034 = 12340 20341        word = running products
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

from data_modules.tasks.base import Draws, Example, log_bucket, option
from data_modules.tasks.held_out import HeldOutTask
from mtp_lightning.settings import require_choice

EQUALS, FIRST = 1, 2


def _is_even(images: tuple[int, ...]) -> bool:
    return sum(a > b for i, a in enumerate(images) for b in images[i + 1 :]) % 2 == 0


ELEMENTS = [images for images in permutations(range(5)) if _is_even(images)]
"""The 60 even permutations, each as the images of 0 .. 4."""
NUMBER = {images: i for i, images in enumerate(ELEMENTS)}
PRODUCT = [[NUMBER[tuple(b[i] for i in a)] for b in ELEMENTS] for a in ELEMENTS]  # type: ignore[index]
"""``PRODUCT[a][b]`` is a followed by b."""
GENERATORS = {
    # A cycle of length 3 and one of length 5.
    "two": [NUMBER[1, 2, 0, 3, 4], NUMBER[1, 2, 3, 4, 0]],
    "all": list(range(60)),
}


@dataclass(frozen=True, kw_only=True)
class Group(HeldOutTask):
    """Words of ``shortest`` .. ``length`` generators, every length equally often.

    Words with the same beginning share the products of that beginning. So a word is held out by its
    first 8 generators (2 of 60 elements), and shorter words are for training: no training word
    reveals more than that of a validation word.

    Attributes:
        generators: elements that words consist of: ``two``, or ``all`` 60 as in Merrill et al.
        shortest: least length of a word, >= 1.
        length: largest length of a word.
        running: whether the products up to every position are asked for, or only the last one.
    """

    name = "group"
    symbols = (".", "=", *("".join(map(str, images)) for images in ELEMENTS))
    sizes = ("shortest", "length")

    generators: str = option("two", require_choice, choices=list(GENERATORS))
    shortest: int = option(1, least=1)
    length: int = option(16, least=1)
    running: bool = True

    @property
    def longest_prompt(self) -> int:
        return self.length + 1

    @property
    def longest_answer(self) -> int:
        return self.length if self.running else 1

    @cached_property
    def chance(self) -> float:
        return self.guess(len(ELEMENTS), self.all_sizes if self.running else [1])

    def question(self, prompt: Sequence[int]) -> Sequence[int] | None:
        deciding = min(self.length, 8 if self.generators == "two" else 2)
        return prompt[:deciding] if len(prompt) > deciding else None

    def of_size(self, size: int, draws: Draws) -> Example:
        generators = GENERATORS[self.generators]
        indices = draws.many_below(len(generators), size)
        prompt = [*(FIRST + generators[i] for i in indices), EQUALS]
        return Example(prompt, self._products(prompt))

    def check(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        return list(answer) == self._products(prompt)

    def groups(self, example: Example) -> Sequence[str]:
        """The number of factors of each product."""
        length = len(example.prompt) - 1
        factors = range(1, length + 1) if self.running else [length]
        return [f"factors_{log_bucket(n)}" for n in factors]

    def _products(self, prompt: Sequence[int]) -> list[int]:
        product, products = NUMBER[0, 1, 2, 3, 4], []
        for token in prompt[:-1]:
            product = PRODUCT[product][token - FIRST]
            products.append(FIRST + product)
        return products if self.running else products[-1:]
