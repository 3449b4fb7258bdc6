"""What a depth is trained on: a loss a position, of the depth's log-probabilities and its target.

A term is one file: a class with ``value``, the formula. Its gradient is then made by autograd,
chunk by chunk; a term may write it down instead, where the closed form is cheaper. A term with
``needs_teacher`` is also given what the main prediction says of the same target tokens.

Shapes: R positions of one chunk, V vocabulary, C d_model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mtp_lightning.model import MTPModel


@dataclass(eq=False)
class Teacher:
    """The main prediction ``p_{t+k}`` for the tokens that depth k predicts at t; no gradient goes
    back to it. All depths and terms read the same one: nothing of it may be overwritten.

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
    """Some positions of one depth on their way through the loss.

    Attributes:
        depth: k, 0 for the main prediction.
        log_probs_RV: ``log q``, fp32.
        targets_R: ids of the target tokens; any id where the position does not count, whose value
            and gradient are multiplied by 0.
        hidden_RC: the depth's state ``h^k``.
        main: see :attr:`teacher`; None unless a term needs it.
    """

    depth: int
    log_probs_RV: Tensor
    targets_R: Tensor
    hidden_RC: Tensor | None = None
    main: Teacher | None = field(default=None, repr=False)

    @property
    def teacher(self) -> Teacher:
        """What a term with ``needs_teacher`` compares with. Where the position has none, which
        then does not count, it is another position's."""
        assert self.main is not None, "a term that reads the teacher says needs_teacher = True"
        return self.main


class Term(ABC):
    """One objective of the MTP depths (group ``objective``).

    Attributes:
        name: what it is called in messages and in the log.
        needs_teacher: whether :attr:`Chunk.teacher` is read. Only positions that have one count.
        of_token: whether the loss is ``-log q(target)`` and reads no other log-probability. Passes
            then take shorter ways: several such targets share one softmax.
        of_state: whether it is a term of the depth's hidden state, an addition to terms of the
            log-probabilities: :meth:`value` is then differentiable by ``chunk.hidden_RC`` and by
            ``parameters``, and what it reads of the log-probabilities has no gradient.
        parameters: of its own, which are part of the model.
        couples: whether a depth's loss rests on the other depths' acceptance; the term then has the
            methods ``accepted`` and ``together`` (``coupled.py``).
        follows_mask: whether ``objective.mask`` holds for its positions.
        follows_weights: whether ``objective.weights`` multiply its positions.
        is_word: whether a mixture may name it.
    """

    name: ClassVar[str]
    needs_teacher: ClassVar[bool] = False
    of_token: ClassVar[bool] = False
    of_state: ClassVar[bool] = False
    couples: ClassVar[bool] = False
    follows_mask: ClassVar[bool] = True
    follows_weights: ClassVar[bool] = True
    is_word: ClassVar[bool] = True
    parameters: Sequence[nn.Parameter] = ()

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

    def for_model(self, model: MTPModel) -> Term:
        """The term as it trains a model. A term that reads a part of the model other than a depth's
        state returns a copy of itself that holds that part."""
        return self

    def tag(self, k: int) -> str:
        """What its loss of depth ``k`` is called in the log, where it is not the only one."""
        return f"train/loss_depth_{k}/{self.name}"

    def parts(self) -> Iterator[tuple[float, Term]]:
        """What a mixture is made of, each with its weight; of any other term, itself."""
        yield 1.0, self
