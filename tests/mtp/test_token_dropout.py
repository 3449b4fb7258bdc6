"""Modules that are given no token, sometimes or always."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from data_modules.windows import WindowBatch
from mtp_lightning.decoding.generate import generate
from mtp_lightning.interop import names
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.inputs import RandomKey
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig
from tests.models import build, windows

KEY = RandomKey(seed=3, step=5)


def test_only_training_drops_and_every_row_has_its_own_draws(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, SequentialConfig(depth=2, token_dropout=0.5))
    batch = windows(4, 12, 2)
    as_used = model(batch)
    state = {n: t for n, t in model.state_dict().items() if n != "mtp.blank"}
    plain = MTPModel(replace(model.config, mtp=SequentialConfig(depth=2)))
    plain.load_state_dict(state)
    for k, hidden in plain(batch).items():
        assert torch.equal(hidden, as_used[k])
    in_training = model(batch, key=KEY)
    assert torch.equal(in_training[0], as_used[0])
    assert not torch.equal(in_training[1], as_used[1])
    # Whatever micro-batch or rank a row is in.
    half = model(WindowBatch(batch.tokens[2:], 2), key=replace(KEY, first_row=2))
    for k in (1, 2):
        torch.testing.assert_close(half[k], in_training[k][2:])


def test_at_one_modules_are_blind_to_tokens(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, SequentialConfig(depth=3, token_dropout=1.0)).eval()
    assert not model.mtp.reads_tokens
    batch = windows(2, 9, 3)
    before = model(batch)
    tokens = batch.tokens.clone()
    tokens[:, 9:] = (tokens[:, 9:] + 1) % 37  # what only depths would have read
    after = model(WindowBatch(tokens, 3))
    for k in range(4):
        assert torch.equal(before[k], after[k])
    blank = model(batch, key=KEY)
    assert all(torch.equal(before[k], blank[k]) for k in range(4))


@pytest.mark.parametrize("detach", ["none", "all"])
def test_the_learned_vector_learns(tiny_trunk: TrunkConfig, detach: str) -> None:
    config = SequentialConfig(depth=1, token_dropout=0.5, detach=detach)
    model = build(tiny_trunk, config)
    model(windows(2, 8, 1), key=KEY)[1].square().sum().backward()
    assert model.mtp.blank.grad is not None and model.mtp.blank.grad.any()


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_drafts_are_lossless(tiny_trunk: TrunkConfig, p: float) -> None:
    model = build(tiny_trunk, SequentialConfig(depth=2, token_dropout=p)).eval()
    prompts = list(windows(3, 6, 0).tokens)
    drafted = generate(model, prompts, max_new_tokens=20)
    plain = generate(model, prompts, max_new_tokens=20, speculative=False)
    assert [g.token_ids for g in drafted] == [g.token_ids for g in plain]
    assert sum(g.drafts_reached[0] for g in drafted) > 0


@pytest.mark.parametrize("p", [-0.1, 1.5, True, "half"])
def test_no_probability_is_refused(p: object) -> None:
    with pytest.raises(ValueError, match="mtp.token_dropout must be"):
        SequentialConfig(depth=1, token_dropout=p)  # type: ignore[arg-type]


def test_other_projects_layouts_hold_modules_that_read_tokens(tiny_trunk: TrunkConfig) -> None:
    for p, fits in ((0.0, True), (0.5, True), (1.0, False)):
        model = build(tiny_trunk, SequentialConfig(depth=1, token_dropout=p))
        assert names.has_layout(model.config) == fits
        config, weights = names.plain(model.config, model.state_dict())
        if fits:  # there nobody knows of the vector, and nobody needs it
            assert config.mtp == SequentialConfig(depth=1) and "mtp.blank" not in weights
