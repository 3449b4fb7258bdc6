"""Heads that summarize the tokens ahead: the search for these tokens, the limits of ``mtp=top``,
and the weights of ``mtp=bag``.

``tests/objective/test_cross_product.py`` compares losses and gradients with the definitions.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules.token_store import TokenFile
from data_modules.windows import WindowBatch
from mtp_lightning.mtp.bag import BagConfig
from mtp_lightning.mtp.summary import LookAhead
from mtp_lightning.mtp.top import TopConfig
from mtp_lightning.nn.config import TrunkConfig
from tests.mtp.summaries import ahead_windows, nearest


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    seq_len=st.integers(1, 9),
    first=st.integers(1, 2),
    more=st.integers(0, 15),
    ids=st.sampled_from([2, 5, 30]),
    documents=st.booleans(),
    scored=st.booleans(),
)
def test_the_tokens_ahead_are_those_of_a_search(
    seed: int,
    rows: int,
    seq_len: int,
    first: int,
    more: int,
    ids: int,
    documents: bool,
    scored: bool,
) -> None:
    last = first + more
    batch = ahead_windows(
        rows, seq_len, last, ids=ids, documents=documents, scored=scored, seed=seed
    )
    ahead_of = LookAhead(batch, first=first, last=last)
    valid = ahead_of.valid()
    assert valid.shape == (rows, seq_len)
    total = rows * seq_len
    for start in range(0, total, 4):  # chunks that cross rows
        place = slice(start, min(start + 4, total))
        tokens_RS, counts_RS = ahead_of.rows(place)
        for m, tokens, counts in zip(range(start, total), tokens_RS, counts_RS, strict=False):
            row, i = divmod(m, seq_len)
            expected = nearest(batch, row, i, first, last)
            distances = {int(tokens[s]): first + s for s in counts.nonzero().flatten().tolist()}
            assert distances == expected
            assert int(counts.sum()) == len(expected)  # no id twice
            assert bool(valid[row, i]) == bool(expected)


def stack_of(config: TopConfig) -> torch.nn.Module:
    trunk = TrunkConfig(vocab_size=12, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, d_ff=8)
    return config.build(trunk)


def test_top_distinguishes_distances_beyond_float16() -> None:
    """Two ids count, 3,000 and 3,001 tokens after the next."""
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


def test_weights_are_smoothed_inverse_frequencies(tiny_trunk: TrunkConfig) -> None:
    stack = BagConfig().build(tiny_trunk)
    holding_V = torch.zeros(37, dtype=torch.int64)
    holding_V[1], holding_V[2] = 1, 10
    text = SimpleNamespace(document_frequency=lambda V: holding_V.numpy(), n_documents=10)
    stack.observe_training_text(SimpleNamespace(training_text=text))
    weights = stack.weights_V.tolist()
    assert weights[:3] == pytest.approx([math.log(11) + 1, math.log(11 / 2) + 1, 1.0])
    assert weights[3:] == pytest.approx([math.log(11) + 1] * 34)
    assert "weights_V" in stack.state_dict()


@pytest.mark.parametrize("block", [1, 5, 1000])
def test_document_and_token_frequencies_equal_those_of_a_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
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
