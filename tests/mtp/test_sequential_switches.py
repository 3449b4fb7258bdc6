"""Random switches of the sequential stack: ``hidden_state_mixing`` and ``token_dropout``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_modules.windows import RandomKey, WindowBatch
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.feed import Feed
from mtp_lightning.mtp.inputs import StackInputs
from mtp_lightning.mtp.sequential import (
    SequentialConfig,
    SequentialMTP,
    draw_dropped,
    draw_states_back,
)
from mtp_lightning.nn.config import TrunkConfig
from tests.integration import helpers
from tests.models import build, windows


def test_mixing_draws_uniformly_from_the_trunk_and_shallower_depths() -> None:
    k, seq_len, batch = 3, 400, 50
    back = draw_states_back(k, batch, seq_len, RandomKey(seed=1, step=0))
    inner = back[:, : seq_len - k]
    share = torch.bincount(inner.flatten(), minlength=k) / inner.numel()
    # 20,000 draws: three standard deviations are 0.01.
    torch.testing.assert_close(share, torch.full((k,), 1 / 3), atol=0.01, rtol=0)
    assert back[:, -1].eq(0).all(), "the window's end has no shallower state to offer"
    # Rows, steps and seeds have different random numbers.
    assert not torch.equal(back[0], back[1])
    for other in (RandomKey(seed=1, step=1), RandomKey(seed=2, step=0)):
        assert not torch.equal(draw_states_back(k, batch, seq_len, other), back)
    # So have depths.
    first, second = (draw_dropped(k, 0.5, 2, 50, RandomKey(seed=1, step=0)) for k in (1, 2))
    assert not torch.equal(first, second)


def test_mixing_does_not_depend_on_micro_batches_or_ranks() -> None:
    whole = draw_states_back(3, 6, 20, RandomKey(seed=1, step=7))
    parts = [draw_states_back(3, 2, 20, RandomKey(seed=1, step=7, first_row=r)) for r in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)


def test_only_training_mixes(tiny_trunk: TrunkConfig) -> None:
    mixing = build(tiny_trunk, "sequential", depth=3, hidden_state_mixing=True)
    plain = build(tiny_trunk, "sequential", depth=3)
    batch = windows(2, 12, 3)
    for k, hidden in plain(batch).items():
        assert torch.equal(hidden, mixing(batch)[k])
    drawn = mixing(replace(batch, key=RandomKey(seed=0, step=0)))
    assert torch.equal(drawn[0], plain(batch)[0]) and torch.equal(drawn[1], plain(batch)[1])
    assert not torch.allclose(drawn[2], plain(batch)[2])
    # A plain stack draws nothing.
    assert torch.equal(plain(replace(batch, key=RandomKey(seed=0, step=0)))[3], plain(batch)[3])


def test_every_step_and_micro_batch_has_its_random_key(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[RandomKey | None] = []

    feed = SequentialMTP.feed

    def recorded(
        stack: SequentialMTP,
        final_BTC: Tensor,
        inputs: StackInputs,
        batch: WindowBatch,
        depths: Sequence[int],
    ) -> Feed:
        if not final_BTC.is_meta:  # the step there only counts FLOPs
            keys.append(inputs.key)
        return feed(stack, final_BTC, inputs, batch, depths)

    monkeypatch.setattr(SequentialMTP, "feed", recorded)
    settings = {"seed": 7, "trainer.accumulate_grad_batches": 2, "data.batch_size": 3}
    for steps in (2, 3):  # a new run, then resumed
        helpers.train_here(tmp_path / "run", cache, {**settings, "trainer.max_steps": steps})
    assert keys == [RandomKey(7, step, row) for step in range(3) for row in (0, 3)]


KEY = RandomKey(seed=3, step=5)


def test_only_training_drops_tokens_and_each_row_has_its_draws(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, "sequential", depth=2, token_dropout=0.5)
    batch = windows(4, 12, 2)
    evaluated = model(batch)
    state = {n: t for n, t in model.state_dict().items() if n != "mtp.blank"}
    plain = MTPModel(replace(model.config, mtp=SequentialConfig(depth=2)))
    plain.load_state_dict(state)
    for k, hidden in plain(batch).items():
        assert torch.equal(hidden, evaluated[k])
    trained = model(replace(batch, key=KEY))
    assert torch.equal(trained[0], evaluated[0])
    assert not torch.equal(trained[1], evaluated[1])
    # The draws are the same in any micro-batch and on any rank.
    half = model(WindowBatch(batch.tokens[2:], 2, key=replace(KEY, first_row=2)))
    for k in (1, 2):
        torch.testing.assert_close(half[k], trained[k][2:])


def test_with_token_dropout_1_modules_read_no_token(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, "sequential", depth=3, token_dropout=1.0).eval()
    assert not model.mtp.reads_tokens
    batch = windows(2, 9, 3)
    before = model(batch)
    tokens = batch.tokens.clone()
    tokens[:, 9:] = (tokens[:, 9:] + 1) % 37  # tokens that only depths could read
    after = model(WindowBatch(tokens, 3))
    for k in range(4):
        assert torch.equal(before[k], after[k])
    blank = model(replace(batch, key=KEY))
    assert all(torch.equal(before[k], blank[k]) for k in range(4))
