"""Name two siblings and their parent that were never seen together: open-ended, yet judged.

Nagarajan et al. 2025, "Roll the dice & look before you leap" (arXiv 2504.15266), sibling discovery:
learning token by token, a model learns the parent from its children, and each child from the one
before; with planning it chooses the parent first, although the parent comes last. The graph of
parents and children is in no prompt. An example begins with a random string (the paper's hash
conditioning), so that greedy decoding of new strings gives different answers.

    q e u h = c17 c4 P2        hash = siblings, parent

The creativity of answers drawn at temperature 1 (:meth:`Sibling.score`) is reported with a fixed
training set (``data.examples``); with fresh examples, no triple would stay new.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from string import ascii_lowercase

import numpy as np

from data_modules.tasks.base import ONCE, Example, Task, option
from data_modules.tasks.measures import SampledAnswers, TaskMeasure, Training

EQUALS, LETTERS = 1, 2
PARENTS = LETTERS + len(ascii_lowercase)
"""Ids of the first letter and of the first parent; children come after the parents."""


@dataclass(frozen=True, kw_only=True)
class Sibling(Task):
    """Triples of one graph, which the seed determines, each equally often.

    Attributes:
        parents: number of parents, >= 1.
        children: children of each parent, >= 2; no two parents share one.
        hash: letters of the random string, of 26 different ones, >= 0; without a string, greedy
            decoding can give only one answer.
    """

    name = "sibling"
    longest_answer = 3

    parents: int = option(5, least=1)
    children: int = option(100, least=2)
    hash: int = option(10, least=0)

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        parents = (f"P{i}" for i in range(self.parents))
        children = (f"c{i}" for i in range(self.parents * self.children))
        return (".", "=", *ascii_lowercase, *parents, *children)

    @property
    def longest_prompt(self) -> int:
        return self.hash + 1

    @property
    def chance(self) -> float:
        """Coherence of two random children and a random parent."""
        return (self.children - 1) / (self.parents * self.children) / self.parents

    def example(self, index: int) -> Example:
        draws = self.draws(index)
        string = [LETTERS + i for i in draws.many_below(len(ascii_lowercase), self.hash)]
        parent, first = draws.below(self.parents), draws.below(self.children)
        second = (first + 1 + draws.below(self.children - 1)) % self.children
        family = self._families[parent]
        return Example([*string, EQUALS], [family[first], family[second], PARENTS + parent])

    def check(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether it is coherent: two children and their common parent. The prompt asks nothing."""
        if len(answer) != 3 or answer[0] == answer[1]:
            return False
        first, second, parent = answer
        return self._parent.get(first) == self._parent.get(second) == parent

    def content(self, example: Example) -> Hashable:
        """The triple, since the string carries no meaning."""
        return frozenset(example.answer)

    def score(self, samples: Sequence[Sequence[int]], training: Sequence[Sequence[int]]) -> float:
        """Creativity: the share of samples (answers of any ids and length, at least one) that are
        coherent, distinct and not in training. A triple with its siblings in the other order is the
        same triple, and counts once."""
        coherent = {frozenset(sample) for sample in samples if self.check((), sample)}
        return len(coherent - {frozenset(answer) for answer in training}) / len(samples)

    def measures(
        self, *, n: int, d_model: int, training: Training | None = None
    ) -> Sequence[TaskMeasure]:
        """Shares of sampled answers: ``sampled_coherent``, ``sampled_distinct`` (coherent, each
        triple once), and with a fixed training set ``creativity`` (those not in training)."""
        span = slice(self.longest_prompt, self.longest)

        def judge(samples: list[list[int]]) -> dict[str, float]:
            coherent = sum(self.check((), s) for s in samples) / len(samples)
            shares = {"sampled_coherent": coherent, "sampled_distinct": self.score(samples, ())}
            new = {} if training is None else {"creativity": self.score(samples, training())}
            return shares | new

        return (SampledAnswers(n, span, judge),)

    @cached_property
    def _families(self) -> list[list[int]]:
        """Ids of each parent's children."""
        names = self.draws(ONCE).permutation(self.parents * self.children)
        ids = np.reshape(names, (self.parents, self.children)) + PARENTS + self.parents
        return ids.tolist()  # type: ignore[no-any-return]

    @cached_property
    def _parent(self) -> dict[int, int]:
        """Id of each child's parent."""
        families = enumerate(self._families)
        return {child: PARENTS + parent for parent, family in families for child in family}
