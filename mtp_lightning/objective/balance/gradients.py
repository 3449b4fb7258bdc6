"""Every depth's own gradient: ``g_k``, of ``L_k`` alone, on parameters that are asked for.

The objective's one backward pass gives the sum over depths. Here the trunk runs forward once more,
and every depth has a backward pass of its own, without touching what training accumulates: no
``.grad``, no router's counts, no random state, none of data parallelism's hooks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import RandomKey
from mtp_lightning.mtp.feed import Prediction
from mtp_lightning.objective.objective import CROSS_ENTROPY, Objective
from mtp_lightning.objective.ranks import sum_over_ranks
from mtp_lightning.objective.targets import DepthTarget, PositionCounts
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.through_head import HeadWeight, through_head

Scope = Literal["trunk", "last_block"]
"""What a gradient is measured on: the whole shared trunk, or its last block alone."""


@dataclass(frozen=True)
class TaskGradients:
    """The gradients of all tasks on one group of parameters, summed over the optimizer step.

    Attributes:
        vectors: task k (0 is the main prediction) -> ``g_k``, flat [P].
        parameters: what it is the gradient of, in the order of the vectors.
    """

    vectors: dict[int, Tensor]
    parameters: list[nn.Parameter]

    @cached_property
    def norms(self) -> dict[int, float]:
        """``|g_k|`` of every task."""
        tasks = list(self.vectors)
        norms = [torch.linalg.vector_norm(self.vectors[k], dtype=torch.float64) for k in tasks]
        return dict(zip(tasks, torch.stack(norms).tolist(), strict=True))

    @cached_property
    def cosines(self) -> dict[int, float]:
        """``cos(g_0, g_k)`` of every task but the main one; 0 where one of them is zero."""
        norms, main = self.norms, self.vectors[0].double()
        return {
            k: float(main @ vector.double()) / product if (product := norms[0] * norms[k]) else 0.0
            for k, vector in self.vectors.items()
            if k
        }

    def log_values(self, group: str) -> dict[str, float]:
        """Norms and cosines by log tag: ``grad/norm_depth_k`` on the last shared block,
        ``grad/GROUP_norm_depth_k`` elsewhere; no two tags mean the same group."""
        where = "" if group == "last_block" else f"{group}_"
        norms = {f"grad/{where}norm_depth_{k}": value for k, value in self.norms.items()}
        cosines = {f"grad/{where}cosine_depth_{k}": value for k, value in self.cosines.items()}
        return norms | cosines

    @torch.no_grad()
    def subtract(self, k: int, factor: float) -> None:
        """Take ``factor * g_k`` out of what training accumulated: ``.grad -= factor * g_k``."""
        sizes = [p.numel() for p in self.parameters]
        for parameter, part in zip(self.parameters, self.vectors[k].split(sizes), strict=True):
            if parameter.grad is not None:
                parameter.grad.sub_(part.view_as(parameter), alpha=factor)


def shared_parameters(model: MTPModel, scope: Scope) -> list[nn.Parameter]:
    """The trunk's parameters that the main prediction and the depths have in common.

    ``mtp.branch=before_last`` shares all blocks but the last; the final norm is shared where the
    depths read what comes after it. Embedding and head belong to no trunk.
    """
    blocks = list(model.trunk.blocks)[: _shared_blocks(model.config)]
    if scope == "last_block":
        return list(blocks[-1].parameters())
    parameters = [p for block in blocks for p in block.parameters()]
    normed = model.config.mtp.input_norm == "post"
    return [*parameters, *model.trunk.norm.parameters()] if normed else parameters


def require_trunk_gradients(config: ModelConfig, *, what: str) -> None:
    """Refuse to measure where no depth has a gradient on the trunk.

    Args:
        config: the model's.
        what: who wants to measure, for the message: ``balance=gradnorm``.

    Raises:
        UserError: the trunk is frozen or cut off, or no block of it is shared.
    """
    reason = None
    if not config.mtp.trains_trunk:
        reason = "mtp.freeze_trunk=true gives it none: set mtp.freeze_trunk=false"
    elif config.mtp.detach != "none":
        reason = f"mtp.detach={config.mtp.detach} cuts it off: set mtp.detach=none"
    elif config.mtp.rank > 1:
        reason = f"with mtp.rank={config.mtp.rank} no depth's loss is its own: set mtp.rank=1"
    elif _shared_blocks(config) == 0:
        layers = config.trunk.n_layers
        reason = (
            f"with mtp.branch=before_last and model.n_layers={layers} no block is shared: "
            "set mtp.branch=final, or take more layers"
        )
    if reason is not None:
        raise UserError(f"{what} measures every depth's gradient on the trunk, but {reason}.")


def require_separable(objective: Objective, *, what: str) -> None:
    """Refuse to measure where a depth's loss is not its own.

    Args:
        objective: of the depths.
        what: who wants to measure, for the message.

    Raises:
        UserError: it is not.
    """
    for rule in objective.rules:
        if rule.measures:
            raise UserError(
                f"{what} looks at one depth after another, but {rule.asked} needs all of them, or "
                "the main prediction's entropy, beforehand: leave it out, or the measuring."
            )


def task_gradients(
    model: MTPModel,
    micro_batches: Sequence[tuple[WindowBatch, RandomKey]],
    depths: Sequence[int],
    counts: PositionCounts,
    groups: Mapping[str, list[nn.Parameter]],
    objective: Objective = CROSS_ENTROPY,
) -> dict[str, TaskGradients]:
    """``g_k`` of the main prediction and of ``depths``, over all micro-batches and ranks.

    The experts' balance losses and weight decay have no part in it. Costs one forward pass of the
    trunk and of the depths, and for each of them one backward pass through its modules and as much
    of the trunk as the groups need; the head takes two products a depth. Holds one vector a task
    and group beside the activations.

    Args:
        model: the model.
        micro_batches: this rank's part of the step, with the keys that the training pass has.
        depths: MTP depths to measure.
        counts: positions that count in the whole step.
        groups: parameters, by any name. A tied embedding's gradient is the input side's alone.
        objective: what the depths are trained on.

    Returns:
        For every group, its gradients.

    Raises:
        UserError: a depth's loss rests on other depths.
    """
    require_separable(objective, what="What measures every depth's gradient")
    parameters = [p for group in groups.values() for p in group]
    tasks = [0, *depths]
    size = sum(p.numel() for p in parameters)
    total_KP = torch.zeros(len(tasks), size, dtype=parameters[0].dtype, device=parameters[0].device)
    for micro, key in micro_batches:
        _add_gradients(model, micro, tasks, counts, parameters, total_KP, key, objective)
    total_KP = sum_over_ranks(total_KP)
    found, start = {}, 0
    for name, group in groups.items():
        end = start + sum(p.numel() for p in group)
        vectors = {k: total_KP[row, start:end] for row, k in enumerate(tasks)}
        found[name], start = TaskGradients(vectors, group), end
    return found


def measuring_flops(config: ModelConfig, seq_len: int, active: Sequence[int], scope: Scope) -> int:
    """FLOPs a position that :func:`task_gradients` adds to a training step."""
    trunk, mtp, shared = config.trunk, config.mtp, _shared_blocks(config)

    def blocks(first: int, last: int, seq_len: int) -> int:
        return mtp.trunk_flops(trunk, seq_len, active, range(first, last))

    def beyond(seq_len: int) -> int:
        """Forward FLOPs between the shared blocks and the head, of all tasks together."""
        own = sum(mtp.alone_flops(trunk, seq_len, k, active) for k in active)
        return own + blocks(shared, trunk.n_layers, seq_len)

    forward = blocks(0, trunk.n_layers, seq_len) + mtp.module_flops(trunk, seq_len, active)
    # What grows with the window has no weights, and so two gradients of inputs; the rest passes one
    # on and leaves none for its weights.
    passed_on = 2 * beyond(seq_len) - beyond(0)
    asked = blocks(shared - 1 if scope == "last_block" else 0, shared, seq_len)
    # A head of its own is a module.
    shared_head = 1 + (0 if mtp.brings_loss else len(active))
    tasks = 1 + len(active)
    return forward + passed_on + 2 * (shared_head * trunk.head_flops() + tasks * asked)


@contextmanager
def _only(model: MTPModel, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, nothing else of the model has a gradient: a product of a kernel of our own computes
    that of its weight, asked for or not, if the weight could have one."""
    wanted = set(parameters)
    others = [p for p in model.parameters() if p.requires_grad and p not in wanted]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _shared_blocks(config: ModelConfig) -> int:
    return config.trunk.n_layers - (config.mtp.branch == "before_last")


def _add_gradients(
    model: MTPModel,
    batch: WindowBatch,
    tasks: Sequence[int],
    counts: PositionCounts,
    parameters: list[nn.Parameter],
    total_KP: Tensor,
    key: RandomKey,
    objective: Objective,
) -> None:
    """One micro-batch's part of every task's gradient, added to the task's row."""
    unused = total_KP.new_zeros(1 + len(objective.parts), dtype=torch.float64)
    with torch.enable_grad(), _only(model, parameters):
        stack = model.mtp
        final, at = model.run_trunk(batch, tasks[1:], key=key)
        head = HeadWeight(model.head.weight)
        for k, hidden in itertools.chain([(0, final)], stack.states(at, tasks[1:], key)):
            targets = [DepthTarget(0, batch.targets(0), 1 / counts.valid[0], CrossEntropy())]
            if k:
                place = stack.target_depth(k, key)
                targets = objective.targets(k, batch, 1.0, counts, place=place)
                targets = objective.settle(targets, {})
            prediction = Prediction(hidden, targets, train_head=False)
            if k and (own := stack.own_loss(k, batch)) is not None:
                prediction.weight, prediction.loss, prediction.width = own.weight, own, own.width
            through_head(head, [prediction], unused, main_hidden=final)
            grads = torch.autograd.grad(
                hidden, parameters, prediction.gradient, retain_graph=True, allow_unused=True
            )
            row_P, start = total_KP[tasks.index(k)], 0
            for parameter, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    row_P[start : start + parameter.numel()] += grad.flatten()
                start += parameter.numel()
