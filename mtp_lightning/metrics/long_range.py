"""How far back a model looks: see docs/long_range.md.

Shapes: B batch, T positions, K depths (0 .. D), N buckets or classes, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.metrics.sums import Sums
from mtp_lightning.model import MTPModel
from mtp_lightning.objective.through_head import log_probs_by_chunk

_EARLY = 50  # Olsson et al. 2022 subtract the loss of the 50th token from that of the 500th
NEGLIGIBLE = 0.01
"""Nats below which a gain counts as none."""
_ROWS = 16  # rows of random ids
N_BYTES = 8
"""Number of bytes before a target that must have occurred earlier."""

# Largest distance of a class, in tokens; the classes are (0, 64], (64, 256], (256, 1024].
_FARTHEST = (64, 256, 1024)
_NAMES = ("repeat_1-64", "repeat_64-256", "repeat_256-1024", "no_repeat")


@dataclass(frozen=True, eq=False)
class Reading:
    """Losses and choices, without tensors of size V."""

    losses_KBT: Tensor  # nats of every depth; 0 where a target does not count
    valid_KBT: Tensor  # whether the target counts
    right_BT: Tensor  # whether depth 0's first choice is its target


def read(model: MTPModel, batch: WindowBatch, *, depths: bool = True) -> Reading:
    """Runs one pass of a model in evaluation mode over windows of its depth, at depths 0 .. D;
    without ``depths``, at depth 0 alone."""
    hidden = model(batch, None if depths else ())
    losses, valid = [], []
    right_BT = torch.empty(0)
    for k, h_BTC in hidden.items():
        target_BT = batch.targets(k)
        valid_BT = model.mtp.targets(k, batch) >= 0
        loss_M, choice_M = _through_head(model, k, h_BTC, target_BT.reshape(-1).clamp(min=0))
        losses.append(loss_M.view_as(target_BT).where(valid_BT, 0))
        valid.append(valid_BT)
        if k == 0:
            right_BT = choice_M.view_as(target_BT) == target_BT
    return Reading(torch.stack(losses), torch.stack(valid), right_BT)


def _through_head(
    model: MTPModel, k: int, h_BTC: Tensor, target_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Depth ``k``'s loss and first choice of every position, [M] each."""
    weight_VC = model.head.weight
    h_MC = h_BTC.reshape(-1, h_BTC.shape[-1]).to(weight_VC.dtype)
    loss_M = torch.empty(len(h_MC), dtype=torch.float64, device=h_MC.device)
    choice_M = torch.empty_like(target_M)
    # The head is computed in the weight's precision, as in DepthRates.
    with torch.autocast(weight_VC.device.type, enabled=False):
        for rows, chunk_RV in log_probs_by_chunk(h_MC, weight_VC, model.head_of(k).log_probs):
            log_prob_R1 = chunk_RV.gather(-1, target_M[rows].unsqueeze(-1))
            loss_M[rows] = -log_prob_R1.squeeze(-1).double()
            choice_M[rows] = chunk_RV.argmax(-1)
    return loss_M, choice_M


def position_buckets(seq_len: int) -> list[tuple[int, int]]:
    """First and last position of every bucket, from 1: 1, 2-3, 4-7, .. up to ``seq_len``.

    At position p the model has read p tokens. A last bucket less than half full joins the one
    before it.
    """
    buckets: list[tuple[int, int]] = []
    first = 1
    while first <= seq_len:
        last = min(2 * first - 1, seq_len)
        if buckets and 2 * (last - first + 1) < first:
            buckets[-1] = (buckets[-1][0], last)
        else:
            buckets.append((first, last))
        first *= 2
    return buckets


def bucket_name(bucket: tuple[int, int]) -> str:
    """The bucket's name in a log tag."""
    first, last = bucket
    return str(first) if first == last else f"{first}-{last}"


def early_bucket(buckets: list[tuple[int, int]]) -> int | None:
    """The bucket that the last one is compared with: that of position 50, or, if this is the last
    one itself, that of position T / 10; None if there is only one bucket."""
    seq_len = buckets[-1][1]
    for position in (_EARLY, max(seq_len // 10, 1)):
        for i, (first, last) in enumerate(buckets[:-1]):
            if first <= position <= last:
                return i
    return None


class PositionLoss(Sums):
    """``loss_position_BUCKET`` of depth 0, ``loss_position_BUCKET_depth_k`` of the others, and
    ``context_score``: depth 0's loss in the last bucket minus that around position 50, in nats; the
    lower it is, the more the tokens in between help (Olsson et al. 2022)."""

    count: Tensor
    loss: Tensor

    def __init__(self, depth: int, seq_len: int) -> None:
        super().__init__()
        self.buckets = position_buckets(seq_len)
        self.index = [i for i, (a, b) in enumerate(self.buckets) for _ in range(a, b + 1)]
        self.add_sums("count", "loss", shape=(depth + 1, len(self.buckets)))

    def update(self, reading: Reading) -> None:
        """Counts one batch of windows, of the given length or shorter."""
        seq_len = reading.losses_KBT.shape[-1]
        index_T = torch.tensor(self.index[:seq_len], device=self.count.device)
        self.count.index_add_(1, index_T, reading.valid_KBT.sum(1).double())
        self.loss.index_add_(1, index_T, reading.losses_KBT.sum(1).double())

    def compute(self) -> dict[str, float]:
        """The values by name; NaN without any count."""
        mean_KN = (self.loss / self.count).tolist()
        values = {
            f"loss_position_{bucket_name(bucket)}" + (f"_depth_{k}" if k else ""): mean
            for k, means in enumerate(mean_KN)
            for bucket, mean in zip(self.buckets, means, strict=True)
        }
        if (early := early_bucket(self.buckets)) is not None:
            values["context_score"] = mean_KN[0][-1] - mean_KN[0][early]
        return values


def contexts(seq_len: int) -> list[int]:
    """8, 16, .. up to half of ``seq_len``: together shorter than a window."""
    return [1 << power for power in range(3, (seq_len // 2).bit_length())]


def _last_tokens(batch: WindowBatch, context: int) -> WindowBatch:
    """The same last targets, with only the last ``context`` tokens to read."""
    start = batch.seq_len - context
    return batch.map(lambda field: field[:, start:])


class TruncatedContext(Sums):
    """``context_gain_c``: depth 0's loss of every window's last target if the model reads only the
    last c tokens, minus that with the whole window, in nats; ``context_gain_c_se``, the standard
    error of this paired mean over windows; ``effective_context``, the smallest c from which every
    gain is below 0.01 nats, and T if there is none.

    A mask that limits every layer to c tokens back does not truncate, since the inputs of a deep
    layer have themselves read c tokens further back. So the model reads only the last c tokens.
    This is done for one target per window, its last: all contexts together then cost less than one
    pass over the text.
    """

    count: Tensor
    gain: Tensor
    square: Tensor

    def __init__(self, seq_len: int) -> None:
        super().__init__()
        self.seq_len = seq_len
        self.contexts = contexts(seq_len)
        self.add_sums("count")
        self.add_sums("gain", "square", shape=len(self.contexts))

    def update(self, model: MTPModel, batch: WindowBatch, reading: Reading) -> None:
        """Counts one batch; ``reading`` is that of the whole windows. Windows shorter than the
        given length are left out: their last target has no whole window before it."""
        if batch.seq_len < self.seq_len:
            return
        valid_B = reading.valid_KBT[0, :, -1]
        self.count += valid_B.sum()
        for i, context in enumerate(self.contexts):
            short = read(model, _last_tokens(batch, context), depths=False)
            gain_B = (short.losses_KBT[0, :, -1] - reading.losses_KBT[0, :, -1])[valid_B].double()
            self.gain[i] += gain_B.sum()
            self.square[i] += gain_B.square().sum()

    def compute(self) -> dict[str, float]:
        """The values by name; NaN without any count."""
        if not self.contexts:
            return {}
        mean = self.gain / self.count
        spread = (self.square / self.count - mean.square()).clamp(min=0) / (self.count - 1)
        gains = dict(zip(self.contexts, mean.tolist(), strict=True))
        values: dict[str, float] = {}
        for (context, gain), se in zip(gains.items(), spread.sqrt().tolist(), strict=True):
            values[f"context_gain_{context}"] = gain
            values[f"context_gain_{context}_se"] = se
        if self.count:
            values["effective_context"] = effective_context(gains, self.seq_len)
        return values


def effective_context(gains: dict[int, float], seq_len: int) -> float:
    """The smallest context from which every gain is negligible; ``seq_len`` if there is none."""
    enough = seq_len
    for context in sorted(gains, reverse=True):
        if not gains[context] < NEGLIGIBLE:
            break
        enough = context
    return float(enough)


def repeat_distances(
    tokens: Sequence[int], token_bytes: Sequence[bytes], documents: Sequence[int] | None = None
) -> np.ndarray:
    """Distance to the last earlier occurrence of the 8 bytes before a target.

    Args:
        tokens: tokens of one window, as read.
        token_bytes: bytes of every id.
        documents: document of every token; an occurrence in another document does not count.

    Returns:
        [T] int64: distance from the token that ends the bytes back to the one that ends the last
        occurrence, 1 if this is the same token; 0 if they did not occur; -1 if there are no 8
        bytes.
    """
    pieces = [token_bytes[token] for token in tokens]
    lengths = np.array([len(piece) for piece in pieces])
    stream = np.frombuffer(b"".join(pieces), np.uint8)
    distances = np.full(len(pieces), -1)
    if len(stream) < N_BYTES:
        return distances
    owner = np.repeat(np.arange(len(pieces)), lengths)
    views = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(stream, N_BYTES))
    key = views.view(np.uint64).reshape(-1)
    # A stable sort keeps equal keys in order, so the one before is the last occurrence.
    order = np.argsort(key, kind="stable")
    repeated = key[order[1:]] == key[order[:-1]]
    before = np.full(len(key), -1)
    before[order[1:][repeated]] = order[:-1][repeated]
    # The 8 bytes that end with a token start here.
    start = np.cumsum(lengths) - N_BYTES
    places = np.flatnonzero((start >= 0) & (lengths > 0))
    earlier = before[start[places]]
    occurred = earlier >= 0
    ends = owner[np.maximum(earlier, 0) + N_BYTES - 1]
    distance = np.where(occurred, np.maximum(places - ends, 1), 0)
    if documents is not None:
        ids = np.asarray(documents)
        first = owner[start[places]]
        distance[occurred & (ids[owner[np.maximum(earlier, 0)]] != ids[places])] = 0
        distance[ids[first] != ids[places]] = -1
    distances[places] = distance
    return distances


class NaturalRepeats(Sums):
    """``accuracy_repeat_1-64``, ``_64-256``, ``_256-1024``: depth 0's accuracy on targets whose
    preceding 8 bytes occurred earlier in the window, by the distance of the last occurrence in
    tokens; ``accuracy_no_repeat``, the control: targets whose 8 bytes did not occur; and the
    ``share_`` of each among the targets of these four classes. A last occurrence more than 1,024
    tokens back is in none of them."""

    count: Tensor
    right: Tensor

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        super().__init__()
        self.token_bytes = token_bytes
        self.add_sums("count", "right", shape=len(_NAMES))

    def update(self, batch: WindowBatch, reading: Reading) -> None:
        """Counts one batch."""
        read_BT = batch.tokens[:, : batch.seq_len].tolist()
        documents = [None] * len(read_BT)
        if batch.documents is not None:
            documents = batch.documents[:, : batch.seq_len].tolist()
        distances = [
            repeat_distances(tokens, self.token_bytes, ids)
            for tokens, ids in zip(read_BT, documents, strict=True)
        ]
        distance_BT = torch.from_numpy(np.stack(distances)).to(reading.right_BT.device)
        valid_BT = reading.valid_KBT[0]
        bounds = itertools.pairwise((0, *_FARTHEST))
        classes = [(distance_BT > low) & (distance_BT <= high) for low, high in bounds]
        for i, class_BT in enumerate([*classes, distance_BT == 0]):
            chosen_BT = class_BT & valid_BT
            self.count[i] += chosen_BT.sum()
            self.right[i] += reading.right_BT[chosen_BT].sum()

    def compute(self) -> dict[str, float]:
        """The values by name; accuracy is NaN without any count."""
        accuracy, share = self.right / self.count, self.count / self.count.sum()
        values = {f"accuracy_{n}": a for n, a in zip(_NAMES, accuracy.tolist(), strict=True)}
        return values | {f"share_{n}": s for n, s in zip(_NAMES, share.tolist(), strict=True)}


def random_repeats(model: MTPModel, seq_len: int) -> dict[str, float]:
    """Accuracy of depth 0 on the second half of ``r r``, where r is P random ids, for P = 8, 16, ..
    up to T / 2.

    The second half's first token cannot be predicted and is left out. Ids are drawn from the whole
    vocabulary, the same at every call. It costs the reading of 32 windows.

    Returns:
        ``accuracy_random_repeat_P``.
    """
    generator = torch.Generator().manual_seed(0)
    vocab, depth, stride = model.config.trunk.vocab_size, model.depth, model.config.mtp.stride
    values: dict[str, float] = {}
    for period in contexts(seq_len):
        ids = torch.randint(0, vocab, (_ROWS, period), generator=generator)
        # A window of 2 P - 1 positions; the extra tokens of the depths are never read.
        tokens = torch.cat((ids, ids, ids[:, :1].expand(-1, stride * depth)), dim=1)
        batch = WindowBatch(tokens.to(model.head.weight.device), depth, stride=stride)
        right_BT = read(model, batch, depths=False).right_BT
        values[f"accuracy_random_repeat_{period}"] = float(right_BT[:, period:].double().mean())
    return values


class LongRange:
    """Counts batches of validation windows.

    It costs about two passes over them: one over the whole windows, which positions and repeats
    share, and less than one over shortened windows; and the reading of 32 windows of random ids.

    Args:
        model: in evaluation mode when it is used.
        token_bytes: bytes of every id of the tokenizer.
    """

    def __init__(self, model: MTPModel, seq_len: int, token_bytes: Sequence[bytes]) -> None:
        device = model.head.weight.device
        self.model, self.seq_len = model, seq_len
        self.positions = PositionLoss(model.token_depth, seq_len).to(device)
        self.truncation = TruncatedContext(seq_len).to(device)
        self.repeats = NaturalRepeats(token_bytes).to(device)

    @torch.no_grad()
    def update(self, batch: WindowBatch) -> None:
        """Counts one batch, on the model's device."""
        reading = read(self.model, batch, depths=self.model.token_depth > 0)
        self.positions.update(reading)
        self.truncation.update(self.model, batch, reading)
        self.repeats.update(batch, reading)

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        """The values by name, over all ranks; a value without any count is left out."""
        values = {
            **self.positions.compute(),
            **self.truncation.compute(),
            **self.repeats.compute(),
            **random_repeats(self.model, self.seq_len),
        }
        return {name: value for name, value in values.items() if value == value}
