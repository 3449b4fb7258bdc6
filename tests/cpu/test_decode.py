"""Decoding few rows: packed products and whole blocks in one call, against float64, the layers and
the paths of a tree."""

from __future__ import annotations

import pytest
import torch

from mtp_lightning.cpu import library as native
from mtp_lightning.cpu.packed import Kind, packed_weight
from mtp_lightning.cpu.prepared import _FUSED
from mtp_lightning.decoding.precision import round_weights, roundings_of
from mtp_lightning.nn.attention import Attention, GroupedQueryConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.kv_cache import KVCache
from mtp_lightning.nn.position_tables import PositionTables
from mtp_lightning.nn.tree_cache import Branches, TreeCache
from mtp_lightning.nn.trunk import Trunk
from mtp_lightning.runtime import threads
from tests.kernels import blocks_of, prepared
from tests.models import PARENTS, PATHS

pytestmark = pytest.mark.usefixtures("built_library")

SHAPES = [(1, 1), (7, 5), (16, 16), (33, 20), (48, 9), (64, 96), (100, 7), (160, 96), (257, 64)]


def rounded(weight: torch.Tensor, kind: Kind) -> torch.Tensor:
    if kind == Kind.FULL:
        return weight
    if kind == Kind.FP16:
        return weight.half().float()
    layer = torch.nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight.data = weight.clone()
    round_weights(layer, roundings_of(layer, "bf16" if kind == Kind.BF16 else "int8"))
    return layer.weight.data


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        *((shape, Kind.FULL) for shape in SHAPES),
        *((shape, kind) for shape in SHAPES[1::3] for kind in (Kind.BF16, Kind.FP16, Kind.BYTE)),
    ],
)
def test_products_equal_float64_and_rows_have_the_bits_of_rows_alone(shape, kind):
    weight = rounded(torch.randn(shape), kind)
    product = packed_weight(weight)
    if weight.numel() > 1:  # a single number is a multiple of itself
        assert product.kind == kind
    for rows in (1, 2, 3, 4, 5, 6, 7, 13, 71):
        x = torch.randn(rows, shape[1])
        y = product.linear(x)
        expected = x.double() @ weight.double().t()
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(y, torch.cat([product.linear(row) for row in x.split(1)]))


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bfloat16, Kind.BF16), (torch.float16, Kind.FP16)]
)
def test_products_of_weights_of_16_bits_have_the_bits_of_fp32(dtype, kind):
    weight = torch.randn(130, 40).to(dtype).float()
    weight[3, 5], weight[7, 0] = float("inf"), -0.0
    weight[5, 2] = 3 * torch.finfo(dtype).smallest_normal / 4  # a subnormal number
    half = packed_weight(weight)
    weight[129, 39] = 1 + 2**-20  # 16 bits cannot hold this number
    full = packed_weight(weight)
    assert (half.kind, full.kind) == (kind, Kind.FULL)
    assert torch.equal(half.unpacked()[:129], weight[:129])
    assert half.unpacked()[7, 0].signbit()
    ids = torch.tensor([7, 3, 128])
    assert torch.equal(half.rows(ids), weight[ids])
    assert half.data.nbytes * 2 <= full.data.nbytes * 1.25
    x = torch.randn(3, 40)
    x[:, 5] = x[:, 5].abs()
    assert torch.equal(half.linear(x)[:, :129], full.linear(x)[:, :129])


def test_a_denormal_number_that_16_bits_cannot_hold_is_kept_where_denormals_count_as_0():
    weight = torch.randn(33, 40).half().float()
    weight[2, 3] = 1e-40
    torch.set_flush_denormal(True)
    try:
        packed = packed_weight(weight)
    finally:
        torch.set_flush_denormal(False)
    assert packed.kind == Kind.FULL and torch.equal(packed.unpacked(), weight)


def test_int8_rounds_to_the_nearest_of_255_levels_per_row():
    weight = torch.randn(70, 40) * torch.logspace(-6, 6, 70).unsqueeze(1)
    weight[5], weight[6, 1:] = 0.0, 0.0
    int8 = rounded(weight, Kind.BYTE).double()
    largest = weight.double().abs().amax(1, keepdim=True)
    # Within 2^-15, the step is the largest number divided by 127.
    steps = largest / 127
    assert ((int8 - weight).abs() <= steps * (0.5 + 2**-7)).all()
    levels = (int8 / steps.clamp(min=1e-30)).abs()
    assert ((levels - levels.round()).abs() < 0.01).all() and levels.max() <= 127.01
    assert torch.equal(int8[5], torch.zeros(40, dtype=torch.float64))
    product = packed_weight(int8.float())
    assert product.kind == Kind.BYTE
    assert product.data.nbytes <= 80 * 40 + 4 * 80
    # The product with the identity is the weight: nothing is lost.
    assert torch.equal(product.linear(torch.eye(40)).t(), int8.float())


def test_a_weight_with_one_number_between_the_int8_levels_stays_in_fp32():
    weight = rounded(torch.randn(130, 40), Kind.BYTE)
    assert packed_weight(weight).kind == Kind.BYTE
    weight[129, 39] += 2**-20
    assert packed_weight(weight).kind == Kind.FULL
    weight[129, 39] = float("nan")
    assert packed_weight(weight).kind == Kind.FULL


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [[0.0], [1.0], [0.0, 3.0], [2.0, -127.0, 5.0]])
def test_nan_and_infinity_reach_the_product(value, row):
    for at in range(len(row) + 1):
        weight = torch.zeros(20, len(row) + 1)
        weight[7] = torch.tensor([*row[:at], value, *row[at:]])
        # BLAS leaves out some products with 0.
        expected = (torch.eye(weight.shape[1]).unsqueeze(1) * weight).sum(-1)
        for matrix in (weight, rounded(weight, Kind.BF16)):
            y = packed_weight(matrix).linear(torch.eye(weight.shape[1]))
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        int8 = rounded(weight, Kind.BYTE)
        assert int8[7].isnan().all() and (int8[:7] == 0).all() and (int8[8:] == 0).all()
        ones = torch.ones(1, weight.shape[1])
        assert packed_weight(int8).linear(ones).isnan().nonzero().tolist() == [[0, 7]]
    weight[:] = value
    assert not packed_weight(weight).linear(ones).isfinite().any()


@pytest.mark.parametrize("kind", [Kind.FULL, Kind.BYTE, Kind.BLOCKS4])
def test_products_have_the_same_bits_on_two_threads(kind):
    blocks = kind == Kind.BLOCKS4
    weight = blocks_of((4096, 128), 16, 1, symmetric=False) if blocks else torch.randn(4096, 128)
    product, x = packed_weight(weight if blocks else rounded(weight, kind)), torch.randn(3, 128)
    assert product.kind == kind
    alone = product.linear(x)
    with threads(2):
        assert torch.equal(product.linear(x), alone)


def fused(layer: torch.nn.Module) -> bool:
    """Whether a layer has a forward pass in one call."""
    return "forward" in vars(layer) and _FUSED[type(layer)](layer) is not None


CAPACITY = 160  # tokens of a row


def build(*, heads=4, kv=2, d_head=None, layers=3, **attention) -> Trunk:
    config = TrunkConfig(
        vocab_size=11, d_model=32, n_layers=layers, n_heads=heads, n_kv_heads=kv, d_ff=40,
        d_head=d_head, attention=GroupedQueryConfig(**attention),
    )  # fmt: skip
    trunk = Trunk(config).eval().requires_grad_(False)
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return trunk


def run(trunk, x, starts, *, packed, before):
    """The output of a pass over a cache with the entries ``before``, and the entries after it."""
    tables = PositionTables(trunk.config, CAPACITY, dtype=x.dtype)
    cache = KVCache(trunk.config, tables, n_layers=len(trunk.blocks), batch_size=x.shape[0])
    for entries, old in zip(cache.entries_L_BSMH, before, strict=True):
        entries.copy_(old)
    cache.lengths = list(starts)
    ctx = ForwardContext.of_cache(cache, list(starts), x.shape[1])
    if packed:
        with prepared(trunk):
            assert fused(trunk) or len(trunk.blocks) == 1
            return trunk(x, ctx), cache.entries_L_BSMH
    return trunk(x, ctx), cache.entries_L_BSMH


CASES = {
    "grouped": {},
    "one key head": {"heads": 3, "kv": 1, "d_head": 10},
    "every head": {"kv": 4, "d_head": 16},
    "wide heads": {"heads": 2, "kv": 1, "d_head": 48},
    # Sizes that the compiler knows.
    "heads of 32": {"heads": 3, "kv": 1, "d_head": 32},
    "heads of 64": {"d_head": 64},
    "heads of 128": {"heads": 3, "kv": 1, "d_head": 128},
    "norms": {"qk_norm": True},
    "biases": {"qkv_bias": True},
    "half rotated": {"d_rope": 4},
    "one layer": {"layers": 1},
}


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "starts", "width"),
    [
        *((name, (17, 3, 30), 3) for name in CASES),
        # More positions than are mixed together.
        *((name, (129, 63), 2) for name in ("grouped", "wide heads", "heads of 64")),
        *(("grouped", *at) for at in (((0,), 16), ((9,), 1), ((31,), 3), ((5, 5), 16))),
    ],
)
def test_blocks_in_one_call_equal_the_layers_in_float64(name, starts, width):
    trunk = build(**CASES[name])
    x = torch.randn(len(starts), width, 32)
    shape = KVCache(
        trunk.config, PositionTables(trunk.config, CAPACITY), n_layers=1, batch_size=len(starts)
    ).entries_L_BSMH[0].shape  # fmt: skip
    before = [torch.randn(shape) for _ in trunk.blocks]
    inputs = x.clone()
    out, entries = run(trunk, x, starts, packed=True, before=before)
    assert torch.equal(x, inputs)
    # A token has the same bits if it is decoded alone.
    for row, start in enumerate(starts):
        cached = [layer[row : row + 1].clone() for layer in before]
        for j in range(width):
            token = x[row : row + 1, j : j + 1]
            alone, cached = run(trunk, token, [start + j], packed=True, before=cached)
            assert torch.equal(alone.final[0, 0], out.final[row, j])
            assert torch.equal(alone.before_last[0, 0], out.before_last[row, j])
    exact = [layer.double() for layer in before]
    expected, expected_entries = run(trunk.double(), x.double(), starts, packed=False, before=exact)
    for value in ("final", "pre_norm", "before_last"):
        torch.testing.assert_close(
            getattr(out, value).double(), getattr(expected, value), rtol=1e-4, atol=1e-4
        )
    for a, b in zip(entries, expected_entries, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


class UsersAttention(Attention):
    """A layer of a user."""


def test_layers_of_users_keep_their_forward_passes(monkeypatch):
    trunk = build()
    with prepared(trunk):
        assert all(fused(block) for block in trunk.blocks)
    trunk.blocks[1].attention.__class__ = UsersAttention
    with prepared(trunk):
        assert not fused(trunk) and not fused(trunk.blocks[1])
        assert fused(trunk.blocks[0])
    monkeypatch.setattr(native, "library", None)
    with prepared(trunk):
        assert not fused(trunk) and not fused(trunk.blocks[0])


@pytest.mark.parametrize("starts", [[7], [20, 20], [3, 18, 11]])
def test_every_path_of_a_tree_has_the_bits_of_a_chain(tiny_trunk, starts):
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
        trunk(x[:, : max(starts)], ForwardContext.of_cache(cache, [0] * rows, max(starts)))
        return cache

    branches = Branches(PARENTS, torch.device("cpu"))
    with torch.no_grad(), prepared(trunk):
        assert "forward" in vars(trunk)
        for path in PATHS:
            cache, chain = filled(), filled()
            out = trunk(new, ForwardContext.of_tree(cache, starts, branches)).final
            expected = trunk(new[:, path], ForwardContext.of_cache(chain, starts, len(path))).final
            assert torch.equal(out[:, path], expected)
            cache.keep_path(torch.tensor([path] * rows))
            cache.lengths = ends = [start + len(path) for start in starts]
            kept, alone = (
                trunk(after, ForwardContext.of_cache(c, ends, 2)) for c in (cache, chain)
            )
            assert torch.equal(kept.final, alone.final)
