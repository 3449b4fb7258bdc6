"""Bits per byte of the evaluated targets, and the text's own error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data_modules.windows import WindowBatch
from mtp_lightning.metrics.rates import DepthRates, bits_per_byte, bits_per_byte_se


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
        metric.update(hidden, weight, batch)
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
            metric.update(hidden, weight, batch)
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
            metric.update(hidden, weight, batch)
        found.append(metric.compute())
    assert found[0] == found[1]
