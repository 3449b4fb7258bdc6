"""Predict a hidden Markov process, whose best predictor is known: a belief over its states.

Shai et al. 2024, "Transformers represent belief state geometry in their residual stream" (arXiv
2405.15943): a model that predicts well holds an affine image of :meth:`HMM.beliefs`, the
distribution over hidden states given the tokens so far. Exact match says only whether the process
could produce the model's output; the informative measures are the loss against
:meth:`HMM.surprisals`, and the R^2 of an affine probe.

    > 0 1 1 0 1 1        rrxor: of three symbols, the last is the exclusive or of the others

Shapes: T tokens, S states, M symbols.
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from data_modules.tasks.base import Example, Task, option
from data_modules.tasks.measures import AffineProbe, Excess, TaskMeasure, Training
from mtp_lightning.settings import require_choice, require_number

START, FIRST = 1, 2


@dataclass(frozen=True, kw_only=True)
class HMM(Task):
    """``length`` symbols of a stationary process.

    Attributes:
        process: ``mess3``, with three states that are never known for sure, or ``rrxor``.
        length: T, symbols of an example, >= 1.
        x: for mess3, the probability of each of the two other states to be next, in (0, 1/2).
        a: for mess3, the probability that the next state emits its own symbol, in (0, 1).
    """

    name = "hmm"
    longest_prompt = 1

    process: str = option("mess3", require_choice, choices=["mess3", "rrxor"])
    length: int = option(32, least=1)
    x: float = option(0.05, require_number, above=0, below=0.5)
    a: float = option(0.85, require_number, above=0, below=1)

    @cached_property
    def transitions(self) -> np.ndarray:
        """``[M, S, S]`` float64: probability of a symbol and the next state, given a state."""
        return _rrxor() if self.process == "rrxor" else _mess3(self.x, self.a)

    @cached_property
    def stationary(self) -> np.ndarray:
        """``[S]`` float64: the distribution over states before anything is read."""
        moves = self.transitions.sum(0)
        n = len(moves)
        equations = np.vstack([moves.T - np.eye(n), np.ones(n)])
        return np.linalg.lstsq(equations, np.eye(n + 1)[n], rcond=None)[0]

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        return (".", ">", *map(str, range(len(self.transitions))))

    @property
    def longest_answer(self) -> int:
        return self.length

    @cached_property
    def chance(self) -> float:
        """Exact match of random symbols: the share of sequences that the process can produce."""
        # Counted by the set of states that the process may be in, since there are few such sets.
        ways = {(True,) * len(self.stationary): 1}
        for _ in range(self.length):
            next_ways: Counter[tuple[bool, ...]] = Counter()
            for states, n in ways.items():
                for table in self.transitions > 0:
                    next_ways[tuple(table[list(states)].any(0).tolist())] += n
            ways = {states: n for states, n in next_ways.items() if any(states)}
        return sum(ways.values()) / len(self.transitions) ** self.length

    def beliefs(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """``[.., T, S]`` float64 distribution over states after each token, by Bayes' rule from the
        stationary one; NaN from the first token that the process could not produce. In ``[.., T]``
        ids, as in a window, only symbols of the process carry information."""
        return self._filter(tokens)[0]

    def surprisals(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """``[.., T]`` float64 nats of each token given those before it: the least expected loss;
        0 for ids that are not symbols of the process."""
        return self._filter(tokens)[1]

    def example(self, index: int) -> Example:
        first, *uniforms = self.draws(index).uniform(self.length + 1).tolist()
        state = bisect(self._starts, first)
        answer = []
        for u in uniforms:
            bounds, edges = self._edges[state]
            symbol, state = edges[bisect(bounds, u)]
            answer.append(FIRST + symbol)
        return Example([START], answer)

    def check(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether the process produces it with nonzero probability."""
        ids = range(FIRST, len(self.symbols))
        well_formed = len(answer) == self.length and all(token in ids for token in answer)
        return well_formed and bool(np.isfinite(self.surprisals(answer)).all())

    def content(self, example: Example) -> Hashable:
        """The sequence itself, since the prompt asks nothing."""
        return tuple(example.answer)

    def variants(self) -> dict[str, Task]:
        return {"longer": replace(self, length=2 * self.length)}

    def measures(
        self, *, n: int, d_model: int, training: Training | None = None
    ) -> Sequence[TaskMeasure]:
        """``belief_r2`` of an affine probe from states to beliefs, and those of :class:`Excess`."""
        probe = AffineProbe("belief_r2", self.beliefs, size=len(self.stationary), d_model=d_model)
        return (probe, Excess(self.surprisals))

    def _filter(self, tokens: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids = np.asarray(tokens)
        n = len(self.stationary)
        transitions = np.concatenate([np.tile(np.eye(n), (FIRST, 1, 1)), self.transitions])
        beliefs, surprisals = np.empty((*ids.shape, n)), np.empty(ids.shape)
        belief = np.broadcast_to(self.stationary, beliefs[..., 0, :].shape)
        with np.errstate(divide="ignore", invalid="ignore"):
            for t in range(ids.shape[-1]):
                joint = np.einsum("...i,...ij->...j", belief, transitions[ids[..., t]])
                likelihood = joint.sum(-1)
                belief = joint / likelihood[..., None]
                beliefs[..., t, :], surprisals[..., t] = belief, -np.log(likelihood)
        # Tokens without information have likelihood 1 up to rounding.
        return beliefs, np.where(ids < FIRST, 0.0, surprisals)

    @cached_property
    def _starts(self) -> list[float]:
        """Upper bounds of each state but the last in [0, 1)."""
        return np.cumsum(self.stationary)[:-1].tolist()  # type: ignore[no-any-return]

    @cached_property
    def _edges(self) -> list[tuple[list[float], list[tuple[int, int]]]]:
        """For each state: the possible pairs of a symbol and the next state, and the upper bounds
        of all pairs but the last in [0, 1)."""
        tables = []
        for table_MS in self.transitions.transpose(1, 0, 2):
            edges = [(int(m), int(s)) for m, s in zip(*np.nonzero(table_MS), strict=True)]
            bounds = np.cumsum([table_MS[edge] for edge in edges])[:-1].tolist()
            tables.append((bounds, edges))
        return tables


def _mess3(x: float, a: float) -> np.ndarray:
    """States emit their own symbol with probability a, each other one with (1 - a) / 2."""
    moves = np.full((3, 3), x) + np.eye(3) * (1 - 3 * x)
    shows = np.full((3, 3), (1 - a) / 2) + np.eye(3) * (a - (1 - a) / 2)
    return np.einsum("ij,jm->mij", moves, shows)


def _rrxor() -> np.ndarray:
    """The states: nothing is known; the first bit was 0, or 1; the exclusive or is 0, or 1."""
    nothing, was_0, was_1, is_0, is_1 = range(5)
    table = np.zeros((2, 5, 5))
    table[0, nothing, was_0] = table[1, nothing, was_1] = 0.5
    table[0, was_0, is_0] = table[1, was_0, is_1] = 0.5
    table[0, was_1, is_1] = table[1, was_1, is_0] = 0.5
    table[0, is_0, nothing] = table[1, is_1, nothing] = 1
    return table
