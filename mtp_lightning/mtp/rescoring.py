"""The interface of rescorers: the logits that drafts are chosen by, given the token before.

Heads that read no draft can be computed for all depths at once, but their drafts need not fit
together. A rescorer changes a depth's logits once the token before its draft is known, which costs
no pass through the stack. It is trained by a loss of its own, in addition to the objective's terms.

Shapes: R positions of one chunk, C d_model, V vocabulary, K tokens that a loss depends on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from mtp_lightning.mtp.chunk import Chunk, StateGradient, TermGradients


class Rescorer(nn.Module, ABC):
    """Changes the logits of a draft by the token that it follows.

    Attributes:
        name: the name of its loss in the log.
    """

    name: ClassVar[str]

    @abstractmethod
    def forward(self, k: int, hidden: Tensor, logits: Tensor, before: Tensor) -> Tensor:
        """The logits [..., V] that drafts of depth ``k`` are chosen by, at least fp32; -inf for a
        token that is never drafted.

        Args:
            hidden: the depth's states [..., C].
            logits: the head's logits [..., V] of these states.
            before: ids of the tokens before the drafts, [...]. Where it is wider than ``hidden``
                and ``logits``, they are broadcast.
        """

    @abstractmethod
    def value(self, chunk: Chunk) -> Tensor:
        """The loss of every position [R], in nats; arguments as in :meth:`state_gradient`."""

    @abstractmethod
    def state_gradient(self, chunk: Chunk, factor_R: Tensor, into: TermGradients) -> StateGradient:
        """:meth:`value`, and the gradient of ``(value * factor).sum()``; adds those of the
        rescorer's own parameters to ``into``.

        Args:
            chunk: the depth's prediction, with its state and the text's own tokens before the
                targets (teacher forcing).
            factor_R: factors of the losses, such as mask times coefficient.
        """
