"""Teacher-forced evaluation of a model on any windows."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch

from data_modules.windows import WindowBatch
from mtp_lightning.metrics.rates import DepthRates
from mtp_lightning.model import MTPModel


@torch.inference_mode()
def evaluate_model(
    model: MTPModel, batches: Iterable[WindowBatch], *, limit: int | None = None
) -> dict[str, float]:
    """Loss, accuracy, agreement and overlap of every depth; see :class:`DepthRates`.

    Args:
        model: in evaluation mode.
        batches: windows built for the model's depth.
        limit: at most so many batches; None for all.

    Raises:
        ValueError: no batch, or one of another depth.
    """
    device = model.head.weight.device
    rates = DepthRates(model.depth).to(device)
    for batch in islice(batches, limit):
        moved = batch.to(device)
        rates.update(model(moved), model.head.weight, moved)
    if not rates.update_called:
        raise ValueError("There is nothing to evaluate: the data gave no batch.")
    return rates.compute()
