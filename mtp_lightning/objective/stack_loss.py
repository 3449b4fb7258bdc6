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
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import BranchPoint, RandomKey
from mtp_lightning.mtp.kinds import SideBySide, Targets
from mtp_lightning.nn.ledger import Ledger
from mtp_lightning.objective.through_head import DepthTarget, Prediction, through_head


def stack_loss(
    model: MTPModel,
    final_BTC: Tensor,
    at: BranchPoint,
    targets: Sequence[DepthTarget],
    *,
    key: RandomKey | None = None,
    auxiliary: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The weighted loss of the main prediction and of some depths.

    Args:
        model: the model.
        final_BTC: the trunk's output, and ...
        at: ... the branch point, both from :meth:`MTPModel.run_trunk`.
        targets: of the main prediction, then of the depths to compute, in order.
        key: of a stack's random choices in training; None makes none.
        auxiliary: factor of the auxiliary losses that heads side by side report; they train those
            heads, and are left out of the total.

    Returns:
        The weighted total, a differentiable scalar in fp32 (in a double precision model fp64), and
        the plain sums of the losses [len(targets)], fp64, without a gradient.
    """
    stack, weight_VC = model.mtp, model.head.weight
    if isinstance(stack, Targets):
        return one_state_loss(weight_VC, final_BTC, targets)
    if isinstance(stack, SideBySide):
        return _apply(weight_VC, _HeadByHead(stack, final_BTC, at, targets, auxiliary))
    depths = [target.depth for target in targets[1:]]
    states = [final_BTC, *(hidden for _, hidden in stack.states(at, depths, key))]
    return joint_loss(weight_VC, states, targets, train_head=stack.config.detach != "all")


def joint_loss(
    weight_VC: Tensor,
    states: Sequence[Tensor],
    targets: Sequence[DepthTarget],
    *,
    train_head: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`stack_loss` of hidden states [..., C] that are parts of the graph, one a target.

    Args:
        train_head: whether the states behind the first one reach the head's weight.
    """
    return _apply(weight_VC, _Joint(list(states), targets, train_head=train_head))


def one_state_loss(
    weight_VC: Tensor, hidden: Tensor, targets: Sequence[DepthTarget]
) -> tuple[Tensor, Tensor]:
    """:func:`stack_loss` of one hidden state [..., C] that has several targets."""
    return _apply(weight_VC, _OneState(hidden, targets))


def _apply(weight_VC: Tensor, stream: _Stream) -> tuple[Tensor, Tensor]:
    return _StackLoss.apply(weight_VC, stream, *stream.inputs)


class _Stream(ABC):
    """Hidden states for the head, one at a time.

    Attributes:
        inputs: what autograd sees: tensors of the graph, and parameters.
        targets: of all of them, in order.
        grad: whether anybody wants gradients.
    """

    inputs: list[Tensor]

    def __init__(self, targets: Sequence[DepthTarget]) -> None:
        self.targets = targets
        self.grad = torch.is_grad_enabled()

    @abstractmethod
    def predictions(
        self, needs: Sequence[bool], gradients: list[Tensor | None]
    ) -> Iterator[Prediction]:
        """Yields every hidden state with its targets; when resumed, its gradient is known.

        Args:
            needs: which of the inputs want a gradient.
            gradients: of the inputs, to be filled in.
        """


class _Joint(_Stream):
    """All depths have run forward before; any stack can be trained so."""

    def __init__(
        self, states: list[Tensor], targets: Sequence[DepthTarget], *, train_head: bool
    ) -> None:
        super().__init__(targets)
        self.inputs = states
        self.train_head = train_head

    def predictions(
        self, needs: Sequence[bool], gradients: list[Tensor | None]
    ) -> Iterator[Prediction]:
        for slot, target in enumerate(self.targets):
            prediction = Prediction(
                self.inputs[slot],
                [target],
                train_head=slot == 0 or self.train_head,
                needs_gradient=needs[slot],
            )
            yield prediction
            gradients[slot] = prediction.gradient


class _OneState(_Stream):
    """One hidden state predicts all targets."""

    def __init__(self, final_BTC: Tensor, targets: Sequence[DepthTarget]) -> None:
        super().__init__(targets)
        self.inputs = [final_BTC]

    def predictions(
        self, needs: Sequence[bool], gradients: list[Tensor | None]
    ) -> Iterator[Prediction]:
        prediction = Prediction(self.inputs[0], self.targets, needs_gradient=needs[0])
        yield prediction
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
    ) -> None:
        super().__init__(targets)
        self.stack, self.at, self.auxiliary = stack, at, auxiliary
        # Only parameters that the pass uses: to the rest, autograd and DDP see no path.
        used = [p for target in targets[1:] for p in stack.parameters_of(target.depth)]
        # What the heads have in common: the branch and, of those that read tokens, the embeddings.
        reads_tokens = stack.ahead([target.depth for target in targets[1:]]) > 0
        self.common = [at.hidden, at.embedded] if reads_tokens else [at.hidden]
        self.inputs = [final_BTC, *self.common, *used]

    def predictions(
        self, needs: Sequence[bool], gradients: list[Tensor | None]
    ) -> Iterator[Prediction]:
        main, *depths = self.targets
        prediction = Prediction(self.inputs[0], [main], needs_gradient=needs[0])
        yield prediction
        gradients[0] = prediction.gradient
        slot = 1 + len(self.common)
        wanted = needs[1:slot]
        for target in depths:
            own = self.stack.parameters_of(target.depth)
            d_common, d_own = yield from self._one_head(target, own, wanted)
            gradients[slot : slot + len(own)] = d_own
            slot += len(own)
            for place, gradient in enumerate(d_common, start=1):
                if gradient is not None:
                    so_far = gradients[place]
                    gradients[place] = gradient if so_far is None else so_far.add_(gradient)

    def _one_head(
        self, target: DepthTarget, own: list[nn.Parameter], needs: Sequence[bool]
    ) -> Generator[Prediction, None, tuple[list[Tensor | None], list[Tensor | None]]]:
        """A head forward, through the loss, and backward; its activations end with this call.

        Args:
            target: of the head.
            own: its parameters.
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
            hidden = self.stack.state(target.depth, at)
        prediction = Prediction(
            hidden,
            [target],
            train_head=self.stack.config.detach != "all",
            needs_gradient=hidden.requires_grad,
        )
        yield prediction
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
        ctx: Any, weight_VC: Tensor, stream: _Stream, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        needs_weight, _, *needs = (wanted and stream.grad for wanted in ctx.needs_input_grad)
        sums = torch.zeros(len(stream.targets), dtype=torch.float64, device=weight_VC.device)
        gradients: list[Tensor | None] = [None] * len(inputs)
        d_weight: Tensor | None = None
        done = 0
        for prediction in stream.predictions(needs, gradients):
            own_sums = sums[done : done + len(prediction.targets)]
            d_weight = through_head(
                weight_VC, prediction, own_sums, d_weight, needs_weight=needs_weight
            )
            done += len(prediction.targets)
        ctx.gradients = (d_weight, gradients)
        ctx.mark_non_differentiable(sums)
        coefficients = sums.new_tensor([target.coefficient for target in stream.targets])
        dtype = torch.promote_types(weight_VC.dtype, torch.float32)
        return (sums * coefficients).sum().to(dtype), sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_weight, gradients = ctx.gradients
        # They are handed on, not kept: a second backward through the same graph has none.
        del ctx.gradients
        for tensor in (d_weight, *gradients):
            if tensor is not None:
                tensor.mul_(grads[0])
        return d_weight, None, *gradients
