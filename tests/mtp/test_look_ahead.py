"""The tokens ahead that count, against a search place by place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules.windows import WindowBatch
from mtp_lightning.mtp.look_ahead import LookAhead
from tests.mtp.summaries import ahead_windows, nearest


def look_ahead(batch: WindowBatch, first: int, last: int) -> LookAhead:
    return LookAhead(
        batch.tokens,
        batch.seq_len,
        documents_BW=batch.documents,
        scored_BW=batch.scored,
        first=first,
        last=last,
    )


@settings(deadline=None, max_examples=60)
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
def test_it_finds_what_a_search_finds(
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
    ahead_of = look_ahead(batch, first, last)
    valid = ahead_of.valid()
    assert valid.shape == (rows, seq_len)
    total = rows * seq_len
    for start in range(0, total, 4):  # chunks that cross rows
        place = slice(start, min(start + 4, total))
        tokens_RS, counts_RS = ahead_of.rows(place)
        for m, tokens, counts in zip(range(start, total), tokens_RS, counts_RS, strict=False):
            row, i = divmod(m, seq_len)
            expected = nearest(batch, row, i, first, last)
            found = {int(tokens[s]): first + s for s in counts.nonzero().flatten().tolist()}
            assert found == expected
            assert int(counts.sum()) == len(expected)  # no id twice
            assert bool(valid[row, i]) == bool(expected)


def test_documents_are_told_apart_by_their_own_ids() -> None:
    """The same token stands in three documents, and is near in one alone."""
    tokens = torch.tensor([[7, 1, 7, 2, 7, 3, 7]])
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2]])
    batch = WindowBatch(tokens, 1, documents, extra=2)
    assert batch.seq_len == 3
    tokens_RS, counts_RS = look_ahead(batch, 1, 4).rows(slice(0, 3))
    seen = [t[c].tolist() for t, c in zip(tokens_RS, counts_RS, strict=True)]
    assert seen == [[1], [], [2, 7]]


@pytest.mark.parametrize("lookahead", [1, 2, 5, 6, 7, 100])
def test_windows_hold_the_reach_or_a_window_of_it(lookahead: int) -> None:
    """T = 5: from W = 7 on the far end is cut for the last positions, by 2 places of 7 .. ."""
    batch = ahead_windows(1, 5, lookahead)
    found = look_ahead(batch, 1, lookahead)
    reach = (found.stop_BT - torch.arange(5)).flatten().tolist()
    held = batch.tokens.shape[1] - 5
    assert held == max(2, min(lookahead, 6))
    assert reach == [min(lookahead, held + 4 - i) for i in range(5)]
