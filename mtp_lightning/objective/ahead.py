"""What must be known of all depths at a position before any of them learns.

A pass through the head of its own, without gradients, chunk by chunk like the one that trains; a
number a position and depth is what remains of it.

Shapes: B windows, T positions, R positions of one chunk, C d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtp_lightning.mtp.feed import Feed
from mtp_lightning.objective.terms.tv import acceptance
from mtp_lightning.objective.through_head import (
    compute_dtype,
    log_probs,
    log_probs_by_chunk,
    rows_left,
)


@dataclass(frozen=True)
class Wanted:
    """What is to be measured.

    Attributes:
        alpha: ``sum_v min(p_{t+k}, q^k_t)`` of every depth.
        target_probs: ``q^k(x)`` of every depth.
        entropy: of the main prediction, in nats.
    """

    alpha: bool = False
    target_probs: bool = False
    entropy: bool = False

    @property
    def of_depths(self) -> bool:
        """Whether the depths are looked at."""
        return self.alpha or self.target_probs

    @property
    def anything(self) -> bool:
        """Whether a pass is needed at all."""
        return self.of_depths or self.entropy


@dataclass
class Seen:
    """What was measured, fp32 (in a double precision model fp64).

    Attributes:
        alpha: depth -> [B, T]; where no teacher is, a number without meaning.
        target_probs: depth -> [B, T]; where no target is, a number without meaning.
        entropy: [B, T]; None unless wanted.
    """

    alpha: dict[int, Tensor] = field(default_factory=dict)
    target_probs: dict[int, Tensor] = field(default_factory=dict)
    entropy: Tensor | None = None


@torch.no_grad()
def look_ahead(
    weight_VC: Tensor,
    feed: Feed,
    tokens: Mapping[int, Tensor],
    wanted: Wanted,
) -> Seen:
    """Measure the depths.

    Args:
        weight_VC: the shared head's.
        feed: the depths' hidden states, asked for only if depths are looked at.
        tokens: depth -> targets [B, T].
        wanted: what is to be measured.
    """
    seen = Seen()
    for states in feed.looks() if wanted.of_depths else ():
        _look(weight_VC, feed.main, states, tokens, wanted, seen)
    if wanted.entropy and seen.entropy is None:
        _look(weight_VC, feed.main, [], tokens, wanted, seen)
    return seen


def _look(
    weight_VC: Tensor,
    main_BTC: Tensor,
    states: Sequence[tuple[int, Tensor]],
    tokens: Mapping[int, Tensor],
    wanted: Wanted,
    seen: Seen,
) -> None:
    """One pass of the main prediction, and the depths that share it. What is measured is added to
    ``seen``, the entropy only if it is not there."""
    dtype = compute_dtype(main_BTC)
    weight = weight_VC.detach().to(dtype)
    number = torch.promote_types(dtype, torch.float32)
    entropy_due = wanted.entropy and seen.entropy is None

    def empty() -> Tensor:
        return torch.empty(main_BTC.shape[:-1], dtype=number, device=main_BTC.device)

    for k, _ in states:
        if wanted.alpha:
            seen.alpha[k] = empty()
        if wanted.target_probs:
            seen.target_probs[k] = empty()
    if entropy_due:
        seen.entropy = empty()
    flat = [(k, h.detach().reshape(-1, h.shape[-1]).to(dtype)) for k, h in states]
    main_MC = main_BTC.detach().reshape(-1, main_BTC.shape[-1]).to(dtype)
    with torch.autocast(weight.device.type, enabled=False):
        if (wanted.alpha and states) or entropy_due:
            for place, main_RV in log_probs_by_chunk(main_MC, weight):
                if entropy_due:
                    assert seen.entropy is not None
                    seen.entropy.view(-1)[place] = -(main_RV.exp() * main_RV).sum(-1)
                main_RV.exp_()
                for k, h_MC in flat:
                    rows = rows_left(place, k, h_MC)
                    q_RV = log_probs(h_MC[rows], weight).exp_()
                    if wanted.alpha:
                        seen.alpha[k].view(-1)[rows] = acceptance(main_RV, q_RV)
                    if wanted.target_probs:
                        _note_target(seen.target_probs[k], tokens[k], rows, q_RV)
        elif wanted.target_probs:
            for k, h_MC in flat:
                for place, log_q_RV in log_probs_by_chunk(h_MC, weight):
                    _note_target(seen.target_probs[k], tokens[k], place, log_q_RV.exp_())


def _note_target(found_BT: Tensor, tokens_BT: Tensor, rows: slice | Tensor, q_RV: Tensor) -> None:
    token_R1 = tokens_BT.reshape(-1)[rows].clamp(min=0).unsqueeze(-1)
    found_BT.view(-1)[rows] = q_RV.gather(1, token_R1).squeeze(-1)
