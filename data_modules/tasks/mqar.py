"""Recall values by their keys, several times over: multi-query associative recall.

Arora et al. 2023, "Zoology" (arXiv 2312.04927), section 4 and appendix: pairs of key and value,
then keys again, whose values are asked for. Most queries come soon: their slots are drawn without
repetition with a probability proportional to ``slot^(power - 1)``. Three things differ from the
paper. An answer is the token after its query, so that a language model can predict it. It is
visible to later queries, so each query's key is drawn independently: if each key were asked once,
the last values would be known without their keys. And one blank symbol, instead of random symbols,
lies between queries.

    k3 v1 k0 v7 = k0 v7 _ _ k0 v7
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress

import numpy as np

from data_modules.tasks.base import Example, Task, log_bucket, option
from mtp_lightning.settings import require_number

EQUALS, BLANK, FIRST = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """``pairs`` pairs, and as many queries in ``slots`` slots of two tokens.

    Attributes:
        pairs: K, >= 1.
        slots: number of slots for queries, >= K; slots without a query are blank.
        keys: number of different keys, >= K; each occurs in an example at most once.
        values: number of different values, >= 1.
        power: a of the power law of the gaps, in (0, 1]; 1 is uniform.
    """

    name = "mqar"

    pairs: int = option(8, least=1)
    slots: int = option(16, least=1)
    keys: int = option(32, least=1)
    values: int = option(32, least=1)
    power: float = option(0.01, require_number, above=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_enough("slots", of="pairs")
        self.require_enough("keys", of="pairs")

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        keys, values = range(self.keys), range(self.values)
        return (".", "=", "_", *(f"k{i}" for i in keys), *(f"v{i}" for i in values))

    @property
    def longest_prompt(self) -> int:
        return 2 * self.pairs + 1

    @property
    def longest_answer(self) -> int:
        return 2 * self.slots

    @cached_property
    def chance(self) -> float:
        """Exact match of a random value of the prompt for each query, over 256 prompts, whose
        values may repeat."""
        total = 0.0
        for i in range(256):
            shares = Counter(self.example(i).prompt[1:-1:2]).values()
            total += sum((count / self.pairs) ** 2 for count in shares) ** self.pairs
        return total / 256

    def example(self, index: int) -> Example:
        draws = self.draws(index)
        keys = [FIRST + i for i in draws.permutation(self.keys)[: self.pairs]]
        values = [FIRST + self.keys + i for i in draws.many_below(self.values, self.pairs)]
        prompt = [token for pair in zip(keys, values, strict=True) for token in pair] + [EQUALS]
        # The smallest of exponential times are a draw without repetition in which each slot has its
        # weight (Efraimidis & Spirakis 2006).
        times = -np.log1p(-draws.uniform(self.slots)) / self._weights
        query_slots = np.argsort(times, kind="stable")[: self.pairs].tolist()
        order = draws.many_below(self.pairs, self.pairs)
        answer, given = [BLANK] * (2 * self.slots), [True] * (2 * self.slots)
        for pair, slot in zip(order, query_slots, strict=True):
            answer[2 * slot : 2 * slot + 2] = [keys[pair], values[pair]]
            given[2 * slot + 1] = False
        # Nothing is asked after the last query.
        end = 2 * max(query_slots) + 2
        return Example(prompt, answer[:end], given[:end])

    def check(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether it has as many queries as the prompt has pairs, each with its value, and blanks
        otherwise."""
        pairs = dict(zip(prompt[:-1:2], prompt[1:-1:2], strict=True))
        slots = list(zip(answer[0::2], answer[1::2], strict=False))
        queries = [slot for slot in slots if slot != (BLANK, BLANK)]
        complete = len(answer) % 2 == 0 and len(queries) == len(pairs)
        return complete and all(pairs.get(key) == value for key, value in queries)

    def variants(self) -> dict[str, Task]:
        """Twice as many pairs and slots, if there are enough keys."""
        if 2 * self.pairs > self.keys:
            return {}
        return {"more": replace(self, pairs=2 * self.pairs, slots=2 * self.slots)}

    def groups(self, example: Example) -> Sequence[str]:
        """The distance in tokens from a query to the previous occurrence of its key."""
        last = {key: 2 * i for i, key in enumerate(example.prompt[:-1:2])}
        names = [""] * len(example.answer)
        for i in compress(range(len(names)), example.asked):
            query, key = len(example.prompt) + i - 1, example.answer[i - 1]
            names[i] = f"distance_{log_bucket(query - last[key])}"
            last[key] = query
        return names

    @cached_property
    def _weights(self) -> np.ndarray:
        return np.arange(1, self.slots + 1) ** (self.power - 1.0)
