"""What all depths of a position are worth together (arXiv 2606.12370, eq. 13).

    1 - (1/D) sum_{j=1..D} prod_{i<=j} alpha_i,    alpha_i = sum_v min(sg p_{t+i,v}, q^i_{t,v})

is one minus the share of D drafts that speculative sampling accepts. It is the mean over j of
``1 - prod_{i<=j} alpha_i``, and that is what depth j has for its loss: ``mtp_lambda`` weighs it as
every other, and it trains depth j and all shallower ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mtp_lightning.objective.terms.tv import TV


class E2ETV(TV):
    """``objective=e2e_tv``. The gradient by a depth's logits is that of ``1 - alpha``, times what
    the other depths' acceptance makes of it: all must be known before any learns
    (``rules/coupling.py``)."""

    name = "e2e_tv"
    couples = True

    def together(
        self,
        alpha: Mapping[int, Tensor],
        valid: Mapping[int, Tensor],
        coefficients: Mapping[int, Tensor],
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The loss of every depth, and what multiplies the gradient of ``1 - alpha_i``.

        A depth that does not count at a position has no draft there that could be rejected: its
        alpha is taken as 1.

        Args:
            alpha: depth -> acceptance [B, T], in the order of depths.
            valid: depth -> bool [B, T].
            coefficients: depth -> [B, T], the weight of its loss at a position.

        Returns:
            depth j -> ``1 - prod_{i<=j} alpha_i`` [B, T]; depth i -> ``sum_{j>=i} coefficient_j
            prod_{l<=j, l!=i} alpha_l`` [B, T], over the depths j that count.
        """
        depths = list(alpha)
        passed = {k: torch.where(valid[k], alpha[k], 1) for k in depths}
        values, scales = {}, {}
        product = torch.ones_like(alpha[depths[0]])
        for k in depths:
            product = product * passed[k]
            values[k] = 1 - product
        for i in depths:
            # Without a division: an alpha may be 0.
            others, scales[i] = torch.ones_like(product), torch.zeros_like(product)
            for j in depths:
                others = others if j == i else others * passed[j]
                if j >= i:
                    scales[i] = scales[i] + coefficients[j] * valid[j] * others
        return values, scales
