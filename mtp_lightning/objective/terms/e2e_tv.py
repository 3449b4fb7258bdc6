"""The expected acceptance of all depths of a position together (arXiv 2606.12370, eq. 13).

    1 - (1/D) sum_{j=1..D} prod_{i<=j} alpha_i,    alpha_i = sum_v min(sg p_{t+i,v}, q^i_{t,v})

is one minus the expected share of D drafts that speculative sampling accepts. It is the mean over j
of ``1 - prod_{i<=j} alpha_i``, which is the loss of depth j here: ``mtp_lambda`` weighs it like any
other, and it trains depth j and all shallower depths.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mtp_lightning.objective.terms.tv import TV


class E2ETV(TV):
    """``objective=e2e_tv``. The gradient with respect to a depth's logits is that of ``1 - alpha``,
    scaled by the other depths' acceptance, which a prepass computes (``rules/coupling.py``)."""

    name = "e2e_tv"
    couples = True

    def together(
        self,
        alpha: Mapping[int, Tensor],
        valid: Mapping[int, Tensor],
        coefficients: Mapping[int, Tensor],
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The loss of every depth, and the scale of the gradient of ``1 - alpha_i``.

        A depth that does not count at a position has no draft there that could be rejected, so its
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
            # Multiplied up instead of divided: an alpha may be 0.
            others, scales[i] = torch.ones_like(product), torch.zeros_like(product)
            for j in depths:
                others = others if j == i else others * passed[j]
                if j >= i:
                    scales[i] = scales[i] + coefficients[j] * valid[j] * others
        return values, scales
