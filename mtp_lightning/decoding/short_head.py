"""The output head over the first tokens of the vocabulary alone, for drafts.

A draft of a small module is mostly a read of the head: of SmolLM2-135M, 28 of the 135 million
weights. Byte pairs have their numbers in the order in which they were merged, the most frequent
first, so that the first sixth of the rows has nine of ten tokens. A draft is then never one of the
others; the trunk says them all the same (the idea of FR-Spec, Zhao et al. 2025, arXiv 2502.14856).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.nn.head import Head
from mtp_lightning.nn.ops import linear


class ShortHead:
    """A :class:`Head` whose other tokens have no chance.

    Args:
        head: the whole one.
        rows: tokens that it can say, from token 0 on.

    Attributes:
        weight: its rows of the whole head's, a tensor of its own.
    """

    def __init__(self, head: Head, rows: int) -> None:
        self.weight = head.weight.detach()[:rows]
        self._others = head.weight.shape[0] - rows

    def __call__(self, h: Tensor) -> Tensor:
        """[..., C] -> logits [..., V]."""
        return self.over_all(linear(h, self.weight))

    def over_all(self, logits: Tensor) -> Tensor:
        """Logits of its own tokens -> [..., V]."""
        return F.pad(logits, (0, self._others), value=-float("inf"))
