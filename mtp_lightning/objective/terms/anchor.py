"""The depth's state is drawn to the main prediction's state and to the embedding of its target.

LSE-MTP (Zhong et al., arXiv 2604.06155), from the published code. For depth k at position t,

    latent ||h^k_t - sg h_{t+k}||^2 + semantic ||h^k_t - sg E(x_{t+1+k})||^2

with means over the C components. It is an addition to a term of the logits (``objective=anchor``:
cross-entropy). Each distance is a term of its own: the latent one counts where a position has a
target and a teacher, the semantic one where it has a target.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

import torch
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.objective.terms.base import Chunk, Term
from mtp_lightning.settings import require_bool, require_number


class Anchor(Term):
    """``anchor`` of a mixture.

    Args:
        latent: weight of the distance from the main prediction's state.
        semantic: weight of the distance from the target's embedding.
        padded: whether the semantic distance also counts at every position without a target (the
            padding of tasks' examples, prompts that are not trained), from the embedding of token
            0, which pads. The published code does so with padding.

    Raises:
        UserError: a negative weight, or both 0.
    """

    name = "anchor"
    of_state = True

    def __init__(self, latent: float = 1.0, semantic: float = 1.0, padded: bool = False) -> None:
        self.latent = require_number("anchor.latent", latent, least=0)
        self.semantic = require_number("anchor.semantic", semantic, least=0)
        self.padded = require_bool("anchor.padded", padded)
        if not (latent or semantic):
            raise UserError(
                "anchor.latent=0 and anchor.semantic=0 leave nothing to learn: set one of them "
                "above 0, or leave anchor out of objective.terms."
            )

    def parts(self) -> Iterator[tuple[float, Term]]:
        if self.latent:
            yield self.latent, Latent()
        if self.semantic:
            yield self.semantic, Semantic(self.padded)

    def value(self, chunk: Chunk) -> Tensor:
        raise AssertionError("the two distances are computed separately")


class Latent(Term):
    """``||h^k_t - sg h_{t+k}||^2``, the mean over the C components."""

    name = "anchor_latent"
    selectable = False
    needs_teacher = True
    of_state = True

    def value(self, chunk: Chunk) -> Tensor:
        return _distance(chunk, chunk.teacher.hidden_RC)


class Semantic(Term):
    """``||h^k_t - sg E(x_{t+1+k})||^2``, the mean over the C components."""

    name = "anchor_semantic"
    selectable = False
    of_state = True

    def __init__(self, padded: bool) -> None:
        self.counts_padding = padded
        self._model: MTPModel | None = None

    def for_model(self, model: MTPModel) -> Semantic:
        own_head = model.mtp.own_head
        if self.counts_padding and own_head is not None and not own_head.is_whole:
            raise UserError(
                "objective.terms.anchor.padded=true counts positions without a target, and "
                "mtp.draft_vocab leaves targets out: set one of the two to its default."
            )
        bound = copy(self)
        bound._model = model
        return bound

    def value(self, chunk: Chunk) -> Tensor:
        assert self._model is not None
        own_head = self._model.mtp.own_head
        ids_R = chunk.targets_R if own_head is None else own_head.tokens[chunk.targets_R]
        with torch.no_grad():
            embedded_RC = self._model.trunk.embedding(ids_R)
        return _distance(chunk, embedded_RC)


def _distance(chunk: Chunk, to_RC: Tensor) -> Tensor:
    """The mean squared difference [R] between the depth's state and another."""
    assert chunk.hidden_RC is not None
    dtype = torch.promote_types(chunk.hidden_RC.dtype, torch.float32)
    return (chunk.hidden_RC.to(dtype) - to_RC.to(dtype)).square().mean(-1)
