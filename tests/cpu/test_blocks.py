"""Weights in blocks of 32 inputs, as in GGUF files: packed in their own bits, without loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtp_lightning.cpu import library as native
from mtp_lightning.cpu import packed as packing
from mtp_lightning.cpu.packed import Kind, PackedWeight, packed_weight
from tests.kernels import blocks_of

pytestmark = pytest.mark.usefixtures("own")

SHAPES = [(1, 32), (16, 64), (33, 96), (130, 32), (257, 160)]


def in_fp32(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> PackedWeight:
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_SMALL", ())
        patch.setattr(packing, "_LARGE", (Kind.FULL,))
        return packed_weight(weight)


@pytest.mark.parametrize(
    ("shape", "symmetric"), [(shape, number % 2 == 0) for number, shape in enumerate(SHAPES)]
)
def test_four_bits_have_the_bits_of_fp32(shape, symmetric, monkeypatch):
    weight = blocks_of(shape, 16, sum(shape), symmetric=symmetric)
    found, full = packed_weight(weight), in_fp32(weight, monkeypatch)
    assert found.kind == Kind.BLOCKS4
    lanes = native.lib().packed_size(1, 1, Kind.FULL) // 4
    outputs = -(-shape[0] // lanes) * lanes
    assert found.numbers.nbytes == outputs * shape[1] * 5 // 8
    for rows in (1, 2, 3, 4, 5, 6, 7, 13):
        x = torch.randn(rows, shape[1])
        product = found.linear(x)
        assert torch.equal(product, full.linear(x))
        assert torch.equal(product, torch.cat([found.linear(row) for row in x.split(1)]))
        expected = x.double() @ weight.double().t()
        torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] > 32])
def test_eight_bits_have_the_bits_of_fp32(shape, monkeypatch):
    # As quantizers leave it, one number of every block is 127 steps.
    weight = blocks_of(shape, 255, sum(shape), symmetric=True).view(-1, 32)
    weight[:, 0] = weight.abs().amax(1)
    step = (weight[:, :1] / 127).half().float()
    weight = ((weight / step).round().nan_to_num() * step).view(shape)
    found, full = packed_weight(weight), in_fp32(weight, monkeypatch)
    assert found.kind == Kind.BLOCKS8
    for rows in (1, 3, 7):
        x = torch.randn(rows, shape[1])
        assert torch.equal(found.linear(x), full.linear(x))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_gguf_quantizes_is_read_in_its_bits(name, monkeypatch):
    quants = pytest.importorskip("gguf.quants", reason="needs pip install -e '.[hf]'")
    kind = quants.GGMLQuantizationType[name]
    weight = torch.randn(70, 96) * torch.logspace(-3, 3, 70).unsqueeze(1)
    weight[5], weight[6, 1:], weight[7, :] = 0.0, 0.0, 0.25
    dequantized = quants.dequantize(quants.quantize(weight.numpy(), kind), kind)
    weight = torch.from_numpy(dequantized).float().contiguous()
    found = packed_weight(weight)
    assert found.kind == (Kind.BLOCKS4 if name.startswith("Q4") else Kind.BLOCKS8)
    x = torch.randn(2, 96)
    assert torch.equal(found.linear(x), in_fp32(weight, monkeypatch).linear(x))
    # Packing loses nothing: of an identity the product is the weight.
    assert torch.equal(found.linear(torch.eye(96)).t(), weight)


@pytest.mark.parametrize("value", [2**-20, float("nan"), float("inf"), -float("inf")])
def test_one_number_between_the_levels_is_not_lost(value, monkeypatch):
    weight = blocks_of((70, 64), 16, 3, symmetric=False)
    assert packed_weight(weight).kind == Kind.BLOCKS4
    weight[69, 63] += value
    found = packed_weight(weight)
    assert found.kind == Kind.FULL
    x = torch.randn(2, 64)
    assert torch.equal(
        found.linear(x).nan_to_num(), (in_fp32(weight, monkeypatch).linear(x)).nan_to_num()
    )


def test_inputs_that_fill_no_block_stay_as_they_are():
    weight = blocks_of((16, 64), 16, 1, symmetric=False)[:, :40].contiguous()
    assert packed_weight(weight).kind == Kind.FULL
