"""Key-value caches: positions, masks, rejected tokens, rows, and trees of tokens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import nn

from mtp_lightning.nn.batch_invariant import batch_invariant_pass
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.kv_cache import KVCache
from mtp_lightning.nn.ops import rotary
from mtp_lightning.nn.position_tables import PositionTables
from mtp_lightning.nn.rope import YarnScaling, over_whole_heads, rope_table, rotate_in_place
from mtp_lightning.nn.tree_cache import Branches, TreeCache
from tests.deepseek import trunk as deepseek_trunk
from tests.kernels import BATCH_INVARIANT, prepared
from tests.models import PARENTS, PATHS


def cache_of(config: TrunkConfig, rows: int, *, capacity: int = 40) -> KVCache:
    tables = PositionTables(config, capacity)
    return KVCache(config, tables, n_layers=1, batch_size=rows)


def passes(width: int, exact: bool) -> AbstractContextManager[None]:
    return batch_invariant_pass(width, torch.device("cpu")) if exact else nullcontext()


@pytest.fixture(params=["grouped", "latent"])
def trunk(request, tiny_trunk):
    return tiny_trunk if request.param == "grouped" else deepseek_trunk(d_model=32)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def attention(config: TrunkConfig) -> nn.Module:
    torch.manual_seed(0)
    layer = config.attention.build(config, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def test_rotation_in_place_equals_rotary():
    x, positions = torch.randn(2, 5, 3, 8), torch.arange(5)
    cos, sin = (t.unsqueeze(-2) for t in rope_table(positions, 8, 100.0))
    expected = rotary(x, cos, sin)
    whole = (t.unsqueeze(-2) for t in over_whole_heads(*rope_table(positions, 8, 100.0)))
    rotate_in_place(x, *whole)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize(
    ("kv", "exact"),
    [(1, True), (2, False), (4, True), ("latent", True), ("latent", False), ("scaled", True)],
)
def test_passes_of_any_width_equal_one_window(kv, exact):
    sizes = {"vocab_size": 9, "d_model": 32, "n_layers": 1, "n_heads": 4, "d_ff": 8}
    if isinstance(kv, int):
        config = TrunkConfig(n_kv_heads=kv, **sizes)
    else:
        yarn = YarnScaling(factor=4.0, original_positions=8, mscale=1.0, mscale_all_dim=0.7)
        config = deepseek_trunk(d_model=32, rope_scaling=yarn if kv == "scaled" else None)
    layer, x = attention(config), torch.randn(3, 30, 32)
    with torch.no_grad():
        expected = layer(x, ForwardContext.of_window(config, 30, device=torch.device("cpu")))
        cache, start = cache_of(config, 3), 0
        for width in (20, 1, 3, 5, 1):
            ctx = ForwardContext.of_cache(cache, [start] * 3, width)
            with passes(width, exact):
                out = layer(x[:, start : start + width], ctx)
            assert_close(out, expected[:, start : start + width])
            start += width


@pytest.mark.parametrize("exact", [True, False])
def test_rows_of_unequal_lengths_and_rejected_tokens(trunk, exact):
    layer, x = attention(trunk), torch.randn(2, 24, 32)
    with torch.no_grad():
        expected = layer(x, ForwardContext.of_window(trunk, 24, device=torch.device("cpu")))
        cache = cache_of(trunk, 2)
        layer(x[:, :18], ForwardContext.of_cache(cache, [0, 0], 18))
        for starts in ([4, 11], [6, 12], [3, 20], [7, 7]):  # back and forth, over stale entries
            if any(s > length for s, length in zip(starts, cache.lengths, strict=True)):
                continue
            new = torch.stack([x[row, s : s + 3] for row, s in enumerate(starts)])
            with passes(3, exact):
                out = layer(new, ForwardContext.of_cache(cache, starts, 3))
            for row, s in enumerate(starts):
                assert_close(out[row], expected[row, s : s + 3])


def test_rows_are_dropped_and_added_and_storage_grows(trunk):
    layer, x = attention(trunk), torch.randn(3, 40, 32)
    with torch.no_grad():
        expected = layer(x, ForwardContext.of_window(trunk, 40, device=torch.device("cpu")))
        cache = cache_of(trunk, 3, capacity=16)
        layer(x[:, :10], ForwardContext.of_cache(cache, [0, 0, 0], 10))
        storage = cache.entries_L_BSMH[0].data_ptr()
        cache.drop_row(0)  # its slot is the last row's
        assert cache.batch_size == 2 and cache.entries_L_BSMH[0].data_ptr() == storage
        cache.resize(3)  # x[2], x[1], and a new row
        assert cache.lengths == [10, 10, 0]
        layer(x[:1, :10], ForwardContext.of_cache(cache.rows(slice(2, 3)), [0], 10))
        cache.lengths[2] = 10
        cache = cache.grown(PositionTables(trunk, 48))
        order = [2, 1, 0]
        for start in range(10, 40, 5):
            out = layer(x[order, start : start + 5], ForwardContext.of_cache(cache, [start] * 3, 5))
            assert_close(out, expected[order, start : start + 5])


def test_more_tokens_than_a_cache_has_room_for_are_refused(tiny_trunk):
    cache = cache_of(tiny_trunk, 1, capacity=16)
    cache.open([0], 16)
    with pytest.raises(ValueError, match="17 tokens do not fit into a cache of 16"):
        cache.open([16], 1)


@pytest.mark.parametrize(
    ("starts", "exact", "latent"),
    [([7], True, True), ([20, 20], False, False), ([3, 18, 11], True, False),
     ([3, 18, 11], False, True)],
)  # fmt: skip
def test_every_path_of_a_tree_is_computed_as_a_chain(tiny_trunk, starts, exact, latent):
    config = deepseek_trunk(d_model=32) if latent else tiny_trunk
    layer, rows = attention(config), len(starts)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 40, config.d_model, generator=generator)
    new = torch.randn(rows, len(PARENTS), config.d_model, generator=generator)
    after = torch.randn(rows, 2, config.d_model, generator=generator)

    def filled():
        tables = PositionTables(config, 48)
        cache = TreeCache(config, tables, n_layers=1, batch_size=rows)
        layer(x[:, : max(starts)], ForwardContext.of_cache(cache, [0] * rows, max(starts)))
        return cache

    with torch.no_grad(), prepared(layer):
        cache, branches = filled(), Branches(PARENTS, torch.device("cpu"))
        with batch_invariant_pass(len(PARENTS) if exact else 99, torch.device("cpu")):
            out = layer(new, ForwardContext.of_tree(cache, starts, branches))
        for path in PATHS:
            chain = filled()
            with batch_invariant_pass(len(path) if exact else 99, torch.device("cpu")):
                expected = layer(new[:, path], ForwardContext.of_cache(chain, starts, len(path)))
            assert_close(out[:, path], expected)
            if exact:
                assert torch.equal(cache.distances()[:, path], chain.distances())
                assert torch.equal(out[:, path], expected) or not BATCH_INVARIANT
            # The kept entries of a path are those that a chain stores.
            kept = object.__new__(TreeCache)
            kept.__dict__.update(cache.__dict__)
            kept._stored = [s.clone() for s in cache._stored]
            kept._new_entries = dict(cache._new_entries)
            kept.resize(rows)
            kept.keep_path(torch.tensor([path] * rows))
            ends = [start + len(path) for start in starts]
            kept.lengths = ends
            expected = layer(after, ForwardContext.of_cache(chain, ends, 2))
            assert_close(layer(after, ForwardContext.of_cache(kept, ends, 2)), expected)
