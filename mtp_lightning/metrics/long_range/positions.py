"""Loss by position in the window, in buckets that double.

Shapes: B batch, T positions, K depths (0 .. D), N buckets.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from mtp_lightning.metrics.long_range.reading import Reading

_EARLY = 50  # Olsson et al. 2022 subtract the loss of the 50th token from that of the 500th


def position_buckets(seq_len: int) -> list[tuple[int, int]]:
    """First and last position of every bucket, from 1: 1, 2-3, 4-7, .. up to ``seq_len``.

    At position p the model has read p tokens. A last bucket less than half full joins the one
    before it.
    """
    buckets: list[tuple[int, int]] = []
    first = 1
    while first <= seq_len:
        last = min(2 * first - 1, seq_len)
        if buckets and 2 * (last - first + 1) < first:
            buckets[-1] = (buckets[-1][0], last)
        else:
            buckets.append((first, last))
        first *= 2
    return buckets


def bucket_name(bucket: tuple[int, int]) -> str:
    """The bucket's name in a log tag."""
    first, last = bucket
    return str(first) if first == last else f"{first}-{last}"


def early_bucket(buckets: list[tuple[int, int]]) -> int | None:
    """The bucket that the last one is compared with: that of position 50, or, if this is the last
    one itself, that of position T / 10; None if there is only one bucket."""
    seq_len = buckets[-1][1]
    for position in (_EARLY, max(seq_len // 10, 1)):
        for i, (first, last) in enumerate(buckets[:-1]):
            if first <= position <= last:
                return i
    return None


class PositionLoss(Metric):
    """``loss_position_BUCKET`` of depth 0, ``loss_position_BUCKET_depth_k`` of the others, and
    ``context_score``: depth 0's loss in the last bucket minus that around position 50, in nats; the
    lower it is, the more the tokens in between help (Olsson et al. 2022)."""

    full_state_update = False
    count: Tensor
    loss: Tensor

    def __init__(self, depth: int, seq_len: int) -> None:
        super().__init__()
        self.buckets = position_buckets(seq_len)
        index = [i for i, (a, b) in enumerate(self.buckets) for _ in range(a, b + 1)]
        self.index = index
        for name in ("count", "loss"):
            zeros = torch.zeros(depth + 1, len(self.buckets), dtype=torch.float64)
            self.add_state(name, default=zeros, dist_reduce_fx="sum")

    def update(self, reading: Reading) -> None:
        """Counts one batch of windows, of the given length or shorter."""
        seq_len = reading.losses_KBT.shape[-1]
        index_T = torch.tensor(self.index[:seq_len], device=self.count.device)
        self.count.index_add_(1, index_T, reading.valid_KBT.sum(1).double())
        self.loss.index_add_(1, index_T, reading.losses_KBT.sum(1).double())

    def compute(self) -> dict[str, float]:
        """The values by name; NaN without any count."""
        mean_KN = (self.loss / self.count).tolist()
        values = {
            f"loss_position_{bucket_name(bucket)}" + (f"_depth_{k}" if k else ""): mean
            for k, means in enumerate(mean_KN)
            for bucket, mean in zip(self.buckets, means, strict=True)
        }
        early = early_bucket(self.buckets)
        if early is not None:
            values["context_score"] = mean_KN[0][-1] - mean_KN[0][early]
        return values
