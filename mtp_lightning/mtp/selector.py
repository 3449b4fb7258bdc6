"""DFlash 2's candidate selector (Inco AI 2026, https://inco.ai/blog/dflash2).

    S_k(a, b) = U_k(b) + <A[a] * H h^k, B[b]>

for the 16 likeliest tokens b of depth k, its *candidates*; a is the token before, ``U_k(b)`` the
head's logit, ``h^k`` the depth's hidden state, A and B tables of r columns and H a projection to r
numbers; ``*`` multiplies elementwise. A draft is chosen among the candidates by ``softmax(S_k(a,
.))``, and no other token is drafted. All depths share A, B and H. B starts at zero, so that every
candidate's score starts as its logit.

The loss is the cross-entropy over the candidates, with the text's own token as a. A target that is
not among them takes the place of the least likely one, in training alone. The source does not
publish its training: this is that of vLLM's Speculators (pull request 1006); NVIDIA's NeMo
AutoModel (3605) leaves such targets out. The gradient reaches the head's logits of the candidates
and the hidden state, as in NeMo's. The matrix products grow with K and not with V. What grows
with V is finding the candidates, writing their scores among the logits, and the optimizer's step
over A and B.

Shapes: R positions of one chunk, C d_model, V vocabulary, K candidates, r rank, X any dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.mtp.chunk import Chunk, StateGradient, TermGradients
from mtp_lightning.mtp.rescoring import Rescorer
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.linear import Linear, embedding

CANDIDATES = 16

# Numbers of the candidates' rows of B that exist at once in training.
_NUMEL = 2**22


class Selector(Rescorer):
    """The tables A and B of r columns, and the projection H."""

    name = "selector"

    def __init__(self, trunk: TrunkConfig, rank: int) -> None:
        super().__init__()
        size = trunk.vocab_size
        tables = {name: embedding(size, rank) for name in ("before", "after")}
        # A is ``before`` and B is ``after``. Optimizers recognize lookup tables by this name
        # (``optim/groups.py``).
        self.embedding = nn.ModuleDict(tables)
        self.gate = Linear(trunk.d_model, rank)  # H

    @property
    def _weights(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """A, B and H."""
        before, after = self.embedding["before"].weight, self.embedding["after"].weight
        return before, after, self.gate.weight  # type: ignore[return-value]

    @torch.no_grad()
    def reset_own_weights(self) -> None:
        self._weights[1].zero_()

    def forward(self, k: int, hidden: Tensor, logits: Tensor, before: Tensor) -> Tensor:
        logits_XV = logits.to(torch.promote_types(logits.dtype, torch.float32))
        unary_XK, ids_XK = logits_XV.topk(min(CANDIDATES, logits.shape[-1]), dim=-1)
        table_A, table_B, gate = self._weights
        scores_XK = _scores(
            unary_XK, F.embedding(before, table_A), F.embedding(ids_XK, table_B), hidden, gate
        )
        rescored_XV = scores_XK.new_full((*scores_XK.shape[:-1], logits.shape[-1]), -torch.inf)
        return rescored_XV.scatter(-1, ids_XK.expand_as(scores_XK), scores_XK)

    @torch.no_grad()
    def value(self, chunk: Chunk) -> Tensor:
        return torch.cat([self._part(chunk, rows)[0] for rows in self._parts(chunk)])

    @torch.no_grad()
    def state_gradient(self, chunk: Chunk, factor_R: Tensor, into: TermGradients) -> StateGradient:
        for weight in self._weights:
            if weight not in into:
                into[weight] = torch.zeros_like(weight)
        d_before, d_after, d_gate = (into[weight] for weight in self._weights)
        results = []
        assert chunk.before_R is not None
        for rows in self._parts(chunk):
            with torch.enable_grad():
                value_R, ids_RK, leaves = self._part(chunk, rows)
                d_unary_RK, d_before_Rr, d_after_RKr, d_hidden_RC, d_gate_rC = torch.autograd.grad(
                    (value_R * factor_R[rows]).sum(), leaves
                )
            d_before.index_add_(0, chunk.before_R[rows], d_before_Rr)
            d_after.index_add_(0, ids_RK.flatten(), d_after_RKr.flatten(0, 1))
            d_gate.add_(d_gate_rC)
            results.append((value_R.detach(), d_hidden_RC, ids_RK, d_unary_RK))
        value_R, d_hidden_RC, ids_RK, d_unary_RK = map(torch.cat, zip(*results, strict=True))
        return StateGradient(value_R, d_hidden_RC, (ids_RK, d_unary_RK))

    def _parts(self, chunk: Chunk) -> Iterator[slice]:
        """Yield parts of the positions, so small that the candidates' rows of B hold at most
        :data:`_NUMEL` numbers."""
        step = max(1, _NUMEL // (CANDIDATES * self.gate.weight.shape[0]))
        for start in range(0, len(chunk.targets_R), step):
            yield slice(start, start + step)

    def _part(self, chunk: Chunk, rows: slice) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Losses [R] of some positions, the candidates' ids [R, K], and the tensors that the losses
        are differentiable by, in the order of the arguments of :func:`_scores`."""
        assert chunk.before_R is not None and chunk.hidden_RC is not None
        log_q_RV, target_R1 = chunk.log_probs_RV[rows], chunk.targets_R[rows].unsqueeze(-1)
        ids_RK = candidates(log_q_RV, target_R1)
        table_A, table_B, gate = self._weights
        tensors = (
            log_q_RV.gather(-1, ids_RK),
            F.embedding(chunk.before_R[rows], table_A),
            F.embedding(ids_RK, table_B),
            chunk.hidden_RC[rows],
            gate,
        )
        needs_gradient = torch.is_grad_enabled()
        leaves = [tensor.detach().requires_grad_(needs_gradient) for tensor in tensors]
        log_p_RK = _scores(*leaves).log_softmax(-1)
        return -(log_p_RK * (ids_RK == target_R1)).sum(-1), ids_RK, leaves


def candidates(log_q_RV: Tensor, target_R1: Tensor) -> Tensor:
    """The ids [R, K] of the likeliest tokens, the likeliest first; a target that is not among them
    replaces the last one."""
    ids_RK = log_q_RV.topk(min(CANDIDATES, log_q_RV.shape[-1]), dim=-1).indices
    missing_R1 = (ids_RK != target_R1).all(-1, keepdim=True)
    last_R1 = torch.where(missing_R1, target_R1, ids_RK[:, -1:])
    return torch.cat((ids_RK[:, :-1], last_R1), dim=-1)


def _scores(
    unary_XK: Tensor, before_Xr: Tensor, after_XKr: Tensor, hidden_XC: Tensor, gate_rC: Tensor
) -> Tensor:
    """``S`` [X, K] in the precision of the logits, from the candidates' logits or
    log-probabilities, the row of A of the token before, the candidates' rows of B, the depth's
    state and H."""
    dtype = unary_XK.dtype
    gated_Xr = before_Xr.to(dtype) * F.linear(hidden_XC.to(dtype), gate_rC.to(dtype))
    return unary_XK + (after_XKr.to(dtype) @ gated_Xr.unsqueeze(-1)).squeeze(-1)
