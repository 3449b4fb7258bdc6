"""The objective: normalisation over the whole step, weights, detaching."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_modules.windows import WindowBatch
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig
from tests import models
from tests.losses import gradients, mtp_loss


def build(trunk: TrunkConfig, **mtp: Any) -> MTPModel:
    return models.build(trunk, SequentialConfig(**mtp))


def packed(batch_size: int, seq_len: int, depth: int, *, masked: bool) -> WindowBatch:
    generator = torch.Generator().manual_seed(3)
    shape = (batch_size, seq_len + depth + 1)
    tokens = torch.randint(0, 37, shape, generator=generator)
    borders = torch.rand(shape, generator=generator) < 0.15
    return WindowBatch(tokens, depth, borders.long().cumsum(1) if masked else None)


def test_micro_batches_add_up_to_the_whole_step(tiny_trunk: TrunkConfig) -> None:
    """With documents of uneven length: a mean of means would weigh the micro-batches wrongly."""
    model = build(tiny_trunk, depth=2)
    batch = packed(4, 16, 2, masked=True)
    counts = batch.counts().tolist()
    whole, whole_sums = mtp_loss(model, batch, [0.2, 0.2], counts)
    whole.backward()
    expected = gradients(model)
    parts = [mtp_loss(model, micro, [0.2, 0.2], counts) for micro in batch.micro_batches(4)]
    for part, _ in parts:
        part.backward()
    torch.testing.assert_close(sum(part for part, _ in parts), whole)
    torch.testing.assert_close(sum(sums for _, sums in parts), whole_sums)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    uneven = [micro.counts().tolist() for micro in batch.micro_batches(4)]
    assert len({tuple(u) for u in uneven}) > 1


def test_detach_is_once_before_the_loop(tiny_trunk: TrunkConfig) -> None:
    """Depth 2's loss must reach depth 1's module even where the trunk is cut off."""
    model = build(tiny_trunk, depth=2, detach="trunk")
    batch = packed(2, 12, 2, masked=False)
    mtp_loss(model, batch, [0.0, 1.0], [24] * 3)[0].backward()
    grads = gradients(model)
    first = [g for n, g in grads.items() if n.startswith("mtp.depths.0.") and "norm" not in n]
    assert first and all(float(g.abs().max()) > 1e-7 for g in first)


def test_a_batch_without_any_target_is_refused(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, depth=0)
    batch = WindowBatch(torch.zeros(1, 4).long(), 0, torch.arange(4).unsqueeze(0))
    with pytest.raises(ValueError, match="no valid target"):
        mtp_loss(model, batch, [], batch.counts().tolist())
