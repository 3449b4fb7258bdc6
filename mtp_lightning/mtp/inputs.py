"""The inputs of a stack: the trunk's hidden state, the tokens with their embeddings, and the
positions.

Shapes: B batch, T positions, C d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from data_modules.windows import RandomKey
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.head import Head


@dataclass(frozen=True)
class StackInputs:
    """Everything that the depths read of the trunk and of the text, over whole windows or at the
    newest positions of decoding.

    Attributes:
        branch: the trunk's state [B, T, C] at the branch point, which the stack starts from.
        tokens: int64 token ids [B, at least T]; depths that read tokens ahead need more than T.
        embedded: their embeddings [B, at least T, C].
        ctx: of the T positions, not shifted; in decoding, with the cache of one depth.
        first: how far ahead of the first position the first of ``tokens`` is.
        tokens_apart: distance in ``tokens`` between the tokens k and k + 1 positions ahead. It is 1
            in a text, and T if ``tokens`` holds a separate list of T tokens for every k.
        head: the shared head, for depths that depend on the probability of a token.
        key: key of the random choices in training; None for no random choices.
    """

    branch: Tensor
    tokens: Tensor
    embedded: Tensor
    ctx: ForwardContext
    first: int = 0
    tokens_apart: int = 1
    head: Head | None = None
    key: RandomKey | None = None

    def tokens_at(self, k: int) -> Tensor:
        """The tokens ``k`` positions ahead, ``w[k : T + k]`` [B, T]."""
        return self._slice(k, self.tokens)

    def embedded_at(self, k: int) -> Tensor:
        """The embeddings of :meth:`tokens_at`, [B, T, C]."""
        return self._slice(k, self.embedded)

    def _slice(self, k: int, field: Tensor) -> Tensor:
        start = (k - self.first) * self.tokens_apart
        return field[:, start : start + self.branch.shape[1]]


@dataclass(frozen=True)
class TrunkText:
    """The states of a trained trunk over some windows of text, which new modules are fitted to.

    Attributes:
        inputs: what the stack reads, over T positions.
        before: the states before the blocks that a module copies [B, T + D, C].
        documents: document ids [B, T + D], or None without a document mask. A module is not fitted
            to states of another document.
    """

    inputs: StackInputs
    before: Tensor
    documents: Tensor | None

    def projection_pairs(self, k: int, x_BTX: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [N, X] of depth k's projection, and the states [N, C] that its block should
        receive, at the N positions whose target is in the same document."""
        seq_len = x_BTX.shape[1]
        y_BTC = self.before[:, k : seq_len + k]
        if self.documents is None:
            return x_BTX.flatten(0, 1), y_BTC.flatten(0, 1)
        same_BT = self.documents[:, :seq_len] == self.documents[:, k : seq_len + k]
        return x_BTX[same_BT], y_BTC[same_BT]
