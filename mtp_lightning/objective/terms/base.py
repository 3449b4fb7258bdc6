"""What a depth is trained on: a loss a position, of the depth's log-probabilities and its target.

A term is one file: a class with ``value``, the formula. Its gradient is then made by autograd,
chunk by chunk; a term may write it down instead, where the closed form is cheaper.

Shapes: R positions of one chunk, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some positions of one depth on their way through the loss.

    Attributes:
        depth: k, 0 for the main prediction.
        log_probs_RV: ``log q``, fp32.
        targets_R: ids of the target tokens; any id where the position does not count, whose value
            and gradient are multiplied by 0.
    """

    depth: int
    log_probs_RV: Tensor
    targets_R: Tensor


class Term(ABC):
    """One objective of the MTP depths (group ``objective``).

    Attributes:
        name: what it is called in messages.
    """

    name: ClassVar[str]

    @abstractmethod
    def value(self, chunk: Chunk) -> Tensor:
        """The loss of every position [R], in nats; differentiable by ``chunk.log_probs_RV``."""

    def gradient(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """:meth:`value`, and its derivative by the logits [R, V] that ``log_probs_RV`` is the
        log-softmax of; the chunk's log-probabilities may be overwritten."""
        with torch.enable_grad():
            log_probs_RV = chunk.log_probs_RV.detach().requires_grad_()
            value_R = self.value(replace(chunk, log_probs_RV=log_probs_RV))
            (d_log_probs_RV,) = torch.autograd.grad(value_R.sum(), log_probs_RV)
        probs_RV = log_probs_RV.detach().exp()
        total_R1 = d_log_probs_RV.sum(-1, keepdim=True)
        return value_R.detach(), d_log_probs_RV - probs_RV * total_R1
