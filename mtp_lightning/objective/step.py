"""One optimizer step on ``L = L_0 + sum_k lambda_k L_k`` (DeepSeek-V3, eq. 24-25).

OptimizerStep.__call__
    plan                    lambdas, the losses' *factors* [D + 1], counts of targets (plan.py)
    micro_batch_loss        for each micro-batch: its part of L (micro_batch.py)
        Objective.targets       what each depth is trained on (objective.py, targets.py)
        MTPModel.run_trunk      the trunk's hidden states (model.py)
        MTPStack.feed           the depths' hidden states (mtp/base.py, mtp/feed.py)
        prepass, apply_rules    rules change the targets (rules/)
        feed_loss               losses and gradients of all states
            through_head            chunk by chunk: logits, terms (through_head.py, terms/)
    backward                through depths and trunk
    clipping, balancing, the optimizer's step
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from operator import call
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data_modules.windows import RandomKey, WindowBatch
from mtp_lightning import processes
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.auxiliary import AuxiliaryOutputs
from mtp_lightning.objective.balance.base import Balance, Observed
from mtp_lightning.objective.cost import StepCost
from mtp_lightning.objective.expert_balance import balance_experts
from mtp_lightning.objective.micro_batch import micro_batch_loss
from mtp_lightning.objective.objective import CROSS_ENTROPY, Objective
from mtp_lightning.objective.plan import StepPlan, step_counts
from mtp_lightning.objective.ranks import rank, sum_over_ranks, world_size
from mtp_lightning.objective.schedule.base import LambdaSchedule, Progress

if TYPE_CHECKING:
    from mtp_lightning.objective.balance.gradients import TaskGradients


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of an optimizer step, over all ranks.

    Attributes:
        plan: the step's plan.
        loss: L, without the layers' auxiliary losses (``nn/auxiliary.py``).
        losses: [D + 1], L_k, fp64; 0 where not computed.
        flops: FLOPs of the step, positions without a valid target included.
        values: all values to log, by tag; losses without their factors.
    """

    plan: StepPlan
    loss: Tensor
    losses: Tensor
    flops: int
    values: Mapping[str, Tensor | float]

    @property
    def tokens(self) -> int:
        """Valid targets of the main prediction."""
        return self.plan.counts.valid[0]


class OptimizerStep:
    """Trains a model, one optimizer step per call, with or without Lightning.

    Args:
        model: in training mode.
        objective: of the MTP depths; by default cross-entropy, like the main prediction's.
        seed: seed of the random choices in training.
        accumulate: number of micro-batches that a rank's batch is split into, at most its windows.
        clip_norm: bound on the gradient's global norm; None for no bound.

    Attributes:
        cost: counts the FLOPs of a window, once for each kind of step.
    """

    def __init__(
        self,
        model: MTPModel,
        *,
        schedule: LambdaSchedule,
        balance: Balance,
        objective: Objective = CROSS_ENTROPY,
        seed: int = 0,
        accumulate: int = 1,
        clip_norm: float | None = None,
    ) -> None:
        self.model, self.schedule, self.balance = model, schedule, balance
        self.cost = StepCost(model.config, objective)
        self.objective = objective.for_model(model)
        self.objective.check(model.config.mtp)
        balance.check(model.config, self.objective)
        self.seed, self.accumulate, self.clip_norm = seed, accumulate, clip_norm
        self._computes_main = balance.needs_main(model.config.mtp)

    def plan(self, batch: WindowBatch, progress: Progress) -> StepPlan:
        """Plan the step over this rank's ``batch``.

        Raises:
            UserError: the batch was built for another depth, or has no valid target.
        """
        batch.require_depth(self.model.depth, self.model.config.mtp.stride)
        key = RandomKey(self.seed, progress.step, first_row=len(batch) * rank())
        batch = replace(batch, key=key)
        counts = step_counts(self.model.mtp, batch)
        if counts.valid[0] == 0:
            reason, remedy = "no token may be a target (`scored`)", "Give windows with an answer."
            if batch.documents is not None:
                reason = "every position crosses a document border or has no target"
                remedy = "Use longer documents, or data.document_mask=false."
            raise UserError(f"The batch holds no valid target: {reason}. {remedy}")
        # A depth that a document mask leaves without a target is treated as switched off.
        depths = range(1, self.model.depth + 1)
        terms = [term for _, term in self.objective.terms if not term.counts_padding]
        usable = [max((counts.of(k, t) for t in terms), default=counts.valid[k]) for k in depths]
        scheduled = self.schedule.lambdas(progress)
        lambdas = [1.0, *_zero_without_targets(scheduled, usable, by=self.schedule)]
        main, *factors = self.balance.factors(lambdas, progress)
        factors = _zero_without_targets(factors, usable, by=self.balance)
        return StepPlan(
            lambdas=lambdas,
            factors=[main if self._computes_main else 0.0, *factors],
            counts=counts,
            windows=len(batch) * world_size(),
            micro_batches=batch.micro_batches(self.accumulate),
        )

    def __call__(
        self,
        batch: WindowBatch,
        progress: Progress,
        optimizer: torch.optim.Optimizer,
        *,
        call_forward: Callable[..., tuple[Tensor, Tensor, AuxiliaryOutputs]] = call,
        backward: Callable[[Tensor], None] = torch.Tensor.backward,
        no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> StepResult:
        """Run one optimizer step over this rank's batch; all ranks' have the same size.

        Args:
            progress: progress before the step.
            optimizer: over the parameters of the model and of the balance rule.
            call_forward: calls a micro-batch's forward pass; data parallelism notes it, and sharded
                models gather their weights in it. Several ranks need one.
            backward: runs the backward pass of a micro-batch's loss.
            no_sync: context of all micro-batches except the last, whose gradients are not yet
                summed over ranks.

        Raises:
            UserError: see :meth:`plan`; or nothing would sum the gradients of several ranks.
        """
        if world_size() > 1 and call_forward is call:
            raise UserError(
                f"without call_forward, {world_size()} processes would each train a model of their "
                "own: give a DistributedDataParallel (docs/recipes.md, From Python)."
            )
        plan = self.plan(batch, progress)
        sums_KP, auxiliary = self._forward_backward(plan, call_forward, backward, no_sync)
        losses_KP = self.objective.term_losses(sums_KP, plan.counts)
        losses = self.objective.depth_losses(losses_KP)
        gradients = self._measure(plan, progress)
        if gradients is not None:
            self.balance.gate(plan.lambdas, gradients)
        values = self._clip(optimizer)
        if self.balance.observes:
            values |= self.balance.update(
                Observed(
                    progress=progress,
                    lambdas=plan.lambdas,
                    factors=plan.factors,
                    losses=losses.cpu(),
                    gradients=gradients,
                )
            )
        values |= self.objective.after_backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        values |= balance_experts(self.model, auxiliary, fraction=progress.fraction)

        # The step is done; the rest is logged.
        if gradients is not None and self.balance.scope is not None:
            values |= gradients.log_values(self.balance.scope)
        if self.balance.weighs_main:
            values["balance/main_factor"] = plan.factors[0]
        dtype = torch.promote_types(self.model.head.weight.dtype, torch.float32)
        for tag, tag_values in auxiliary.by_tag.items():
            values[tag] = sum_over_ranks((torch.stack(tag_values) * (1 / plan.windows)).sum())
        values |= self.objective.log_values(losses_KP.to(dtype), plan.active)
        loss = plan.factors[0] * losses[0] + sum(plan.factors[k] * losses[k] for k in plan.active)
        values["train/loss"] = loss.to(dtype)
        values |= {f"train/loss_depth_{k}": losses[k].to(dtype) for k in plan.tasks}
        # The tag is older than balance rules: these are the factors.
        values |= {f"train/lambda_depth_{k}": f for k, f in enumerate(plan.factors) if k}
        flops = self._flops(plan, measured=gradients is not None)
        return StepResult(plan=plan, loss=loss, losses=losses, flops=flops, values=values)

    def _forward_backward(
        self,
        plan: StepPlan,
        call_forward: Callable[..., tuple[Tensor, Tensor, AuxiliaryOutputs]],
        backward: Callable[[Tensor], None],
        no_sync: Callable[[], AbstractContextManager[None]],
    ) -> tuple[Tensor, AuxiliaryOutputs]:
        """All micro-batches: the summed losses [D + 1, P] over all ranks, and the auxiliary outputs
        of this rank."""
        sums: list[Tensor] = []
        auxiliary = AuxiliaryOutputs()
        for index, micro in enumerate(plan.micro_batches):
            last = index == len(plan.micro_batches) - 1
            with nullcontext() if last else no_sync():
                loss, micro_sums, micro_auxiliary = call_forward(
                    micro_batch_loss, self.model, self.objective, plan, micro
                )
                # A frozen trunk with all weights at 0 trains nothing.
                if loss.requires_grad:
                    # Data-parallel ranks average their gradients; here they must add up.
                    backward(loss * world_size())
            sums.append(micro_sums)
            auxiliary.add(micro_auxiliary)
        return sum_over_ranks(sum(sums[1:], sums[0])), auxiliary

    def _measure(self, plan: StepPlan, progress: Progress) -> TaskGradients | None:
        """The gradients that the balance rule measures in this step; None if it measures none."""
        scope = self.balance.scope
        if scope is None or not self.balance.measures_at(progress):
            return None
        from mtp_lightning.objective.balance.gradients import shared_parameters, task_gradients

        group: dict[str, list[nn.Parameter]] = {scope: shared_parameters(self.model, scope)}
        return task_gradients(self.model, self.objective, plan, plan.active, group)[scope]

    def _clip(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor | float]:
        """Clip the gradients, if a bound is given; returns their norm before, to log."""
        # A balance rule's parameters have no gradient yet, so the norm leaves them out.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self.clip_norm is None:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        else:
            norm = nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        return {"train/grad_norm": processes.tensors().whole(norm)}

    def _flops(self, plan: StepPlan, *, measured: bool) -> int:
        batch = plan.micro_batches[0]
        main, stored = plan.factors[0] != 0, batch.states is not None
        scope = self.balance.scope if measured else None
        per_window = self.cost(batch.seq_len, plan.active, main=main, stored=stored, scope=scope)
        return plan.windows * per_window


def _zero_without_targets(
    factors: Sequence[float], counts: Sequence[int], *, by: object
) -> list[float]:
    """The factors of L_1 .. L_D that a schedule or rule gives, 0 for a depth without a target."""
    if len(factors) != len(counts):
        raise UserError(
            f"{type(by).__name__} gives factors for {len(factors)} depths, and the model has "
            f"{len(counts)}: return one for each depth."
        )
    return [factor if count else 0.0 for factor, count in zip(factors, counts, strict=True)]
