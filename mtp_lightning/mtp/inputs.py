"""The inputs of a stack: the branch point, the key of random choices, and what it is trained on.

Shapes: B batch, T positions, C d_model, D depths of the stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.nn.attention import Positions
from mtp_lightning.nn.head import Head
from mtp_lightning.nn.init import parameter_seed


@dataclass(frozen=True)
class RandomKey:
    """Everything that a random choice in training depends on, so that no generator is stored.

    Attributes:
        seed: seed of the run.
        step: optimizer step, from 0.
        first_row: index of this micro-batch's first window in the step's global batch. So the
            choices do not depend on accumulation or on the number of ranks.
    """

    seed: int
    step: int
    first_row: int = 0

    def generators(self, what: str, k: int, rows: int) -> list[torch.Generator]:
        """A generator for each of the micro-batch's windows; ``what`` names the purpose, ``k`` the
        depth that it is for."""
        names = (f"{what}:{self.step}:{k}:{self.first_row + row}" for row in range(rows))
        return [torch.Generator().manual_seed(parameter_seed(self.seed, name)) for name in names]


@dataclass(frozen=True)
class BranchPoint:
    """Everything that the depths read of the trunk and of the text, over whole windows or at the
    newest positions of decoding.

    Attributes:
        hidden: the trunk's state [B, T, C] that the stack starts from.
        tokens: int64 token ids [B, at least T]; depths that read tokens ahead need more than T.
        embedded: their embeddings [B, at least T, C].
        positions: of the T positions, not shifted; in decoding, with the cache of one depth.
        first: how far ahead of the first position the first of ``tokens`` is.
        stride: distance in ``tokens`` between the tokens k and k + 1 positions ahead. It is 1 in a
            text, and T if ``tokens`` holds a separate list of T tokens for every k.
        head: the shared head, for depths that depend on the probability of a token.
    """

    hidden: Tensor
    tokens: Tensor
    embedded: Tensor
    positions: Positions = field(repr=False)
    first: int = 0
    stride: int = 1
    head: Head | None = field(default=None, repr=False)

    def tokens_at(self, k: int) -> Tensor:
        """The tokens ``k`` positions ahead, ``w[k : T + k]`` [B, T]."""
        start = (k - self.first) * self.stride
        return self.tokens[:, start : start + self.hidden.shape[1]]

    def embedded_at(self, k: int) -> Tensor:
        """Their embeddings [B, T, C]."""
        start = (k - self.first) * self.stride
        return self.embedded[:, start : start + self.hidden.shape[1]]


@dataclass(frozen=True, eq=False)
class FeedInputs:
    """What a stack is trained on in one micro-batch.

    Attributes:
        final_BTC: the trunk's final states, from :meth:`MTPModel.run_trunk`.
        at: the branch point, from the same call.
        batch: the windows.
        depths: the depths that are trained, in order.
        key: key of the random choices in training; None for no random choices.
    """

    final_BTC: Tensor
    at: BranchPoint
    batch: WindowBatch
    depths: Sequence[int]
    key: RandomKey | None = None
