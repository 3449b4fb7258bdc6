"""Whether a model uses what it has already read: natural repeats, and repeated random tokens.

Shapes: B batch, T positions, N classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from data_modules.windows import WindowBatch
from mtp_lightning.metrics.long_range.reading import Reading, read
from mtp_lightning.model import MTPModel

N_BYTES = 8
"""Number of bytes before a target that must have occurred earlier."""

# Largest distance of a class, in tokens; the classes are (0, 64], (64, 256], (256, 1024].
_FARTHEST = (64, 256, 1024)
_NAMES = ("repeat_1-64", "repeat_64-256", "repeat_256-1024", "no_repeat")


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
    found = np.full(len(pieces), -1)
    if len(stream) < N_BYTES:
        return found
    owner = np.repeat(np.arange(len(pieces)), lengths)
    views = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(stream, N_BYTES))
    key = views.view(np.uint64).reshape(-1)
    # A stable sort keeps equal keys in order, so the one before is the last occurrence.
    order = np.argsort(key, kind="stable")
    same = key[order[1:]] == key[order[:-1]]
    before = np.full(len(key), -1)
    before[order[1:][same]] = order[:-1][same]
    # The 8 bytes that end with a token start here.
    start = np.cumsum(lengths) - N_BYTES
    at = np.flatnonzero((start >= 0) & (lengths > 0))
    earlier = before[start[at]]
    occurred = earlier >= 0
    ends = owner[np.maximum(earlier, 0) + N_BYTES - 1]
    distance = np.where(occurred, np.maximum(at - ends, 1), 0)
    if documents is not None:
        ids = np.asarray(documents)
        first = owner[start[at]]
        distance[occurred & (ids[owner[np.maximum(earlier, 0)]] != ids[at])] = 0
        distance[ids[first] != ids[at]] = -1
    found[at] = distance
    return found


class NaturalRepeats(Metric):
    """``accuracy_repeat_1-64``, ``_64-256``, ``_256-1024``: depth 0's accuracy on targets whose
    preceding 8 bytes occurred earlier in the window, by the distance of the last occurrence in
    tokens; ``accuracy_no_repeat``, the control: targets whose 8 bytes did not occur; and the
    ``share_`` of each among the targets with 8 bytes before them."""

    full_state_update = False
    count: Tensor
    right: Tensor

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        super().__init__()
        self.token_bytes = token_bytes
        for name in ("count", "right"):
            zeros = torch.zeros(len(_NAMES), dtype=torch.float64)
            self.add_state(name, default=zeros, dist_reduce_fx="sum")

    def update(self, batch: WindowBatch, reading: Reading) -> None:
        """Counts one batch."""
        read_BT = batch.tokens[:, : batch.seq_len].tolist()
        documents = [None] * len(read_BT)
        if batch.documents is not None:
            documents = batch.documents[:, : batch.seq_len].tolist()
        found = [
            repeat_distances(tokens, self.token_bytes, ids)
            for tokens, ids in zip(read_BT, documents, strict=True)
        ]
        distance_BT = torch.from_numpy(np.stack(found)).to(reading.right_BT.device)
        valid_BT = reading.valid_KBT[0]
        low = 0
        classes = []
        for high in _FARTHEST:
            classes.append((distance_BT > low) & (distance_BT <= high) & valid_BT)
            low = high
        classes.append((distance_BT == 0) & valid_BT)
        for i, chosen_BT in enumerate(classes):
            self.count[i] += chosen_BT.sum()
            self.right[i] += reading.right_BT[chosen_BT].sum()

    def compute(self) -> dict[str, float]:
        """The values by name; accuracy is NaN without any count."""
        accuracy, share = self.right / self.count, self.count / self.count.sum()
        values = {f"accuracy_{n}": a for n, a in zip(_NAMES, accuracy.tolist(), strict=True)}
        return values | {f"share_{n}": s for n, s in zip(_NAMES, share.tolist(), strict=True)}


def random_repeats(
    model: MTPModel, seq_len: int, *, rows: int = 16, seed: int = 0
) -> dict[str, float]:
    """Accuracy of depth 0 on the second half of ``r r``, where r is P random ids, for P = 8, 16, ..
    up to T / 2.

    The second half's first token cannot be predicted and is left out. Ids are drawn from the whole
    vocabulary, the same at every call. It costs the reading of ``2 rows`` windows.

    Returns:
        ``accuracy_random_repeat_P``.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab, depth, stride = model.config.trunk.vocab_size, model.depth, model.config.mtp.stride
    values: dict[str, float] = {}
    period = 8
    while 2 * period <= seq_len:
        ids = torch.randint(0, vocab, (rows, period), generator=generator)
        # A window of 2 P - 1 positions; the extra tokens of the depths are never read.
        tokens = torch.cat((ids, ids, ids[:, :1].expand(-1, stride * depth)), dim=1)
        batch = WindowBatch(tokens.to(model.head.weight.device), depth, stride=stride)
        right_BT = read(model, batch, depths=False).right_BT
        values[f"accuracy_random_repeat_{period}"] = float(right_BT[:, period:].double().mean())
        period *= 2
    return values
