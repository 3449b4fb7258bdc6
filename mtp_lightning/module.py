"""The LightningModule: wires model, objective and metrics, steps the optimizer, logs.

One batch of the loader is one optimizer step of one rank. The module splits it into micro-batches
itself, so that every depth's loss can be the mean over the whole step: the counts of valid
targets are known before the first backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.metrics.rates import DepthRates, bits_per_byte
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import Draw
from mtp_lightning.objective.balance.base import Balance, NoBalance, Observed
from mtp_lightning.objective.expert_balance import balance_experts
from mtp_lightning.objective.lambda_schedule import LambdaSchedule, Progress
from mtp_lightning.objective.mtp_loss import active_depths, mtp_loss
from mtp_lightning.optimizer import OptimizerConfig


class MTPModule(pl.LightningModule):
    """Trains an :class:`MTPModel`.

    Args:
        model_config: shape of the model.
        schedule: lambda_k as a function of progress.
        optimizer: AdamW's settings.
        balance: the rule that weighs the tasks by what is measured; None keeps the weights fixed.
        seed: of the initial weights, and of random choices in training.
        accumulate: micro-batches an optimizer step of one rank is split into.
        clip_norm: bound on the gradient's global norm; None for no bound.
        bytes_per_token: of the validation text, to turn nats per token into bits per byte.
        extra: plain containers stored in every checkpoint (tokenizer, composed config).
    """

    def __init__(
        self,
        model_config: ModelConfig,
        *,
        schedule: LambdaSchedule,
        optimizer: OptimizerConfig,
        balance: Balance | None = None,
        seed: int,
        accumulate: int = 1,
        clip_norm: float | None = 1.0,
        bytes_per_token: float | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        number = isinstance(clip_norm, int | float)
        if clip_norm is not None and not (number and clip_norm > 0):
            raise ValueError(
                f"trainer.gradient_clip_val must be above 0, or null for no bound, not {clip_norm}."
            )
        self.automatic_optimization = False
        self.model = MTPModel(model_config)
        self.model.initialise(seed)
        self.seed = seed
        self.schedule = schedule
        self.optimizer_config = optimizer
        self.balance = NoBalance(self.model.depth) if balance is None else balance
        self.balance.check(model_config)
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.bytes_per_token = bytes_per_token
        self.extra = extra or {}
        self.rates = DepthRates(self.model.depth)
        # Progress that schedules and the summary read; restored from checkpoints.
        self.tokens = 0
        self.flops = 0
        self.seconds = 0.0
        # The newest step's values by log tag.
        self._values: dict[str, Tensor | float] = {}
        # The newest validation: the optimizer steps before it, and its metrics by log tag.
        self.validated_step: int | None = None
        self.validation: dict[str, float] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        others = self.balance.parameters()
        for parameter in others:
            # No part of the module tree: data parallelism would wait for gradients of theirs.
            parameter.data = parameter.data.to(self.device)
        return self.optimizer_config.build(self.model, others)

    def training_step(self, batch: WindowBatch, batch_idx: int) -> dict[str, Any]:
        """One optimizer step.

        Returns:
            ``loss`` (L) and ``losses`` [D + 1] (L_k, 0 where not computed), over all ranks;
            ``lambdas`` [D], the factors of L_1 .. L_D; ``active``, whether each depth was computed;
            ``tokens`` and ``flops`` of the step.
        """
        began = time.perf_counter()
        step = self.trainer.global_step
        progress = self.progress(step)
        base = [1.0, *self.schedule.weights(progress)]
        factors = self.balance.factors(base, progress)
        weights = factors[1:]
        counts = self.step_counts(batch)
        optimizer = self.optimizers(use_pl_optimizer=True)
        assert not isinstance(optimizer, list)
        self._set_learning_rate(optimizer, step)

        sums = torch.zeros(self.model.depth + 1, dtype=torch.float64, device=self.device)
        micro_batches = batch.micro_batches(self.accumulate)
        windows = len(batch) * self.trainer.world_size
        first = draw = Draw(self.seed, step, first_row=len(batch) * self.trainer.global_rank)
        sequence_losses: list[Tensor] = []
        for index, micro in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with nullcontext() if last else self._no_sync():
                loss, micro_sums = mtp_loss(
                    self.model,
                    micro,
                    weights,
                    counts,
                    main=factors[0],
                    draw=draw,
                    windows=windows,
                    sequence_losses=sequence_losses,
                )
                # With a frozen trunk and all weights 0, a step trains nothing.
                if loss.requires_grad:
                    # Data-parallel ranks average their gradients; the parts of the loss add up.
                    self.manual_backward(loss * self.trainer.world_size)
            sums += micro_sums
            draw = replace(draw, first_row=draw.first_row + len(micro))
        losses = self._sum_over_ranks(sums) / torch.tensor(counts, device=self.device)
        gradients = self.balance.measure(
            self.model, micro_batches, factors, counts, progress=progress, draw=first
        )
        if gradients is not None:
            self.balance.gate(base, gradients)
        grad_norm = self._clip_gradients(optimizer)
        values: dict[str, Tensor | float] = {}
        if self.balance.observes:
            seen = Observed(
                progress=progress,
                base=base,
                factors=factors,
                losses=losses.cpu(),
                gradients=gradients,
            )
            values |= self.balance.learn(seen)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        values |= balance_experts(self.model, done=step / max(self.trainer.max_steps, 1))
        if sequence_losses:
            values["moe/sequence_loss"] = self._sum_over_ranks(torch.stack(sequence_losses).sum())

        active = active_depths(weights)
        total = factors[0] * losses[0] + sum(weights[k - 1] * losses[k] for k in active)
        n_tokens = counts[0]
        config = self.model.config
        n_flops = n_tokens * config.flops_per_token(batch.seq_len, active)
        if gradients is not None:
            n_flops += n_tokens * self.balance.measuring_flops(config, batch.seq_len, active)
        self.tokens += n_tokens
        self.flops += n_flops
        self.seconds += time.perf_counter() - began
        if grad_norm is not None:
            values["train/grad_norm"] = grad_norm
        self._values = values | self._losses_by_tag(total, losses, factors, active)
        # For callbacks that monitor a value, such as Lightning's EarlyStopping. log() would put the
        # values there, too, but takes a quarter of a millisecond for each.
        self.trainer.callback_metrics.update(
            {tag: torch.as_tensor(value) for tag, value in self._values.items()}
        )
        # Lightning takes the x axis, of what callbacks log too, from "step".
        self.log_dict({"train/lr": optimizer.param_groups[0]["lr"], "step": float(step + 1)})
        return {
            "loss": total,
            "losses": losses,
            "lambdas": weights,
            "active": [k == 0 or k in active for k in range(self.model.depth + 1)],
            "tokens": n_tokens,
            "flops": n_flops,
        }

    def on_train_batch_end(self, outputs: Any, batch: WindowBatch, batch_idx: int) -> None:
        # After the callbacks: what they save has no row in the log yet.
        self.log_here(self._values, self.trainer.global_step)

    def progress(self, step: int) -> Progress:
        """Where the run stands before optimizer step ``step`` (counted from 0)."""
        return Progress(step=step, max_steps=self.trainer.max_steps, tokens=self.tokens)

    def validation_step(self, batch: WindowBatch, batch_idx: int) -> None:
        self.rates.update(self.model(batch), self.model.head.weight, batch)

    def on_validation_epoch_end(self) -> None:
        rates = {f"val/{name}": value for name, value in self.rates.compute().items()}
        self.rates.reset()
        if self.bytes_per_token is not None:
            rates["val/bits_per_byte"] = bits_per_byte(
                rates["val/loss_depth_0"], self.bytes_per_token
            )
        self.validated_step, self.validation = self.trainer.global_step, rates
        # What this validation's model has cost, the x axes of a fair comparison.
        cost = {
            "progress/tokens": float(self.tokens),
            "progress/flops": float(self.flops),
            "progress/seconds": self.seconds,
        }
        # Lightning takes the x axis from "step": optimizer steps done, as in training.
        step = float(self.trainer.global_step)
        self.log_dict({**rates, **cost, "step": step}, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["model_config"] = self.model.config.to_dict()
        checkpoint["progress"] = {
            "tokens": self.tokens,
            "flops": self.flops,
            "seconds": self.seconds,
        }
        checkpoint["balance"] = {"rule": self.balance.name, "state": self.balance.state_dict()}
        checkpoint.update(self.extra)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress = checkpoint["progress"]
        self.tokens, self.flops = progress["tokens"], progress["flops"]
        self.seconds = progress["seconds"]
        if "balance" in checkpoint:  # older ones had fixed weights, which have no state
            self.balance.load_state_dict(checkpoint["balance"]["state"])

    def log_here(
        self, values: Mapping[str, Tensor | float], step: int, *, always: bool = False
    ) -> None:
        """Log all that belongs to a step, in one row, and nothing else.

        Lightning would repeat what only some steps have in the steps without it.

        Args:
            values: by log tag.
            step: optimizer steps done when this one is.
            always: also between the steps that ``trainer.log_every_n_steps`` chooses.
        """
        due = always or step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if values and due:
            plain = {tag: float(value) for tag, value in values.items()}
            for logger in self.trainer.loggers:
                logger.log_metrics(plain, step)

    def step_counts(self, batch: WindowBatch) -> list[int]:
        """Valid targets of every depth in the whole step, all ranks together."""
        if batch.documents is None:
            # Known without looking; every rank's batch has the same size.
            n = len(batch) * batch.seq_len * self.trainer.world_size
            return [n] * (batch.depth + 1)
        return [int(count) for count in self._sum_over_ranks(batch.counts()).tolist()]

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def _no_sync(self) -> AbstractContextManager[Any]:
        """Skip the gradients' all-reduce: only the last micro-batch of a step needs it."""
        no_sync = getattr(self.trainer.strategy.model, "no_sync", nullcontext)
        return no_sync()

    def _clip_gradients(self, optimizer: Any) -> Tensor | None:
        if self.clip_norm is None:
            return None
        # What a balance rule learns has no gradient yet, and so no part in the norm.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)

    def _set_learning_rate(self, optimizer: Any, step: int) -> None:
        scale = self.optimizer_config.schedule(step, self.trainer.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = self.optimizer_config.lr * scale

    def _losses_by_tag(
        self, total: Tensor, losses: Tensor, factors: Sequence[float], active: Sequence[int]
    ) -> dict[str, Tensor | float]:
        values: dict[str, Tensor | float] = {"train/loss": total.float()}
        values |= {f"train/loss_depth_{k}": losses[k].float() for k in (0, *active)}
        values |= {f"train/lambda_depth_{k}": f for k, f in enumerate(factors[1:], start=1)}
        if self.balance.weighs_main:
            values["balance/main_factor"] = factors[0]
        return values
