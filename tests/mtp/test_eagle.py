"""EAGLE-3's layer: the states that it reads, and its draft vocabulary.

``tests/objective/test_cross_product.py`` compares losses and gradients with the equations, which
``tests/objective/states.py`` computes query by query in float64.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_modules.windows import IGNORE_INDEX
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.errors import UserError
from mtp_lightning.metrics.long_range import read
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.eagle import EagleConfig, EagleMTP
from mtp_lightning.mtp.inner_states import default_layers
from mtp_lightning.mtp.own_head import OwnHead
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective.objective import Objective
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.terms.kl import KL
from mtp_lightning.objective.terms.mixture import Mixture
from tests.models import build, windows

TRUNK = TrunkConfig(
    vocab_size=37, d_model=32, n_layers=8, n_heads=4, n_kv_heads=2, d_ff=48, init_std=0.2
)


def eagle_model(trunk: TrunkConfig = TRUNK, **switches: Any) -> MTPModel:
    """A model in float64 whose draft vocabulary is not the first tokens."""
    model = build(trunk, "eagle", **{"depth": 3, **switches}).double().eval()
    assert isinstance(model.mtp, EagleMTP)
    generator = torch.Generator().manual_seed(7)
    model.mtp.layer.head.choose(torch.randint(0, 99, (trunk.vocab_size,), generator=generator))
    return model


def test_the_default_layers_are_three_blocks() -> None:
    """For 32 blocks, those that servers use for Llama 3.1 8B."""
    assert default_layers(32) == (2, 16, 29)
    assert [default_layers(n) for n in (1, 2, 4, 7)] == [(0, 0, 1), (0, 1, 2), (1, 2, 3), (2, 3, 4)]


def test_the_draft_vocabulary_has_the_most_frequent_tokens() -> None:
    head = OwnHead(8, 4, 3)
    assert head.tokens.tolist() == [0, 1, 2] and not head.is_whole
    head.choose(torch.tensor([5, 0, 7, 5, 5, 9, 0, 0]))
    assert head.tokens.tolist() == [0, 2, 5]
    none = IGNORE_INDEX
    targets = torch.tensor([[0, 1, 2], [5, 7, none]])
    assert head.rows_of(targets).tolist() == [[0, none, 1], [2, none, none]]
    torch.nn.init.normal_(head.weight)
    h = torch.randn(2, 5, 4)
    q = head.log_probs(h).exp()
    torch.testing.assert_close(q, head(h).softmax(-1))
    assert q.shape == (2, 5, 8) and not q[..., [1, 3, 4, 6, 7]].any()
    torch.testing.assert_close(q.sum(-1), torch.ones(2, 5))


def test_targets_outside_the_draft_vocabulary_are_left_out() -> None:
    model, batch = eagle_model(draft_vocab=11), windows(2, 7, 3)
    head = model.mtp.own_head
    assert head is not None
    losses = read(model, batch)
    assert torch.isfinite(losses.losses_KBT).all()
    for k in (1, 2, 3):
        inside = torch.isin(batch.targets(k), head.tokens)
        assert 0 < inside.sum() < 14 and torch.equal(losses.valid_KBT[k], inside)


def test_a_trunk_keeps_only_states_that_are_read(tiny_trunk: TrunkConfig) -> None:
    assert set(eagle_model(tiny_trunk).trunk.keep_after) == {0, 1, 2}
    assert not build(tiny_trunk, "eagle", depth=0).trunk.keep_after
    assert not build(tiny_trunk, "joint", depth=2).trunk.keep_after


def test_the_draft_vocabulary_is_chosen_by_the_training_text() -> None:
    text = SimpleNamespace(token_frequency=lambda V: np.arange(V)[::-1].copy() % 7)
    data = SimpleNamespace(training_text=text)
    model = eagle_model(draft_vocab=5)
    model.mtp.observe_training_text(data)
    assert model.mtp.layer.head.tokens.tolist() == [2, 9, 16, 23, 30]
    large = MTPModel(replace(model.config, mtp=EagleConfig(depth=2, draft_vocab=38)))
    with pytest.raises(UserError, match="mtp.draft_vocab=38, but the model has 37 tokens"):
        large.mtp.observe_training_text(data)
    with pytest.raises(UserError, match="a task makes its examples as it trains"):
        model.mtp.observe_training_text(SimpleNamespace(training_text=None))


def test_settings_that_do_not_fit_a_draft_vocabulary_are_refused() -> None:
    model = eagle_model(draft_vocab=11)
    for options, message in (
        ({"compile": True}, "compile=true has passes for a cache per draft"),
        ({"draft_vocab": 5}, "mtp=eagle drafts by a head of its own"),
    ):
        with pytest.raises(UserError, match=message):
            DecodingOptions(**options).max_draft(model)
    for rule in ({"weights": "acceptance"}, {"mask": "entropy"}, {"confidence": True}):
        objective = Objective(term=CrossEntropy(), **rule)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="has no draft: set mtp.draft_vocab=null|have no draft"):
            objective.check(model.config.mtp)
        objective.check(replace(model.config.mtp, draft_vocab=None))
    padded = Objective(term=Mixture({"ce": 1, "anchor": {"weight": 1, "padded": True}}))
    with pytest.raises(UserError, match="anchor.padded=true .* mtp.draft_vocab leaves targets out"):
        padded.for_model(model)
    padded.for_model(eagle_model())
    with pytest.raises(UserError, match="which mtp=eagle never does"):
        Objective(term=KL(), train_head=False).check(model.config.mtp)


def test_a_new_layer_starts_with_the_trunks_norm_and_rows() -> None:
    model = eagle_model(draft_vocab=11)
    layer = model.mtp.layer
    model.mtp.init_from_trunk([0], model.trunk, model.head, None)
    assert torch.equal(layer.norm.weight, model.trunk.norm.weight)
    assert torch.equal(layer.head.weight, model.head.weight[layer.head.tokens])
