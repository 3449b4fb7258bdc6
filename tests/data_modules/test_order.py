"""The order of an epoch: a seeded permutation, which takes no memory for a large corpus."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules import order as order_module
from data_modules.order import LARGE, FeistelOrder, epoch_order, window_order
from tests.data_modules.loaders import loader_of, numbers, stream

seeds = st.integers(0, 2**31)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 3000), seeds, st.integers(0, 99))
def test_feistel_order_is_a_permutation(n, seed, epoch):
    order = FeistelOrder(n, seed=seed, epoch=epoch)
    entries = order[:]
    assert len(order) == len(entries) == n and entries.dtype == np.int64
    assert np.array_equal(np.sort(entries), np.arange(n))


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 2**62), seeds, st.data())
def test_a_slice_of_an_order_of_any_size_equals_its_entries(n, seed, data):
    order = FeistelOrder(n, seed=seed, epoch=1)
    start = data.draw(st.integers(0, n - 1))
    entries = order[start : start + 50]
    assert len(set(entries.tolist())) == len(entries) == min(50, n - start)
    assert entries.min() >= 0 and entries.max() < n
    middle = data.draw(st.integers(0, len(entries) - 1))
    assert order[start + middle : start + middle + 1][0] == entries[middle]


def test_only_orders_above_the_threshold_are_feistel_orders(monkeypatch):
    assert LARGE == 2**26
    monkeypatch.setattr(order_module, "LARGE", 999)
    assert np.array_equal(window_order(999, seed=3, epoch=2), epoch_order(999, seed=3, epoch=2))
    assert isinstance(window_order(1000, seed=3, epoch=2), FeistelOrder)
    # The bits are part of the contract: a run resumed elsewhere sees the same batches.
    assert FeistelOrder(10, seed=0, epoch=0)[:].tolist() == SMALL
    assert FeistelOrder(2**40, seed=0, epoch=0)[:3].tolist() == HUGE


SMALL = [1, 5, 4, 0, 3, 7, 9, 6, 8, 2]
HUGE = [837807340563, 281071186567, 470752200013]


def test_feistel_order_has_the_statistics_of_a_shuffle():
    n = 200_003
    order = FeistelOrder(n, seed=7, epoch=0)[:]
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.01
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.01
    assert abs(np.corrcoef(np.diff(order)[1:], np.diff(order)[:-1])[0, 1] + 0.5) < 0.01
    # The first tenth is spread evenly over the corpus: chi-square of 100 bins, mean 99.
    counts = np.bincount(order[: n // 10] * 100 // n, minlength=100)
    chi = ((counts - n / 1000) ** 2 / (n / 1000)).sum() / (1 - 1 / 10)
    assert 50 < chi < 160
    for other in (FeistelOrder(n, seed=8, epoch=0), FeistelOrder(n, seed=7, epoch=1)):
        assert (other[:] == order).sum() < 20 and abs(np.corrcoef(other[:], order)[0, 1]) < 0.01


def test_a_trillion_windows_take_no_memory():
    tracemalloc.start()
    order = window_order(10**12, seed=0, epoch=0)
    slices = [order[i * 10**9 : i * 10**9 + 256] for i in range(50)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6 and len(np.unique(np.concatenate(slices))) == 50 * 256


@pytest.mark.parametrize("consumed", [1, 6, 9])
def test_a_loader_resumes_in_a_feistel_order(tmp_path, monkeypatch, consumed):
    monkeypatch.setattr(order_module, "LARGE", 0)
    expected = numbers(stream(loader_of(tmp_path, seed=1), 12))
    flat = sum(expected[:6], [])
    assert len(set(flat)) == 24 and flat != epoch_order(25, seed=1, epoch=0)[:24].tolist()
    first = loader_of(tmp_path, seed=1)
    assert numbers(stream(first, consumed)) == expected[:consumed]
    second = loader_of(tmp_path, seed=1, num_workers=1)
    second.load_state_dict(first.state_dict())
    assert numbers(stream(second, 12 - consumed)) == expected[consumed:]
