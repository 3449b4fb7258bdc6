"""The fast paths of layers against float64: values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.nn.init import parameter_seed
from mtp_lightning.nn.norm import RMSNorm
from mtp_lightning.nn.ops import linear, rotary, swiglu
from mtp_lightning.nn.rope import rope_table
from tests import reference

pytestmark = pytest.mark.usefixtures("kernels")


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    seed = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return torch.autograd.grad(output, inputs, seed.to(output.dtype))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    scale = expected.abs().max().clamp(min=1.0)
    torch.testing.assert_close(actual.double() / scale, expected / scale, rtol=0, atol=tolerance)


@torch.no_grad()
def test_a_layer_without_tokens_keeps_its_axes() -> None:
    out = swiglu(torch.empty(2, 0, 24), torch.ones(112, 24), torch.ones(24, 56))
    assert out.shape == (2, 0, 24)


@pytest.mark.parametrize(("rows", "k", "n"), [(1, 24, 56), (31, 56, 24), (32, 1, 3), (100, 24, 56)])
def test_linear_equals_float64(rows: int, k: int, n: int) -> None:
    x = torch.randn(2, rows, k, dtype=torch.float64, requires_grad=True)
    w = torch.randn(n, k, dtype=torch.float64, requires_grad=True)
    x32, w32 = (t.detach().float().requires_grad_() for t in (x, w))
    actual, expected = linear(x32, w32), x @ w.T
    assert_close(actual, expected)
    for a, b in zip(gradients(actual, x32, w32), gradients(expected, x, w), strict=True):
        assert_close(a, b)


def test_linear_gives_the_weights_gradient_alone() -> None:
    x, w = torch.randn(64, 8), torch.randn(8, 8, requires_grad=True)
    linear(x, w).sum().backward()
    assert_close(w.grad, x.double().sum(0).expand(8, 8))


@pytest.mark.parametrize("shape", [(3, 5, 16), (7, 16), (1, 1, 16)])
def test_rms_norm_equals_float64(shape: tuple[int, ...]) -> None:
    norm = RMSNorm(16, 1e-5)
    with torch.no_grad():
        norm.weight.normal_()
    x = (torch.randn(shape, dtype=torch.float64) * 3).requires_grad_()
    gain = norm.weight.detach().double().requires_grad_()
    x32 = x.detach().float().requires_grad_()
    actual, expected = norm(x32), reference.rms_norm(x, gain, 1e-5)
    assert_close(actual, expected)
    pairs = zip(gradients(actual, x32, norm.weight), gradients(expected, x, gain), strict=True)
    for a, b in pairs:
        assert_close(a, b)


@pytest.mark.parametrize(("rows", "c", "f"), [(6, 20, 10), (40, 16, 32)])
def test_swiglu_equals_float64(rows: int, c: int, f: int) -> None:
    sizes = ((rows, c), (2 * f, c), (c, f))
    exact = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes]
    leaves = [t.detach().float().requires_grad_() for t in exact]
    gate, up = (exact[0] @ exact[1].T).split(f, dim=-1)
    actual, expected = swiglu(*leaves), (F.silu(gate) * up) @ exact[2].T
    assert_close(actual, expected)
    for a, b in zip(gradients(actual, *leaves), gradients(expected, *exact), strict=True):
        assert_close(a, b)


def test_rope_equals_rotation_in_float64() -> None:
    positions = torch.tensor([0, 1, 7, 100_000])
    cos, sin = rope_table(positions, 8, 10_000.0)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    expected = torch.stack(
        [reference.rotate(row, int(p), 10_000.0) for row, p in zip(x, positions, strict=True)]
    )
    x32 = x.detach().float().requires_grad_()
    actual = rotary(x32, cos, sin)
    assert_close(actual, expected)
    assert_close(gradients(actual, x32)[0], gradients(expected, x)[0])


def test_parameter_seeds_use_all_bits_that_the_generator_takes() -> None:

    def first(seed: int) -> int:
        generator = torch.Generator().manual_seed(seed)
        return int(torch.randint(2**62, (), generator=generator))

    seeds = [parameter_seed(7, f"block.{i}.weight") for i in range(200)]
    assert all(0 <= seed < 2**32 for seed in seeds) and len(set(seeds)) == 200
    assert any(seed >= 2**31 for seed in seeds)
    assert len({first(seeds[0] ^ (1 << bit)) for bit in range(32)} | {first(seeds[0])}) == 33
    assert first(seeds[0] + 2**32) == first(seeds[0]), "the generator takes more: use it"
