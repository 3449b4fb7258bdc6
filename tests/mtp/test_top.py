"""Token Order Prediction, against loops in float64 over the whole vocabulary."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.top import TopConfig
from mtp_lightning.nn.config import TrunkConfig
from tests.losses import mtp_loss
from tests.models import build
from tests.mtp.summaries import ahead_windows, assert_loss_is, nearest, own_loss


def order_loss(logits_V: Tensor, near: dict[int, int], tau: float) -> Tensor:
    """Of one position: ``-sum_v softmax(y)_v log softmax(logits)_v``, y the order's scores, which
    are -inf for an id that does not come (2508.19228, section 3)."""
    scores = torch.full_like(logits_V, -torch.inf)
    for token, ahead in near.items():
        scores[token] = -(ahead - 1) / tau
    target = [float(s.exp() / scores.exp().sum()) for s in scores]
    log_norm = torch.logsumexp(logits_V, 0)
    loss = torch.zeros((), dtype=logits_V.dtype)
    for token, mass in enumerate(target):
        loss = loss - mass * (logits_V[token] - log_norm)
    return loss


def reference(
    hidden_BTC: Tensor, weight_VC: Tensor, batch: WindowBatch, config: TopConfig
) -> tuple[Tensor, int]:
    """Summed loss, and positions that count."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(len(batch)):
        for i in range(batch.seq_len):
            near = nearest(batch, row, i, 1, config.lookahead)
            if near:
                total = total + order_loss(weight_VC @ hidden_BTC[row, i], near, config.tau)
                count += 1
    return total, count


# Both ends: the next token alone, all that a window holds, and more than that.
@pytest.mark.parametrize("lookahead", [1, 2, 3, 7, 8, 9, 50])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("tau", [1.0, 0.3, 20.0])
def test_loss_and_gradients(
    tiny_trunk: TrunkConfig, lookahead: int, documents: bool, scored: bool, tau: float
) -> None:
    config = TopConfig(lookahead=lookahead, tau=tau)
    model = build(tiny_trunk, config).double()
    batch = ahead_windows(2, 7, lookahead, ids=9, documents=documents, scored=scored)
    assert_loss_is(model, batch, lambda h, weight: reference(h, weight, batch, config))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), tau=st.floats(0.1, 30), rows=st.integers(1, 6))
def test_the_target_is_a_distribution_that_is_reached(seed: int, tau: float, rows: int) -> None:
    """At logits that are the target's own logarithm, the loss is its entropy, the least there is,
    and nothing is left to learn."""
    batch = ahead_windows(rows, 5, 8, ids=12, seed=seed)
    model = stack_of(TopConfig(lookahead=8, tau=tau))
    loss, every = model.own_loss(1, batch), slice(0, rows * 5)
    scores = torch.full((rows * 5, 12), -torch.inf, dtype=torch.float64)
    for m in range(rows * 5):
        for token, ahead in nearest(batch, m // 5, m % 5, 1, 8).items():
            scores[m, token] = -(ahead - 1) / tau
    target = torch.softmax(scores, -1)
    best, d_best = loss.gradient(every, scores.clamp(min=-1e4))
    entropy = -torch.special.xlogy(target, target).sum(-1)
    torch.testing.assert_close(best, entropy)
    assert d_best.abs().max() < 1e-9
    other, d_other = loss.gradient(every, torch.randn_like(scores))
    assert bool((other >= best - 1e-9).all())
    # Softmax minus a distribution.
    assert d_other.sum(-1).abs().max() < 1e-9


def stack_of(config: TopConfig) -> torch.nn.Module:
    trunk = TrunkConfig(vocab_size=12, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, d_ff=8)
    return config.build(trunk)


def test_a_reach_of_one_is_cross_entropy(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, TopConfig(lookahead=1))
    batch = ahead_windows(2, 8, 1)
    hidden = torch.randn(2, 8, 32)
    _, found = own_loss(model.mtp, hidden, batch, 1.0)
    logits = model.mtp.head(hidden).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch.targets(0).flatten())
    torch.testing.assert_close(found.item() / 16, expected.item(), rtol=1e-5, atol=1e-6)


def test_distances_beyond_float16_are_told_apart() -> None:
    """Two ids 3,000 and 3,001 places ahead, and nothing else that counts."""
    tokens = torch.zeros(1, 3004, dtype=torch.int64)
    tokens[0, 3001], tokens[0, 3002] = 1, 2
    scored = tokens > 0
    batch = WindowBatch(tokens, 1, None, scored, extra=3001)
    stack = stack_of(TopConfig(lookahead=3002))
    value, d_logits = stack.own_loss(1, batch).gradient(slice(0, 1), torch.zeros(1, 12))
    # softmax(0, -1): the nearer one has e / (1 + e).
    expected = torch.tensor([1.0, torch.e]) / (1 + torch.e)
    torch.testing.assert_close(1 / 12 - d_logits[0, [2, 1]], expected)
    torch.testing.assert_close(value, torch.tensor([12.0]).log())


def test_the_whole_objective_reaches_trunk_and_both_heads(tiny_trunk: TrunkConfig) -> None:
    trunk = replace(tiny_trunk, tie_embeddings=False)
    config = TopConfig(lookahead=4)
    model = build(trunk, config).double()
    batch = ahead_windows(2, 7, 4)
    total, sums = mtp_loss(model, batch, [0.3], [14, 14])
    total.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    hidden = model(batch)
    assert hidden[1] is hidden[0]
    main = torch.nn.functional.cross_entropy(
        model.head(hidden[0]).flatten(0, 1), batch.targets(0).flatten()
    )
    further, count = reference(hidden[1], model.mtp.head.weight, batch, config)
    assert count == 14
    torch.testing.assert_close(sums[1], further.detach())
    expected = main + 0.3 * further / count
    torch.testing.assert_close(total, expected)
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, msg=name)


def test_chunks_change_nothing(tiny_trunk: TrunkConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tiny_trunk, TopConfig(lookahead=6)).double()
    batch = ahead_windows(3, 9, 6, documents=True, scored=True)
    found = []
    for rows in (1000, 4):
        monkeypatch.setattr(
            "mtp_lightning.objective.through_head.chunk_rows", lambda *_, rows=rows: rows
        )
        hidden = torch.linspace(-1, 1, 3 * 9 * 32, dtype=torch.float64).view(3, 9, 32)
        hidden.requires_grad_()
        loss, plain = own_loss(model.mtp, hidden, batch, 0.5)
        found.append([plain, *torch.autograd.grad(loss, [hidden, model.mtp.head.weight])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_bad_settings_are_named() -> None:
    for settings_, message in (
        ({"depth": 2}, "mtp=top has one loss .* mtp.depth=2: set it 1"),
        ({"depth": 0}, "mtp.depth=0: set it 1"),
        ({"lookahead": 0}, "mtp.lookahead must be a whole number of at least 1, not 0"),
        ({"tau": 0.0}, "mtp.tau must be a number above 0, not 0.0"),
        ({"detach": "all"}, "mtp.detach=all has no meaning for mtp=top"),
        ({"detach": "head"}, "mtp.detach=head is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            TopConfig(**settings_)
    assert MTPConfig.from_dict(TopConfig(tau=2.0).to_dict()) == TopConfig(tau=2.0)


def test_it_needs_no_token_of_the_answer_at_decoding(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, TopConfig())
    assert isinstance(model, MTPModel)
    assert model.mtp.max_draft_depth == 0 and not model.mtp.reads_tokens
    with pytest.raises(ValueError, match="mtp=top shapes the trunk in training and has nothing"):
        model.mtp.require_drafts()
