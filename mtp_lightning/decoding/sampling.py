"""From logits to a distribution to a token: temperature, top-k, nucleus, random numbers.

Shapes: B rows, V vocabulary, and any dimensions before V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.nn.ops import Op
from mtp_lightning.runtime import threads
from mtp_lightning.settings import is_number, is_whole

# The smallest positive setting that is not 0 in fp32, the precision of probabilities.
_LEAST = torch.finfo(torch.float32).tiny
# Largest probabilities that are sorted first, to find those that reach top_p.
_SORTED = 512


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most probable tokens; among tokens equal to the k-th, the lowest ids.
        top_p: keep the fewest most probable tokens that together reach this probability
            (Holtzman et al. 2020), at least one; applied after ``top_k``.

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
        if p is not None and (not is_number(p) or not 0 <= p <= 1):
            raise UserError(f"top_p={p} must be a number from 0 (the likeliest token) to 1 (all).")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always chosen."""
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits [..., V] -> probabilities [..., V], fp32.

        Greedy sampling puts all probability on the largest logit, on the lowest id among equals.
        """
        logits = logits.float()
        if self.greedy:
            return certain(logits.argmax(dim=-1), logits.shape[-1])
        if self.temperature != 1:
            # Subtract the maximum before dividing: a tiny temperature would overflow large logits.
            logits = logits - logits.amax(dim=-1, keepdim=True)
            logits = logits / max(self.temperature, _LEAST)
        probs = torch.softmax(logits, dim=-1)
        n_tokens = logits.shape[-1]
        top_k = min(self.top_k or n_tokens, n_tokens)
        top_p = 1.0 if self.top_p is None else self.top_p
        if top_k == n_tokens and top_p == 1:
            return probs
        return _largest(probs, top_k, max(top_p, _LEAST))


def _largest(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities [..., V] of the tokens that ``top_k`` and then ``top_p`` keep; others get 0.

    A whole vocabulary takes longer to sort than a model to read, so only the largest probabilities
    are sorted: ``top_k``, or as many as reach ``top_p``.
    """
    n_tokens = probs.shape[-1]
    n = top_k if top_k < n_tokens else min(_SORTED, n_tokens)
    while True:
        ordered = probs.topk(n, dim=-1).values
        count = torch.full_like(ordered[..., :1], n, dtype=torch.long)
        if top_p < 1:
            shares = ordered / total(ordered if n == top_k else probs)
            before = shares.cumsum(dim=-1) - shares
            count = (before < top_p).sum(dim=-1, keepdim=True).clamp_(min=1)
        if n == top_k or bool((count < n).all()):
            break
        n = min(8 * n, n_tokens)
    least = ordered.gather(-1, count - 1)
    above, equal = probs > least, probs == least
    # Among the tokens equal to the last one, keep the lowest ids.
    equal &= equal.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True)
    kept_probs = torch.where(above | equal, probs, 0.0)
    return kept_probs / total(kept_probs)


def total(weights: Tensor) -> Tensor:
    """The sums [..., 1] of weights [..., V]. With several threads, PyTorch divides the sum of a
    single row among them, and it is rounded differently than that of a row of a batch."""
    with threads(1):
        return weights.sum(dim=-1, keepdim=True)


@Op
def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw token ids [...] from probabilities [..., V], which need not sum to 1, by inverting the
    cumulative sum in fp64, with one number of [0, 1) per draw, [...]. A token of probability 0 is
    never drawn."""
    cumulative = probs.double().cumsum(dim=-1)
    # The last entry is exactly the total, so no draw can lie beyond it.
    aim = uniform.double().unsqueeze(-1) * cumulative[..., -1:]
    tokens = torch.searchsorted(cumulative, aim, right=True).squeeze(-1)
    return tokens.clamp_(max=probs.shape[-1] - 1)


def certain(tokens: Tensor, n_tokens: int) -> Tensor:
    """The distributions [..., V] that give tokens [...] a probability of 1."""
    zeros = torch.zeros(*tokens.shape, n_tokens, device=tokens.device)
    return zeros.scatter_(-1, tokens.unsqueeze(-1), 1.0)


class RowSampling:
    """One :class:`Sampling` per row; a row's result does not depend on the settings of others."""

    def __init__(self, rows: Sequence[Sampling]) -> None:
        self.greedy = all(sampling.greedy for sampling in rows)
        self._groups: dict[Sampling, list[int]] = {}
        for row, sampling in enumerate(rows):
            self._groups.setdefault(sampling, []).append(row)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits [B, ..., V] -> probabilities [B, ..., V], fp32."""
        if len(self._groups) == 1:
            (sampling,) = self._groups
            return sampling.probabilities(logits)
        probs = torch.empty(logits.shape, device=logits.device)
        for sampling, rows in self._groups.items():
            probs[rows] = sampling.probabilities(logits[rows])
        return probs


class RoundNoise(NamedTuple):
    """The uniform random numbers of one round, fp64."""

    draft_BM: Tensor  # that the drafts are drawn by
    accept_BM: Tensor  # that judge them
    final_B: Tensor  # that the trunk's own token is drawn by


class Noise:
    """The uniform random numbers in [0, 1) of a batch whose rows come and go. A row's numbers
    depend only on its seed, its index, its number of drafts and the rounds since it joined.

    A row of fewer drafts than ``most`` takes the first numbers of a round; its others are 0.
    """

    def __init__(self, most: int, device: torch.device | str) -> None:
        self._most, self._device = most, device
        # For every row, its generator and the places of its numbers.
        self.rows: list[tuple[torch.Generator, Tensor]] = []

    def join(self, streams: Sequence[tuple[int, int, int]]) -> RoundNoise:
        """Append rows, by seed, index and number of drafts; returns their numbers of a first
        round."""
        new_rows = []
        for seed, index, drafts in streams:
            # Spread out, so that no two small pairs (seed, index) share a stream. The generator
            # takes a seed of 32 bits.
            number = (seed * 1_000_003 + index * 2_654_435_761) % 2**32
            first = torch.arange(drafts)
            places = torch.cat((first, first + self._most, torch.tensor([2 * self._most])))
            new_rows.append((torch.Generator().manual_seed(number), places))
        self.rows += new_rows
        return self._draw(new_rows)

    def next(self) -> RoundNoise:
        """The numbers of every row for the next round."""
        return self._draw(self.rows)

    def _draw(self, rows: Sequence[tuple[torch.Generator, Tensor]]) -> RoundNoise:
        numbers = torch.zeros(len(rows), 2 * self._most + 1, dtype=torch.float64)
        for row, (generator, places) in zip(numbers, rows, strict=True):
            row[places] = torch.rand(len(places), generator=generator, dtype=torch.float64)
        draft_BM, accept_BM, final_B1 = numbers.to(self._device).split(
            [self._most, self._most, 1], 1
        )
        return RoundNoise(draft_BM, accept_BM, final_B1.squeeze(1))
