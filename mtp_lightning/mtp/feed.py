"""How a stack is trained: hidden states go out with their targets, and their gradients come back.

:meth:`MTPStack.feed` returns a :class:`Feed` for every micro-batch. The objective sends each
:class:`Prediction` that the feed yields through a head, chunk by chunk, and the feed continues once
the gradient of its hidden state is known. All of this happens in the forward pass of one autograd
node (``objective/stream.py``), whose backward pass hands the gradients on to the feed's inputs.

====================  =========================================================================
feed                  order
====================  =========================================================================
:class:`Together`     every depth runs forward first; one teacher serves them all
:class:`OneState`     the main prediction's state has the targets of all depths
``HeadByHead``        one head at a time, forward and backward (``kinds.py``)
``JointFeed``         all depths of a position together, mixed from components (``rank.py``)
====================  =========================================================================

Shapes: B batch, T positions, C d_model, V vocabulary, R positions of one chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Asked(Protocol):
    """A target at the R positions of one chunk, for a loss that the stack computes.

    Attributes:
        depth: k.
        coefficient: factor of the summed loss.
        tokens_R: target ids; any id where the position does not count.
        counts_R: weight of every position, 0 where it does not count.
        of_token: whether the loss is ``-log q(target)`` and reads no other log-probability.
    """

    depth: int
    coefficient: float
    tokens_R: Tensor
    counts_R: Tensor
    of_token: bool

    def value(self, log_q_RV: Tensor) -> Tensor:
        """The term's loss at every position [R], differentiable by ``log_q_RV``."""

    def note(self, value_R: Tensor, counts_R: Tensor | None = None) -> None:
        """Add the losses to the step's sums, by ``counts_R`` if given."""


Loss = Callable[[slice, Tensor, Sequence[Asked], bool], tuple[Tensor, Tensor | None] | None]
"""A loss that the stack computes and notes. It is called with the rows of a chunk (of the B x T
positions), the logits [N, V] of all their hidden states, which it may overwrite, the prediction's
targets there, and whether anybody wants a gradient. It returns that gradient [N, V], and what its
rows are still to be multiplied by, [N, 1] or None."""


@dataclass(eq=False)
class Prediction:
    """A hidden state on its way through a head.

    Attributes:
        hidden: [..., C], ready for the head.
        targets: what its logits are made for once: the objective's targets of a depth, one for each
            term; with ``parameter_free`` those of all depths.
        train_head: whether the head's weight gets a gradient from it.
        needs_gradient: whether the hidden state does.
        weight: [V', C] of a head of its own; None for the shared one.
        loss: computes the loss in the place of the targets' terms.
        width: numbers that a position takes up in ``loss`` beside its logits.
        states: hidden states that stand in ``hidden`` for each position.
        gradient: by the hidden state, once it is known.
        weight_gradient: by a ``weight`` of its own, once it is known.
    """

    hidden: Tensor
    targets: Sequence[Any]
    train_head: bool = True
    needs_gradient: bool = True
    weight: Tensor | None = None
    loss: Loss | None = None
    width: int = 1
    states: int = 1
    gradient: Tensor | None = None
    weight_gradient: Tensor | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with the main prediction."""
        return any(target.needs_teacher for target in self.targets)


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a feed's states are to learn.

    Attributes:
        targets: depth -> its targets, the main prediction's first, in the order of depths.
        needs: which of the feed's inputs want a gradient.
        train_head: whether the depths train the shared head; the main prediction does.
        auxiliary: factor of the layers' auxiliary losses.
    """

    targets: Mapping[int, Sequence[Any]]
    needs: Sequence[bool]
    train_head: bool = True
    auxiliary: float = 1.0

    @property
    def needs_teacher(self) -> bool:
        """Whether any target compares with the main prediction."""
        return any(target.needs_teacher for own in self.targets.values() for target in own)


Steps = Generator[Sequence[Prediction], None, Sequence[Tensor | None]]
"""Yields predictions that go through the head together; returns the gradients of the inputs."""


class Feed(ABC):
    """The hidden states of one micro-batch, and where their gradients go.

    Args:
        inputs: tensors of the autograd graph, parameters included, that a gradient goes back to.
            A parameter that this pass does not use is left out: autograd and DDP then see no path
            to it.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        self.inputs = inputs

    @property
    def main(self) -> Tensor:
        """The main prediction's hidden state [..., C], from which teachers are made."""
        return self.inputs[0]

    def looks(self) -> Iterator[Sequence[tuple[int, Tensor]]]:
        """The depths' hidden states before any of them learns, the very ones that are going to:
        (k, [B, T, C]), in one group those that exist at the same time."""
        yield from ()

    @abstractmethod
    def learn(self, lesson: Lesson) -> Steps:
        """Yield every hidden state with its targets; when resumed, its gradient is known."""


class Together(Feed):
    """Every depth has run forward, as part of the graph. Any stack can be trained so.

    Args:
        final: the main prediction's hidden state.
        depths: (k, hidden state) of the depths, in order.
        own: the losses that depths bring with them.
    """

    def __init__(
        self, final: Tensor, depths: Sequence[tuple[int, Tensor]], own: Mapping[int, OwnLoss]
    ) -> None:
        self.depths, self.own = depths, own
        weights = [loss.weight for loss in own.values()]
        super().__init__([final, *(hidden for _, hidden in depths), *weights])

    def looks(self) -> Iterator[Sequence[tuple[int, Tensor]]]:
        yield self.depths

    def learn(self, lesson: Lesson) -> Steps:
        states = [(0, self.main), *self.depths]
        predictions = [
            Prediction(
                hidden,
                lesson.targets[k],
                train_head=k == 0 or lesson.train_head,
                needs_gradient=needed,
            )
            for (k, hidden), needed in zip(states, lesson.needs, strict=False)
        ]
        with_own = [p for p, (k, _) in zip(predictions, states, strict=True) if k in self.own]
        needs_weight = lesson.needs[len(states) :]
        for p, loss, needed in zip(with_own, self.own.values(), needs_weight, strict=True):
            p.weight, p.loss, p.width, p.train_head = loss.weight, loss, loss.width, needed
        yield predictions
        return [*(p.gradient for p in predictions), *(p.weight_gradient for p in with_own)]


class OneState(Feed):
    """No depth has a state of its own: the main prediction's is asked for further tokens.

    One pass through the head serves all depths. Two things part them: a term with a teacher, whose
    teacher stands at another position for each depth, and a head that learns from the main
    prediction alone.

    Args:
        final: the hidden state.
        depths: k of the depths.
    """

    def __init__(self, final: Tensor, depths: Sequence[int]) -> None:
        super().__init__([final])
        self.depths = depths

    def looks(self) -> Iterator[Sequence[tuple[int, Tensor]]]:
        yield [(k, self.main) for k in self.depths]

    def learn(self, lesson: Lesson) -> Steps:
        parts: list[tuple[bool, Sequence[Any]]]
        if lesson.needs_teacher or not lesson.train_head:
            parts = [(k == 0 or lesson.train_head, own) for k, own in lesson.targets.items()]
        else:
            parts = [(True, [target for own in lesson.targets.values() for target in own])]
        predictions = [
            Prediction(self.main, targets, train_head=trained, needs_gradient=lesson.needs[0])
            for trained, targets in parts
        ]
        yield predictions
        return [added(prediction.gradient for prediction in predictions)]


class OwnLoss(ABC):
    """A loss that a stack brings with it, of the logits that a matrix of its own makes of a state.

    A subclass writes :meth:`value`, and may override :meth:`gradient` by a closed form.

    Args:
        weight: [V', C], the matrix.
        valid_BT: bool [B, T], which positions count.

    Attributes:
        width: numbers that a position takes up beside its logits.
    """

    width = 1

    def __init__(self, weight: Tensor, valid_BT: Tensor) -> None:
        self.weight, self.valid_BT = weight, valid_BT

    @abstractmethod
    def value(self, rows: slice, logits_RV: Tensor) -> Tensor:
        """The loss of every position [R], differentiable by the logits. Where a position does not
        count, it must be finite.

        Args:
            rows: the positions, of the B x T.
            logits_RV: theirs, at least fp32.
        """

    def gradient(self, rows: slice, logits_RV: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`value`, and its derivative by the logits [R, V'], which may be overwritten."""
        with torch.enable_grad():
            logits_RV = logits_RV.detach().requires_grad_()
            value_R = self.value(rows, logits_RV)
            (d_logits_RV,) = torch.autograd.grad(value_R.sum(), logits_RV)
        return value_R.detach(), d_logits_RV

    def __call__(
        self, rows: slice, logits_NV: Tensor, asked: Sequence[Asked], learns: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """See :data:`Loss`. Of the target, its coefficient alone is used."""
        (target,) = asked
        dtype, valid_R = logits_NV.dtype, self.valid_BT.reshape(-1)[rows]
        logits_RV = logits_NV.to(torch.promote_types(dtype, torch.float32))
        if not learns:
            target.note(self.value(rows, logits_RV), valid_R)
            return None
        value_R, d_logits_RV = self.gradient(rows, logits_RV)
        target.note(value_R, valid_R)
        return d_logits_RV, valid_R.to(dtype).mul_(target.coefficient).unsqueeze(-1)


def added(gradients: Iterable[Tensor | None]) -> Tensor | None:
    """Their sum, without those that are None."""
    total: Tensor | None = None
    for gradient in gradients:
        if gradient is not None:
            total = gradient if total is None else total.add_(gradient)
    return total
