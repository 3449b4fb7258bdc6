"""DeepSeekMoE: shared and fine-grained routed experts, balanced by a bias (DeepSeek-V3, 2.1.2).

    s_i = sigmoid(u . e_i);  chosen = top-k of s + b;  g_i = scaling * s_i / sum of the chosen s
    out = shared(u) + sum of g_i expert_i(u) over the chosen

The bias b only affects the choice. It has no gradient: objective/expert_balance.py moves it after
every optimizer step, by the loads that routers report (nn/auxiliary.py).

Shapes: B batch, T positions, C d_model, E routed experts, M tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from mtp_lightning.errors import UserError
from mtp_lightning.nn.auxiliary import AuxiliaryOutputs
from mtp_lightning.nn.batch_invariant import by_token
from mtp_lightning.nn.components import FeedForwardConfig, check_whole
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.experts import Experts
from mtp_lightning.nn.feed_forward import FeedForward
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.ops import no_autocast
from mtp_lightning.settings import require, require_number

Scoring = Literal["sigmoid", "softmax"]


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(FeedForwardConfig, variant="experts"):
    """DeepSeekMoE with auxiliary-loss-free balancing (DeepSeek-V3, section 2.1.2).

    Attributes:
        n_routed: E, experts that tokens are routed to.
        n_shared: experts that every token uses, built as one expert of ``n_shared`` times the
            width.
        top_k: routed experts per token.
        d_expert: inner width of one expert.
        first_k_dense: number of the trunk's first layers that stay dense.
        n_groups: groups of adjacent experts; 1 does not restrict the choice.
        top_groups: groups that a token may choose its experts from: those with the largest sums of
            their two best biased scores.
        scaling: factor of the gates after they are normalized over the chosen experts.
        bias_rate: gamma, the change of an expert's bias per optimizer step.
        bias_frozen: the last fraction of the run, in which biases stay fixed.
        sequence_loss: alpha of the sequence-wise balance loss (eq. 17-20); 0 for none.
        scoring: how affinities are computed: ``sigmoid`` (DeepSeek-V3), or ``softmax`` over all
            experts without a bias (Qwen3).

    Raises:
        UserError: sizes do not fit together; the message names them.
    """

    training_keys: ClassVar[tuple[str, ...]] = ("bias_rate", "bias_frozen", "sequence_loss")
    newer: ClassVar[dict[str, Any]] = {"scoring": "sigmoid"}

    n_routed: int
    n_shared: int
    top_k: int
    d_expert: int
    first_k_dense: int = 0
    n_groups: int = 1
    top_groups: int = 1
    scaling: float = 1.0
    bias_rate: float = 0.001
    bias_frozen: float = 0.0
    sequence_loss: float = 0.0
    scoring: Scoring = "sigmoid"

    def __post_init__(self) -> None:
        group = "model.feed_forward"
        check_whole(group, self, ("n_routed", "top_k", "d_expert", "n_groups", "top_groups"))
        check_whole(group, self, ("n_shared", "first_k_dense"), least=0)
        if self.n_routed % self.n_groups:
            raise UserError(
                f"{group}.n_routed={self.n_routed} is not divisible by {group}.n_groups="
                f"{self.n_groups}: every group has the same number of experts."
            )
        if self.top_groups > self.n_groups:
            raise UserError(
                f"{group}.top_groups={self.top_groups} is more than {group}.n_groups="
                f"{self.n_groups}: lower it."
            )
        size = self.n_routed // self.n_groups
        if self.n_groups > 1 and size < 2:
            raise UserError(
                f"{group}.n_groups={self.n_groups} leaves {size} expert a group, and a group is "
                "scored by its best two: use fewer groups."
            )
        if self.top_k > self.top_groups * size:
            raise UserError(
                f"{group}.top_k={self.top_k} experts do not exist in {group}.top_groups="
                f"{self.top_groups} groups of {size}: lower top_k, or allow more groups."
            )
        for name in ("bias_rate", "sequence_loss"):
            require_number(f"{group}.{name}", getattr(self, name), least=0)
        require_number(f"{group}.bias_frozen", self.bias_frozen, least=0, most=1)
        require_number(f"{group}.scaling", self.scaling, above=0)
        words = " or ".join(get_args(Scoring))
        require(self.scoring in get_args(Scoring), f"{group}.scoring", self.scoring, words)
        if self.scoring == "softmax" and self.bias_rate:
            raise UserError(
                f"{group}.scoring=softmax has no bias that {group}.bias_rate={self.bias_rate} "
                "could move: set it to 0."
            )

    def is_dense(self, layer: int | None) -> bool:
        """Whether a layer is dense. The block of a prediction module (None) never is."""
        return layer is not None and layer < self.first_k_dense

    def build(self, trunk: TrunkConfig, layer: int | None) -> nn.Module:
        if self.is_dense(layer):
            return FeedForward(trunk.d_model, trunk.d_ff)
        return MoE(trunk.d_model, self)

    def check(self, trunk: TrunkConfig) -> None:
        if self.first_k_dense > trunk.n_layers:
            raise UserError(
                f"model.feed_forward.first_k_dense={self.first_k_dense} is more than "
                f"model.n_layers={trunk.n_layers}: lower it."
            )

    def rate(self, fraction: float) -> float:
        """gamma after a ``fraction`` of the run; a sum, since 1 - 0.18 exceeds 0.82."""
        return 0.0 if fraction + self.bias_frozen >= 1 else self.bias_rate


class Router(Linear):
    """Computes affinities, and chooses experts with their gates; ``expert_bias`` is b [E], fp32."""

    expert_bias: Tensor
    may_be_bf16 = False

    def __init__(self, d_model: int, config: ExpertsConfig) -> None:
        super().__init__(d_model, config.n_routed)
        self.config = config
        persistent = config.scoring == "sigmoid"  # else it is always 0
        self.register_buffer("expert_bias", torch.zeros(config.n_routed), persistent=persistent)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        # Stays fp32 in a model of any precision: bf16 would lose steps of 0.001.
        self.expert_bias = self.expert_bias.float()
        return self

    def reset_buffers(self) -> None:
        """Set the biases to their initial values."""
        self.expert_bias.zero_()

    def forward(  # type: ignore[override]
        self, x_MC: Tensor, auxiliary: AuxiliaryOutputs | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[M, C] -> affinities [M, E], chosen experts [M, top_k] and their gates [M, top_k]."""
        with no_autocast(x_MC):
            logits_ME = super().forward(x_MC.to(self.weight.dtype))
            # Vectorized code rounds the last numbers of a tensor differently from the others.
            softmax = self.config.scoring == "softmax"
            scoring = partial(torch.softmax, dim=-1) if softmax else torch.sigmoid
            scores_ME = by_token(scoring, logits_ME)
        chosen_MK = self.choose(scores_ME.detach())
        gates_MK = scores_ME.gather(1, chosen_MK)
        gates_MK = gates_MK / (gates_MK.sum(-1, keepdim=True) + 1e-20) * self.config.scaling
        # The biases of a frozen router stay fixed too.
        if auxiliary is not None and self.weight.requires_grad:
            auxiliary.count(self, chosen_MK, self.config.n_routed)
        return scores_ME, chosen_MK, gates_MK

    @torch.no_grad()
    def choose(self, scores_ME: Tensor) -> Tensor:
        """The experts [M, top_k] of every token; in training, in no particular order."""
        c = self.config
        biased_ME = scores_ME + self.expert_bias if c.scoring == "sigmoid" else scores_ME
        if c.n_groups > 1:
            grouped = biased_ME.unflatten(-1, (c.n_groups, -1))
            best_groups = grouped.topk(2, dim=-1).values.sum(-1).topk(c.top_groups, dim=-1).indices
            excluded = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=scores_ME.device)
            excluded.scatter_(1, best_groups, False)
            biased_ME = grouped.masked_fill(excluded.unsqueeze(-1), -torch.inf).flatten(1)
        # Without sorting, their order depends on the number of tokens, and so would the rounding.
        return biased_ME.topk(c.top_k, dim=-1, sorted=not self.training).indices


class MoE(nn.Module):
    """The mixture of experts; it replaces a :class:`FeedForward`."""

    def __init__(self, d_model: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(d_model, config)
        self.experts = Experts(d_model, config.d_expert, config.n_routed)
        width = config.n_shared * config.d_expert
        self.shared = FeedForward(d_model, width) if width else None

    def idle_params(self) -> int:
        """Weights of the experts that a token is not sent to."""
        expert_params = sum(weight[0].numel() for weight in self.experts.parameters())
        return (self.config.n_routed - self.config.top_k) * expert_params

    def forward(self, x_BTC: Tensor, ctx: ForwardContext | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C]; loads and the balance loss go to ``ctx.auxiliary``."""
        auxiliary = None if ctx is None else ctx.auxiliary
        x_MC = x_BTC.reshape(-1, x_BTC.shape[-1])
        scores_ME, chosen_MK, gates_MK = self.router(x_MC, auxiliary)
        if auxiliary is not None and self.config.sequence_loss and scores_ME.requires_grad:
            scores_BTE = scores_ME.view(*x_BTC.shape[:-1], -1)
            per_sequence = sequence_balance_loss(scores_BTE, self.config.top_k)
            auxiliary.add_loss(self.config.sequence_loss * per_sequence.sum())
        out = self.experts(x_MC, chosen_MK, gates_MK).view(x_BTC.shape)
        return out if self.shared is None else out + self.shared(x_BTC)


def sequence_balance_loss(scores_BTE: Tensor, top_k: int) -> Tensor:
    """``sum_i f_i P_i`` of every sequence (eq. 17-20): [B], 1 at perfect balance.

    ``f_i`` is E times the expert's share of the ``top_k`` highest affinities in the sequence, and
    ``P_i`` its mean share of a token's affinities. Neither uses biases or groups (eq. 18): the loss
    measures the router itself.
    """
    batch, seq_len, n_experts = scores_BTE.shape
    highest = scores_BTE.detach().topk(top_k, dim=-1, sorted=False).indices.flatten(1)
    share = scores_BTE.new_full((), n_experts / (top_k * seq_len))
    share_BE = scores_BTE.new_zeros(batch, n_experts).scatter_add_(
        1, highest, share.expand_as(highest)
    )
    affinity_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
    return (share_BE * affinity_BE).sum(-1)


def routers_of(model: nn.Module) -> dict[str, Router]:
    """All routers of a model, of the trunk and of the modules, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}
