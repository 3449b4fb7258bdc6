"""Tests whether a cell's sampled tokens follow the trunk's distribution.

A token x drawn from p has F(x - 1) + v p(x) uniform on [0, 1), where F is the cumulative of p in
any fixed order and v is uniform (the randomized probability integral transform; Brockwell 2007,
"Universal residuals"). A lossless decoder draws each token from the trunk's p given the tokens
before it, so these numbers are independent, whatever the drafts were. The order here is from the
most to the least probable token, which best reveals drafts that are accepted too often.

Shapes: T tokens of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtp_lightning.certify.cells import Cell
from mtp_lightning.certify.texts import Prompts, decode
from mtp_lightning.model import MTPModel

_BINS = 16


@dataclass
class Sampled:
    """The number of a cell's sampled tokens, and of their transforms in each of 16 equal bins of
    [0, 1)."""

    tokens: int = 0
    counts: list[int] = field(default_factory=lambda: [0] * _BINS)

    @property
    def chi_square(self) -> float:
        """Pearson's statistic against equal counts; 15 degrees of freedom."""
        wanted = self.tokens / _BINS
        return sum((count - wanted) ** 2 for count in self.counts) / wanted

    @property
    def p(self) -> float:
        """The probability that a lossless decoder has a statistic at least as large."""
        degrees = torch.tensor((_BINS - 1) / 2, dtype=torch.float64)
        half = torch.tensor(self.chi_square / 2, dtype=torch.float64)
        return float(torch.special.gammaincc(degrees, half))

    def draw(
        self, model: MTPModel, cell: Cell, prompts: Prompts, length: int, *, first: int, seed: int
    ) -> None:
        """Sample a text of ``length`` tokens for every prompt, at temperature 1, and count its
        tokens; ``first`` is the number of the first prompt. Where drafts are looked up, the second
        half of a prompt is read twice, since a model then continues with what it has read."""
        if cell.options.lookup:
            prompts = [list(ids[-(len(ids) // 2) :]) * 2 for ids in prompts]
        lengths = [length] * len(prompts)
        texts = decode(model, cell, prompts, lengths, first=first, temperature=1.0, seed=seed)
        noise = torch.Generator().manual_seed((seed * 1_000_003 + first) % 2**63)
        for text in texts:
            u_T = transform(text.logits_TV.cpu(), text.ids, noise)
            counts = torch.histc(u_T, bins=_BINS, min=0.0, max=1.0).long().tolist()
            self.tokens += len(text.ids)
            self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]


def transform(logits_TV: Tensor, ids: Sequence[int], noise: torch.Generator) -> Tensor:
    """The transform [T] of tokens, from the logits from which they were drawn."""
    p_TV = logits_TV.double().softmax(dim=-1)
    ids_T1 = torch.tensor(ids).unsqueeze(1)
    own_T1 = p_TV.gather(1, ids_T1)
    # Equal probabilities are ordered by id.
    earlier_TV = torch.arange(p_TV.shape[1]) < ids_T1
    before_TV = (p_TV > own_T1) | ((p_TV == own_T1) & earlier_TV)
    below_T = (p_TV * before_TV).sum(dim=-1)
    v_T = torch.rand(len(ids), generator=noise, dtype=torch.float64)
    return (below_T + v_T * own_T1[:, 0]).clamp(max=1 - 1e-12)
