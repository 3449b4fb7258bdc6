"""The depth's state is drawn to the main prediction's state and to the embedding of its target.

LSE-MTP (Zhong et al., arXiv 2604.06155), from the published code. For depth k at position t,

    latent ||h^k_t - sg h_{t+k}||^2 + semantic ||h^k_t - sg E(x_{t+1+k})||^2

with means over the C components. It is an addition to a term of the logits (``objective=anchor``:
cross-entropy). A position counts where it has a target and a teacher. The published code also
averages the second distance over padded targets, whose embedding is that of the padding symbol.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor, nn

from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.own_head import OwnHead
from mtp_lightning.objective.terms.base import Chunk, Term
from mtp_lightning.settings import require_number


class Anchor(Term):
    """``anchor`` of a mixture.

    Args:
        latent: weight of the distance from the main prediction's state.
        semantic: weight of the distance from the target's embedding.

    Raises:
        UserError: a negative weight, or both 0.
    """

    name = "anchor"
    needs_teacher = True
    of_state = True

    def __init__(self, latent: float = 1.0, semantic: float = 1.0) -> None:
        self.latent = require_number("anchor.latent", latent, least=0)
        self.semantic = require_number("anchor.semantic", semantic, least=0)
        if not (latent or semantic):
            raise UserError(
                "anchor.latent=0 and anchor.semantic=0 leave nothing to learn: set one of them "
                "above 0, or leave anchor out of objective.terms."
            )
        self._embedding: nn.Module | None = None
        self._own_head: OwnHead | None = None

    def for_model(self, model: MTPModel) -> Anchor:
        bound = copy(self)
        bound._embedding, bound._own_head = model.trunk.embedding, model.mtp.own_head
        return bound

    def value(self, chunk: Chunk) -> Tensor:
        assert chunk.hidden_RC is not None and self._embedding is not None
        dtype = torch.promote_types(chunk.hidden_RC.dtype, torch.float32)
        hidden_RC = chunk.hidden_RC.to(dtype)
        ids_R = chunk.targets_R
        if self._own_head is not None:  # whose targets are its rows
            ids_R = self._own_head.tokens[ids_R]
        with torch.no_grad():
            embedded_RC = self._embedding(ids_R).to(dtype)
        distances = (
            (self.latent, chunk.teacher.hidden_RC.to(dtype)),
            (self.semantic, embedded_RC),
        )
        weighted = [w * (hidden_RC - to_RC).square().mean(-1) for w, to_RC in distances if w]
        return torch.stack(weighted).sum(0)
