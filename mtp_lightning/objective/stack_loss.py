"""``sum_k coefficient_k * loss_k`` of all depths as one node of the autograd graph.

All kinds of stack feed the same loop: a stream of hidden states goes through the head one after
another (``through_head.py``), and what is learned of each goes back to where it came from. That
happens in the node's forward pass; its backward pass hands the gradients on.

- A chain has run forward before, as part of the graph: its hidden states are the node's inputs.
- Heads side by side run inside, in Gloeckle's memory order (Gloeckle et al. 2024, section 2,
  fig. 2): each in turn forward, through the loss, and backward; its activations are freed before
  the next one starts. What they say adds up at the branch point, from where one backward pass goes
  through the trunk. The peak holds the activations of the trunk and of one head, whatever D is. To
  data parallelism, with its hooks on every parameter, the node is like any other.
- With targets alone, one hidden state is asked for several tokens.

Where a term compares with the main prediction, a chain's depths go through the head together, and
one teacher serves them all, which is the main prediction's own pass. Heads side by side, of which
only one is there at a time, have it made anew for each. With targets alone every depth goes through
the head by itself, since its teacher stands at another position; so it does where the head learns
from the main prediction alone.

Depths that one mixture joins have a node of their own (``mixture_loss.py``).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import BranchPoint, RandomKey
from mtp_lightning.mtp.kinds import SideBySide, Targets
from mtp_lightning.mtp.rank import JointLinearMTP
from mtp_lightning.nn.ledger import Ledger
from mtp_lightning.objective.ahead import Seen, look_ahead
from mtp_lightning.objective.mixture_loss import mixture_loss
from mtp_lightning.objective.objective import CROSS_ENTROPY, Objective, tokens_of
from mtp_lightning.objective.terms.base import HiddenTerm
from mtp_lightning.objective.through_head import (
    DepthTarget,
    HeadWeight,
    Prediction,
    through_head,
)


def stack_loss(
    model: MTPModel,
    final_BTC: Tensor,
    at: BranchPoint,
    targets: Sequence[DepthTarget],
    *,
    key: RandomKey | None = None,
    auxiliary: float = 1.0,
    objective: Objective = CROSS_ENTROPY,
) -> tuple[Tensor, Tensor]:
    """The weighted loss of the main prediction and of some depths.

    Args:
        model: the model.
        final_BTC: the trunk's output, and ...
        at: ... the branch point, both from :meth:`MTPModel.run_trunk`.
        targets: of the main prediction, then of the depths to compute, in order; of a depth, one
            for every term.
        key: of a stack's random choices in training; None makes none.
        auxiliary: factor of the auxiliary losses that heads side by side report; they train those
            heads, and are left out of the total.
        objective: that the targets are of.

    Returns:
        The weighted total, a differentiable scalar in fp32 (in a double precision model fp64), and
        the plain sums of the losses [len(targets)], fp64, without a gradient.
    """
    stack, weight_VC = model.mtp, model.head.weight
    train_head = objective.train_head and stack.config.detach != "all"
    compiled = model.has_compiled_kernels
    depths = list(by_depth(targets))[1:]
    if isinstance(stack, JointLinearMTP):
        return mixture_loss(model, final_BTC, at, objective.settle(targets, Seen()))
    tokens, wanted = tokens_of(targets), objective.wanted
    if isinstance(stack, SideBySide):
        # Each head is computed once more. What its routers do is counted in training.
        unheard = replace(at, positions=replace(at.positions, ledger=None))
        one_by_one = ([state] for state in stack.states(unheard, depths, key))
        seen = look_ahead(weight_VC, final_BTC, one_by_one, tokens, wanted)
        targets = objective.settle(targets, seen)
        stream = _HeadByHead(stack, final_BTC, at, targets, auxiliary, key, train_head=train_head)
        return _apply(weight_VC, stream, compiled=compiled)
    pairs = list(stack.states(at, depths, key))
    states = [final_BTC, *(hidden for _, hidden in pairs)]
    seen = look_ahead(weight_VC, final_BTC, [pairs], tokens, wanted)
    targets = objective.settle(targets, seen)
    alone = not train_head or any(target.term.needs_teacher for target in targets)
    if isinstance(stack, Targets) and not alone:
        return one_state_loss(weight_VC, final_BTC, targets)
    return joint_loss(weight_VC, states, targets, train_head=train_head, compiled=compiled)


def by_depth(targets: Sequence[DepthTarget]) -> dict[int, list[DepthTarget]]:
    """The targets of every depth, in their order."""
    groups = itertools.groupby(targets, key=lambda target: target.depth)
    return {depth: list(group) for depth, group in groups}


def joint_loss(
    weight_VC: Tensor,
    states: Sequence[Tensor],
    targets: Sequence[DepthTarget],
    *,
    train_head: bool = True,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`stack_loss` of hidden states [..., C] that are parts of the graph, one a depth.

    Args:
        train_head: whether the states behind the first one reach the head's weight.
        compiled: whether cross-entropy is one compiled kernel.
    """
    stream = _Joint(list(states), targets, train_head=train_head)
    return _apply(weight_VC, stream, compiled=compiled)


def one_state_loss(
    weight_VC: Tensor, hidden: Tensor, targets: Sequence[DepthTarget]
) -> tuple[Tensor, Tensor]:
    """:func:`stack_loss` of one hidden state [..., C] that has several targets."""
    return _apply(weight_VC, _OneState(hidden, targets))


def _apply(weight_VC: Tensor, stream: _Stream, *, compiled: bool = False) -> tuple[Tensor, Tensor]:
    return _StackLoss.apply(weight_VC, stream, compiled, *stream.inputs)


class _Stream(ABC):
    """Hidden states for the head, one at a time, or together those that one teacher serves.

    Attributes:
        inputs: what autograd sees: tensors of the graph, and parameters. The first one is the main
            prediction's hidden state.
        targets: of all of them, in order.
        of_terms: parameters of the targets' terms, which come last among the inputs.
        grad: whether anybody wants gradients.
    """

    inputs: list[Tensor]

    def __init__(self, targets: Sequence[DepthTarget]) -> None:
        self.targets = targets
        self.grad = torch.is_grad_enabled()
        owned = {
            id(parameter): parameter
            for target in targets
            if isinstance(target.term, HiddenTerm)
            for parameter in target.term.parameters
        }
        self.of_terms = list(owned.values())

    @abstractmethod
    def predictions(
        self, needs: Sequence[bool], gradients: list[Tensor | None]
    ) -> Iterator[Sequence[Prediction]]:
        """Yields every hidden state with its targets; when resumed, its gradient is known.

        Args:
            needs: which of the inputs want a gradient.
            gradients: of the inputs, to be filled in.
        """

    def add_of_terms(
        self, predictions: Sequence[Prediction], gradients: list[Tensor | None]
    ) -> None:
        """Add what the terms' own parameters learned of predictions that are done."""
        for prediction in predictions:
            for slot, part in enumerate(prediction.of_parameters, -len(self.of_terms)):
                before = gradients[slot]
                gradients[slot] = part if before is None else before + part


class _Joint(_Stream):
    """All depths have run forward before; any stack can be trained so."""

    def __init__(
        self, states: list[Tensor], targets: Sequence[DepthTarget], *, train_head: bool
    ) -> None:
        super().__init__(targets)
        self.inputs = [*states, *self.of_terms]
        self.train_head = train_head

    def predictions(
        self, needs: Sequence[bool], gradients: list[Tensor | None]
    ) -> Iterator[Sequence[Prediction]]:
        predictions = [
            Prediction(
                self.inputs[slot],
                targets,
                train_head=slot == 0 or self.train_head,
                needs_gradient=needs[slot],
            )
            for slot, targets in enumerate(by_depth(self.targets).values())
        ]
        together = any(prediction.needs_teacher for prediction in predictions)
        yield from [predictions] if together else ([each] for each in predictions)
        for slot, prediction in enumerate(predictions):
            gradients[slot] = prediction.gradient
        self.add_of_terms(predictions, gradients)


class _OneState(_Stream):
    """One hidden state predicts all targets."""

    def __init__(self, final_BTC: Tensor, targets: Sequence[DepthTarget]) -> None:
        super().__init__(targets)
        self.inputs = [final_BTC]

    def predictions(
        self, needs: Sequence[bool], gradients: list[Tensor | None]
    ) -> Iterator[Sequence[Prediction]]:
        prediction = Prediction(self.inputs[0], self.targets, needs_gradient=needs[0])
        yield [prediction]
        gradients[0] = prediction.gradient


class _HeadByHead(_Stream):
    """Heads side by side, each forward and backward by itself."""

    def __init__(
        self,
        stack: SideBySide,
        final_BTC: Tensor,
        at: BranchPoint,
        targets: Sequence[DepthTarget],
        auxiliary: float,
        key: RandomKey | None,
        *,
        train_head: bool,
    ) -> None:
        super().__init__(targets)
        self.stack, self.at, self.auxiliary, self.key = stack, at, auxiliary, key
        self.train_head = train_head
        (self.main, *_), *self.depths = by_depth(targets).values()
        # Only parameters that the pass uses: to the rest, autograd and DDP see no path.
        used = [p for own, *_ in self.depths for p in stack.parameters_of(own.depth)]
        # What the heads have in common: the branch and, of those that read tokens, the embeddings.
        reads_tokens = stack.ahead([own.depth for own, *_ in self.depths]) > 0
        self.common = [at.hidden, at.embedded] if reads_tokens else [at.hidden]
        self.inputs = [final_BTC, *self.common, *used, *self.of_terms]

    def predictions(
        self, needs: Sequence[bool], gradients: list[Tensor | None]
    ) -> Iterator[Sequence[Prediction]]:
        prediction = Prediction(self.inputs[0], [self.main], needs_gradient=needs[0])
        yield [prediction]
        gradients[0] = prediction.gradient
        slot = 1 + len(self.common)
        wanted = needs[1:slot]
        for targets in self.depths:
            own = self.stack.parameters_of(targets[0].depth)
            d_common, d_own = yield from self._one_head(targets, own, gradients, wanted)
            gradients[slot : slot + len(own)] = d_own
            slot += len(own)
            for place, gradient in enumerate(d_common, start=1):
                if gradient is not None:
                    so_far = gradients[place]
                    gradients[place] = gradient if so_far is None else so_far.add_(gradient)

    def _one_head(
        self,
        targets: list[DepthTarget],
        own: list[nn.Parameter],
        gradients: list[Tensor | None],
        needs: Sequence[bool],
    ) -> Generator[Sequence[Prediction], None, tuple[list[Tensor | None], list[Tensor | None]]]:
        """A head forward, through the loss, and backward; its activations end with this call.

        Args:
            targets: of the head.
            own: its parameters.
            gradients: of the stream's inputs; those of terms' own parameters are added to.
            needs: which of what the heads have in common want a gradient.

        Returns:
            The gradients of what they have in common, and of the head's own parameters.
        """
        outer = self.at.positions.ledger
        ledger = None if outer is None else Ledger()
        with torch.set_grad_enabled(self.grad):
            leaves = [
                tensor.detach().requires_grad_(wanted)
                for tensor, wanted in zip(self.common, needs, strict=True)
            ]
            branch, embedded = leaves if len(leaves) == 2 else (leaves[0], self.at.embedded)
            positions = replace(self.at.positions, ledger=ledger)
            at = replace(self.at, hidden=branch, embedded=embedded, positions=positions)
            ((_, hidden),) = self.stack.states(at, [targets[0].depth], self.key)
        prediction = Prediction(
            hidden,
            targets,
            train_head=self.train_head,
            needs_gradient=hidden.requires_grad,
        )
        yield [prediction]
        self.add_of_terms([prediction], gradients)
        auxiliary: list[Tensor] = []
        if outer is not None and ledger is not None:
            auxiliary = ledger.losses
            outer.add_loads(ledger)
            for loss in auxiliary:  # whose backward pass is the one below
                outer.add_loss(loss.detach())
        if prediction.gradient is None:
            return [None] * len(leaves), [None] * len(own)
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        # A head's own experts are balanced in the same backward pass.
        grads = torch.autograd.grad(
            [hidden, *auxiliary],
            [*asked, *own],
            [prediction.gradient, *(torch.full_like(loss, self.auxiliary) for loss in auxiliary)],
            allow_unused=True,
        )
        of_common = iter(grads)
        d_common = [next(of_common) if leaf.requires_grad else None for leaf in leaves]
        return d_common, list(grads[len(asked) :])


class _StackLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight_VC: Tensor, stream: _Stream, compiled: bool, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        needs_weight, _, _, *needs = (wanted and stream.grad for wanted in ctx.needs_input_grad)
        sums = torch.zeros(len(stream.targets), dtype=torch.float64, device=weight_VC.device)
        gradients: list[Tensor | None] = [None] * len(inputs)
        head = HeadWeight(weight_VC, needs_gradient=needs_weight)
        done = 0
        for predictions in stream.predictions(needs, gradients):
            end = done + sum(len(prediction.targets) for prediction in predictions)
            through_head(
                head, predictions, sums[done:end], main_hidden=inputs[0], compiled=compiled
            )
            done = end
        ctx.gradients = (head.gradient, gradients)
        ctx.mark_non_differentiable(sums)
        # Number by number: written out as a tensor, the coefficients would be copied from the host,
        # which waits for the device.
        weighted = [
            total * target.coefficient for total, target in zip(sums, stream.targets, strict=True)
        ]
        dtype = torch.promote_types(weight_VC.dtype, torch.float32)
        return torch.stack(weighted).sum().to(dtype), sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_weight, gradients = ctx.gradients
        # They are handed on, not kept: a second backward through the same graph has none.
        del ctx.gradients
        for tensor in (d_weight, *gradients):
            if tensor is not None:
                tensor.mul_(grads[0])
        return d_weight, None, None, *gradients
