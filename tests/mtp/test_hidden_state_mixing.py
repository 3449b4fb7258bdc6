"""Hidden-state mixing: what is mixed, how it is drawn, and that resuming needs nothing stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.feed import Feed
from mtp_lightning.mtp.inputs import RandomKey
from mtp_lightning.mtp.sequential import SequentialConfig, SequentialMTP, draw_states_back
from mtp_lightning.nn.config import TrunkConfig
from tests.integration import helpers
from tests.losses import mtp_loss
from tests.models import build, windows


def labelled(depth: int, seq_len: int, batch: int = 2) -> Tensor:
    """States that say where they are from: [B, T, 2] of (depth, position)."""
    position = torch.arange(seq_len, dtype=torch.float32).expand(batch, seq_len)
    return torch.stack([torch.full_like(position, depth), position], dim=-1)


def test_every_position_gets_a_state_that_has_read_the_same_tokens(
    tiny_trunk: TrunkConfig,
) -> None:
    seq_len, depth = 50, 4
    stack = SequentialMTP(SequentialConfig(depth=depth, hidden_state_mixing=True), tiny_trunk)
    key = RandomKey(seed=0, step=3)
    for k in range(1, depth + 1):
        history = [labelled(j, seq_len) for j in range(k)]
        mixed = stack.input_of(k, history, key)
        back = draw_states_back(k, 2, seq_len, key)
        for row in range(2):
            for i in range(seq_len):
                source, position = mixed[row, i].long().tolist()
                # Depth j at position p has read the tokens up to p + j.
                assert source + position == k - 1 + i
                assert source == k - 1 - back[row, i] and position < seq_len


def test_the_draw_is_uniform_over_depths_and_trunk() -> None:
    k, seq_len, batch = 3, 400, 50
    back = draw_states_back(k, batch, seq_len, RandomKey(seed=1, step=0))
    inner = back[:, : seq_len - k]
    share = torch.bincount(inner.flatten(), minlength=k) / inner.numel()
    # 20,000 draws: three standard deviations are 0.01.
    torch.testing.assert_close(share, torch.full((k,), 1 / 3), atol=0.01, rtol=0)
    assert back[:, -1].eq(0).all(), "the window's end has no shallower state to offer"
    # Rows, steps, depths and seeds have streams of their own.
    assert not torch.equal(back[0], back[1])
    for other in (RandomKey(seed=1, step=1), RandomKey(seed=2, step=0)):
        assert not torch.equal(draw_states_back(k, batch, seq_len, other), back)


def test_the_draw_depends_on_the_window_alone() -> None:
    """Not on how the step is split into micro-batches or ranks."""
    whole = draw_states_back(3, 6, 20, RandomKey(seed=1, step=7))
    parts = [draw_states_back(3, 2, 20, RandomKey(seed=1, step=7, first_row=r)) for r in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)


def test_training_mixes_and_evaluation_does_not(tiny_trunk: TrunkConfig) -> None:
    mixing = build(tiny_trunk, SequentialConfig(depth=3, hidden_state_mixing=True))
    plain = build(tiny_trunk, SequentialConfig(depth=3))
    batch = windows(2, 12, 3)
    for k, hidden in plain(batch).items():
        assert torch.equal(hidden, mixing(batch)[k])
    drawn = mixing(batch, key=RandomKey(seed=0, step=0))
    assert torch.equal(drawn[0], plain(batch)[0]) and torch.equal(drawn[1], plain(batch)[1])
    assert not torch.allclose(drawn[2], plain(batch)[2])
    # A plain stack has no use for a draw.
    assert torch.equal(plain(batch, key=RandomKey(seed=0, step=0))[3], plain(batch)[3])


def test_a_depth_never_sees_the_token_that_it_predicts(tiny_trunk: TrunkConfig) -> None:
    depth, seq_len = 3, 8
    model = build(tiny_trunk, SequentialConfig(depth=depth, hidden_state_mixing=True))
    batch = windows(1, seq_len, depth)
    for step in range(3):
        key = RandomKey(seed=0, step=step)
        before = model(batch, key=key)
        for changed in range(1, seq_len + depth + 1):
            tokens = batch.tokens.clone()
            tokens[0, changed] = (tokens[0, changed] + 1) % 37
            after = model(type(batch)(tokens, depth), key=key)
            for k in range(depth + 1):
                unseen = max(min(changed - k, seq_len), 0)
                assert torch.equal(before[k][0, :unseen], after[k][0, :unseen]), (changed, k)


def test_gradients_reach_all_mixed_depths(tiny_trunk: TrunkConfig) -> None:
    model = MTPModel(
        ModelConfig(
            trunk=tiny_trunk,
            mtp=SequentialConfig(depth=2, hidden_state_mixing=True, detach="trunk"),
        )
    )
    model.initialise(0)
    loss, _ = mtp_loss(model, windows(2, 12, 2), [0.0, 1.0], [24] * 3, key=RandomKey(0, 0))
    loss.backward()
    assert all(p.grad is not None for p in model.mtp.parameters())


def test_every_step_and_micro_batch_draws_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[RandomKey] = []

    feed = SequentialMTP.feed

    def recorded(stack: SequentialMTP, *given: Any) -> Feed:
        if not given[0].is_meta:  # a step there is counted, not trained
            keys.append(given[-1])
        return feed(stack, *given)

    monkeypatch.setattr(SequentialMTP, "feed", recorded)
    settings = {"seed": 7, "trainer.accumulate_grad_batches": 2, "data.batch_size": 3}
    for steps in (2, 3):  # begun, and resumed
        helpers.train_here(
            tmp_path / "run", tmp_path / "cache", {**settings, "trainer.max_steps": steps}
        )
    assert keys == [RandomKey(7, step, row) for step in range(3) for row in (0, 3)]


@pytest.mark.slow
def test_a_resumed_run_mixes_as_the_uninterrupted_one(tmp_path: Path) -> None:
    settings = {
        "mtp.depth": 3,
        "mtp.hidden_state_mixing": "true",
        "trainer.accumulate_grad_batches": 2,
        "data.batch_size": 2,
        "callbacks.checkpoints.every_n_steps": 3,
        # A constant rate and weight: so a run of 3 steps is the first half of one of 6.
        "lambda_schedule": "constant",
        "optimizer.schedule.kind": "constant",
        "optimizer.schedule.warmup_steps": 0,
        "optimizer.schedule.warmup_fraction": "null",
    }
    cache = tmp_path / "cache"
    for folder, steps in (("a", 6), ("b", 3), ("b", 6)):
        helpers.train_here(tmp_path / folder, cache, {**settings, "trainer.max_steps": steps})
    helpers.assert_same_weights(tmp_path / "a", tmp_path / "b")
    off = {**settings, "mtp.hidden_state_mixing": "false", "trainer.max_steps": 6}
    helpers.train_here(tmp_path / "off", cache, off)
    with pytest.raises(AssertionError):
        helpers.assert_same_weights(tmp_path / "a", tmp_path / "off")
