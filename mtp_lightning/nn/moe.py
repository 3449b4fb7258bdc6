"""DeepSeekMoE: shared and fine-grained routed experts, balanced by a bias (DeepSeek-V3, 2.1.2).

    s_i = sigmoid(u . e_i);  chosen = top-k of s + b;  g_i = scaling * s_i / sum of the chosen s
    out = shared(u) + sum of g_i expert_i(u) over the chosen

The bias b chooses and does nothing else. It has no gradient: objective/expert_balance.py moves it
after every optimizer step by the loads that routers report (nn/ledger.py).

Names in transformers' DeepseekV3MoE, whose weights fit as they are (HF -> here):
gate.weight -> router.weight, gate.e_score_correction_bias -> router.expert_bias,
experts.gate_up_proj -> experts.gate_up, experts.down_proj -> experts.down,
shared_experts.[gate_proj ; up_proj] -> shared.gate_up (one matrix), .down_proj -> shared.down.

Shapes: B batch, T positions, C d_model, E routed experts, M tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtp_lightning.nn.attention import Positions
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.experts import Experts
from mtp_lightning.nn.feed_forward import FeedForward
from mtp_lightning.nn.ledger import Ledger
from mtp_lightning.nn.linear import Linear

# Up to this many tokens, those of a verify pass, a token's numbers must be the same bits however
# many others are computed with it: see KVCache.attend.
_FEW_TOKENS = 64


class Router(Linear):
    """Affinities, choice and gates.

    Attributes:
        expert_bias: b [E], fp32.
    """

    expert_bias: Tensor

    def __init__(self, config: TrunkConfig) -> None:
        assert config.experts is not None
        super().__init__(config.d_model, config.experts.n_routed)
        self.config = config.experts
        self.register_buffer("expert_bias", torch.zeros(self.config.n_routed))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        # Also in a model of another precision: steps of 0.001 would be lost in bf16.
        self.expert_bias = self.expert_bias.float()
        return self

    def reset_buffers(self) -> None:
        """The biases of a fresh model."""
        self.expert_bias.zero_()

    def forward(  # type: ignore[override]
        self, x_MC: Tensor, ledger: Ledger | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
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
        if ledger is not None and self.weight.requires_grad:
            ledger.count(self, chosen_MK, self.config.n_routed)
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

    def forward(self, x_BTC: Tensor, positions: Positions | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C]; loads and the balance loss go to ``positions.ledger``."""
        ledger = None if positions is None else positions.ledger
        x_MC = x_BTC.reshape(-1, x_BTC.shape[-1])
        scores_ME, chosen_MK, gates_MK = self.router(x_MC, ledger)
        if ledger is not None and self.config.sequence_loss and scores_ME.requires_grad:
            shape = (*x_BTC.shape[:-1], -1)
            per_sequence = sequence_balance_loss(scores_ME.view(shape), chosen_MK.view(shape))
            ledger.add_loss(self.config.sequence_loss * per_sequence.sum())
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
