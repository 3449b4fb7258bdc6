"""The separate gradient ``g_k`` of every depth's loss ``L_k`` on given parameters.

The backward pass of training gives the sum over depths. Here the trunk runs forward again, and
every depth has its own backward pass, without side effects on training: ``.grad``, the routers'
counts, random states and the hooks of data parallelism are not touched.

Shapes: K tasks, P numbers of the parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.feed import HeadWeight
from mtp_lightning.objective.micro_batch import feed_and_targets
from mtp_lightning.objective.objective import Objective
from mtp_lightning.objective.plan import StepPlan
from mtp_lightning.objective.ranks import sum_over_ranks
from mtp_lightning.objective.targets import by_depth
from mtp_lightning.objective.through_head import through_head

Scope = Literal["trunk", "last_block"]
"""The parameters that gradients are measured on: the whole shared trunk, or its last block."""


@dataclass(frozen=True)
class TaskGradients:
    """The gradients of all tasks on one group of parameters, summed over the optimizer step."""

    vectors: dict[int, Tensor]  # task k (0 is the main prediction) -> ``g_k``, flat [P]
    parameters: list[nn.Parameter]  # in the order of the vectors

    @cached_property
    def norms(self) -> dict[int, float]:
        """``|g_k|`` of every task."""
        tasks = list(self.vectors)
        norms = [torch.linalg.vector_norm(self.vectors[k], dtype=torch.float64) for k in tasks]
        return dict(zip(tasks, torch.stack(norms).tolist(), strict=True))

    @cached_property
    def cosines(self) -> dict[int, float]:
        """``cos(g_0, g_k)`` of every task except the main one; 0 if one of them is zero."""
        norms, main = self.norms, self.vectors[0].double()
        return {
            k: float(main @ vector.double()) / product if (product := norms[0] * norms[k]) else 0.0
            for k, vector in self.vectors.items()
            if k
        }

    def log_values(self, group: str) -> dict[str, float]:
        """Norms and cosines by log tag: ``grad/norm_depth_k`` for the last shared block, and
        ``grad/GROUP_norm_depth_k`` for other groups."""
        prefix = "" if group == "last_block" else f"{group}_"
        norms = {f"grad/{prefix}norm_depth_{k}": value for k, value in self.norms.items()}
        cosines = {f"grad/{prefix}cosine_depth_{k}": value for k, value in self.cosines.items()}
        return norms | cosines

    @torch.no_grad()
    def subtract(self, k: int, factor: float) -> None:
        """Subtract from the gradients that training accumulated: ``.grad -= factor * g_k``."""
        sizes = [p.numel() for p in self.parameters]
        for parameter, part in zip(self.parameters, self.vectors[k].split(sizes), strict=True):
            if parameter.grad is not None:
                parameter.grad.sub_(part.view_as(parameter), alpha=factor)


def shared_parameters(model: MTPModel, scope: Scope) -> list[nn.Parameter]:
    """The trunk's parameters that the main prediction and the depths share.

    With ``mtp.branch=before_last`` all blocks except the last are shared; the final norm is shared
    if the depths read the state after it. Embedding and head do not count.
    """
    blocks = list(model.trunk.blocks)[: model.config.mtp.shared_blocks(model.config.trunk.n_layers)]
    if scope == "last_block":
        return list(blocks[-1].parameters())
    parameters = [p for block in blocks for p in block.parameters()]
    normed = model.config.mtp.input_norm == "post"
    return [*parameters, *model.trunk.norm.parameters()] if normed else parameters


def require_measurable(config: ModelConfig, objective: Objective, *, setting: str) -> None:
    """Refuse a model or an objective whose depths have no separate gradient on the trunk, with a
    message that names the ``setting`` that measures, such as ``balance=gradnorm``.

    Raises:
        UserError: the trunk is frozen or detached, no block of it is shared, the depths are
            predicted jointly, or a rule of the objective needs a prepass over all of them.
    """
    mtp, layers, reason = config.mtp, config.trunk.n_layers, None
    if not mtp.trains_trunk:
        reason = "mtp.freeze_trunk=true gives it none: set mtp.freeze_trunk=false"
    elif mtp.detach != "none":
        reason = f"mtp.detach={mtp.detach} cuts it off: set mtp.detach=none"
    elif mtp.depths_are_mixed:
        reason = f"with mtp.rank={mtp.rank} no depth's loss is its own: set mtp.rank=1"
    elif mtp.shared_blocks(layers) == 0:
        reason = (
            f"with mtp.branch=before_last and model.n_layers={layers} no block is shared: "
            "set mtp.branch=final, or take more layers"
        )
    if reason is not None:
        raise UserError(f"{setting} measures every depth's gradient on the trunk, but {reason}.")
    for rule in objective.rules:
        if rule.measures:
            raise UserError(
                f"{setting} measures one depth after another, but {rule.setting} needs all of "
                "them, or the main prediction's entropy, beforehand: leave one of the two out."
            )


def task_gradients(
    model: MTPModel,
    objective: Objective,
    plan: StepPlan,
    depths: Sequence[int],
    groups: Mapping[str, list[nn.Parameter]],
) -> dict[str, TaskGradients]:
    """``g_k`` of the main prediction and of ``depths``, over all micro-batches and ranks.

    The experts' balance losses and weight decay are not included. It costs one forward pass of the
    trunk and of the depths, and for each of them two products with the head and one backward pass
    through its modules and the part of the trunk that the groups need. Memory holds one vector per
    task and group, besides the activations.

    ``groups`` are parameters by any name. For a tied embedding only the gradient of the input side
    is included.
    """
    assert not any(rule.measures for rule in objective.rules), "see require_measurable"
    parameters = [p for group in groups.values() for p in group]
    tasks = [0, *depths]
    size = sum(p.numel() for p in parameters)
    total_KP = torch.zeros(len(tasks), size, dtype=parameters[0].dtype, device=parameters[0].device)
    totals = dict(zip(tasks, total_KP, strict=True))
    for micro in plan.micro_batches:
        add_gradients(model, objective, plan, micro, parameters, totals)
    total_KP = sum_over_ranks(total_KP)
    sizes = [sum(p.numel() for p in group) for group in groups.values()]
    return {
        name: TaskGradients(dict(zip(tasks, part_KP, strict=True)), group)
        for (name, group), part_KP in zip(groups.items(), total_KP.split(sizes, 1), strict=True)
    }


@contextmanager
def _only(model: MTPModel, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Disable the gradients of all other parameters: this project's kernels compute the gradient of
    a weight that requires one even if it was not asked for."""
    selected = set(parameters)
    others = [p for p in model.parameters() if p.requires_grad and p not in selected]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def add_gradients(
    model: MTPModel,
    objective: Objective,
    plan: StepPlan,
    batch: WindowBatch,
    parameters: list[nn.Parameter],
    totals: Mapping[int, Tensor],
) -> None:
    """Add one micro-batch's part of every task's gradient to ``totals``, task -> flat [P]."""
    shared = HeadWeight(model.head.weight)
    plan = replace(plan, factors=[float(k in totals) for k in range(model.depth + 1)])
    with torch.enable_grad(), _only(model, parameters):
        feed, targets = feed_and_targets(model, objective, plan, batch)
        task_targets = by_depth(objective.apply_rules(targets, {}))
        groups = itertools.chain([[(0, feed.main)]], feed.state_groups())
        for k, hidden in itertools.chain.from_iterable(groups):
            prediction = feed.prediction(k, hidden, task_targets[k])
            through_head(shared, [prediction], main_hidden=feed.main)
            grads = torch.autograd.grad(
                hidden, parameters, prediction.gradient, retain_graph=True, allow_unused=True
            )
            parts = totals[k].split([p.numel() for p in parameters])
            for part, grad in zip(parts, grads, strict=True):
                if grad is not None:
                    part.add_(grad.flatten())
