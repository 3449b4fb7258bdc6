"""EAGLE-3's drafting layer (Li et al. 2025, arXiv 2503.01840; code: SafeAILab/EAGLE).

One decoder layer drafts any number of tokens, each from its own output for the one before:

    f_t     = W_fc [l_t ; m_t ; h_t]                   states of a low, a middle and a high layer
    g^k_t   = a^(k-1)_t,  g^1_t = f_t
    y       = g^k_t + Attention([norm E(x_{t+k}) ; norm g^k_t])
    a^k_t   = y + SwiGLU(norm y)
    q^k_t   = softmax(U norm a^k_t)                    over the most frequent tokens alone

and ``q^k_t`` predicts ``x_{t+k+1}``. *Training-time test*: in training, the layer runs on its own
outputs as it does when it drafts, D steps. The query of step k at t stands at position t + k - 1.
It attends to the keys of step 1 at the positions up to t, and to those of the steps 2 .. k at t
itself: the entries that its cache holds after k - 1 drafts. So training and drafting compute the
same.

Shapes: B batch, T positions, C d_model, N heads, M key heads, G = N / M, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtp_lightning.errors import UserError
from mtp_lightning.mtp.block_attention import Entry
from mtp_lightning.mtp.inner_states import InnerStates, InnerStatesConfig
from mtp_lightning.mtp.inputs import StackInputs, TrunkText
from mtp_lightning.mtp.kinds import Chain
from mtp_lightning.mtp.own_head import OwnHead
from mtp_lightning.nn.attention import Attention, GroupedQueryConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.feed_forward import FeedForward
from mtp_lightning.nn.head import Head
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.norm import RMSNorm
from mtp_lightning.nn.ops import attention, rotary
from mtp_lightning.nn.rope import rope_table
from mtp_lightning.nn.trunk import Trunk
from mtp_lightning.settings import require_whole


@dataclass(frozen=True, kw_only=True)
class EagleConfig(InnerStatesConfig, variant="eagle"):
    """Switches of the drafting layer.

    Attributes:
        depth: D, steps of the training-time test.
        draft_vocab: rows of the layer's own output head, for the tokens that are the most frequent
            in the training text; None is all tokens.
    """

    meaning: ClassVar[tuple[str, ...]] = ("layers", "draft_vocab")

    draft_vocab: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draft_vocab is not None:
            require_whole("mtp.draft_vocab", self.draft_vocab, least=1)

    def check_objective(self, draft_rules: Sequence[str], separate_training: Sequence[str]) -> None:
        if "objective.train_head=false" in separate_training:
            raise UserError(
                "objective.train_head=false keeps the depths from training the trunk's head, which "
                "mtp=eagle never does, as it has its own: leave it out."
            )
        if draft_rules and self.draft_vocab is not None:
            raise UserError(
                f"{draft_rules[0]} follows a draft from token to token, and mtp.draft_vocab="
                f"{self.draft_vocab} leaves out the tokens that have no draft: set "
                "mtp.draft_vocab=null, or leave it out."
            )

    def build(self, trunk: TrunkConfig) -> EagleMTP:
        return EagleMTP(self, trunk)

    def check_vocabulary(self, trunk: TrunkConfig) -> None:
        """Raise a ``UserError`` for more rows than there are tokens."""
        if self.draft_vocab is not None and self.draft_vocab > trunk.vocab_size:
            raise UserError(
                f"mtp.draft_vocab={self.draft_vocab}, but the model has {trunk.vocab_size} tokens: "
                "use at most that many, or null."
            )


class DraftAttention(Attention):
    """Grouped-query attention that reads 2 C numbers per position, and in training the entries of
    the steps before."""

    def __init__(self, trunk: TrunkConfig) -> None:
        super().__init__(trunk, GroupedQueryConfig())
        self.qkv = Linear(2 * trunk.d_model, self.qkv.weight.shape[0])

    def step(
        self, x_BTX: Tensor, ctx: ForwardContext, before: Sequence[Entry]
    ) -> tuple[Tensor, Entry]:
        """The output [B, T, C] of one step over whole windows, and its own entry; X = 2 C, and
        ``before`` are the entries of the steps before, in order."""
        kv = self.n_kv_heads
        rotated, value = self.heads(x_BTX).split([self.n_heads + kv, kv], dim=2)
        rotated = rotary(rotated, ctx.cos, ctx.sin)
        query, key = rotated.split([self.n_heads, kv], dim=2)
        if before:
            mixed = attend_steps(query, [*before, (key, value)], ctx.dense_mask())
        else:
            mixed = attention(query, key, value, ctx.mask)
        return self.out(mixed.flatten(2)), (key, value)


def attend_steps(query_BTNH: Tensor, steps: Sequence[Entry], mask: Tensor) -> Tensor:
    """Attention of the newest step's queries: to the first step's entries as ``mask`` says, and of
    every later step to the one at the query's own place. [B, T, N, H].

    The latter are products of single vectors: written as masked matrix products, they would cost as
    much as the former (section 3.2 of the paper).

    ``mask`` is bool [1 | B, 1, T, T], True where a query attends to a key.
    """
    (first_key, first_value), *later = steps
    seq_len, n_heads, size = query_BTNH.shape[1:]
    shared = n_heads // first_key.shape[2]
    query = query_BTNH.unflatten(2, (-1, shared)) / math.sqrt(size)
    scores = torch.einsum("btmgh,bsmh->bmgts", query, first_key)
    scores = scores.masked_fill(~mask.unsqueeze(1), -math.inf)
    # [B, M, G, T, K - 1]: one score for every later step.
    later_scores = torch.stack([(query * key.unsqueeze(3)).sum(-1) for key, _ in later], -1)
    later_scores = later_scores.permute(0, 2, 3, 1, 4)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.cat((scores, later_scores.to(scores.dtype)), dim=-1).softmax(-1, dtype=dtype)
    weights = weights.to(first_value.dtype)
    mixed = torch.einsum("bmgts,bsmh->btmgh", weights[..., :seq_len], first_value)
    for i, (_, value) in enumerate(later):
        weight = weights[..., seq_len + i].permute(0, 3, 1, 2).unsqueeze(-1)
        mixed = mixed + weight * value.unsqueeze(3)
    return mixed.flatten(2, 3)


class DraftLayer(nn.Module):
    """The layer, the projection of the trunk's states before it, and norm and head after it."""

    def __init__(self, config: EagleConfig, trunk: TrunkConfig) -> None:
        super().__init__()
        width, eps = trunk.d_model, trunk.norm_eps
        self.recompute = trunk.recompute
        self.fuse = Linear(config.n_states * width, width)
        self.token_norm = RMSNorm(width, eps)
        self.hidden_norm = RMSNorm(width, eps)
        self.attention = DraftAttention(trunk)
        self.feed_forward_norm = RMSNorm(width, eps)
        self.feed_forward = FeedForward(width, trunk.d_ff)
        self.norm = RMSNorm(width, eps)
        self.head = OwnHead(trunk.vocab_size, width, config.draft_vocab)

    def forward(self, hidden: Tensor, embedded_BTC: Tensor, ctx: ForwardContext) -> Tensor:
        """The next state [B, T, C] at positions of a cache; ``hidden`` is the state before it, or
        the trunk's states [B, T, 3 C]."""
        hidden_BTC, x_BTX = self._inputs(hidden, embedded_BTC)
        return self._after(hidden_BTC, self.attention(x_BTX, ctx))

    def step(
        self, hidden: Tensor, embedded_BTC: Tensor, ctx: ForwardContext, before: Sequence[Entry]
    ) -> tuple[Tensor, Entry]:
        """One step over whole windows, and its entry; see :meth:`DraftAttention.step`."""
        if self.recompute and self.training and torch.is_grad_enabled():
            # A copy of the list, which the caller extends before the backward pass.
            arguments = hidden, embedded_BTC, ctx, [*before]
            return checkpoint(self._step, *arguments, use_reentrant=False, preserve_rng_state=False)
        return self._step(hidden, embedded_BTC, ctx, before)

    def _step(
        self, hidden: Tensor, embedded_BTC: Tensor, ctx: ForwardContext, before: Sequence[Entry]
    ) -> tuple[Tensor, Entry]:
        hidden_BTC, x_BTX = self._inputs(hidden, embedded_BTC)
        mixed_BTC, entry = self.attention.step(x_BTX, ctx, before)
        return self._after(hidden_BTC, mixed_BTC), entry

    def _inputs(self, hidden: Tensor, embedded_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream [B, T, C], and the attention's input [B, T, 2 C]."""
        if hidden.shape[-1] != self.norm.weight.shape[0]:
            hidden = self.fuse(hidden)
        return hidden, torch.cat((self.token_norm(embedded_BTC), self.hidden_norm(hidden)), dim=-1)

    def _after(self, hidden_BTC: Tensor, mixed_BTC: Tensor) -> Tensor:
        y_BTC = hidden_BTC + mixed_BTC
        return y_BTC + self.feed_forward(self.feed_forward_norm(y_BTC))


class EagleMTP(InnerStates, Chain):
    """One layer, applied D times."""

    config: EagleConfig
    one_cache: ClassVar[bool] = True
    repeats = True

    def __init__(self, config: EagleConfig, trunk: TrunkConfig) -> None:
        super().__init__(config, trunk)
        self.depths = nn.ModuleList(DraftLayer(config, trunk) for _ in range(min(config.depth, 1)))

    @property
    def layer(self) -> DraftLayer:
        """The layer."""
        (layer,) = self.depths
        assert isinstance(layer, DraftLayer)
        return layer

    @property
    def own_head(self) -> OwnHead | None:
        return self.layer.head if self.depth else None

    def observe_training_text(self, data: Any) -> None:
        """Choose the draft vocabulary."""
        if self.config.draft_vocab is None:
            return
        if data.training_text is None:
            raise UserError(
                "mtp.draft_vocab counts the tokens of a text, and a task makes its examples as it "
                "trains: set mtp.draft_vocab=null."
            )
        # Not before: the vocabulary may be unknown when a model is only counted.
        self.config.check_vocabulary(self.trunk_config)
        counts = data.training_text.token_frequency(self.trunk_config.vocab_size)
        self.layer.head.choose(torch.from_numpy(counts))

    @torch.no_grad()
    def init_from_trunk(
        self, fresh: Collection[int], trunk: Trunk, head: Head, text: TrunkText | None
    ) -> None:
        """A new layer's norm is the trunk's final one, and its head the trunk's rows."""
        for _ in fresh:
            self.layer.norm.load_state_dict(trunk.norm.state_dict())
            self.layer.head.weight.copy_(head.weight[self.layer.head.tokens])

    def states(self, inputs: StackInputs, active: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        hidden, entries = inputs.branch, list[Entry]()
        for k in self.with_prerequisites(active):
            ctx = self._moved(inputs.ctx, k)
            hidden, entry = self.layer.step(hidden, self.token_input(k, inputs), ctx, entries)
            entries.append(entry)
            if k in active:
                yield k, self.head_input(hidden)

    def _moved(self, ctx: ForwardContext, k: int) -> ForwardContext:
        """The positions of step ``k``, k - 1 after those of step 1."""
        if k == 1:
            return ctx
        steps_T = torch.arange(len(ctx.cos), device=ctx.cos.device) + k - 1
        cos, sin = rope_table(steps_T, **self.trunk_config.rotary, dtype=ctx.cos.dtype)
        return replace(ctx, cos=cos.unsqueeze(-2), sin=sin.unsqueeze(-2))

    def step(
        self, k: int, previous_BTC: Tensor, embedded_BTC: Tensor, ctx: ForwardContext
    ) -> Tensor:
        return self.layer(previous_BTC, embedded_BTC, ctx)

    def head_input(self, hidden: Tensor) -> Tensor:
        return self.layer.norm(hidden)
