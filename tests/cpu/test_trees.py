"""Fused blocks over a tree give every path the bits of a pass over that path alone."""

from __future__ import annotations

import pytest
import torch

from mtp_lightning.cpu import library as native
from mtp_lightning.nn.attention import Positions
from mtp_lightning.nn.position_tables import PositionTables
from mtp_lightning.nn.tree_cache import Branches, TreeCache
from mtp_lightning.nn.trunk import Trunk
from tests.kernels import prepared
from tests.models import PARENTS, PATHS


@pytest.mark.parametrize("starts", [[7], [20, 20], [3, 18, 11]])
def test_every_path_has_its_bits(tiny_trunk, starts):
    if native.library is None:
        pytest.skip("needs the layers in C++")
    trunk, rows = Trunk(tiny_trunk), len(starts)
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 20, tiny_trunk.d_model, generator=generator)
    new = torch.randn(rows, len(PARENTS), tiny_trunk.d_model, generator=generator)
    after = torch.randn(rows, 2, tiny_trunk.d_model, generator=generator)

    def filled():
        tables = PositionTables(tiny_trunk, 48)
        cache = TreeCache(tiny_trunk, tables, n_layers=tiny_trunk.n_layers, batch_size=rows)
        trunk(x[:, : max(starts)], Positions.of_cache(cache, [0] * rows, max(starts)))
        return cache

    branches = Branches(PARENTS, torch.device("cpu"))
    with torch.no_grad(), prepared(trunk):
        assert "forward" in vars(trunk)
        for path in PATHS:
            cache, chain = filled(), filled()
            found = trunk(new, Positions.of_tree(cache, starts, branches)).final
            expected = trunk(new[:, path], Positions.of_cache(chain, starts, len(path))).final
            assert torch.equal(found[:, path], expected)
            cache.settle(torch.tensor([path] * rows))
            cache.lengths = ends = [start + len(path) for start in starts]
            kept, alone = (trunk(after, Positions.of_cache(c, ends, 2)) for c in (cache, chain))
            assert torch.equal(kept.final, alone.final)
