"""Which drafts of a chain are kept: the rules of ``verify=``.

``token`` judges one draft after the other and stops at the first rejection
(:func:`accept_or_resample`). ``block`` judges all of them together (Sun et al., arXiv 2403.10444,
algorithm 2). With ``p_0 = 1`` and, for every draft x_i,

    p_i = min(p_(i-1) p(x_i) / q(x_i), 1),   S_i = sum_v max(p_i p(v | x_1 .. x_i) - q(v | ..), 0)
    h_i = S_i / (S_i + 1 - p_i),             h_M = p_M of the last draft

h_i is the probability that draft i is the last one kept. A random number of its own decides for
each draft, the largest i that succeeds wins, and all drafts up to it are kept. The next token is
drawn from ``max(p_i p - q, 0)`` renormalized, after the last draft from p. The text has the trunk's
distribution, and no rule that uses only these probabilities keeps more drafts on average (theorem
2). Unlike ``token``, it can keep a draft that ``token`` rejects, if later drafts are more likely
under p than under q.

Greedily both rules keep the same drafts: all probabilities are then 0 or 1.

Shapes: B rows, M drafts, V vocabulary, N tokens that drafts are chosen from, T = M + 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mtp_lightning.decoding.sampling import draw, total
from mtp_lightning.nn.ops import Op

Verification = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A rule: called like :func:`accept_or_resample`."""


@Op
def accept_or_resample(
    p_BTV: Tensor,
    q_BMN: Tensor,
    draft_BM: Tensor,
    accept_noise_BM: Tensor,
    final_noise_B: Tensor,
    limit_B: Tensor,
) -> tuple[Tensor, Tensor]:
    """The rejection rule of speculative sampling.

    Args:
        p_BTV: the trunk's distributions, T = M + 1.
        q_BMN: the distributions that the drafts were drawn from, over the first N tokens.
        accept_noise_BM, final_noise_B: uniform numbers of [0, 1).
        limit_B: for each row, the number of drafts that are considered.

    Returns:
        Tokens [B, T], of which the first ``accepted + 1`` are valid, and ``accepted`` [B].
    """
    p_draft_BM, q_draft_BM = draft_probs(p_BTV, q_BMN, draft_BM)
    # u < p / q without the division: p = 0 never accepts, p >= q always does.
    ok_BM = accept_noise_BM * q_draft_BM < p_draft_BM
    ok_BM &= torch.arange(draft_BM.shape[1], device=ok_BM.device) < limit_B.unsqueeze(1)
    accepted_B = ok_BM.long().cumprod(dim=1).sum(dim=1)
    tokens_BT = with_own_token(p_BTV, q_BMN, draft_BM, accepted_B, final_noise_B, limit_B)
    return tokens_BT, accepted_B


def draft_probs(p_BTV: Tensor, q_BMN: Tensor, draft_BM: Tensor) -> tuple[Tensor, Tensor]:
    """The probabilities [B, M] of the drafts by the trunk and by the distributions that they were
    drawn from; arguments as for :func:`accept_or_resample`."""
    index = draft_BM.unsqueeze(-1)
    p_BMV = p_BTV[:, : draft_BM.shape[1]]
    return p_BMV.gather(-1, index).squeeze(-1), q_BMN.gather(-1, index).squeeze(-1)


def with_own_token(
    p_BTV: Tensor,
    q_BMN: Tensor,
    draft_BM: Tensor,
    accepted_B: Tensor,
    noise_B: Tensor,
    limit_B: Tensor,
    weight_B: Tensor | None = None,
) -> Tensor:
    """The drafts, and after the accepted ones one token of the trunk: after a rejection, drawn
    from ``max(weight p - q, 0)`` renormalized, else from p. Further arguments are as for
    :func:`accept_or_resample`.

    Args:
        accepted_B: the number of drafts kept.
        noise_B: uniform numbers of [0, 1).
        weight_B: 1 by default.

    Returns:
        Tokens [B, T], of which the first ``accepted + 1`` are valid.
    """
    rejected_B1 = (accepted_B < limit_B).unsqueeze(1)
    rows = torch.arange(p_BTV.shape[0], device=p_BTV.device)
    p_BV = p_BTV[rows, accepted_B]
    q_BN = q_BMN[rows, accepted_B.clamp(max=q_BMN.shape[1] - 1)]
    rest_BV = residual(p_BV if weight_B is None else p_BV * weight_B.unsqueeze(1), q_BN)
    # If p = q up to rounding, nothing is left to draw from, and p itself is right.
    rejected_B1 &= rest_BV.sum(dim=1, keepdim=True) > 0
    final_B = draw(torch.where(rejected_B1, rest_BV, p_BV), noise_B)
    tokens_BT = torch.cat((draft_BM, final_B.unsqueeze(1)), dim=1)
    return tokens_BT.scatter(1, accepted_B.unsqueeze(1), final_B.unsqueeze(1))


def residual(p: Tensor, q: Tensor) -> Tensor:
    """``max(p - q, 0)`` of p [..., V] and q [..., N]; q is 0 for tokens from N on."""
    rest = p.clone()
    rest[..., : q.shape[-1]].sub_(q).clamp_(min=0)
    return rest


def accept_block(
    p_BTV: Tensor,
    q_BMN: Tensor,
    draft_BM: Tensor,
    accept_noise_BM: Tensor,
    final_noise_B: Tensor,
    limit_B: Tensor,
) -> tuple[Tensor, Tensor]:
    """Block verification. The arguments and the result are those of :func:`accept_or_resample`;
    draft number ``limit`` is the last one of its row."""
    n_drafts = draft_BM.shape[1]
    p_draft_BM, q_draft_BM = (x.double() for x in draft_probs(p_BTV, q_BMN, draft_BM))
    joints = [torch.ones_like(final_noise_B, dtype=torch.float64)]
    for p_B, q_B in zip(p_draft_BM.unbind(1), q_draft_BM.unbind(1), strict=True):
        joints.append((joints[-1] * p_B / q_B).clamp(max=1))
    joint_BT = torch.stack(joints, dim=1)
    # The probability that a draft is the last one kept, for all drafts but the last.
    inner_BM = joint_BT[:, 1:n_drafts]
    weighted_BMV = p_BTV[:, 1:n_drafts] * inner_BM.unsqueeze(-1).to(p_BTV.dtype)
    rest_BM = total(residual(weighted_BMV, q_BMN[:, 1:]).double()).squeeze(-1)
    chance_BM = rest_BM / (rest_BM + 1 - inner_BM)
    # 0 / 0: both distributions agree, and whether a later draft is kept decides.
    chance_BM = torch.cat((chance_BM.nan_to_num(1.0), joint_BT[:, n_drafts:]), dim=1)
    number_M = torch.arange(1, n_drafts + 1, device=draft_BM.device)
    last_BM = number_M == limit_B.unsqueeze(1)
    chance_BM = torch.where(last_BM, joint_BT[:, 1:], chance_BM)
    kept_BM = (accept_noise_BM < chance_BM) & (number_M <= limit_B.unsqueeze(1))
    accepted_B = (kept_BM * number_M).amax(dim=1)
    joint_B = joint_BT.gather(1, accepted_B.unsqueeze(1)).squeeze(1)
    tokens_BT = with_own_token(
        p_BTV, q_BMN, draft_BM, accepted_B, final_noise_B, limit_B, joint_B.to(p_BTV.dtype)
    )
    return tokens_BT, accepted_B


RULES: dict[str, Verification] = {"token": accept_or_resample, "block": accept_block}
"""The words of ``verify=``; a rule of your own is one more entry."""
