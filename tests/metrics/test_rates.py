"""Rates against brute force over whole float64 distributions; bits per byte and their error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.metrics import rates as rates_file
from mtp_lightning.metrics.rates import DepthRates, bits_per_byte, bits_per_byte_se
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.kinds import NoModules
from mtp_lightning.mtp.own_head import OwnHead
from mtp_lightning.mtp.parameter_free import ParameterFreeConfig
from mtp_lightning.nn.head import Head


class Stack(NoModules):
    """Depths that have a head of their own, or the shared one."""

    def __init__(self, own: OwnHead | None = None) -> None:
        super().__init__(ParameterFreeConfig(depth=1))
        self.own = own

    @property
    def own_head(self) -> OwnHead | None:
        return self.own


class Model(MTPModel):
    """The head and the stack alone."""

    def __init__(self, weight: Tensor, own: OwnHead | None = None) -> None:
        torch.nn.Module.__init__(self)
        self.head = Head(*weight.shape, tied=torch.nn.Parameter(weight))
        self.mtp = Stack(own)


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


@pytest.mark.parametrize(
    ("rows", "masked", "width"),
    [(None, True, 1), (None, False, 64), (13, True, 2), (5, False, 5), (5, True, 64)],
)
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
    metric = DepthRates(depth)
    batches, hiddens = [], []
    for _ in range(2):
        tokens = torch.randint(0, 13, (3, seq_len + depth + 1))
        documents = (torch.rand(tokens.shape) < 0.2).long().cumsum(1) if masked else None
        batches.append(WindowBatch(tokens, depth, documents))
        hiddens.append({k: torch.randn(3, seq_len, 8) for k in range(depth + 1)})
        metric.update(Model(weight, own), batches[-1], hiddens[-1])
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
        metric.update(Model(weight), batch, hidden)
        results.append(metric.compute())
    for k in (1, 2):
        assert results[0][f"agreement_depth_{k}"] == 1.0
        assert results[0][f"overlap_depth_{k}"] == pytest.approx(1.0)
        assert results[1][f"agreement_depth_{k}"] < 0.1


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_nothing_counted_is_nan() -> None:
    assert all(math.isnan(value) for value in DepthRates(1).compute().values())


def test_nats_over_the_bytes_of_the_same_targets() -> None:
    assert bits_per_byte(np.array([math.log(2), 3 * math.log(2)]), np.array([1, 1])) == 2.0
    # Not the mean over documents: long ones count more.
    assert bits_per_byte(np.array([8.0, 1.0]) * math.log(2), np.array([8, 2])) == 0.9


def test_standard_error_against_the_linearised_ratio() -> None:
    """With many documents the bootstrap's is that of the delta method."""
    random = np.random.default_rng(1)
    bytes_N = random.integers(100, 5000, 400)
    nats_N = bytes_N * random.normal(1.0, 0.2, 400)
    ratio = nats_N.sum() / bytes_N.sum()
    deviation = (nats_N - ratio * bytes_N) / bytes_N.mean()
    expected = deviation.std(ddof=1) / math.sqrt(400) / math.log(2)
    found = bits_per_byte_se(nats_N, bytes_N)
    assert found == pytest.approx(expected, rel=0.1)
    assert found == bits_per_byte_se(nats_N, bytes_N)
    # Documents that are all alike say nothing of others.
    assert bits_per_byte_se(bytes_N * 2.0, bytes_N) == pytest.approx(0, abs=1e-12)


def batches(n: int, *, depth: int, texts: int) -> list[tuple[dict[int, torch.Tensor], WindowBatch]]:
    found = []
    for _ in range(n):
        tokens = torch.randint(0, 13, (3, 11 + depth))
        scored = torch.rand(tokens.shape) < 0.8
        names = torch.randint(0, texts, tokens.shape)
        hidden = {k: torch.randn(3, 10, 8) for k in range(depth + 1)}
        found.append((hidden, WindowBatch(tokens, depth, None, scored, names)))
    return found


def test_losses_go_to_the_documents_of_their_targets() -> None:
    weight, text_bytes = torch.randn(13, 8), [50, 20, 70]
    given = batches(4, depth=1, texts=3)
    metric = DepthRates(1, text_bytes)
    nats = [0.0] * 3
    for hidden, batch in given:
        metric.update(Model(weight), batch, hidden)
        log_q = torch.log_softmax(hidden[0].double() @ weight.double().T, -1)
        for row in range(3):
            for i in range(10):
                if batch.scored[row, i + 1]:
                    loss = -log_q[row, i, batch.tokens[row, i + 1]]
                    nats[int(batch.texts[row, i + 1])] += float(loss)
    found = metric.compute()
    assert metric.text_loss.tolist() == pytest.approx(nats, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / 140, rel=1e-5)
    assert found["bits_per_byte_se"] > 0


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_one_document_has_no_standard_error() -> None:
    assert "bits_per_byte_se" not in DepthRates(1, [9]).compute()


def test_sums_are_the_same_to_the_last_bit_in_any_order() -> None:
    weight, given = torch.randn(13, 8), batches(9, depth=2, texts=3)
    found = []
    for order in (given, given[::-1], given[4:] + given[:4]):
        metric = DepthRates(2, [50, 20, 70])
        for hidden, batch in order:
            metric.update(Model(weight), batch, hidden)
        found.append(metric.compute())
    assert found[0] == found[1] == found[2]


def test_the_head_is_computed_in_the_weights_precision() -> None:
    """In bfloat16 the two best of a thousand logits are often the same number."""
    weight, batch = torch.randn(1000, 8), WindowBatch(torch.randint(0, 1000, (2, 66)), 1)
    hidden = {k: torch.randn(2, 64, 8, dtype=torch.bfloat16) for k in range(2)}
    found = []
    for enabled in (False, True):
        metric = DepthRates(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            metric.update(Model(weight), batch, hidden)
        found.append(metric.compute())
    assert found[0] == found[1]
