"""A model's answers to the questions of a whole batch, greedy or sampled.

Shapes: B rows, W tokens of a window, P its positions, K scored tokens of the batch, C d_model,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from data_modules.windows import WindowBatch
from mtp_lightning.decoding.fused import decoding_passes
from mtp_lightning.decoding.sampling import Sampling, draw
from mtp_lightning.decoding.trunk_session import TrunkSession
from mtp_lightning.model import MTPModel


class ModelOutputs:
    """A model's outputs for a batch of questions; each is computed when first asked for.

    The model is in evaluation mode; ``uniforms`` returns the random numbers [B, W] of
    :func:`generate_scored`, on any device.
    """

    def __init__(self, model: MTPModel, batch: WindowBatch, uniforms: Callable[[], Tensor]) -> None:
        self._model = model
        self._uniforms = uniforms
        self.batch = batch

    @cached_property
    def greedy_BW(self) -> Tensor:
        """The tokens, with the model's greedy answers at the scored positions."""
        return generate_scored(self._model, self.batch)

    @cached_property
    def sampled_BW(self) -> Tensor:
        """The tokens, with answers sampled at temperature 1 at the scored positions."""
        return generate_scored(self._model, self.batch, self._uniforms().to(self.batch.device))

    @cached_property
    def states_BPC(self) -> Tensor:
        """The trunk's final states, teacher-forced."""
        # A packed mixture begins with its first component, the trunk's own state.
        return self._main_BPX[..., : self._model.config.trunk.d_model]

    @cached_property
    def forced_BW(self) -> Tensor:
        """The tokens, with the model's teacher-forced greedy choices at the scored positions."""
        return _in_place(self.batch, self._logits_KV.argmax(-1), self.batch.tokens)

    @cached_property
    def nats_BW(self) -> Tensor:
        """float64 ``-log p`` of each scored token, teacher-forced; 0 elsewhere."""
        target_K = _scored(self.batch, self.batch.tokens)
        nats_K = F.cross_entropy(self._logits_KV.double(), target_K, reduction="none")
        return _in_place(self.batch, nats_K, torch.zeros_like(self.batch.tokens).double())

    @cached_property
    def log_probs_KV(self) -> Tensor:
        """``log p`` of every id at the scored tokens, row by row, teacher-forced."""
        return torch.log_softmax(self._logits_KV.float(), dim=-1)

    @cached_property
    def _main_BPX(self) -> Tensor:
        return _teacher_forced(self._model, self.batch)

    @cached_property
    def _logits_KV(self) -> Tensor:
        return _logits(self._model, self.batch, self._main_BPX)


def generate_scored(
    model: MTPModel, batch: WindowBatch, uniforms_BW: Tensor | None = None
) -> Tensor:
    """Generate the scored tokens of a batch without drafts; other tokens are teacher-forced.

    If the scored tokens of a row are contiguous, the greedy result is that of :func:`generate`.

    Args:
        model: any variant, in evaluation mode.
        batch: windows with ``scored``; the first token of a window must not be scored.
        uniforms_BW: numbers of [0, 1) that each token is drawn by, at temperature 1; None for the
            most probable tokens.

    Returns:
        ``[B, W]`` the tokens, with the model's own at the scored positions.
    """
    assert batch.scored is not None and not bool(batch.scored[:, 0].any())
    if model.config.mtp.answers_at_once:
        # Such a model never reads the scored tokens.
        logits_KV = _logits(model, batch, _teacher_forced(model, batch))
        uniform_K = None if uniforms_BW is None else _scored(batch, uniforms_BW)
        return _in_place(batch, _choose_token(logits_KV, uniform_K), batch.tokens)
    places = torch.arange(batch.tokens.shape[1], device=batch.device)
    first_B = batch.scored.int().argmax(1)
    last_B = torch.where(batch.scored, places, first_B.unsqueeze(1)).amax(1)
    first, last = first_B.tolist(), last_B.tolist()
    rounds = max(b - a for a, b in zip(first, last, strict=True)) + 1
    # Rows that finish early decode into the padding, which is cut off at the end.
    said_BW, scored_BW = F.pad(batch.tokens, (0, rounds)), F.pad(batch.scored, (0, rounds))
    if uniforms_BW is not None:
        uniforms_BW = F.pad(uniforms_BW, (0, rounds))
    with decoding_passes(model):
        session = TrunkSession(model, slots=len(batch), capacity=max(first) + rounds)
        rows = zip(batch.tokens.tolist(), first, strict=True)
        logits_BV = session.join([row[:n] for row, n in rows])
        for i in range(rounds):
            place_B1 = (first_B + i).unsqueeze(1)
            uniform_B = None if uniforms_BW is None else uniforms_BW.gather(1, place_B1).squeeze(1)
            choice_B1 = _choose_token(logits_BV, uniform_B).unsqueeze(1)
            true_B1 = said_BW.gather(1, place_B1)
            token_B1 = torch.where(scored_BW.gather(1, place_B1), choice_B1, true_B1)
            said_BW.scatter_(1, place_B1, token_B1)
            if i + 1 == rounds:
                break
            session.put(token_B1, 0)
            logits_BV = session.verify(0)[:, 0]
            session.accept([0] * len(batch))
    return said_BW[:, : batch.tokens.shape[1]]


def _choose_token(logits: Tensor, uniform: Tensor | None) -> Tensor:
    """Tokens [...] by logits [..., V] and numbers of [0, 1), None for the most probable ones."""
    if uniform is None:
        return logits.argmax(-1)
    return draw(Sampling(temperature=1.0).probabilities(logits), uniform)


@torch.no_grad()
def _teacher_forced(model: MTPModel, batch: WindowBatch) -> Tensor:
    """The main prediction's states [B, P, X]."""
    with torch.autocast(batch.device.type, enabled=False):
        return model(batch, ())[0]


@torch.no_grad()
def _logits(model: MTPModel, batch: WindowBatch, states_BPX: Tensor) -> Tensor:
    """The logits [K, V] of the scored tokens."""
    with torch.autocast(batch.device.type, enabled=False):
        return model.head(states_BPX[batch.valid(0)])


def _scored(batch: WindowBatch, field_BW: Tensor) -> Tensor:
    """A field's values [K] at the scored positions."""
    return batch.shifted(field_BW, 0)[batch.valid(0)]


def _in_place(batch: WindowBatch, values_K: Tensor, elsewhere_BW: Tensor) -> Tensor:
    """``elsewhere_BW`` with other values [K] at the scored positions."""
    field_BW = elsewhere_BW.clone()
    # `shifted` returns a view, so this writes into the field.
    batch.shifted(field_BW, 0)[batch.valid(0)] = values_K
    return field_BW
