"""Linear heads that predict the next tokens jointly, by a tensor of rank r (Basharin et al. 2024,
arXiv 2410.17765, section 3: a canonical polyadic decomposition).

    P(x_{t+1} .. x_{t+1+D}) = sum_a w_a prod_k p_a^k(x_{t+1+k}),    a = 1 .. r,  k = 0 .. D
    w = softmax(W h_t),    p_a^k = softmax(U (h_t + SiLU(W_{k,a} h_t)))

By the chain rule this is a prediction for each depth, given the true tokens before it,

    q^k(x) = sum_a w_a^k p_a^k(x),    w^0 = w,    w_a^k ~ w_a^(k-1) p_a^(k-1)(x_{t+k})

so that ``-log P = sum_k -log q^k``: L_k is the mean of ``-log q^k``, and with every lambda at 1 the
loss is the paper's. A draft of depth k is drawn from q^k given the drafts before it. The next token
is a mixture with the weights w too: its first component is the trunk's own prediction, the others
have a matrix each. Rank 1 is ``mtp=linear`` (``linear.py``).

The first component of every depth starts as a copy of the main prediction, as in Medusa; the others
are initialized at random, since equal components would learn the same. The paper's auxiliary loss,
which keeps all components in use, is not implemented.

The depths' losses depend on one another, so all depths and components of a chunk of positions go
through the head together. A chunk has correspondingly fewer positions, and its logits take no more
memory than those of one depth elsewhere.

Shapes: B batch, T positions, M = B x T, R of them in a chunk, K depths 0 .. the deepest that is
computed, A components (r), C d_model, V vocabulary, X width of a packed mixture
(``nn/mixture_of_softmaxes.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.mtp.base import MTPConfig, MTPStack
from mtp_lightning.mtp.feed import Feed, LossRequest, LossTarget, Prediction, StackLoss, ThroughHead
from mtp_lightning.mtp.inputs import StackInputs
from mtp_lightning.nn.batch_invariant import by_row
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.linear import Linear, ZeroLinear
from mtp_lightning.nn.mixture_of_softmaxes import pack, unpack
from mtp_lightning.nn.ops import exp_, log_softmax_
from mtp_lightning.settings import require_whole

# Numbers in one chunk of logits, when the components' weights are updated by the tokens read.
_CHUNK_NUMEL = 2**21


def check_rank(config: MTPConfig) -> None:
    """Raise a ``UserError`` for a rank below 1, and for switches that have no meaning with more
    than one component."""
    require_whole("mtp.rank", config.rank, least=1)
    if config.rank == 1:
        return
    rank = f"mtp.rank={config.rank}"
    for name, reason in (
        ("branch", "whose next token is predicted from the whole trunk"),
        ("detach", "whose depths share their components' weights with the next token"),
        ("freeze_trunk", "whose next token learns with the depths"),
        ("stride", "which reads the tokens between"),
        ("correction", "which lets the heads know the tokens before theirs in its own way"),
    ):
        given, default = (getattr(of, name, "none") for of in (config, MTPConfig))
        if given != default:
            raise UserError(
                f"mtp.{name}={str(given).lower()} has no meaning with {rank}, {reason}: set "
                f"mtp.{name}={str(default).lower()}, or mtp.rank=1."
            )
    if config.depth == 0:
        raise UserError(
            f"{rank} has no tokens to join at mtp.depth=0: set mtp.depth to 1 or more, or "
            "mtp.rank=1."
        )


class MixtureLinearMTP(MTPStack):
    """D + 1 depths of r components each, with one set of weights."""

    cached_blocks = 0
    chained: ClassVar[bool] = True

    def __init__(self, config: MTPConfig, trunk: TrunkConfig) -> None:
        super().__init__(config)
        self.d_model = width = trunk.d_model

        def random_matrices() -> list[nn.Module]:
            return [Linear(width, width) for _ in range(config.rank - 1)]

        # For the next token, the matrices of all components except the first.
        self.next = nn.ModuleList(random_matrices())
        # For every depth, r matrices.
        self.depths = nn.ModuleList(
            nn.ModuleList([ZeroLinear(width, width), *random_matrices()])
            for _ in range(config.depth)
        )
        self.weigh = Linear(width, config.rank)  # W, which gives the components' weights w

    def components(self, k: int, hidden_BTC: Tensor) -> Tensor:
        """The hidden states [B, T, A, C] of depth ``k``, 0 for the next token."""
        matrices = self.next if k == 0 else self.depths[k - 1]
        assert isinstance(matrices, nn.ModuleList)
        states = [hidden_BTC + by_row(F.silu, matrix(hidden_BTC)) for matrix in matrices]
        return torch.stack(states if k else [hidden_BTC, *states], dim=-2)

    def log_weights(self, hidden_BTC: Tensor) -> Tensor:
        """``log w`` [B, T, A], fp32 at least."""
        logits_BTA = self.weigh(hidden_BTC)
        return logits_BTA.to(torch.promote_types(logits_BTA.dtype, torch.float32)).log_softmax(-1)

    def main_state(self, final_BTC: Tensor) -> Tensor:
        return pack(self.components(0, final_BTC), self.log_weights(final_BTC))

    def reads(self, k: int) -> range:
        return range(k, k + 1)

    def depth_state(self, k: int, inputs: StackInputs, previous_BTC: Tensor) -> Tensor:
        before_BTX = self.main_state(inputs.branch) if k == 1 else previous_BTC
        hidden_BTAC, log_weights_BTA = unpack(before_BTX, self.d_model)
        log_p_BTA = _token_log_probs(inputs, hidden_BTAC, inputs.tokens_at(k))
        log_weights_BTA = (log_weights_BTA + log_p_BTA).log_softmax(-1)
        return pack(self.components(k, inputs.branch), log_weights_BTA)

    def feed(
        self, final_BTC: Tensor, inputs: StackInputs, batch: WindowBatch, depths: Sequence[int]
    ) -> Feed:
        return MixtureFeed(self, final_BTC, inputs, depths)

    def state_width(self, d_model: int) -> int:
        return self.config.rank * (d_model + 1)


def _token_log_probs(inputs: StackInputs, hidden_BTAC: Tensor, tokens_BT: Tensor) -> Tensor:
    """The log-probability of a token by every component, ``log p_a`` [B, T, A], in chunks."""
    assert inputs.head is not None, "the components' weights depend on the head's log-probabilities"
    hidden_MAC, token_M = hidden_BTAC.flatten(0, 1), tokens_BT.flatten()
    rank, vocab = hidden_MAC.shape[1], inputs.head.weight.shape[0]
    rows = max(1, _CHUNK_NUMEL // (vocab * rank))
    parts = []
    for h_RAC, token_R in zip(hidden_MAC.split(rows), token_M.split(rows), strict=True):
        log_p_RAV = inputs.head.differentiable_log_probs(h_RAC)
        parts.append(_at_token(log_p_RAV, token_R))
    return torch.cat(parts).unflatten(0, tokens_BT.shape)


class MixtureFeed(Feed):
    """Trains all depths and components of a position, up to the deepest depth, as one
    prediction."""

    def __init__(
        self, stack: MixtureLinearMTP, final_BTC: Tensor, inputs: StackInputs, depths: Sequence[int]
    ) -> None:
        deepest = max(depths, default=0)
        parts = [stack.components(k, final_BTC) for k in range(deepest + 1)]
        parts_MKAC = torch.stack(parts, dim=2).flatten(0, 1)
        super().__init__([parts_MKAC, stack.log_weights(final_BTC).flatten(0, 1)])
        # The tokens between determine the weights, whether they are targets or not.
        self.between = [inputs.tokens_at(k + 1).flatten() for k in range(deepest)]

    @property
    def main(self) -> Tensor:
        parts_MKAC, log_weights_MA = self.inputs
        return pack(parts_MKAC[:, 0], log_weights_MA)

    def input_gradients(self, request: LossRequest, send: ThroughHead) -> Sequence[Tensor | None]:
        parts_MKAC, log_weights_MA = self.inputs
        loss = JointLoss(log_weights_MA, self.between, parts_MKAC.shape[1])
        prediction = Prediction(
            parts_MKAC,
            [target for depth_targets in request.targets.values() for target in depth_targets],
            needs_gradient=request.needs[0],
            loss=loss,
        )
        send([prediction])
        return [prediction.gradient, loss.d_log_weights_MA if request.needs[1] else None]


class JointLoss(StackLoss):
    """The losses of all K depths, from the logits of their components.

    Args:
        log_weights_MA: ``log w`` of the next token.
        between: the true tokens of the depths before the deepest, [M] each.
    """

    def __init__(self, log_weights_MA: Tensor, between: Sequence[Tensor], depths: int) -> None:
        self.log_weights_MA, self.between = log_weights_MA.detach(), between
        self.depths, self.states = depths, depths * log_weights_MA.shape[1]
        self.d_log_weights_MA = torch.empty_like(self.log_weights_MA)

    def __call__(
        self, rows: slice, logits_NV: Tensor, targets: Sequence[LossTarget], needs_gradient: bool
    ) -> tuple[Tensor, None]:
        log_w_RA = self.log_weights_MA[rows]
        between_R = [token_M[rows] for token_M in self.between]
        dtype = torch.promote_types(logits_NV.dtype, torch.float32)
        shape = (-1, self.depths, log_w_RA.shape[1], logits_NV.shape[1])
        log_p_RKAV = log_softmax_(logits_NV, dtype).view(shape)
        gradients = _cross_entropy if all(t.term.of_token for t in targets) else _by_autograd
        d_logits_RKAV, d_log_w_RA = gradients(log_p_RKAV, log_w_RA, between_R, targets)
        self.d_log_weights_MA[rows] = d_log_w_RA.to(self.d_log_weights_MA.dtype)
        return d_logits_RKAV.flatten(0, 2), None


def _cross_entropy(
    log_p_RKAV: Tensor, log_w_RA: Tensor, between_R: Sequence[Tensor], targets: Sequence[LossTarget]
) -> tuple[Tensor, Tensor]:
    """Cross-entropy alone, which depends only on each component's probability of single tokens.

    Returns:
        The gradients with respect to the logits [R, K, A, V], which overwrite the
        log-probabilities, and with respect to ``log_w_RA``.
    """
    depths = log_p_RKAV.shape[1]
    # The tokens between are also the shallower depths' targets, at positions that count.
    deepest_R = [target.tokens_R for target in targets if target.depth == depths - 1]
    tokens = [*between_R, *deepest_R][:depths]
    with torch.enable_grad():
        at_tokens = [_at_token(log_p_RKAV[:, k], tokens[k]) for k in range(depths)]
        at_token_RKA = torch.stack(at_tokens, dim=1).detach().requires_grad_()
        start_RA = log_w_RA.detach().requires_grad_()
        weights = _weights_after(start_RA, at_token_RKA[:, :-1].unbind(1))
        loss = at_token_RKA.new_zeros(())
        for target in targets:
            k = target.depth
            value_R = -(weights[k] + at_token_RKA[:, k]).logsumexp(-1)
            loss = loss + _counted(value_R, target)
        d_at_token_RKA, d_log_w_RA = torch.autograd.grad(loss, (at_token_RKA, start_RA))
    # d log_softmax(z)_token / dz = one_hot(token) - softmax(z).
    d_logits = exp_(log_p_RKAV).mul_(-d_at_token_RKA.unsqueeze(-1))
    for k, token_R in enumerate(tokens):
        index = token_R[:, None, None].expand(-1, d_at_token_RKA.shape[2], 1)
        d_logits[:, k].scatter_add_(-1, index, d_at_token_RKA[:, k].unsqueeze(-1))
    return d_logits, d_log_w_RA


def _by_autograd(
    log_p_RKAV: Tensor, log_w_RA: Tensor, between_R: Sequence[Tensor], targets: Sequence[LossTarget]
) -> tuple[Tensor, Tensor]:
    """Terms of whole distributions; arguments and result as in :func:`_cross_entropy`."""
    with torch.enable_grad():
        log_p = log_p_RKAV.detach().requires_grad_()
        start_RA = log_w_RA.detach().requires_grad_()
        at_tokens = [_at_token(log_p[:, k], token_R) for k, token_R in enumerate(between_R)]
        weights = _weights_after(start_RA, at_tokens)
        loss = log_p.new_zeros(())
        mixed: dict[int, Tensor] = {}
        for target in targets:
            k = target.depth
            if k not in mixed:
                mixed[k] = (weights[k].unsqueeze(-1) + log_p[:, k]).logsumexp(1)
            loss = loss + _counted(target.value(mixed[k]), target)
        d_log_p, d_log_w_RA = torch.autograd.grad(loss, (log_p, start_RA))
    total = d_log_p.sum(-1, keepdim=True)
    return d_log_p - exp_(log_p_RKAV).mul_(total), d_log_w_RA


def _counted(value_R: Tensor, target: LossTarget) -> Tensor:
    """A target's part of the loss; also adds its losses to the step's sums."""
    target.add_to_total(value_R.detach())
    return (value_R * target.counts_R.to(value_R.dtype)).sum() * target.coefficient


def _weights_after(log_w_RA: Tensor, log_p: Sequence[Tensor]) -> list[Tensor]:
    """``log w^k`` [R, A] of every depth, from the components' log-probabilities ``log p_a`` [R, A]
    of the tokens before it."""
    log_weights = [log_w_RA]
    for log_p_RA in log_p:
        log_weights.append((log_weights[-1] + log_p_RA).log_softmax(-1))
    return log_weights


def _at_token(log_p_RAV: Tensor, token_R: Tensor) -> Tensor:
    """Every component's log-probability ``log p_a`` of a token, [R, A]."""
    index = token_R[:, None, None].expand(-1, log_p_RAV.shape[1], 1)
    return log_p_RAV.gather(-1, index).squeeze(-1)
