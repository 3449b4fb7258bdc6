"""Future summary prediction, against loops in float64 over the whole vocabulary."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data_modules.token_store import TokenFile
from data_modules.windows import WindowBatch
from mtp_lightning.metrics.rates import own_values
from mtp_lightning.mtp.bag import BagConfig
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.config import TrunkConfig
from tests.models import build
from tests.mtp.summaries import ahead_windows, assert_loss_is, nearest


def bag_loss(logits_V: Tensor, bag: set[int], weights_V: Tensor) -> Tensor:
    """Of one position: every id's binary cross-entropy (2510.14751, section 3)."""
    loss = torch.zeros((), dtype=logits_V.dtype)
    for token in range(len(logits_V)):
        says = 1 / (1 + torch.exp(-logits_V[token]))
        loss = loss - weights_V[token] * torch.log(says if token in bag else 1 - says)
    return loss


def reference(
    hidden_BTC: Tensor, weight_VC: Tensor, batch: WindowBatch, tau: int, weights_V: Tensor
) -> tuple[Tensor, int]:
    """Summed loss, and positions that count."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(len(batch)):
        for i in range(batch.seq_len):
            bag = set(nearest(batch, row, i, 2, tau))
            if bag:
                total = total + bag_loss(weight_VC @ hidden_BTC[row, i], bag, weights_V)
                count += 1
    return total, count


# Both ends: one token, all that a window holds, and more than that.
@pytest.mark.parametrize("tau", [2, 3, 8, 9, 50])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("weights", ["idf", "none"])
def test_loss_and_gradients(
    tiny_trunk: TrunkConfig, tau: int, documents: bool, scored: bool, weights: str
) -> None:
    model = build(tiny_trunk, BagConfig(lookahead=tau, weights=weights)).double()
    if weights == "idf":
        model.mtp.weigh(torch.arange(37) % 9, 8)
        assert len(set(model.mtp.weights_V.tolist())) == 9
    weights_V = model.mtp.weights_V
    assert bool((weights_V == 1).all()) == (weights == "none")
    batch = ahead_windows(2, 7, tau, ids=9, documents=documents, scored=scored)
    assert_loss_is(model, batch, lambda h, weight: reference(h, weight, batch, tau, weights_V))


def test_the_next_token_is_not_in_the_bag(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, BagConfig(lookahead=3, weights="none"))
    batch = ahead_windows(1, 6, 3)
    other = batch.tokens.clone()
    other[0, 1] = (other[0, 1] + 1) % 37
    hidden = torch.randn(1, 6, 32)
    one, _ = own_values(model.mtp, 1, hidden, batch)
    two, _ = own_values(model.mtp, 1, hidden, WindowBatch(other, 1, extra=batch.extra))
    # Token 1 is the next one of position 0, and stands behind position 1's own reach.
    assert torch.equal(one, two)


def test_weights_are_smoothed_inverse_frequencies(tiny_trunk: TrunkConfig) -> None:
    stack = BagConfig().build(tiny_trunk)
    stack.weigh(torch.tensor([0, 1, 10]), 10)  # the model has more rows than the tokenizer
    found = stack.weights_V.tolist()
    assert found[:3] == pytest.approx([math.log(11) + 1, math.log(11 / 2) + 1, 1.0])
    assert found[3:] == pytest.approx([math.log(11) + 1] * 34)
    assert "weights_V" in stack.state_dict()


@pytest.mark.parametrize("block", [1, 5, 1000])
def test_documents_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("data_modules.token_store._BLOCK", block)
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 6, n).astype(np.uint16) for n in (3, 1, 9, 4, 0, 2)]
    path = tmp_path / "train.bin"
    np.concatenate(documents).tofile(path)
    starts = np.cumsum([0, *(len(d) for d in documents[:-1])])
    np.save(tmp_path / "train.starts.npy", starts)
    file = TokenFile(path, "uint16", 19, 0, len(documents))
    expected = [sum(v in d for d in documents) for v in range(8)]
    assert file.document_frequency(8).tolist() == expected
    tokens = np.concatenate(documents).tolist()
    assert file.token_frequency(8).tolist() == [tokens.count(v) for v in range(8)]


def test_bad_settings_are_named() -> None:
    for settings, message in (
        ({"depth": 3}, "mtp=bag has one loss .* mtp.depth=3: set it 1"),
        ({"lookahead": 1}, "mtp.lookahead must be a whole number of at least 2, not 1"),
        ({"weights": "tfidf"}, "mtp.weights=tfidf is unknown: choose one of idf, none"),
    ):
        with pytest.raises(ValueError, match=message):
            BagConfig(**settings)
    assert MTPConfig.from_dict(BagConfig(weights="none").to_dict()) == BagConfig(weights="none")
