"""Latent attention against DeepSeek's equations in float64, and its cache."""

from __future__ import annotations

import pytest
import torch

from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.kv_cache import KVCache
from mtp_lightning.nn.mla import LatentAttention, pairs_to_halves
from mtp_lightning.nn.position_tables import PositionTables
from tests import deepseek, deepseek_reference


def layer_of(config: TrunkConfig) -> LatentAttention:
    torch.manual_seed(0)
    layer = LatentAttention(config, config.attention)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.7 if parameter.dim() == 1 else 0.0, 0.3)
    return layer


def expected(x_BTC: torch.Tensor, layer: LatentAttention, config: TrunkConfig, documents=None):
    weights = {f"a.{name}": t.double() for name, t in layer.state_dict().items()}
    documents = documents or [None] * len(x_BTC)
    return torch.stack(
        [
            deepseek_reference.latent_attention(x.double(), weights, "a", config, d)
            for x, d in zip(x_BTC, documents, strict=True)
        ]
    )


# Values are narrower than a key, as wide, wider.
@pytest.mark.parametrize(
    ("q_rank", "d_value", "masked"), [(12, 6, True), (None, 12, False), (12, 14, True)]
)
def test_windows_equal_the_equations(q_rank: int | None, d_value: int, masked: bool) -> None:
    config = deepseek.trunk(latent={"q_rank": q_rank, "d_value": d_value})
    layer = layer_of(config)
    x = torch.randn(2, 37, 32)  # more than one block of queries
    documents = [[0] * 9 + [1] * 28, [3] * 37] if masked else None
    ctx = ForwardContext.of_window(
        config, 37, device=x.device, documents=torch.tensor(documents) if documents else None
    )
    with torch.no_grad():
        out = layer(x, ctx).double()
    torch.testing.assert_close(out, expected(x, layer, config, documents), rtol=1e-4, atol=1e-5)


def test_the_cache_holds_one_latent_and_one_rotary_key_per_token() -> None:
    tables = PositionTables(deepseek.TRUNK, 16)
    cache = KVCache(deepseek.TRUNK, tables, n_layers=3, batch_size=2)
    numbers = sum(entries.numel() for entries in cache.entries_L_BSMH)
    assert numbers == 3 * 2 * tables.capacity * (10 + 4)


def test_pairs_to_halves_puts_even_places_first() -> None:
    assert pairs_to_halves(torch.arange(6)).tolist() == [0, 2, 4, 1, 3, 5]
