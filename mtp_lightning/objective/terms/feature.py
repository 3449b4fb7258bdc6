"""A distance between the depth's hidden state and the main prediction's for the same token.

EAGLE (arXiv 2401.15077, section 4.2), and NextLat (arXiv 2511.05963) without the normalization.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.objective.terms.base import Chunk, Term
from mtp_lightning.settings import require_bool

_EPS = 1e-6


class Feature(Term):
    """``SmoothL1(h^k_t / rms, sg h_{t+k} / rms)``, the mean over the C components.

    Args:
        normalise: whether rms is that of ``sg h_{t+k}``; else it is 1, and the states themselves
            are compared.

    Raises:
        UserError: ``normalise`` is neither true nor false.
    """

    name = "feature"
    needs_teacher = True
    of_state = True

    def __init__(self, normalise: bool = True) -> None:
        self.normalise = require_bool("feature.normalise", normalise)

    def value(self, chunk: Chunk) -> Tensor:
        assert chunk.hidden_RC is not None
        dtype = torch.promote_types(chunk.hidden_RC.dtype, torch.float32)
        hidden_RC, main_RC = chunk.hidden_RC.to(dtype), chunk.teacher.hidden_RC.to(dtype)
        if self.normalise:
            scale_R1 = (main_RC.square().mean(-1, keepdim=True) + _EPS).rsqrt()
            hidden_RC, main_RC = hidden_RC * scale_R1, main_RC * scale_R1
        return F.smooth_l1_loss(hidden_RC, main_RC, reduction="none").mean(-1)
