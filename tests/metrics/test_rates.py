"""Rates against brute force over whole float64 distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.metrics import rates as rates_file
from mtp_lightning.metrics.rates import DepthRates
from mtp_lightning.mtp.own_head import OwnHead


def brute_force(
    hidden: dict[int, Tensor], weight: Tensor, batch: WindowBatch, own: OwnHead | None = None
) -> dict[str, float]:
    probs = {k: torch.softmax(h.double() @ weight.double().T, -1) for k, h in hidden.items()}
    for k in hidden if own is not None else ():
        if k:
            assert own is not None
            rows = torch.softmax(hidden[k].double() @ own.weight.detach().double().T, -1)
            probs[k] = torch.zeros_like(probs[0])
            probs[k][..., own.tokens] = rows
    found: dict[str, list[float]] = {}
    for row in range(batch.batch_size):
        for i in range(batch.seq_len):
            for k in range(batch.depth + 1):
                docs = batch.documents
                if docs is not None and docs[row, i] != docs[row, i + k + 1]:
                    continue
                q, target = probs[k][row, i], batch.tokens[row, i + k + 1]
                if q[target] > 0:
                    found.setdefault(f"loss_depth_{k}", []).append(-math.log(q[target]))
                found.setdefault(f"accuracy_depth_{k}", []).append(float(q.argmax() == target))
                if k and i + k < batch.seq_len:
                    p = probs[0][row, i + k]
                    same = float(q.argmax() == p.argmax())
                    found.setdefault(f"agreement_depth_{k}", []).append(same)
                    overlap = torch.minimum(p, q).sum().item()
                    found.setdefault(f"overlap_depth_{k}", []).append(overlap)
    return {name: sum(values) / len(values) for name, values in found.items()}


@pytest.mark.parametrize("rows", [None, 13, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [1, 2, 5, 64])
def test_against_brute_force(
    monkeypatch: pytest.MonkeyPatch, masked: bool, width: int, rows: int | None
) -> None:
    monkeypatch.setattr(rates_file, "chunk_rows", lambda *_: width)
    depth, seq_len = 3, 11
    weight = torch.randn(13, 8)
    own = None
    if rows is not None:
        own = OwnHead(13, 8, rows)
        torch.nn.init.normal_(own.weight)
        own.choose(torch.randint(0, 99, (13,)))
    metric = DepthRates(depth, own_head=own)
    batches, hiddens = [], []
    for _ in range(2):
        tokens = torch.randint(0, 13, (3, seq_len + depth + 1))
        documents = (torch.rand(tokens.shape) < 0.2).long().cumsum(1) if masked else None
        batches.append(WindowBatch(tokens, depth, documents))
        hiddens.append({k: torch.randn(3, seq_len, 8) for k in range(depth + 1)})
        metric.update(hiddens[-1], weight, batches[-1])
    whole = WindowBatch(
        torch.cat([b.tokens for b in batches]),
        depth,
        torch.cat([b.documents for b in batches]) if masked else None,
    )
    joined = {k: torch.cat([h[k] for h in hiddens]) for k in range(depth + 1)}
    assert metric.compute() == pytest.approx(brute_force(joined, weight, whole, own), rel=1e-4)


def test_perfect_drafts_agree_and_shifted_ones_do_not() -> None:
    """Hidden states of depth k that are the main ones k positions on agree everywhere."""
    seq_len, depth = 200, 2
    main = torch.randn(1, seq_len + depth, 16)
    weight = torch.randn(50, 16)
    batch = WindowBatch(torch.randint(0, 50, (1, seq_len + depth + 1)), depth)
    right = {k: main[:, k : k + seq_len] for k in range(depth + 1)}
    shifted = {0: right[0], **{k: main[:, k - 1 : k - 1 + seq_len] for k in (1, 2)}}
    results = []
    for hidden in (right, shifted):
        metric = DepthRates(depth)
        metric.update(hidden, weight, batch)
        results.append(metric.compute())
    for k in (1, 2):
        assert results[0][f"agreement_depth_{k}"] == 1.0
        assert results[0][f"overlap_depth_{k}"] == pytest.approx(1.0)
        assert results[1][f"agreement_depth_{k}"] < 0.1


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_nothing_counted_is_nan() -> None:
    assert all(math.isnan(value) for value in DepthRates(1).compute().values())
