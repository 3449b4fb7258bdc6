"""Losses and choices of one teacher-forced pass, at every position.

Shapes: B batch, T positions, K depths (0 .. D), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.own_head import OwnHead
from mtp_lightning.objective.through_head import log_probs_by_chunk


@dataclass(frozen=True, eq=False)
class Reading:
    """Losses and choices, without tensors of size V.

    Attributes:
        losses_KBT: nats of every depth; 0 where a target does not count.
        valid_KBT: whether the target counts.
        right_BT: whether depth 0's first choice is its target.
    """

    losses_KBT: Tensor
    valid_KBT: Tensor
    right_BT: Tensor


def read(model: MTPModel, batch: WindowBatch, *, depths: bool = True) -> Reading:
    """Runs one pass of the model over windows.

    Args:
        model: a model in evaluation mode.
        batch: windows of the model's depth.
        depths: whether to include depths 1 .. D, or only depth 0.
    """
    hidden = model(batch, None if depths else ())
    losses, valid = [], []
    right_BT = torch.empty(0)
    for k, h_BTC in hidden.items():
        target_BT = batch.targets(k)
        own, target_M = model.mtp.own_head if k else None, target_BT.reshape(-1)
        valid_M = (target_M if own is None else own.rows_of(target_M)) >= 0
        loss_M, choice_M = _through_head(model, h_BTC, target_M.clamp(min=0), own)
        losses.append(loss_M.where(valid_M, 0).view_as(target_BT))
        valid.append(valid_M.view_as(target_BT))
        if k == 0:
            right_BT = choice_M.view_as(target_BT) == target_BT
    return Reading(torch.stack(losses), torch.stack(valid), right_BT)


def _through_head(
    model: MTPModel, h_BTC: Tensor, target_M: Tensor, own: OwnHead | None
) -> tuple[Tensor, Tensor]:
    """Loss and first choice of every position, [M] each."""
    weight_VC = model.head.weight
    h_MC = h_BTC.reshape(-1, h_BTC.shape[-1]).to(weight_VC.dtype)
    loss_M = torch.empty(len(h_MC), dtype=torch.float64, device=h_MC.device)
    choice_M = torch.empty_like(target_M)
    # In the weight's precision, as DepthRates computes it.
    with torch.autocast(weight_VC.device.type, enabled=False):
        for rows, chunk_RV in log_probs_by_chunk(h_MC, weight_VC, own):
            found_R1 = chunk_RV.gather(-1, target_M[rows].unsqueeze(-1))
            loss_M[rows] = -found_R1.squeeze(-1).double()
            choice_M[rows] = chunk_RV.argmax(-1)
    return loss_M, choice_M
