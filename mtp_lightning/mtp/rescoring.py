"""The interface of rescorers: the logits that drafts are chosen by, given the token before.

Heads that read no draft can be computed for all depths at once, but their drafts need not fit
together. A rescorer changes a depth's logits once the token before its draft is known, which costs
no pass through the stack. It is trained by a loss of its own, in addition to the objective's terms.

Shapes: R positions of one chunk, C d_model, V vocabulary, K tokens that a loss depends on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, nn


class Forced(NamedTuple):
    """A depth's prediction at some positions, with the text's own tokens (teacher forcing).

    Attributes:
        k: the depth.
        log_q_RV: the head's log-probabilities, at least fp32.
        hidden_RC: the depth's state.
        before_R: ids of the tokens before the targets.
        target_R: ids of the targets; arbitrary at positions that do not count.
    """

    k: int
    log_q_RV: Tensor
    hidden_RC: Tensor
    before_R: Tensor
    target_R: Tensor


@dataclass(frozen=True, eq=False)
class StateGradient:
    """The losses of a chunk, and the gradient of their sum, each times a factor.

    Attributes:
        value_R: the losses, in nats.
        hidden_RC: gradient with respect to the depth's state.
        logits: token ids [R, K] and the gradient with respect to their logits [R, K], if the loss
            depends on some of the head's logits.
    """

    value_R: Tensor
    hidden_RC: Tensor
    logits: tuple[Tensor, Tensor] | None = None


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
            k: the depth.
            hidden: the depth's states [..., C].
            logits: the head's logits [..., V] of these states.
            before: ids of the tokens before the drafts, [...]. Where it is wider than ``hidden``
                and ``logits``, they are broadcast.
        """

    @abstractmethod
    def value(self, forced: Forced) -> Tensor:
        """The loss of every position [R], in nats."""

    @abstractmethod
    def state_gradient(
        self, forced: Forced, factor_R: Tensor, into: dict[nn.Parameter, Tensor]
    ) -> StateGradient:
        """:meth:`value` and its gradient.

        Args:
            forced: the predictions at the chunk's positions.
            factor_R: factors of the losses, such as mask times coefficient.
            into: receives the gradients of the rescorer's own parameters, which are added.
        """
