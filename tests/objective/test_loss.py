"""The objective: normalisation over the whole step, weights, detaching."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.none import NoMTPConfig
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


@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_formula(tiny_trunk: TrunkConfig, masked: bool) -> None:
    model = build(tiny_trunk, depth=2)
    batch = packed(3, 12, 2, masked=masked)
    counts = batch.counts().tolist()
    weights = [0.3, 0.05]
    total, sums = mtp_loss(model, batch, weights, counts)
    total.backward()
    found = gradients(model)

    hidden = model(batch)
    means = []
    for k in range(3):
        logits = model.head(hidden[k]).flatten(0, 1)
        means.append(F.cross_entropy(logits, batch.targets(k).flatten(), ignore_index=-100))
    expected = means[0] + 0.3 * means[1] + 0.05 * means[2]
    expected.backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close((sums / batch.counts()).float(), torch.stack(means))
    for name, grad in gradients(model).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=name)


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


def test_weight_zero_is_plain_next_token_training_bit_for_bit(tiny_trunk: TrunkConfig) -> None:
    with_depths, plain = (
        MTPModel(ModelConfig(trunk=tiny_trunk, mtp=mtp))
        for mtp in (SequentialConfig(depth=2), NoMTPConfig())
    )
    with_depths.initialise(0)
    plain.initialise(0)
    batch = packed(2, 12, 2, masked=False)
    short = WindowBatch(batch.tokens[:, :-2], 0)
    total, _ = mtp_loss(with_depths, batch, [0.0, 0.0], [24] * 3)
    expected, _ = mtp_loss(plain, short, [], [24])
    assert torch.equal(total, expected)
    total.backward()
    expected.backward()
    found, want = gradients(with_depths), gradients(plain)
    assert found.keys() == want.keys(), "depths of weight 0 have no gradient at all"
    assert all(torch.equal(found[name], want[name]) for name in want)


def depth_gradients(trunk: TrunkConfig, detach: str) -> dict[str, Tensor]:
    """Gradients of the depths' losses alone: those with the depths less those without."""
    model = build(trunk, depth=2, detach=detach)
    batch = packed(2, 12, 2, masked=False)
    mtp_loss(model, batch, [1.0, 1.0], [24] * 3)[0].backward()
    both = gradients(model)
    mtp_loss(model, batch, [0.0, 0.0], [24] * 3)[0].backward()
    main = gradients(model)
    return {n: g - main[n] if n in main else g for n, g in both.items()}


def is_zero(grad: Tensor) -> bool:
    return float(grad.abs().max()) < 1e-7


def test_detach_cuts_where_it_says(tiny_trunk: TrunkConfig) -> None:
    untied = TrunkConfig(
        vocab_size=37, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48,
        tie_embeddings=False,
    )  # fmt: skip
    by_detach = {d: depth_gradients(untied, d) for d in ("none", "trunk", "all")}
    body = [n for n in by_detach["none"] if n.startswith("trunk.") and "embedding" not in n]
    for detach, cut in (("none", False), ("trunk", True), ("all", True)):
        for name in body:
            assert is_zero(by_detach[detach][name]) == cut, (detach, name)
    for name in ("trunk.embedding.weight", "head.weight"):
        assert not is_zero(by_detach["none"][name]), name
        assert not is_zero(by_detach["trunk"][name]), name
        assert is_zero(by_detach["all"][name]), name


def test_detach_is_once_before_the_loop(tiny_trunk: TrunkConfig) -> None:
    """Depth 2's loss must reach depth 1's module even where the trunk is cut off."""
    model = build(tiny_trunk, depth=2, detach="trunk")
    batch = packed(2, 12, 2, masked=False)
    mtp_loss(model, batch, [0.0, 1.0], [24] * 3)[0].backward()
    grads = gradients(model)
    first = [g for n, g in grads.items() if n.startswith("mtp.depths.0.") and "norm" not in n]
    assert first and not any(is_zero(g) for g in first)


def test_a_batch_without_any_target_is_refused(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, depth=0)
    batch = WindowBatch(torch.zeros(1, 4).long(), 0, torch.arange(4).unsqueeze(0))
    with pytest.raises(ValueError, match="no valid target"):
        mtp_loss(model, batch, [], batch.counts().tolist())
