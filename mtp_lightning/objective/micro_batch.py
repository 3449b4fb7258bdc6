"""From a micro-batch to ``sum_k coefficient_k * loss_k`` of all depths, with its gradients.

The feed of the stack (``mtp/feed.py``) sends hidden states through the head (``through_head.py``),
which computes losses and gradients together, and propagates the gradients to the feed's inputs.
Then one autograd node connects the loss to these inputs; its backward pass only returns the
gradients. The hooks of data parallelism on the parameters see an ordinary autograd node.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.chunk import TermGradients
from mtp_lightning.mtp.feed import Feed, HeadWeight, LossRequest, Prediction
from mtp_lightning.nn.auxiliary import AuxiliaryOutputs
from mtp_lightning.nn.ops import compute_dtype
from mtp_lightning.objective.objective import Objective
from mtp_lightning.objective.plan import StepPlan
from mtp_lightning.objective.rules.base import Measures, PositionMeasure
from mtp_lightning.objective.targets import DepthTarget, by_depth, tokens_of
from mtp_lightning.objective.through_head import through_head


def micro_batch_loss(
    model: MTPModel, objective: Objective, plan: StepPlan, batch: WindowBatch
) -> tuple[Tensor, Tensor, AuxiliaryOutputs]:
    """One micro-batch's part of the loss that a step differentiates.

    The backward passes of heads side by side have already run when this returns (see
    ``mtp/kinds.py``); ``backward()`` on the part goes through the trunk and distributes all
    gradients.

    Args:
        model: in training mode.
        objective: bound to the model.
        batch: one of the plan's micro-batches.

    Returns:
        The part, a differentiable scalar; the parts of all micro-batches and ranks add up to the
        loss. The micro-batch's summed losses by depth and term, [D + 1, P] fp64: 0 where not
        computed, the main prediction's in the first column. And the layers' auxiliary outputs,
        whose losses are in the part.
    """
    auxiliary = AuxiliaryOutputs()
    feed, targets = feed_and_targets(model, objective, plan, batch, auxiliary)
    weight_VC = model.head.weight
    if objective.draft_vocab is not None:  # a slice's backward pass allocates a whole gradient
        weight_VC = weight_VC[: objective.draft_vocab]
    measure_values = prepass(weight_VC, feed, targets, objective.measures)
    if not weight_VC.is_meta:  # meta tensors have no values for the rules
        targets = objective.apply_rules(targets, measure_values)
    total, sums = feed_loss(
        weight_VC,
        feed,
        targets,
        train_head=objective.train_head and model.config.mtp.detach != "all",
        auxiliary_factor=1 / plan.windows,
        compiled=model.has_compiled_kernels,
    )
    for loss in auxiliary.losses:
        if loss.requires_grad:  # the losses of heads side by side are already backpropagated
            total = total + 1 / plan.windows * loss
    sums_KP = sums.new_zeros(model.depth + 1, len(objective.terms))
    for target, target_sum in zip(targets, sums, strict=True):
        sums_KP[target.depth, target.index] = target_sum
    return total, sums_KP, auxiliary


def feed_and_targets(
    model: MTPModel,
    objective: Objective,
    plan: StepPlan,
    batch: WindowBatch,
    auxiliary: AuxiliaryOutputs | None = None,
) -> tuple[Feed, list[DepthTarget]]:
    """A micro-batch's pass through the trunk: the feed of its hidden states, and their targets
    before the rules. ``auxiliary`` collects the layers' auxiliary outputs; None for none."""
    targets = objective.targets(model.mtp, plan, batch)
    depths = [k for k in by_depth(targets) if k]
    final, inputs = model.run_trunk(batch, depths, auxiliary=auxiliary)
    return model.mtp.feed(final, inputs, batch, depths), targets


@torch.no_grad()
def prepass(
    weight_VC: Tensor,
    feed: Feed,
    targets: Sequence[DepthTarget],
    measures: Collection[PositionMeasure],
) -> Measures:
    """Compute the rules' measures of all hidden states before any of them learns.

    The states go through the head in the same chunks as when they learn; one number per position,
    depth and measure remains.

    Args:
        weight_VC: the shared head's weight.
        feed: its depths are computed only if a measure needs them.
        targets: the main prediction's, then the depths'.
    """
    if not measures:
        return {}
    main_measures = [measure for measure in measures if measure.of_main]
    depth_measures = [measure for measure in measures if not measure.of_main]
    values: dict[str, dict[int, Tensor]] = {measure.name: {} for measure in measures}
    dtype = torch.promote_types(compute_dtype(feed.main), torch.float32)
    tokens, shifts = tokens_of(targets), {target.depth: target.shift for target in targets}

    main = [[(0, feed.main)]] if main_measures else []
    for group in itertools.chain(main, feed.state_groups() if depth_measures else ()):
        predictions = []
        for k, hidden in group:
            measure_targets = []
            for measure in depth_measures if k else main_measures:
                values_BT = torch.empty(tokens[k].shape, dtype=dtype, device=hidden.device)
                values[measure.name][k] = values_BT
                measure_targets.append(
                    DepthTarget(k, tokens[k], 1.0, measure, shift=shifts[k], record=values_BT)
                )
            prediction = feed.prediction(k, hidden, measure_targets)
            predictions.append(replace(prediction, needs_gradient=False))
        if predictions:
            through_head(HeadWeight(weight_VC), predictions, main_hidden=feed.main)
    return values


def feed_loss(
    weight_VC: Tensor,
    feed: Feed,
    targets: Sequence[DepthTarget],
    *,
    train_head: bool = True,
    auxiliary_factor: float = 1.0,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """The weighted loss of the main prediction and of some depths over one micro-batch.

    Args:
        weight_VC: the shared head's weight.
        targets: the main prediction's, then those of the feed's depths in order; one target per
            term of a depth.
        train_head: whether the depths train the shared head, or only pass through it.
        auxiliary_factor: factor of the auxiliary losses of layers whose backward pass happens here
            (those of heads side by side); they are left out of the total.
        compiled: whether plain cross-entropy uses one compiled kernel.

    Returns:
        The weighted total, a differentiable scalar of at least fp32, and the unweighted sums of the
        losses [len(targets)], fp64, without a gradient.
    """
    parameters = list(dict.fromkeys(p for target in targets for p in target.term.parameters))
    inputs = [weight_VC, *feed.inputs, *parameters]
    learns = torch.is_grad_enabled()
    head = HeadWeight(weight_VC, needs_gradient=learns and weight_VC.requires_grad)
    needs = [learns and x.requires_grad for x in feed.inputs]
    sums = torch.zeros(len(targets), dtype=torch.float64, device=weight_VC.device)
    targets = [replace(t, total=total) for t, total in zip(targets, sums, strict=True)]
    term_gradients: TermGradients = {}

    def send(predictions: Sequence[Prediction]) -> None:
        through_head(head, predictions, term_gradients, main_hidden=feed.main, compiled=compiled)

    request = LossRequest(by_depth(targets), needs, train_head, auxiliary_factor)
    with torch.no_grad():
        gradients = feed.input_gradients(request, send)
        # Multiply one at a time: a coefficient tensor would force a host-to-device copy and a sync.
        weighted = [total * t.coefficient for total, t in zip(sums, targets, strict=True)]
        total = torch.stack(weighted).sum().to(torch.promote_types(weight_VC.dtype, torch.float32))
    input_gradients = [head.gradient, *gradients, *(term_gradients.get(p) for p in parameters)]
    return _WithGradients.apply((total, input_gradients), *inputs), sums


class _WithGradients(torch.autograd.Function):
    """Connects a loss, whose gradients with respect to the inputs are known, to the graph."""

    @staticmethod
    def forward(ctx: Any, result: tuple[Tensor, list[Tensor | None]], *inputs: Tensor) -> Tensor:
        # One tuple: autograd would take a loss passed alone for one of the inputs.
        loss, ctx.gradients = result
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        # Not kept for a second backward pass through the same graph.
        del ctx.gradients
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                # In place for memory, except where autograd has expanded it (of a sum).
                expanded = 0 in gradient.stride()
                gradients[i] = gradient * grads[0] if expanded else gradient.mul_(grads[0])
        return None, *gradients
