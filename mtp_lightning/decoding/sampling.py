"""From logits to a distribution to a token: temperature, top-k, nucleus; randomness by row.

Shapes: V vocabulary, anything in front of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.settings import is_number, is_whole


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most probable tokens; ties with the k-th go to the lowest ids.
        top_p: keep the fewest most probable tokens that together reach this probability
            (Holtzman et al. 2020); applied after ``top_k``.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        t, k, p = self.temperature, self.top_k, self.top_p
        if not is_number(t) or t < 0:
            raise UserError(f"temperature={t} must be a number of at least 0 (0 is greedy).")
        if k is not None and (not is_whole(k) or k < 1):
            raise UserError(f"top_k={k} must be a whole number of at least 1, or null for all.")
        if p is not None and (not is_number(p) or not 0 < p <= 1):
            raise UserError(f"top_p={p} must lie above 0 and at most at 1; null or 1 keeps all.")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, with no randomness."""
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits [..., V] -> probabilities [..., V], fp32.

        Greedy is all probability on the largest logit, on the lowest id among equals.
        """
        logits = logits.float()
        if self.greedy:
            best = logits.argmax(dim=-1, keepdim=True)
            return torch.zeros_like(logits).scatter_(-1, best, 1.0)
        # The maximum goes first: at a tiny temperature a quotient of large logits would overflow.
        scaled = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature
        probs = torch.softmax(scaled, dim=-1)
        narrow_k = self.top_k is not None and self.top_k < logits.shape[-1]
        top_p = 1.0 if self.top_p is None else self.top_p
        if not narrow_k and top_p == 1:
            return probs
        ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
        if narrow_k:
            ordered[..., self.top_k :] = 0
        if top_p < 1:
            ordered /= ordered.sum(dim=-1, keepdim=True)
            before = ordered.cumsum(dim=-1) - ordered
            ordered.masked_fill_(before >= top_p, 0)
        kept = torch.zeros_like(probs).scatter_(-1, ids, ordered)
        return kept / kept.sum(dim=-1, keepdim=True)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Token ids [...] from probabilities [..., V], one number of [0, 1) [...] each.

    By inversion, in fp64; the probabilities need not be normalised. A token of probability 0 is
    never drawn.
    """
    cumulative = probs.double().cumsum(dim=-1)
    # The last entry is the total, exactly: no draw can lie beyond it.
    aim = uniform.double().unsqueeze(-1) * cumulative[..., -1:]
    return (cumulative <= aim).sum(dim=-1).clamp_(max=probs.shape[-1] - 1)


class Noise:
    """Uniform numbers in [0, 1), every row from a generator of its own.

    So a row's sample depends on ``seed`` and its prompt's index, not on its neighbours.

    Args:
        seed: of the whole call.
        indices: one a row: which prompt it is.
        device: where the numbers are wanted.
    """

    _BLOCK = 1024

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device | str) -> None:
        self._generators = [
            # Far apart for every seed; neighbouring small seeds of one call never coincide. The
            # generator takes 32 bits.
            torch.Generator().manual_seed((seed * 1_000_003 + index * 2_654_435_761) % 2**32)
            for index in indices
        ]
        self._device = device
        self._used = self._BLOCK
        self._block = torch.empty(0)

    def next(self, n: int) -> Tensor:
        """The next ``n`` numbers of every row, [B, n] fp64."""
        if self._used + n > self._BLOCK:
            assert n <= self._BLOCK
            rows = [
                torch.rand(self._BLOCK, generator=g, dtype=torch.float64) for g in self._generators
            ]
            self._block = torch.stack(rows).to(self._device)
            self._used = 0
        self._used += n
        return self._block[:, self._used - n : self._used]

    def drop_row(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        last = len(self._generators) - 1
        self._generators[row] = self._generators[last]
        self._generators.pop()
        if self._used < self._BLOCK:
            self._block[row] = self._block[last]
        self._block = self._block[:last]
