"""The use of distant context: each measure against its definition, and on a model with a known
one."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.metrics.long_range import (
    LongRange,
    NaturalRepeats,
    PositionLoss,
    TruncatedContext,
    bucket_name,
    contexts,
    early_bucket,
    effective_context,
    position_buckets,
    read,
    repeat_distances,
)
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.head import Head
from tests.models import build, windows

TRUNK = {"vocab_size": 37, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24}


def small(depth: int = 2) -> MTPModel:
    trunk = TrunkConfig(**TRUNK, init_std=0.3)  # type: ignore[arg-type]
    return build(trunk, SequentialConfig(depth=depth) if depth else NoMTPConfig()).eval()


def masked(batch: WindowBatch) -> WindowBatch:
    """The batch with documents of 13 tokens."""
    ids = (torch.arange(batch.tokens.shape[1]) // 13).expand_as(batch.tokens)
    return WindowBatch(batch.tokens, batch.depth, ids)


def test_buckets_of_positions_double_in_length() -> None:
    names = {T: [bucket_name(b) for b in position_buckets(T)] for T in (1, 8, 12, 63, 256)}
    assert names[1] == ["1"]
    assert names[8] == ["1", "2-3", "4-8"]
    assert names[12] == ["1", "2-3", "4-7", "8-12"]
    assert names[63] == ["1", "2-3", "4-7", "8-15", "16-31", "32-63"]
    assert names[256][-2:] == ["64-127", "128-256"]
    early = {T: early_bucket(position_buckets(T)) for T in (1, 8, 63, 256)}
    assert early == {1: None, 8: 0, 63: 2, 256: 5}


@pytest.mark.parametrize("documents", [False, True])
@torch.no_grad()
def test_losses_by_position_equal_those_of_a_loop(documents: bool) -> None:
    model, batch = small(), windows(3, 40, 2)
    batch = masked(batch) if documents else batch
    metric = PositionLoss(2, 40)
    for half in batch.micro_batches(2):
        metric.update(read(model, half))
    values = metric.compute()
    hidden = model(batch)
    for k in range(3):
        log_p = model.head(hidden[k]).double().log_softmax(-1)
        for first, last in position_buckets(40):
            losses = []
            for row in range(3):
                for i in range(first - 1, last):
                    target = int(batch.targets(k)[row, i])
                    if target >= 0:
                        losses.append(-float(log_p[row, i, target]))
            name = f"loss_position_{bucket_name((first, last))}" + (f"_depth_{k}" if k else "")
            assert values[name] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    late = values["loss_position_16-40"]
    assert values["context_score"] == pytest.approx(late - values["loss_position_4-7"])


@pytest.mark.parametrize("documents", [False, True])
@torch.no_grad()
def test_the_gain_of_a_longer_context_equals_brute_force(documents: bool) -> None:
    model, batch = small(), windows(5, 40, 2)
    batch = masked(batch) if documents else batch
    metric = TruncatedContext(40)
    for part in batch.micro_batches(2):
        metric.update(model, part, read(model, part))
    values = metric.compute()

    def loss(row: int, context: int) -> float:
        """The loss of the last target if the model reads only the last ``context`` tokens."""
        start = 40 - context
        ids = None if batch.documents is None else batch.documents[row : row + 1, start:]
        truncated = WindowBatch(batch.tokens[row : row + 1, start:], 2, ids)
        logits = model.head(model(truncated, ())[0][0, -1]).double()
        return -float(logits.log_softmax(-1)[batch.tokens[row, 40]])

    assert set(metric.contexts) == {8, 16}
    assert all(sum(contexts(T)) < T for T in range(1, 300))
    for c in metric.contexts:
        gains = torch.tensor([loss(row, c) - loss(row, 40) for row in range(5)]).double()
        assert values[f"context_gain_{c}"] == pytest.approx(float(gains.mean()), abs=1e-5)
        se = float(gains.std()) / math.sqrt(5)
        assert values[f"context_gain_{c}_se"] == pytest.approx(se, abs=1e-5)
    if not documents:
        assert all(abs(values[f"context_gain_{c}"]) > 1e-3 for c in (8, 16))


def test_the_effective_context_is_the_shortest_with_small_gains_beyond() -> None:
    assert effective_context({8: 0.5, 16: 0.02, 32: 0.009}, 64) == 32
    assert effective_context({8: 0.5, 16: 0.0, 32: 0.1}, 64) == 64
    assert effective_context({8: -0.1, 16: 0.0, 32: 0.0}, 64) == 8


@pytest.mark.parametrize("documents", [False, True])
def test_distances_of_repeats_equal_those_of_a_search(documents: bool) -> None:
    rng = random.Random(0)
    table = [b"a", b"b", b"ab", b"ba", b"aaaaaaaaaaa", "é".encode(), b""]
    for _ in range(20):
        tokens = [rng.randrange(len(table)) for _ in range(90)]
        ids = [i // 37 for i in range(90)] if documents else None
        distances = repeat_distances(tokens, table, ids)
        stream = b"".join(table[t] for t in tokens)
        owner = [i for i, t in enumerate(tokens) for _ in table[t]]
        end = 0
        for i, token in enumerate(tokens):
            end += len(table[token])
            if not table[token] or end < 8:
                assert distances[i] == -1
                continue
            if ids and ids[owner[end - 8]] != ids[i]:
                assert distances[i] == -1
                continue
            at = next(
                (s for s in range(end - 9, -1, -1) if stream[s : s + 8] == stream[end - 8 : end]),
                None,
            )
            if at is None or (ids and ids[owner[at]] != ids[i]):
                assert distances[i] == 0
            else:
                assert distances[i] == max(1, i - owner[at + 7])


def test_repeats_are_counted_by_distance() -> None:
    table = [bytes([i]) for i in range(37)]
    model, batch = small(), windows(2, 200, 2)
    tokens = batch.tokens.clone()
    tokens[:, 100:160] = tokens[:, :60]  # a distance of 100
    tokens[:, 180:195] = tokens[:, 140:155]  # and of 40
    metric = NaturalRepeats(table)
    repeated = WindowBatch(tokens, 2)
    metric.update(repeated, read(model, repeated))
    near, middle, far, others = metric.count.tolist()
    assert near >= 2 * 8 and middle >= 2 * 53 and far == 0
    assert near + middle + others == 2 * (200 - 7)


class _CopyModel(torch.nn.Module):
    """A model with a known effective context: it predicts the token ``lag`` places before the
    target with near certainty, and has uniform predictions where this place is outside the
    window."""

    depth = token_depth = 0
    head_of = MTPModel.head_of

    def __init__(self, lag: int, vocab: int) -> None:
        super().__init__()
        self.lag, self.vocab = lag, vocab
        self.head = Head(vocab, vocab)
        torch.nn.init.eye_(self.head.weight)
        trunk = TrunkConfig(**{**TRUNK, "vocab_size": vocab})  # type: ignore[arg-type]
        self.config = ModelConfig(trunk=trunk, mtp=NoMTPConfig())
        self.mtp = self.config.mtp.build(trunk)

    def forward(self, batch: WindowBatch, active: object = None) -> dict[int, Tensor]:
        read_BT = batch.tokens[:, : batch.seq_len]
        h_BTV = torch.zeros(*read_BT.shape, self.vocab)
        back = self.lag - 1
        if read_BT.shape[1] > back:
            copied = read_BT[:, : read_BT.shape[1] - back]
            h_BTV[:, back:] = 12.0 * torch.nn.functional.one_hot(copied, self.vocab)
        return {0: h_BTV}


@pytest.mark.parametrize("lag", [8, 30, 50])
def test_the_effective_context_of_a_copy_model_is_its_lag(lag: int) -> None:
    model: MTPModel = _CopyModel(lag, 37)  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    phase = torch.randint(0, 37, (20, lag), generator=generator)
    tokens = phase.repeat(1, 129 // lag + 1)[:, :129]
    measure = LongRange(model, 128, [bytes([i]) for i in range(37)])
    measure.update(WindowBatch(tokens, 0))
    values = measure.compute()
    # The smallest of 8, 16, 32, .. that is at least the lag.
    assert values["effective_context"] == 8 * 2 ** math.ceil(math.log2(lag / 8))
    assert values["loss_position_64-128"] < 0.01 < 3.6 < values["loss_position_4-7"]
    assert values["accuracy_repeat_1-64"] == 1
    for period in (8, 16, 32, 64):
        accuracy = values[f"accuracy_random_repeat_{period}"]
        assert accuracy == 1 if period == lag else accuracy < 0.3


def test_shorter_windows_count_only_for_losses_by_position() -> None:
    model = small()
    measure = LongRange(model, 32, [bytes([i]) for i in range(37)])
    measure.update(windows(2, 12, 2))
    values = measure.compute()
    assert measure.positions.count[0].tolist() == [2, 4, 8, 10, 0]
    assert not [name for name in values if "context" in name]
