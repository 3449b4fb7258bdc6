"""The interface of a task: examples as pure functions of (seed, index), and a check of answers.

A task has its own symbols and no other tokenizer. An example is a prompt and an answer, and only
the answer is trained and judged. One file per task; ``copy.py`` is the shortest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np

from data_modules.digests import digest
from data_modules.tasks.measures import TaskMeasure, Training
from mtp_lightning.errors import UserError
from mtp_lightning.settings import require_whole

END = 0
"""Id of the symbol that pads windows and, in tasks with ``ends``, ends an answer."""

STREAM = 1 << 48
"""Examples of a stream. Validation reads stream 0, and training with seed s stream s + 1."""

ONCE = 1 << 127
"""First index of the draws that a task makes once, above the indices of all examples."""

_WORD = (1 << 64) - 1
# Making a generator takes ten times as long as setting its state, so each process has one, which is
# set before every use.
_PHILOX = np.random.Philox(0)
_FRESH = _PHILOX.state
_AHEAD = 64  # numbers that are drawn for an example at first; most examples need fewer


@dataclass(frozen=True)
class Example:
    """A question and one right answer to it; there may be others.

    Attributes:
        prompt: ids, at least one.
        answer: ids, at least one that is not given.
        given: which tokens of the answer are read instead of answered, such as further questions;
            None for none. They are not targets, and decoding reads them.
    """

    prompt: list[int]
    answer: list[int]
    given: list[bool] | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def asked(self) -> list[bool]:
        """Which tokens of the answer the model has to predict."""
        if self.given is None:
            return [True] * len(self.answer)
        return [not given for given in self.given]


def question_of(example: Example) -> tuple[int | None, ...]:
    """The tokens that a model does not answer: the prompt, and the answer's given tokens, with None
    in place of each asked token."""
    answer = zip(example.answer, example.asked, strict=True)
    return (*example.prompt, *(None if is_asked else token for token, is_asked in answer))


class Draws:
    """The random numbers of the example ``index``, from raw Philox, whose stream numpy promises to
    keep. They overlap with no other example's. ``key`` comes from the task's seed."""

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
        """A number of 0 .. n - 1."""
        return int(self.raw(1)[0]) % n

    def many_below(self, n: int, size: int) -> list[int]:
        """``size`` numbers of 0 .. n - 1, with repetition."""
        return (self.raw(size) % np.uint64(n)).tolist()  # type: ignore[no-any-return]

    def uniform(self, size: int) -> np.ndarray:
        """``[size]`` float64 in [0, 1)."""
        return (self.raw(size) >> np.uint64(11)) * 2.0**-53


def option(
    default: Any, check: Callable[..., Any] = require_whole, *, null: str = "", **bounds: Any
) -> Any:
    """A field of a task whose value is checked when the task is made.

    Args:
        default: the field's default.
        check: a function of :mod:`mtp_lightning.settings`.
        null: the meaning of None, which is then allowed, for messages.
        bounds: further arguments of ``check``.
    """
    return field(default=default, metadata={"check": partial(check, **bounds), "null": null})


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A source of examples; the fields of a subclass are its options (:func:`option`).

    Attributes:
        name: as in ``data=NAME``.
        ends: whether every answer ends with :data:`END`, so that the model decides its length.
            Otherwise an answer is as long as the example's own.
        seed: seed of the examples, not of the run: all runs validate on the same examples.

    Raises:
        UserError: for an option out of range, or options that contradict each other.
    """

    name: ClassVar[str]
    ends: ClassVar[bool] = False

    seed: int = option(0, least=0)

    def __post_init__(self) -> None:
        for task_field in fields(self):
            value, null = getattr(self, task_field.name), task_field.metadata.get("null")
            if "check" in task_field.metadata and not (null and value is None):
                null_hint = f" (null for {null})" if null else ""
                task_field.metadata["check"](f"data.task.{task_field.name}{null_hint}", value)

    def require_enough(self, option: str, *, of: str) -> None:
        """Refuses fewer of an option than of another one, each of which needs one of its own."""
        number, needed = getattr(self, option), getattr(self, of)
        if number < needed:
            raise UserError(
                f"data.task.{option}={number} are too few for data.task.{of}={needed}, each "
                f"needing one of its own: raise data.task.{option}, or ask for fewer {of}."
            )

    @property
    @abstractmethod
    def symbols(self) -> tuple[str, ...]:
        """How every id is written, without white space; that of :data:`END` comes first."""

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
        """Exact match of a guess that knows only the form of an answer."""

    @abstractmethod
    def example(self, index: int) -> Example:
        """Example ``index`` >= 0, of any size; the same at every call."""

    @abstractmethod
    def check(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether an answer, of any ids and length, is right for the prompt."""

    def variants(self) -> dict[str, Task]:
        """Test sets from other distributions, such as longer examples, by name; same symbols."""
        return {}

    def content(self, example: Example) -> Hashable:
        """A value that identifies an example: a model that was trained on an example with the same
        content has seen this one. By default the question (:func:`question_of`)."""
        return question_of(example)

    def groups(self, example: Example) -> Sequence[str]:
        """A name for each token of the answer, by which accuracies are reported, "" for given
        tokens; empty for a task without groups."""
        return ()

    def measures(
        self, *, n: int, d_model: int, training: Training | None = None
    ) -> Sequence[TaskMeasure]:
        """Metrics besides exact match on examples 0 .. n - 1, for a model of width ``d_model``.

        Args:
            training: the answers of a fixed training set, if there is one.
        """
        return ()

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return self.longest_prompt + self.longest_answer

    def show(self, ids: Sequence[int]) -> str:
        """A sequence as text for people."""
        symbols = self.symbols
        return " ".join(symbols[i] for i in ids)

    def draws(self, index: int) -> Draws:
        """The random numbers of an example."""
        return Draws(self._key, index)

    @cached_property
    def _key(self) -> np.ndarray:
        return np.random.SeedSequence(self.seed).generate_state(2, np.uint64)

    def spec(self) -> dict[str, Any]:
        """Name and options, which determine the examples."""
        return {"name": self.name, **asdict(self)}

    def fingerprint(self) -> str:
        return digest(sorted(self.spec().items()))


def log_bucket(n: int) -> str:
    """The bucket of a distance n >= 1 among 1, 2-3, 4-7, .., as in ``val/loss_position_*``."""
    first = 1 << (n.bit_length() - 1)
    return str(first) if first == 1 else f"{first}-{2 * first - 1}"
