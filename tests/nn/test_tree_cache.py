"""A tree of tokens in one pass gives every path what a pass over it alone gives."""

from __future__ import annotations

import pytest
import torch

from mtp_lightning.nn.attention import Positions
from mtp_lightning.nn.batch_invariant import batch_invariant_pass
from mtp_lightning.nn.position_tables import PositionTables
from mtp_lightning.nn.tree_cache import Branches, TreeCache
from tests.deepseek import trunk as deepseek_trunk
from tests.kernels import BATCH_INVARIANT, prepared
from tests.models import PARENTS, PATHS


@pytest.mark.parametrize("starts", [[7], [20, 20], [3, 18, 11]])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("latent", [True, False])
def test_every_path_is_as_alone(tiny_trunk, starts, exact, latent):
    config = deepseek_trunk(d_model=32) if latent else tiny_trunk
    layer, rows = config.attention.build(config, 0), len(starts)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 40, config.d_model, generator=generator)
    new = torch.randn(rows, len(PARENTS), config.d_model, generator=generator)
    after = torch.randn(rows, 2, config.d_model, generator=generator)

    def filled():
        tables = PositionTables(config, 48)
        cache = TreeCache(config, tables, n_layers=1, batch_size=rows)
        layer(x[:, : max(starts)], Positions.of_cache(cache, [0] * rows, max(starts)))
        return cache

    with torch.no_grad(), prepared(layer):
        cache, branches = filled(), Branches(PARENTS, torch.device("cpu"))
        with batch_invariant_pass(len(PARENTS) if exact else 99, torch.device("cpu")):
            found = layer(new, Positions.of_tree(cache, starts, branches))
        for path in PATHS:
            chain = filled()
            with batch_invariant_pass(len(path) if exact else 99, torch.device("cpu")):
                expected = layer(new[:, path], Positions.of_cache(chain, starts, len(path)))
            torch.testing.assert_close(found[:, path], expected, rtol=1e-4, atol=1e-5)
            if exact:
                assert torch.equal(cache.distances()[:, path], chain.distances())
                same = torch.stack([a == b for a, b in zip(found[:, path], expected, strict=True)])
                assert same.all() or not BATCH_INVARIANT
            # What is kept of a path is what a chain would have stored.
            kept = object.__new__(TreeCache)
            kept.__dict__.update(cache.__dict__)
            kept._stored = [s.clone() for s in cache._stored]
            kept._kept = dict(cache._kept)
            kept.resize(rows)
            kept.settle(torch.tensor([path] * rows))
            ends = [start + len(path) for start in starts]
            kept.lengths = ends
            expected = layer(after, Positions.of_cache(chain, ends, 2))
            torch.testing.assert_close(
                layer(after, Positions.of_cache(kept, ends, 2)), expected, rtol=1e-4, atol=1e-5
            )
