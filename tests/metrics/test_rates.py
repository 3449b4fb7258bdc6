"""Rates of depths against brute force in float64; bits per byte and their standard error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.metrics import rates as rates_file
from mtp_lightning.metrics.rates import (
    DepthRates,
    bits_per_byte,
    bits_per_byte_se,
    own_values,
)
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.kinds import NoModules
from mtp_lightning.mtp.own_head import OwnHead
from mtp_lightning.mtp.parameter_free import ParameterFreeConfig
from mtp_lightning.nn.head import Head
from tests.models import build, windows


class Stack(NoModules):
    """Depths with their own head, or with the shared one."""

    def __init__(self, head: OwnHead | None = None) -> None:
        super().__init__(ParameterFreeConfig(depth=1))
        self.head = head

    @property
    def own_head(self) -> OwnHead | None:
        return self.head


class Model(MTPModel):
    """A model with only a head and a stack."""

    def __init__(self, weight: Tensor, own_head: OwnHead | None = None) -> None:
        torch.nn.Module.__init__(self)
        self.head = Head(*weight.shape, tied=torch.nn.Parameter(weight))
        self.mtp = Stack(own_head)


def brute_force(
    hidden: dict[int, Tensor], weight: Tensor, batch: WindowBatch, own_head: OwnHead | None = None
) -> dict[str, float]:
    probs = {k: torch.softmax(h.double() @ weight.double().T, -1) for k, h in hidden.items()}
    for k in range(1, len(hidden)) if own_head is not None else ():
        assert own_head is not None
        rows = torch.softmax(hidden[k].double() @ own_head.weight.detach().double().T, -1)
        probs[k] = torch.zeros_like(probs[0])
        probs[k][..., own_head.tokens] = rows
    values: dict[str, list[float]] = {}
    for row in range(len(batch)):
        for i in range(batch.seq_len):
            for k in range(batch.depth + 1):
                docs, ahead = batch.documents, batch.stride * k
                if docs is not None and docs[row, i] != docs[row, i + ahead + 1]:
                    continue
                q, target = probs[k][row, i], batch.tokens[row, i + ahead + 1]
                if q[target] > 0:
                    values.setdefault(f"loss_depth_{k}", []).append(-math.log(q[target]))
                values.setdefault(f"accuracy_depth_{k}", []).append(float(q.argmax() == target))
                if k and i + ahead < batch.seq_len:
                    p = probs[0][row, i + ahead]
                    same = float(q.argmax() == p.argmax())
                    values.setdefault(f"agreement_depth_{k}", []).append(same)
                    overlap = torch.minimum(p, q).sum().item()
                    values.setdefault(f"overlap_depth_{k}", []).append(overlap)
    return {name: sum(x) / len(x) for name, x in values.items()}


@pytest.mark.parametrize(
    ("rows", "masked", "width", "stride"),
    [(None, True, 1, 1), (13, True, 2, 1), (5, True, 64, 1), (5, False, 5, 3)],
)
def test_rates_equal_those_of_brute_force(
    monkeypatch: pytest.MonkeyPatch, masked: bool, width: int, rows: int | None, stride: int
) -> None:
    monkeypatch.setattr(rates_file, "chunk_rows", lambda *_: width)
    depth, seq_len = 3, 11
    weight = torch.randn(13, 8)
    own_head = None
    if rows is not None:
        own_head = OwnHead(13, 8, rows)
        torch.nn.init.normal_(own_head.weight)
        own_head.choose(torch.randint(0, 99, (13,)))
    metric = DepthRates(depth)
    tokens = torch.randint(0, 13, (6, seq_len + stride * depth + 1))
    documents = (torch.rand(tokens.shape) < 0.2).long().cumsum(1) if masked else None
    batch = WindowBatch(tokens, depth, documents, stride=stride)
    hidden = {k: torch.randn(6, seq_len, 8) for k in range(depth + 1)}
    for part, half in zip(batch.micro_batches(2), (slice(3), slice(3, None)), strict=True):
        states = {k: h[half] for k, h in hidden.items()}
        metric.update(Model(weight, own_head), part, states)
    expected = brute_force(hidden, weight, batch, own_head)
    assert metric.compute() == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_rates_without_a_batch_are_nan_and_one_document_has_no_standard_error() -> None:
    assert all(math.isnan(value) for value in DepthRates(1).compute().values())
    assert "bits_per_byte_se" not in DepthRates(1, [9]).compute()


def test_bits_per_byte_are_pooled_over_documents() -> None:
    assert bits_per_byte(np.array([math.log(2), 3 * math.log(2)]), np.array([1, 1])) == 2.0
    # Longer documents count more than in a mean over documents.
    assert bits_per_byte(np.array([8.0, 1.0]) * math.log(2), np.array([8, 2])) == 0.9


def test_the_standard_error_of_bits_per_byte_is_near_the_delta_method() -> None:
    """The bootstrap approaches it with many documents."""
    rng = np.random.default_rng(1)
    bytes_N = rng.integers(100, 5000, 400)
    nats_N = bytes_N * rng.normal(1.0, 0.2, 400)
    ratio = nats_N.sum() / bytes_N.sum()
    deviation = (nats_N - ratio * bytes_N) / bytes_N.mean()
    expected = deviation.std(ddof=1) / math.sqrt(400) / math.log(2)
    error = bits_per_byte_se(nats_N, bytes_N)
    assert error == pytest.approx(expected, rel=0.1)
    assert error == bits_per_byte_se(nats_N, bytes_N)
    # Documents with the same bits per byte have no error.
    assert bits_per_byte_se(bytes_N * 2.0, bytes_N) == pytest.approx(0, abs=1e-12)


def random_batches(
    n: int, *, depth: int, texts: int
) -> list[tuple[dict[int, Tensor], WindowBatch]]:
    batches = []
    for _ in range(n):
        tokens = torch.randint(0, 13, (3, 11 + depth))
        scored = torch.rand(tokens.shape) < 0.8
        names = torch.randint(0, texts, tokens.shape)
        hidden = {k: torch.randn(3, 10, 8) for k in range(depth + 1)}
        batches.append((hidden, WindowBatch(tokens, depth, None, scored, names)))
    return batches


def test_losses_are_summed_by_the_document_of_the_target() -> None:
    weight, text_bytes = torch.randn(13, 8), [50, 20, 70]
    metric = DepthRates(1, text_bytes)
    nats = [0.0] * 3
    for hidden, batch in random_batches(4, depth=1, texts=3):
        metric.update(Model(weight), batch, hidden)
        log_q = torch.log_softmax(hidden[0].double() @ weight.double().T, -1)
        for row in range(3):
            for i in range(10):
                if batch.scored[row, i + 1]:
                    loss = -log_q[row, i, batch.tokens[row, i + 1]]
                    nats[int(batch.texts[row, i + 1])] += float(loss)
    values = metric.compute()
    assert metric.text_loss.tolist() == pytest.approx(nats, rel=1e-5)
    assert values["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / 140, rel=1e-5)
    assert values["bits_per_byte_se"] > 0


def test_rates_have_the_same_bits_in_any_order_of_batches() -> None:
    weight, batches = torch.randn(13, 8), random_batches(9, depth=2, texts=3)
    values = []
    for order in (batches, batches[::-1], batches[4:] + batches[:4]):
        metric = DepthRates(2, [50, 20, 70])
        for hidden, batch in order:
            metric.update(Model(weight), batch, hidden)
        values.append(metric.compute())
    assert values[0] == values[1] == values[2]


def test_rates_under_autocast_compute_the_heads_in_fp32() -> None:
    """In bfloat16, the two best of a thousand logits are often equal."""
    weight, batch = torch.randn(1000, 8), WindowBatch(torch.randint(0, 1000, (2, 66)), 1)
    own_head = OwnHead(1000, 8, None)
    torch.nn.init.normal_(own_head.weight)
    hidden = {k: torch.randn(2, 64, 8, dtype=torch.bfloat16) for k in range(2)}
    values = []
    for enabled in (False, True):
        metric = DepthRates(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            metric.update(Model(weight, own_head), batch, hidden)
        values.append(metric.compute())
    assert values[0] == values[1]


def test_a_stacks_own_loss_under_autocast_is_computed_in_fp32(tiny_trunk) -> None:
    stack = build(tiny_trunk, "bag", depth=1).mtp
    batch, hidden = windows(2, 8, 1), torch.randn(2, 8, tiny_trunk.d_model)
    plain, _ = own_values(stack, 1, batch, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = own_values(stack, 1, batch, hidden)
    assert torch.equal(plain, mixed)
