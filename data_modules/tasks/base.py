"""What a task is: a source of examples, each a pure function of (seed, index), and their judge.

A task has symbols of its own and no tokenizer. Its examples are prompt and answer; only the answer
is learned and judged. One file a task: ``copy.py`` is the shortest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from data_modules.digests import digest
from data_modules.tasks.measures import Measure, Training
from mtp_lightning.settings import require_whole

END = 0
"""Id of the symbol that pads windows and, in tasks with ``ends``, closes an answer."""

TRAINING = 48
"""Training with seed s reads examples from ``(s + 1) << 48`` on; validation those below."""

_WORD = (1 << 64) - 1
# To make a generator takes ten times as long as to set one, so a process has this one. It is set
# for every look, and keeps nothing between two.
_PHILOX = np.random.Philox(0)
_FRESH = _PHILOX.state
# Random numbers that an example is given to begin with: most need fewer.
_AHEAD = 64


@dataclass(frozen=True)
class Example:
    """A question and an answer to it, which need not be the only one.

    Attributes:
        prompt: ids, at least one.
        answer: ids, at least one that is not given.
        given: which of the answer's tokens are read and not answered, such as further questions;
            None for none. They are no targets, and decoding reads them as they are.
    """

    prompt: list[int]
    answer: list[int]
    given: list[bool] | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def asked(self) -> list[bool]:
        """Which of the answer's tokens the model is to say."""
        return [True] * len(self.answer) if self.given is None else [not g for g in self.given]


def question_of(example: Example) -> tuple[int | None, ...]:
    """What a model reads before it has said anything: the prompt, and the answer with None for
    what is asked."""
    answer = zip(example.answer, example.asked, strict=True)
    return (*example.prompt, *(None if asked else token for token, asked in answer))


class Draws:
    """The random numbers of one example: raw Philox, whose stream numpy promises never to change.

    Args:
        key: of the task's seed.
        index: the example's; its numbers overlap no other's.
    """

    def __init__(self, key: np.ndarray, index: int) -> None:
        counter = np.array([0, 0, index & _WORD, index >> 64], dtype=np.uint64)
        self._start: Any = {**_FRESH, "state": {"counter": counter, "key": key}}
        self._ahead = self._read(_AHEAD)
        self._taken = 0

    def raw(self, size: int) -> np.ndarray:
        """The next ``size`` numbers of the stream, uint64."""
        first, self._taken = self._taken, self._taken + size
        if self._taken > len(self._ahead):
            self._ahead = self._read(2 * self._taken)
        return self._ahead[first : self._taken]

    def _read(self, size: int) -> np.ndarray:
        """The first ``size`` numbers of the stream."""
        _PHILOX.state = self._start
        return _PHILOX.random_raw(size)  # type: ignore[no-any-return]

    def permutation(self, n: int) -> list[int]:
        """0 .. n - 1 in random order."""
        return np.argsort(self.raw(n), kind="stable").tolist()  # type: ignore[no-any-return]

    def below(self, n: int) -> int:
        """One of 0 .. n - 1."""
        return int(self.raw(1)[0]) % n

    def many_below(self, n: int, size: int) -> list[int]:
        """``size`` of 0 .. n - 1, with repetition."""
        return (self.raw(size) % np.uint64(n)).tolist()  # type: ignore[no-any-return]

    def uniform(self, size: int) -> np.ndarray:
        """``[size]`` float64 of [0, 1)."""
        return (self.raw(size) >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A source of examples; a variant's fields are its options.

    Attributes:
        name: as in ``data=NAME``.
        ends: whether every answer closes with :data:`END`; the model then decides how long it is.
            Else it is as long as the example's own.
        seed: of the examples; not the run's, so that all runs are validated on the same ones.

    Raises:
        UserError: an option out of range, or options that do not fit together.
    """

    name: ClassVar[str]
    ends: ClassVar[bool] = False

    seed: int = 0

    def __post_init__(self) -> None:
        require_whole("data.task.seed", self.seed, least=0)

    @property
    @abstractmethod
    def symbols(self) -> tuple[str, ...]:
        """How every id is written, without white space; that of :data:`END` first."""

    @property
    @abstractmethod
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""

    @property
    @abstractmethod
    def longest_answer(self) -> int:
        """Tokens of the longest answer."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Exact match of who knows the form of an answer and guesses the rest."""

    @abstractmethod
    def example(self, index: int) -> Example:
        """Example ``index`` >= 0, of whatever size; the same one whenever it is asked for."""

    @abstractmethod
    def check(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether an answer, of any ids and length, is right; by the prompt alone."""

    def variants(self) -> dict[str, Task]:
        """Test sets outside of the distribution, such as longer ones, by name; same symbols."""
        return {}

    def content(self, example: Example) -> Hashable:
        """What is known of an example to whoever has read another one with the same: by default
        its question, which is the prompt and what is given of the answer."""
        return question_of(example)

    def groups(self, example: Example) -> Sequence[str]:
        """A name for each of the answer's tokens, by which accuracy is reported, "" for those that
        are given; nothing for a task without groups."""
        return ()

    def measures(
        self, *, n: int, d_model: int, training: Training | None = None
    ) -> Sequence[Measure]:
        """What is reported of a model beside exact match, and of which outputs of its.

        Args:
            n: examples, 0 .. n - 1, that it is reported of.
            d_model: of the model.
            training: the training set's answers, where it is a fixed one.
        """
        return ()

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return self.longest_prompt + self.longest_answer

    def show(self, ids: Sequence[int]) -> str:
        """A sequence for people."""
        symbols = self.symbols
        return " ".join(symbols[i] for i in ids)

    def draws(self, index: int) -> Draws:
        """The random numbers of an example."""
        return Draws(self._key, index)

    @cached_property
    def _key(self) -> np.ndarray:
        return np.random.SeedSequence(self.seed).generate_state(2, np.uint64)

    def spec(self) -> dict[str, Any]:
        """Name and options: what decides the examples."""
        return {"name": self.name, **asdict(self)}

    def fingerprint(self) -> str:
        """Hex digest of :meth:`spec`."""
        return digest(sorted(self.spec().items()))


def log_bucket(n: int) -> str:
    """The bucket of a distance n >= 1 among 1, 2-3, 4-7, .., as in ``val/loss_position_*``."""
    first = 1 << (n.bit_length() - 1)
    return str(first) if first == 1 else f"{first}-{2 * first - 1}"
