"""Multi-token prediction without parameters (modded-nanogpt, record of 2025-12-22).

The next token's logits are trained on several targets at once:

    L = -sum_k lambda_k log p(t_{i+1+k} | t_{<=i}),    k = 0 .. D,  lambda_0 = 1

with one distribution ``p``, the main prediction's. So the loss of depth k is that of the same
logits for the target k positions further. It only shapes training, usually with weights that decay
to 0 (``lambda_schedule=modded_nanogpt``); there is nothing to draft with.
"""

from __future__ import annotations

from dataclasses import dataclass

from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.kinds import NoModules
from mtp_lightning.nn.config import TrunkConfig


@dataclass(frozen=True, kw_only=True)
class ParameterFreeConfig(MTPConfig, variant="parameter_free"):
    """``mtp=parameter_free``: no weights, and no matrix product beyond the trunk's own."""

    def build(self, trunk: TrunkConfig) -> NoModules:
        return NoModules(self)
