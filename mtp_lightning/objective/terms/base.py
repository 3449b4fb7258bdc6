"""The interface of terms: a loss per position of a depth's log-probabilities and its target.

A term is one file: a class with ``value``, the formula. Autograd computes its gradient chunk by
chunk, unless the term overrides ``gradient`` with a cheaper closed form. A term with
``needs_teacher`` also receives the main prediction of the same target tokens.

Shapes: R positions of one chunk, V vocabulary, C d_model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from mtp_lightning.mtp.chunk import Chunk, StateGradient, TermGradients

if TYPE_CHECKING:
    from mtp_lightning.model import MTPModel
    from mtp_lightning.objective.rules.base import Rule


class Term(ABC):
    """One objective of the MTP depths (group ``objective``).

    Attributes:
        name: its name in messages and in the log.
        needs_teacher: whether it reads :attr:`Chunk.teacher`. Then only positions that have one
            count.
        of_token: whether the loss is ``-log q(target)`` and reads no other log-probability. Faster
            code then applies: several such targets share one softmax.
        of_state: whether it is a term of the depth's hidden state, in addition to terms of the
            log-probabilities: :meth:`value` is then differentiable with respect to
            ``chunk.hidden_RC`` and ``parameters``, and not to the log-probabilities.
        reads_before: whether it reads the tokens before the targets.
        counts_padding: whether positions without a target count too, as if it were token 0.
        parameters: its own parameters, which belong to the model.
        follows_mask: whether ``objective.mask`` applies to its positions.
        follows_weights: whether ``objective.weights`` multiply its positions.
        selectable: whether ``objective.terms`` may name it.
    """

    name: ClassVar[str]
    needs_teacher: ClassVar[bool] = False
    of_token: ClassVar[bool] = False
    of_state: ClassVar[bool] = False
    reads_before: bool = False
    counts_padding: bool = False
    follows_mask: ClassVar[bool] = True
    follows_weights: ClassVar[bool] = True
    selectable: ClassVar[bool] = True
    parameters: Sequence[nn.Parameter] = ()

    @abstractmethod
    def value(self, chunk: Chunk) -> Tensor:
        """The loss of every position [R], in nats, differentiable with respect to
        ``chunk.log_probs_RV``."""

    def gradient(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """:meth:`value`, and its gradient with respect to the logits [R, V] whose log-softmax is
        ``chunk.log_probs_RV``; it may overwrite the chunk's log-probabilities."""
        with torch.enable_grad():
            log_probs_RV = chunk.log_probs_RV.detach().requires_grad_()
            value_R = self.value(replace(chunk, log_probs_RV=log_probs_RV))
            (d_log_probs_RV,) = torch.autograd.grad(value_R.sum(), log_probs_RV)
        probs_RV = log_probs_RV.detach().exp()
        total_R1 = d_log_probs_RV.sum(-1, keepdim=True)
        return value_R.detach(), d_log_probs_RV - probs_RV * total_R1

    def state_gradient(self, chunk: Chunk, factor_R: Tensor, into: TermGradients) -> StateGradient:
        """For a term ``of_state``: :meth:`value`, and the gradient of ``(value * factor).sum()``;
        adds those of ``parameters`` to ``into``."""
        assert chunk.hidden_RC is not None
        parameters = [p for p in self.parameters if p.requires_grad]
        with torch.enable_grad():
            hidden_RC = chunk.hidden_RC.detach().requires_grad_()
            value_R = self.value(replace(chunk, hidden_RC=hidden_RC))
            loss = (value_R * factor_R).sum()
            d_hidden_RC, *parameter_gradients = torch.autograd.grad(loss, [hidden_RC, *parameters])
        for parameter, gradient in zip(parameters, parameter_gradients, strict=True):
            before = into.get(parameter)
            into[parameter] = gradient if before is None else before + gradient
        return StateGradient(value_R.detach(), d_hidden_RC)

    def for_model(self, model: MTPModel) -> Term:
        """The term as it trains a model. A term that reads a part of the model other than a depth's
        state returns a copy of itself that holds that part."""
        return self

    @property
    def setting(self) -> str:
        """The setting that selects the term, for messages."""
        return f"objective={self.name}"

    def rules(self, setting: str) -> Sequence[Rule]:
        """The rules that the term needs, by default none.

        Args:
            setting: the setting that selects the term, for messages.
        """
        return ()

    def tag(self, k: int) -> str:
        """The log tag of its loss of depth ``k``, if it is not the only term."""
        return f"train/loss_depth_{k}/{self.name}"

    def parts(self) -> Iterator[tuple[float, Term]]:
        """The weighted terms that a mixture consists of; by default the term itself."""
        yield 1.0, self
