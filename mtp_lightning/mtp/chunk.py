"""The arguments and the result of a loss at some positions of one depth.

Terms of the objective (``objective/terms/``) and rescorers (``rescoring.py``) compute such losses.

Shapes: R positions of one chunk, V vocabulary, C d_model, K tokens that a loss depends on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

TermGradients = dict[nn.Parameter, Tensor]
"""The gradients of the losses' own parameters; those of every chunk are added."""


@dataclass(eq=False)
class Teacher:
    """The main prediction ``p_{t+k}`` of the tokens that depth k predicts at t, without gradient.
    All depths and terms share its tensors, so they must not overwrite them.

    Attributes:
        log_probs_RV: ``log p``, fp32.
        hidden_RC: the main prediction's state ``h_{t+k}``, the one that the head projects.
    """

    log_probs_RV: Tensor
    hidden_RC: Tensor

    @cached_property
    def probs_RV(self) -> Tensor:
        """``p``, computed once for all depths."""
        return self.log_probs_RV.exp()


@dataclass(frozen=True, eq=False)
class Chunk:
    """The inputs of a loss at some positions of one depth.

    Attributes:
        depth: k, 0 for the main prediction.
        log_probs_RV: ``log q``, fp32.
        targets_R: ids of the target tokens; arbitrary at positions that do not count, whose value
            and gradient are multiplied by 0.
        hidden_RC: the depth's state ``h^k``.
        teacher_if_needed: see :attr:`teacher`; None unless a term needs it.
        before_R: ids of the tokens before the targets, for a term that ``reads_before``; else None.
    """

    depth: int
    log_probs_RV: Tensor
    targets_R: Tensor
    hidden_RC: Tensor | None = None
    teacher_if_needed: Teacher | None = None
    before_R: Tensor | None = None

    @property
    def teacher(self) -> Teacher:
        """The teacher of a term with ``needs_teacher``. At positions without one, which do not
        count, it is the teacher of another position."""
        teacher = self.teacher_if_needed
        assert teacher is not None, "a term that reads the teacher says needs_teacher = True"
        return teacher

    def tempered(self, temperature: float) -> Chunk:
        """The chunk with both distributions at a temperature: ``softmax(logits / temperature)``."""
        if temperature == 1:
            return self
        log_q_RV = torch.log_softmax(self.log_probs_RV / temperature, dim=-1)
        log_p_RV = torch.log_softmax(self.teacher.log_probs_RV / temperature, dim=-1)
        teacher = Teacher(log_p_RV, self.teacher.hidden_RC)
        return replace(self, log_probs_RV=log_q_RV, teacher_if_needed=teacher)


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
