"""Weights in blocks of 32 inputs, as in GGUF files: they are packed without loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtp_lightning.cpu import library as native
from mtp_lightning.cpu import packed as packing
from mtp_lightning.cpu.packed import Kind, PackedWeight, packed_weight
from tests.kernels import blocks_of

pytestmark = pytest.mark.usefixtures("built_library")

SHAPES = [(1, 32), (16, 64), (33, 96), (130, 32), (257, 160)]


def in_fp32(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> PackedWeight:
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_SMALL", ())
        patch.setattr(packing, "_LARGE", (Kind.FULL,))
        return packed_weight(weight)


@pytest.mark.parametrize(
    ("shape", "symmetric"), [(shape, number % 2 == 0) for number, shape in enumerate(SHAPES)]
)
def test_products_of_4_bit_blocks_have_the_bits_of_fp32(shape, symmetric, monkeypatch):
    weight = blocks_of(shape, 16, sum(shape), symmetric=symmetric)
    packed, full = packed_weight(weight), in_fp32(weight, monkeypatch)
    assert packed.kind == Kind.BLOCKS4
    lanes = native.lib().packed_size(1, 1, Kind.FULL) // 4
    outputs = -(-shape[0] // lanes) * lanes
    assert packed.data.nbytes == outputs * shape[1] * 5 // 8
    for rows in (1, 2, 3, 4, 5, 6, 7, 13):
        x = torch.randn(rows, shape[1])
        product = packed.linear(x)
        assert torch.equal(product, full.linear(x))
        assert torch.equal(product, torch.cat([packed.linear(row) for row in x.split(1)]))
        expected = x.double() @ weight.double().t()
        torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] > 32])
def test_products_of_8_bit_blocks_have_the_bits_of_fp32(shape, monkeypatch):
    # As after a quantizer, the largest number of every block is 127 steps.
    weight = blocks_of(shape, 255, sum(shape), symmetric=True).view(-1, 32)
    weight[:, 0] = weight.abs().amax(1)
    step = (weight[:, :1] / 127).half().float()
    weight = ((weight / step).round().nan_to_num() * step).view(shape)
    packed, full = packed_weight(weight), in_fp32(weight, monkeypatch)
    assert packed.kind == Kind.BLOCKS8
    for rows in (1, 3, 7):
        x = torch.randn(rows, shape[1])
        assert torch.equal(packed.linear(x), full.linear(x))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_weights_that_gguf_quantizes_are_packed_in_their_number_of_bits(name, monkeypatch):
    quants = pytest.importorskip("gguf.quants", reason="needs pip install -e '.[hf]'")
    kind = quants.GGMLQuantizationType[name]
    weight = torch.randn(70, 96) * torch.logspace(-3, 3, 70).unsqueeze(1)
    weight[5], weight[6, 1:], weight[7, :] = 0.0, 0.0, 0.25
    dequantized = quants.dequantize(quants.quantize(weight.numpy(), kind), kind)
    weight = torch.from_numpy(dequantized).float().contiguous()
    packed = packed_weight(weight)
    assert packed.kind == (Kind.BLOCKS4 if name.startswith("Q4") else Kind.BLOCKS8)
    x = torch.randn(2, 96)
    assert torch.equal(packed.linear(x), in_fp32(weight, monkeypatch).linear(x))
    # The product with the identity is the weight: nothing is lost.
    assert torch.equal(packed.linear(torch.eye(96)).t(), weight)


@pytest.mark.parametrize("value", [2**-20, float("nan"), float("inf"), -float("inf")])
def test_a_weight_with_one_number_between_the_levels_stays_in_fp32(value, monkeypatch):
    weight = blocks_of((70, 64), 16, 3, symmetric=False)
    assert packed_weight(weight).kind == Kind.BLOCKS4
    weight[69, 63] += value
    packed = packed_weight(weight)
    assert packed.kind == Kind.FULL
    x = torch.randn(2, 64)
    assert torch.equal(
        packed.linear(x).nan_to_num(), (in_fp32(weight, monkeypatch).linear(x)).nan_to_num()
    )


def test_a_weight_whose_inputs_fill_no_whole_block_stays_in_fp32():
    weight = blocks_of((16, 64), 16, 1, symmetric=False)[:, :40].contiguous()
    assert packed_weight(weight).kind == Kind.FULL
