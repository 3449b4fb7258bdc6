"""DeepSeekMoE: shared and fine-grained routed experts, balanced by a bias (DeepSeek-V3, 2.1.2).

    s_i = sigmoid(u . e_i);  chosen = top-k of s + b;  g_i = scaling * s_i / sum of the chosen s
    out = shared(u) + sum of g_i expert_i(u) over the chosen

The bias b chooses and does nothing else. It has no gradient: objective/expert_balance.py moves it
after every optimizer step by what :attr:`Router.load` counted.

Names in transformers' DeepseekV3MoE, whose weights fit as they are (HF -> here):
gate.weight -> router.weight, gate.e_score_correction_bias -> router.expert_bias,
experts.gate_up_proj -> experts.gate_up, experts.down_proj -> experts.down,
shared_experts.[gate_proj ; up_proj] -> shared.gate_up (one matrix), .down_proj -> shared.down.

Shapes: B batch, T positions, C d_model, E routed experts, M tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.experts import Experts
from mtp_lightning.nn.feed_forward import FeedForward
from mtp_lightning.nn.linear import Linear

# Up to this many tokens, those of a verify pass, a token's numbers must be the same bits however
# many others are computed with it: see KVCache.attend.
_FEW_TOKENS = 64

_counting: ContextVar[bool] = ContextVar("counting", default=True)
_collected: ContextVar[list[Tensor] | None] = ContextVar("collected", default=None)


@contextmanager
def without_counting() -> Iterator[None]:
    """Inside, routers count no loads: for passes over tokens that have been counted already."""
    token = _counting.set(False)
    try:
        yield
    finally:
        _counting.reset(token)


@contextmanager
def collecting_balance_losses() -> Iterator[list[Tensor]]:
    """Inside, every mixture that trains leaves its balance loss, summed over sequences and times
    alpha, in the list. Outside of any such block none is computed."""
    losses: list[Tensor] = []
    token = _collected.set(losses)
    try:
        yield losses
    finally:
        _collected.reset(token)


def report_balance_losses(losses: list[Tensor]) -> None:
    """Leave values, without their gradients, in the list of the block around; see above."""
    collected = _collected.get()
    if collected is not None:
        collected += [loss.detach() for loss in losses]


def repetition() -> AbstractContextManager[None]:
    """What activation recomputation puts around its repetition of a pass that begins now.

    Nothing is counted or left in the collecting list a second time, but the same is computed:
    autograd compares.
    """
    return _Repetition(_collected.get() is not None)


class _Repetition(AbstractContextManager[None]):
    """:func:`_repeat` as often as wanted: a pass is repeated once for every backward pass."""

    def __init__(self, collecting: bool) -> None:
        self._collecting = collecting
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._entered.append(_repeat(collecting=self._collecting))
        self._entered[-1].__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._entered.pop().__exit__(*raised)


@contextmanager
def _repeat(*, collecting: bool) -> Iterator[None]:
    token = _collected.set([] if collecting else None)
    try:
        with without_counting():
            yield
    finally:
        _collected.reset(token)


class Router(Linear):
    """Affinities, choice and gates.

    Attributes:
        expert_bias: b [E], fp32.
        load: int64 [E], tokens sent to every expert in this process since the last update of the
            biases; None before the first. No buffer, because data parallelism overwrites those
            with the first rank's.
    """

    expert_bias: Tensor

    def __init__(self, config: TrunkConfig) -> None:
        assert config.experts is not None
        super().__init__(config.d_model, config.experts.n_routed)
        self.config = config.experts
        self.register_buffer("expert_bias", torch.zeros(self.config.n_routed))
        self.load: Tensor | None = None

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        # Also in a model of another precision: steps of 0.001 would be lost in bf16.
        self.expert_bias = self.expert_bias.float()
        return self

    def reset_buffers(self) -> None:
        """The biases of a fresh model."""
        self.expert_bias.zero_()
        self.load = None

    def forward(self, x_MC: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """[M, C] -> affinities [M, E], chosen experts [M, top_k] and their gates [M, top_k]."""
        with torch.autocast(x_MC.device.type, enabled=False):
            logits_ME = super().forward(x_MC.to(self.weight.dtype))
            many = self.training or logits_ME.shape[0] > _FEW_TOKENS
            if many or torch.compiler.is_compiling():
                scores_ME = logits_ME.sigmoid()
            else:
                # Within a row of its own: the last of a tensor's numbers are rounded otherwise.
                scores_ME = torch.cat([row.sigmoid() for row in logits_ME.split(1)])
        chosen_MK = self.choose(scores_ME.detach())
        gates_MK = scores_ME.gather(1, chosen_MK)
        gates_MK = gates_MK / (gates_MK.sum(-1, keepdim=True) + 1e-20) * self.config.scaling
        # A frozen router's biases stay, too.
        if self.training and torch.is_grad_enabled() and self.weight.requires_grad:
            self._count(chosen_MK)
        return scores_ME, chosen_MK, gates_MK

    @torch.no_grad()
    def choose(self, scores_ME: Tensor) -> Tensor:
        """The experts [M, top_k] of every token; in training, in no order."""
        biased_ME = scores_ME + self.expert_bias
        c = self.config
        if c.n_groups > 1:
            grouped = biased_ME.unflatten(-1, (c.n_groups, -1))
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(c.top_groups, dim=-1).indices
            shut = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=scores_ME.device)
            shut.scatter_(1, best, False)
            biased_ME = grouped.masked_fill(shut.unsqueeze(-1), -torch.inf).flatten(1)
        # Unsorted, their order depends on the number of tokens, and the gates' rounding on that.
        return biased_ME.topk(c.top_k, dim=-1, sorted=not self.training).indices

    @torch.no_grad()
    def _count(self, chosen_MK: Tensor) -> None:
        if not _counting.get():
            return
        counted = torch.bincount(chosen_MK.flatten(), minlength=self.config.n_routed)
        self.load = counted if self.load is None else self.load + counted


class MoE(nn.Module):
    """The mixture; it takes a :class:`FeedForward`'s place."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        assert config.experts is not None
        self.config = config.experts
        self.router = Router(config)
        self.experts = Experts(config.d_model, self.config.d_expert, self.config.n_routed)
        width = self.config.n_shared * self.config.d_expert
        self.shared = FeedForward(config, d_ff=width) if width else None

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        x_MC = x_BTC.reshape(-1, x_BTC.shape[-1])
        scores_ME, chosen_MK, gates_MK = self.router(x_MC)
        losses = _collected.get() if self.training else None
        if losses is not None and self.config.sequence_loss and scores_ME.requires_grad:
            shape = (*x_BTC.shape[:-1], -1)
            per_sequence = sequence_balance_loss(scores_ME.view(shape), chosen_MK.view(shape))
            losses.append(self.config.sequence_loss * per_sequence.sum())
        out = self.experts(x_MC, chosen_MK, gates_MK).view(x_BTC.shape)
        return out if self.shared is None else out + self.shared(x_BTC)


def sequence_balance_loss(scores_BTE: Tensor, chosen_BTK: Tensor) -> Tensor:
    """``sum_i f_i P_i`` of every sequence (eq. 17-20): [B], 1 at perfect balance.

    ``f_i`` is the expert's share of the sequence's choices times E, ``P_i`` its mean share of a
    token's affinities.
    """
    batch, seq_len, n_experts = scores_BTE.shape
    chosen = chosen_BTK.flatten(1)
    one = scores_BTE.new_full((), n_experts / (chosen_BTK.shape[-1] * seq_len))
    share_BE = scores_BTE.new_zeros(batch, n_experts).scatter_add_(1, chosen, one.expand_as(chosen))
    affinity_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
    return (share_BE * affinity_BE).sum(-1)


def routers_of(model: nn.Module) -> dict[str, Router]:
    """Every router of a model, trunk's and modules', by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}
