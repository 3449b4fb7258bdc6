"""``mtp.rank``: linear heads that predict the next tokens jointly, by a tensor of rank r."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules.windows import WindowBatch
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.linear import LinearConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.head import Head
from mtp_lightning.nn.mixture_of_softmaxes import pack, unpack
from mtp_lightning.objective import through_head
from mtp_lightning.objective.objective import Objective
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.terms.kl import KL
from mtp_lightning.objective.terms.mixture import Mixture
from tests.losses import mtp_loss, step_of
from tests.models import build, windows
from tests.objective.memory import LiveMemory


def of_rank(trunk: TrunkConfig, rank: int, depth: int) -> MTPModel:
    """A model in float64 with random weights, so that all components differ."""
    model = build(trunk, "linear", depth=depth, rank=rank).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.mtp.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.4 * drawn)
    return model


def test_a_depth_is_the_conditional_of_the_joint_distribution(tiny_trunk: TrunkConfig) -> None:
    """``q^k`` is a quotient of sums over all texts; the next token's prediction is the marginal."""
    trunk = replace(tiny_trunk, vocab_size=4)
    model = of_rank(trunk, 3, 2)
    generator = torch.Generator().manual_seed(1)
    batch = WindowBatch(torch.randint(0, 4, (1, 8), generator=generator), 2)
    hidden = model(batch)
    predicted = {k: model.head(h)[0].exp() for k, h in hidden.items()}
    components, log_weights = zip(
        *(unpack(h[0], trunk.d_model) for h in hidden.values()), strict=True
    )
    shares = log_weights[0].exp()
    probs = torch.softmax(torch.stack(components) @ model.head.weight.T, -1)
    for t in range(5):
        joint = torch.einsum("a,ax,ay,az->xyz", shares[t], *probs[:, t])
        x, y = batch.tokens[0, t + 1 : t + 3].tolist()
        exact = joint.sum((1, 2)), joint[x].sum(1) / joint[x].sum(), joint[x, y] / joint[x, y].sum()
        for k in range(3):
            torch.testing.assert_close(predicted[k][t], exact[k], rtol=1e-6, atol=1e-9)


def test_components_start_different_and_the_first_as_the_main_prediction(
    tiny_trunk: TrunkConfig,
) -> None:
    model = MTPModel(ModelConfig(trunk=tiny_trunk, mtp=LinearConfig(depth=2, rank=3)))
    model.initialize(0)
    hidden = model(windows(1, 8, 2))
    parts = [unpack(h, tiny_trunk.d_model) for h in hidden.values()]
    for states, log_weights in parts:
        assert torch.equal(states[..., 0, :], parts[0][0][..., 0, :])
        assert not torch.equal(states[..., 1, :], states[..., 2, :])
        torch.testing.assert_close(log_weights.exp().sum(-1), torch.ones(1, 8))
    assert not torch.equal(parts[1][1], parts[0][1])  # depth 1 knows one token more


@given(rank=st.integers(1, 4), d_model=st.integers(1, 5), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_a_packed_mixture_unpacks_to_the_same_bits(rank: int, d_model: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 3, rank, d_model, generator=generator)
    weights = torch.randn(2, 3, rank, generator=generator).log_softmax(-1)
    packed = pack(states, weights)
    for unpacked, original in zip(unpack(packed, d_model), (states, weights), strict=True):
        assert torch.equal(unpacked, original)
    head = Head(7, d_model)
    torch.nn.init.normal_(head.weight, generator=generator)
    expected = (weights.exp().unsqueeze(-1) * (states @ head.weight.T).softmax(-1)).sum(-2)
    torch.testing.assert_close(head(packed).exp(), expected)


def test_the_largest_tensor_is_a_chunk_of_rows_times_the_vocabulary(
    tiny_trunk: TrunkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, vocab = 40, 5_000
    monkeypatch.setattr(through_head, "chunk_rows", lambda *_: rows)
    trunk = replace(tiny_trunk, vocab_size=vocab)
    model, batch = build(trunk, "linear", depth=3, rank=2), windows(2, 64, 3)
    with LiveMemory(least=rows * vocab // 2) as memory:
        mtp_loss(model, batch, [0.1] * 3, [128] * 4, term=KL())[0].backward()
    assert memory.largest <= max(rows * vocab, vocab * trunk.d_model) < 128 * vocab


@pytest.mark.parametrize(
    "options",
    [
        {"term": Mixture({"kl": 1, "feature": 1})},
        {"weights": "acceptance"},
        {"mask": "entropy"},
        {"confidence": True},
        {"train_head": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_objectives_that_need_the_logits_of_one_depth_are_refused(
    tiny_trunk: TrunkConfig, options: dict[str, Any]
) -> None:
    model = build(tiny_trunk, "linear", depth=2, rank=2)
    with pytest.raises(ValueError, match="has no meaning with mtp.rank=2"):
        step_of(model, Objective(**({"term": CrossEntropy()} | options)))
    step_of(model, Objective(term=KL(), weights="exp_decay"))
