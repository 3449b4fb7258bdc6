"""A depth's gradient reaches the trunk only while it does not oppose the main prediction's (Du et
al. 2018, arXiv 1812.02224, section 3, the unweighted form).

    trunk gradient = g_0 + sum_k 1[c_k >= 0] lambda_k g_k,    c_k = EMA(cos(g_0, g_k))

``c_k`` starts from the first cosine. Only the gradient on the shared trunk's parameters is gated:
the depth's modules, the embedding and the head always learn from ``lambda_k L_k``, so that a gated
depth is still trained to draft.

The training pass is unchanged; afterwards ``lambda_k g_k`` of the gated depths is subtracted from
the trunk's gradients, before they are clipped. Under bf16-mixed this is exact up to rounding.

Cost: that of :func:`task_gradients` on the whole shared trunk, in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtp_lightning.objective.balance.base import Balance, Observed
from mtp_lightning.objective.plan import depths_of

if TYPE_CHECKING:
    from mtp_lightning.objective.balance.gradients import TaskGradients


@dataclass(eq=False, kw_only=True)
class CosineGate(Balance):
    """``balance=cosine_gate``."""

    name = "cosine_gate"
    scope = "trunk"
    stored = ("cosines",)

    ema: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self._cosines: dict[int, float] = {}

    def gate(self, lambdas: Sequence[float], gradients: TaskGradients) -> None:
        for k, cosine in gradients.cosines.items():
            before = self._cosines.get(k, cosine)
            self._cosines[k] = self.ema * before + (1 - self.ema) * cosine
            if not self.is_open(k):
                gradients.subtract(k, lambdas[k])

    def is_open(self, k: int) -> bool:
        """Whether the gradient of depth ``k`` reaches the trunk."""
        return self._cosines[k] >= 0

    def update(self, observed: Observed) -> dict[str, float]:
        values = {}
        for k in depths_of(observed.factors):
            values[f"balance/cosine_depth_{k}"] = self._cosines[k]
            values[f"balance/gate_depth_{k}"] = float(self.is_open(k))
        return values
