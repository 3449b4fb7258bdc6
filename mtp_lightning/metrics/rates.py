"""Teacher-forced rates of every prediction depth.

Three rates that the field calls "acceptance" have different names here: *accuracy* compares a depth
with the text, *agreement* with the main model's own choice of the same token, *overlap* with its
whole distribution. The acceptance rate of the draft-verify loop is measured in decoding, not here.

Shapes: B batch, T positions, C d_model, K depths (0 .. D), V vocabulary, P positions of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.metrics.sums import Sums
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import MTPStack
from mtp_lightning.mtp.feed import HeadWeight, Prediction
from mtp_lightning.objective.targets import DepthTarget
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.through_head import chunk_rows, log_probs_by_chunk, through_head

_RESAMPLES = 1000  # samples of a bootstrap


class DepthRates(Sums):
    """Loss, accuracy, agreement and overlap of every depth, over all ranks and batches.

    For depth k at position i, with p the main model's distribution at i + k (which predicts the
    same token, i + k + 1) and q that of depth k at i:

    - ``loss``: mean of ``-log q(target)`` in nats
    - ``accuracy``: share of ``argmax q == target``
    - ``agreement`` (k >= 1): share of ``argmax q == argmax p``
    - ``overlap`` (k >= 1): mean of ``sum_v min(p, q)``, the probability that a token sampled from q
      is accepted (Leviathan et al. 2023, theorem 3.5)

    With a stride s, i + s k replaces i + k.

    The last k positions of a window have no main prediction to agree with, so agreement and overlap
    leave them out; all four leave out masked positions.

    With a stack that rescores, accuracy, agreement and overlap are those of the rescored q, given
    the true token before the target, and there is

    - ``candidate_recall`` (k >= 1): share of targets that can be drafted at all.

    With ``text_bytes``, for windows of that evaluation text, there is also depth 0's
    ``bits_per_byte`` and its standard error over the documents.

    The head is computed in the weight's precision, regardless of autocast: in bfloat16 one choice
    in a hundred would be a tie. Sums are exact in any order, over batches and ranks, up to 8
    million nats.

    If the depths have a head of their own, over some tokens, q is 0 for the others, and the loss
    leaves targets among those out. The other rates do not. ``rescores`` is whether the stack has a
    rescorer.
    """

    # One number per depth, and in text_loss one per document.
    count: Tensor
    scored: Tensor
    loss: Tensor
    accuracy: Tensor
    pairs: Tensor
    agreement: Tensor
    overlap: Tensor
    candidate_recall: Tensor
    text_loss: Tensor

    def __init__(
        self, depth: int, text_bytes: Sequence[int] | None = None, *, rescores: bool = False
    ) -> None:
        super().__init__()
        self.depth = depth
        self.text_bytes = text_bytes
        self.rescores = rescores
        self.add_sums("text_loss", shape=len(text_bytes or ()))
        counted = ["count", "scored", "loss", "accuracy", "pairs", "agreement", "overlap"]
        self.add_sums(*counted, *(["candidate_recall"] if rescores else []), shape=depth + 1)

    @torch.no_grad()
    def update(self, model: MTPModel, batch: WindowBatch, hidden: dict[int, Tensor]) -> None:
        """Counts one batch, with the model's hidden states of every depth 0 .. D, [B, T, C]."""
        targets = [
            (batch.targets(k), model.mtp.targets(k, batch) >= 0) for k in range(self.depth + 1)
        ]
        weight_VC = model.head.weight
        width = chunk_rows(weight_VC.shape[0], weight_VC.device)
        with torch.autocast(weight_VC.device.type, enabled=False):
            for row in range(len(batch)):
                texts_T = None
                if self.text_bytes is not None and batch.texts is not None:
                    texts_T = batch.shifted(batch.texts, 0)[row]
                for start in range(0, batch.seq_len, width):
                    chunk = slice(start, min(start + width, batch.seq_len))
                    nll_P = self._update_chunk(model, batch, hidden, targets, row, chunk)
                    if texts_T is not None:
                        self.text_loss.index_add_(0, texts_T[chunk], nll_P)

    def _update_chunk(
        self,
        model: MTPModel,
        batch: WindowBatch,
        hidden: dict[int, Tensor],
        targets: list[tuple[Tensor, Tensor]],
        row: int,
        chunk: slice,
    ) -> Tensor:
        """Returns depth 0's losses [P], 0 where a position does not count."""
        start, end, stride = chunk.start, chunk.stop, batch.stride
        # Depth k is compared with the main prediction k strides later.
        main = _log_probs(model, 0, hidden[0][row, start : end + stride * self.depth])
        main_choice, main_probs = main.argmax(-1), main.exp()
        for k in range(self.depth + 1):
            log_q = main[: end - start]
            if k > 0:
                log_q = _log_probs(model, k, hidden[k][row, start:end])
            target_P, scored_P = (field[row, start:end] for field in targets[k])
            valid_P = target_P >= 0
            log_target_P = log_q.gather(-1, target_P.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            # Masked by zeros instead of an index, whose length the host would wait for.
            nll_P = exact(-log_target_P).where(scored_P, 0)
            if k and self.rescores:
                # Before a depth's target is the target of the depth before.
                before_P = batch.shifted(batch.tokens, k - 1)[row, start:end]
                logits = model.mtp.rescore(k, hidden[k][row, start:end], log_q, before_P)
                log_q = logits.log_softmax(-1)
                drafted = log_q.gather(-1, target_P.clamp(min=0).unsqueeze(-1)).squeeze(-1)
                self.candidate_recall[k] += (drafted.isfinite() & valid_P).sum()
            choice_P = log_q.argmax(-1)
            self.count[k] += valid_P.sum()
            self.scored[k] += scored_P.sum()
            self.loss[k] += nll_P.sum()
            self.accuracy[k] += ((choice_P == target_P) & valid_P).sum()
            if k == 0:
                nll_of_main = nll_P
                continue
            shift = stride * k
            n = max(min(end - start, main.shape[0] - shift), 0)
            paired = valid_P[:n]
            agrees = choice_P[:n] == main_choice[shift : shift + n]
            shared = torch.minimum(log_q[:n].exp(), main_probs[shift : shift + n]).sum(-1)
            self.pairs[k] += paired.sum()
            self.agreement[k] += (agrees & paired).sum()
            self.overlap[k] += exact(shared).where(paired, 0).sum()
        return nll_of_main

    def compute(self) -> dict[str, float]:
        """The rates as ``NAME_depth_k``, NaN without any count; ``bits_per_byte`` and, for two
        documents or more, ``bits_per_byte_se``."""
        parts = [("loss", self.scored, 0), ("accuracy", self.count, 0)]
        parts += [("agreement", self.pairs, 1), ("overlap", self.pairs, 1)]
        if self.rescores:
            parts.append(("candidate_recall", self.count, 1))
        rates = {
            f"{name}_depth_{k}": float(getattr(self, name)[k] / total[k])
            for name, total, first in parts
            for k in range(first, self.depth + 1)
        }
        if self.text_bytes is not None:
            nats_N, bytes_N = self.text_loss.cpu().numpy(), np.asarray(self.text_bytes)
            rates["bits_per_byte"] = bits_per_byte(nats_N, bytes_N)
            if len(bytes_N) > 1:
                rates["bits_per_byte_se"] = bits_per_byte_se(nats_N, bytes_N)
        return rates


class OwnLossRates(DepthRates):
    """:class:`DepthRates` of the main prediction, and ``loss_depth_k`` of depths that bring a loss
    of their own: the mean over the positions that count. These depths have no other rates."""

    own_count: Tensor
    own_loss: Tensor

    def __init__(self, depth: int, text_bytes: Sequence[int] | None = None) -> None:
        super().__init__(0, text_bytes)
        self.add_sums("own_count", "own_loss", shape=depth)

    @torch.no_grad()
    def update(self, model: MTPModel, batch: WindowBatch, hidden: dict[int, Tensor]) -> None:
        super().update(model, batch, hidden)
        for k in range(1, len(self.own_loss) + 1):
            value_BT, valid_BT = own_values(model.mtp, k, batch, hidden[k])
            self.own_count[k - 1] += valid_BT.sum()
            self.own_loss[k - 1] += exact(value_BT).where(valid_BT, 0).sum()

    def compute(self) -> dict[str, float]:
        means = (self.own_loss / self.own_count).tolist()
        losses = {f"loss_depth_{k}": loss for k, loss in enumerate(means, start=1)}
        return {**super().compute(), **losses}


@torch.no_grad()
def own_values(
    stack: MTPStack, k: int, batch: WindowBatch, hidden_BTC: Tensor
) -> tuple[Tensor, Tensor]:
    """Depth ``k``'s own loss at every position [B, T], in the weight's precision whatever the
    autocast around, and which positions count, bool [B, T]."""
    loss = stack.own_loss(k, batch)
    assert loss is not None
    weight = loss.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    values_BT = torch.empty(hidden_BTC.shape[:2], dtype=dtype, device=hidden_BTC.device)
    # The target's tokens and term are not read: the depth's own loss replaces them.
    target = DepthTarget(k, batch.targets(0), 1.0, CrossEntropy(), record=values_BT)
    hidden_BTC = hidden_BTC.to(weight.dtype)
    prediction = Prediction(hidden_BTC, [target], train_head=False, needs_gradient=False, loss=loss)
    with torch.autocast(weight.device.type, enabled=False):
        through_head(HeadWeight(weight), [prediction])
    return values_BT, loss.valid_BT


def rates_of(model: MTPModel, text_bytes: Sequence[int] | None = None) -> DepthRates:
    """The metric that a validation computes; ``text_bytes`` as for :class:`DepthRates`."""
    if model.config.mtp.brings_loss:
        return OwnLossRates(model.depth, text_bytes)
    rescores = model.mtp.rescorer is not None
    return DepthRates(model.token_depth, text_bytes, rescores=rescores)


def exact(values: Tensor) -> Tensor:
    """Values in fp64, rounded to multiples of 2^-30, whose sums below 2^23 need no rounding."""
    return (values.double() * 2.0**30).round_() / 2.0**30


def _log_probs(model: MTPModel, k: int, h_PC: Tensor) -> Tensor:
    weight_VC = model.head.weight
    chunks = log_probs_by_chunk(h_PC.to(weight_VC.dtype), weight_VC, model.head_of(k).log_probs)
    return torch.cat([chunk for _, chunk in chunks])


def bits_per_byte(nats_N: np.ndarray, bytes_N: np.ndarray) -> float:
    """Summed loss of the evaluated targets over the bytes of the same targets, from each document's
    summed loss and the UTF-8 bytes of its targets."""
    return float(nats_N.sum() / math.log(2) / bytes_N.sum())


def bits_per_byte_se(nats_N: np.ndarray, bytes_N: np.ndarray) -> float:
    """Standard error of :func:`bits_per_byte` by a bootstrap over documents (Efron 1979): how much
    another sample of as many documents would change it.

    It measures how well this text represents its corpus. The difference of two models on the same
    text varies far less.
    """
    generator, n = np.random.default_rng(0), len(nats_N)
    draws = (generator.integers(n, size=n) for _ in range(_RESAMPLES))
    return float(np.std([bits_per_byte(nats_N[draw], bytes_N[draw]) for draw in draws], ddof=1))
