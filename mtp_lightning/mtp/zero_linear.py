"""A linear layer that starts at zero: a sum with its output starts as the other summand."""

from __future__ import annotations

import torch

from mtp_lightning.nn.linear import Linear


class ZeroLinear(Linear):
    """``x @ weight.T``, 0 at the start."""

    @torch.no_grad()
    def reset_own_weights(self) -> None:
        """Start at zero; the model calls this after it has drawn all weights."""
        self.weight.zero_()
