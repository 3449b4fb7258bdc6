"""How a stack is trained: its hidden states go through a head and come back with gradients.

:meth:`MTPStack.feed` returns a :class:`Feed` for every micro-batch. :meth:`Feed.input_gradients`
passes each hidden state, with its targets, to the objective (:data:`ThroughHead`), which sends it
through a head, chunk by chunk, and sets its gradient. It returns the gradients of the feed's
inputs, which one autograd node hands on (``objective/micro_batch.py``).

Besides the feeds of this file there are ``HeadByHead`` (``kinds.py``) and ``MixtureFeed``
(``rank.py``).

Shapes: B batch, T positions, C d_model, V vocabulary, R positions of one chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from mtp_lightning.nn.ops import weight_gradient


class LossTarget(Protocol):
    """A target at the R positions of one chunk, as a loss that the stack computes sees it
    (``ChunkTarget`` of ``objective/targets.py``)."""

    depth: int
    coefficient: float
    tokens_R: Tensor
    counts_R: Tensor
    term: Any

    def value(self, log_q_RV: Tensor) -> Tensor:
        """The term's loss at every position [R], differentiable with respect to ``log_q_RV``."""

    def add_to_total(self, value_R: Tensor, counts_R: Tensor | None = None) -> None:
        """Add the losses to the target's total, weighted by ``counts_R`` (default: its own)."""


class StackLoss(ABC):
    """A loss that the stack computes and adds to its targets' totals itself.

    Attributes:
        width: numbers per position that it needs besides the logits, to size the chunks.
        states: hidden states per position.
    """

    width: int = 1
    states: int = 1

    @abstractmethod
    def __call__(
        self, rows: slice, logits_NV: Tensor, targets: Sequence[LossTarget], needs_gradient: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """The loss at one chunk.

        Args:
            rows: the chunk's positions among the B x T.
            logits_NV: the logits of all their hidden states, which it may overwrite.
            targets: the prediction's targets at these rows.
            needs_gradient: whether the gradient is used; if not, it may be None.

        Returns:
            The gradient with respect to the logits [N, V], and a factor of its rows that is still
            to be applied, [N, 1] or None.
        """


class HeadWeight:
    """A head's weight and its accumulated gradient.

    Attributes:
        tokens_N: int64, the token of each row; None if row i is token i.
        gradient: the gradient so far; None before the first chunk.
    """

    def __init__(
        self, weight_VC: Tensor, *, needs_gradient: bool = False, tokens_N: Tensor | None = None
    ) -> None:
        self.weight_VC, self.needs_gradient, self.tokens_N = weight_VC, needs_gradient, tokens_N
        self.gradient: Tensor | None = None

    def add(self, d_logits_NV: Tensor, h_NC: Tensor, factor: float = 1.0) -> None:
        """``gradient += factor * d_logits.T @ h``."""
        if self.gradient is None:
            # In the layout of weight_gradient's results: adding across layouts is slow.
            self.gradient = self.weight_VC.new_zeros(self.weight_VC.shape[::-1]).t()
        self.gradient.add_(weight_gradient(d_logits_NV, h_NC), alpha=factor)


@dataclass(eq=False)
class Prediction:
    """A hidden state on its way through a head.

    Attributes:
        hidden: [..., C], ready for the head.
        targets: the targets that share its logits: those of a depth, one per term; with
            ``parameter_free`` those of all depths.
        train_head: whether a head that needs a gradient gets one from it.
        needs_gradient: whether the hidden state gets a gradient.
        head: the head, which the targets are rows of; None for the shared one.
        loss: computes the loss instead of the targets' terms.
        gradient: with respect to ``hidden``, once known.
    """

    hidden: Tensor
    targets: Sequence[Any]
    train_head: bool = True
    needs_gradient: bool = True
    head: HeadWeight | None = None
    loss: StackLoss | None = None
    gradient: Tensor | None = None

    def trains_head(self, shared: HeadWeight) -> bool:
        """Whether the prediction trains its head, which is ``shared`` unless it has its own."""
        head = shared if self.head is None else self.head
        return head.needs_gradient and self.train_head


@dataclass(frozen=True, eq=False)
class LossRequest:
    """The targets of a feed's states, and which gradients are needed.

    Attributes:
        targets: depth -> its targets, in the order of depths, the main prediction's first.
        needs: which of the feed's inputs need a gradient.
        train_head: whether the depths train the shared head; the main prediction always does.
        auxiliary_factor: factor of the layers' auxiliary losses.
    """

    targets: Mapping[int, Sequence[Any]]
    needs: Sequence[bool]
    train_head: bool = True
    auxiliary_factor: float = 1.0


ThroughHead = Callable[[Sequence[Prediction]], None]
"""Sends predictions through the head together, and sets the ``gradient`` of each."""


class Feed(ABC):
    """The hidden states of one micro-batch, and the tensors that receive their gradients.

    Args:
        inputs: tensors of the autograd graph, parameters included, that receive gradients.
            Parameters that this pass does not use are left out, so that autograd and DDP see no
            path to them.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        self.inputs = inputs

    @property
    def main(self) -> Tensor:
        """The main prediction's hidden state [..., C], from which teachers are computed."""
        return self.inputs[0]

    def state_groups(self) -> Iterator[Sequence[tuple[int, Tensor]]]:
        """The depths' hidden states (k, [B, T, C]) that :meth:`input_gradients` trains, in groups
        of states that exist at the same time: for a prepass, and for the gradient of each depth
        alone."""
        yield from ()

    def prediction(self, k: int, hidden: Tensor, targets: Sequence[Any]) -> Prediction:
        """The prediction of depth ``k`` for a prepass, or for the gradient of a depth alone, which
        train no head."""
        return Prediction(hidden, targets, train_head=False)

    @abstractmethod
    def input_gradients(self, request: LossRequest, send: ThroughHead) -> Sequence[Tensor | None]:
        """Train the hidden states on their targets; return the gradients of the inputs."""


class Together(Feed):
    """All depths run forward first, as part of the autograd graph, and one teacher serves them all.
    Any stack can be trained so.

    Args:
        final: the main prediction's hidden state.
        depth_states: (k, hidden state) in order.
        losses: the depths' own losses, by k.
        head: the depths' own head; None for the shared head.
    """

    def __init__(
        self,
        final: Tensor,
        depth_states: Sequence[tuple[int, Tensor]],
        losses: Mapping[int, OwnLoss],
        head: HeadWeight | None = None,
    ) -> None:
        self.depth_states, self.losses = depth_states, losses
        # The heads of depths that do not go through the shared one.
        self.heads = {k: HeadWeight(loss.weight) for k, loss in losses.items()}
        if head is not None:
            self.heads |= {k: head for k, _ in depth_states}
        self.own_heads = list(dict.fromkeys(self.heads.values()))
        weights = [head.weight_VC for head in self.own_heads]
        super().__init__([final, *(hidden for _, hidden in depth_states), *weights])

    def state_groups(self) -> Iterator[Sequence[tuple[int, Tensor]]]:
        yield self.depth_states

    def prediction(self, k: int, hidden: Tensor, targets: Sequence[Any]) -> Prediction:
        head, loss = self.heads.get(k), self.losses.get(k)
        return Prediction(hidden, targets, train_head=False, head=head, loss=loss)

    def input_gradients(self, request: LossRequest, send: ThroughHead) -> Sequence[Tensor | None]:
        states = [(0, self.main), *self.depth_states]
        for head, needs_gradient in zip(self.own_heads, request.needs[len(states) :], strict=True):
            head.needs_gradient = needs_gradient
        predictions = [
            replace(
                self.prediction(k, hidden, request.targets[k]),
                train_head=k == 0 or k in self.heads or request.train_head,
                needs_gradient=needs_gradient,
            )
            for (k, hidden), needs_gradient in zip(states, request.needs, strict=False)
        ]
        send(predictions)
        return [*(p.gradient for p in predictions), *(head.gradient for head in self.own_heads)]


class OneState(Feed):
    """All depths use the main prediction's hidden state, for targets further ahead.

    One pass through the head serves all depths, with two exceptions that need a pass per depth: a
    term with a teacher, whose position differs by depth, and a head that learns only from the main
    prediction.
    """

    def __init__(self, final: Tensor, depths: Sequence[int]) -> None:
        super().__init__([final])
        self.depths = depths

    def state_groups(self) -> Iterator[Sequence[tuple[int, Tensor]]]:
        yield [(k, self.main) for k in self.depths]

    def input_gradients(self, request: LossRequest, send: ThroughHead) -> Sequence[Tensor | None]:
        parts = [(k == 0 or request.train_head, group) for k, group in request.targets.items()]
        targets = [target for _, group in parts for target in group]
        if request.train_head and not any(target.term.needs_teacher for target in targets):
            parts = [(True, targets)]
        predictions = [
            Prediction(self.main, group, train_head=trains, needs_gradient=request.needs[0])
            for trains, group in parts
        ]
        send(predictions)
        return [added(prediction.gradient for prediction in predictions)]


class OwnLoss(StackLoss):
    """A stack's own loss, computed from logits of its own matrix.

    A subclass defines :meth:`value`, and may override :meth:`gradient` with a closed form.

    Args:
        weight: the matrix, [V', C].
        valid_BT: bool [B, T], which positions count.
    """

    def __init__(self, weight: Tensor, valid_BT: Tensor) -> None:
        self.weight, self.valid_BT = weight, valid_BT

    @abstractmethod
    def value(self, rows: slice, logits_RV: Tensor) -> Tensor:
        """The loss of every position [R], ``rows`` among the B x T, differentiable with respect to
        their logits, at least fp32. It must be finite at positions that do not count."""

    def gradient(self, rows: slice, logits_RV: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`value` and its gradient with respect to the logits [R, V'], which it may
        overwrite."""
        with torch.enable_grad():
            logits_RV = logits_RV.detach().requires_grad_()
            value_R = self.value(rows, logits_RV)
            (d_logits_RV,) = torch.autograd.grad(value_R.sum(), logits_RV)
        return value_R.detach(), d_logits_RV

    def __call__(
        self, rows: slice, logits_NV: Tensor, targets: Sequence[LossTarget], needs_gradient: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        # Only the coefficient of the target is used.
        (target,) = targets
        valid_R = self.valid_BT.reshape(-1)[rows]
        logits_RV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        if not needs_gradient:
            target.add_to_total(self.value(rows, logits_RV), valid_R)
            return None
        value_R, d_logits_RV = self.gradient(rows, logits_RV)
        target.add_to_total(value_R, valid_R)
        return d_logits_RV, (valid_R * target.coefficient).unsqueeze(-1)


def added(gradients: Iterable[Tensor | None]) -> Tensor | None:
    """The sum of the gradients that are not None, added in place to the first unless autograd has
    expanded that (of a sum); None without any."""
    total: Tensor | None = None
    for gradient in gradients:
        if total is None or gradient is None:
            total = gradient if total is None else total
        else:
            total = total + gradient if 0 in total.stride() else total.add_(gradient)
    return total
