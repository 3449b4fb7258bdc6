"""``activations=int8``: products of integers against float64, and rows against rows alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.cpu import library as native
from mtp_lightning.cpu.packed import Kind, PackedWeight, pack, packed_of, packed_weight, unpack
from mtp_lightning.decoding import generate
from mtp_lightning.decoding.fused import decoding_passes
from mtp_lightning.decoding.precision import use_activations, use_precision
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.ops import linear
from mtp_lightning.runtime import threads
from tests.decoding.models import random_prompts, small_model
from tests.integration.helpers import evaluated
from tests.kernels import blocks_of, k_quants

pytestmark = pytest.mark.skipif(
    native.library is None or not native.lib().multiplies_bytes(),
    reason=f"needs {native.NEEDED_FOR_INTEGERS}",
)
SHAPES = [(16, 64), (33, 96), (64, 128), (130, 160), (257, 576)]


def in_blocks(kind: Kind, shape: tuple[int, int], seed: int) -> tuple[Tensor, PackedWeight]:
    """Random weights of a kind and their packed copy with products of integers."""
    if kind == Kind.BLOCKS4:
        weight = blocks_of(shape, 16, seed, symmetric=False)
        packed = packed_weight(weight)
    elif kind == Kind.BLOCKS8:  # as Q8_0
        blocks = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).view(-1, 32)
        step = (blocks.abs().amax(1, keepdim=True) / 127).half().float()
        weight = ((blocks / step).round().clamp(-127, 127) * step).view(shape)
        packed = packed_weight(weight)
    else:  # the factor has more bits than fp16, and few enough for exact sums
        bits, group = (4, 32) if kind == Kind.BLOCKS4_FULL else (6, 16)
        weight, scales = k_quants(shape, bits, group, (1 + 2**-12) * 2**-14)
        packed = packed_weight(weight, scales)
    assert packed is not None and packed.kind == kind, packed
    return weight, replace(packed, integers=True)


def rounded(x: Tensor, group: int) -> Tensor:
    """The rows as products of integers round them, in float64."""
    parts = x.double().unflatten(-1, (-1, group))
    step = parts.abs().amax(-1, keepdim=True) / 127
    return torch.where(step == 0, 0.0, (parts / step).round() * step).flatten(-2)


@pytest.mark.parametrize("kind", [Kind.BLOCKS4, Kind.BLOCKS8, Kind.BLOCKS4_FULL, Kind.BLOCKS8_FULL])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_integers_equal_float64(kind: Kind, shape: tuple[int, int]) -> None:
    weight, packed = in_blocks(kind, shape, sum(shape))
    group = 16 if kind == Kind.BLOCKS8_FULL else 32
    x = torch.randn(13, shape[1]) * torch.logspace(-3, 3, 13)[:, None]
    product = packed.linear(x)
    expected = rounded(x, group) @ weight.double().t()
    size = x.double().abs() @ weight.double().abs().t()
    assert ((product - expected).abs() <= 2e-6 * size).all()
    # A row has the same bits alone and with others, in any tile.
    for rows in (1, 2, 3, 4, 5, 7):
        for part in x.split(rows):
            at = int((x == part[0]).all(-1).nonzero()[0, 0])
            assert torch.equal(packed.linear(part), product[at : at + len(part)])
    with threads(2):
        assert torch.equal(packed.linear(x.repeat(40, 1))[: len(x)], product)


@pytest.mark.parametrize("kind", [Kind.BLOCKS4, Kind.BLOCKS8, Kind.BLOCKS4_FULL, Kind.BLOCKS8_FULL])
def test_blocks_unpacked_once_for_many_rows_give_the_bits_of_rows_alone(kind: Kind) -> None:
    weight, packed = in_blocks(kind, (150, 160), 2)
    packed, x = replace(packed, integers=False), torch.randn(71, 160)
    product = packed.linear(x)
    assert torch.equal(product, torch.cat([packed.linear(row) for row in x.split(1)]))
    torch.testing.assert_close(
        product.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-5
    )


def test_nan_and_infinity_change_only_their_row() -> None:
    _, packed = in_blocks(Kind.BLOCKS4, (33, 96), 1)
    x = torch.randn(6, 96)
    finite = packed.linear(x)
    x[1], x[2, 40], x[4, 70] = 0, float("nan"), float("inf")
    product = packed.linear(x)
    assert torch.equal(product[1], torch.zeros(33))
    assert product[2].isnan().all() and product[4].isnan().all()
    assert torch.equal(product[[0, 3, 5]], finite[[0, 3, 5]])


def test_weights_in_blocks_multiply_integers_after_use_activations() -> None:
    model = small_model(2, 1)
    with pytest.raises(
        UserError, match="activations=int8 needs weights in blocks .*precision=int4"
    ):
        use_activations(model, "int8")
    use_precision(model, "int4")
    use_activations(model, "fp32")
    weight = next(m.weight for m in model.trunk.modules() if isinstance(m, Linear))
    x = torch.randn(1, 30, weight.shape[1])
    pack(weight)
    with torch.inference_mode():
        plain = linear(x, weight)
        unpack(weight)
        use_activations(model, "int8")
        pack(weight)
        packed = packed_of(weight)
        assert packed is not None and packed.integers and packed.kind == Kind.BLOCKS4
        # The 30 tokens are more than those for which other packed copies are used.
        assert torch.equal(linear(x, weight), packed.linear(x))
        assert not torch.equal(linear(x, weight), plain)
        torch.testing.assert_close(linear(x, weight), plain, rtol=0.05, atol=0.1)
    unpack(weight)


@pytest.mark.parametrize("rows", [1, 3])
def test_drafts_change_no_bit_with_products_of_integers(rows: int) -> None:
    model = small_model(5, 2)
    use_precision(model, "int4")
    use_activations(model, "int8")
    prompts = random_prompts(5, (4, 9, 2))
    shared: dict[str, Any] = {"max_new_tokens": 40, "batch_size": rows, "logprobs": 1}
    plain = generate(model, prompts, speculative=False, **shared)
    for tree in (None, [2, 1]):
        for drafted, expected in zip(
            generate(model, prompts, tree=tree, **shared), plain, strict=True
        ):
            assert drafted.token_ids == expected.token_ids
            assert drafted.logprobs == expected.logprobs
    # Control: products in fp32 of the same weights round otherwise.
    fp32 = small_model(5, 2)
    use_precision(fp32, "int4")
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    with decoding_passes(model), decoding_passes(fp32):
        int8, full = (m.head(m(WindowBatch(ids, m.depth))[0]) for m in (model, fp32))
    assert not torch.equal(int8, full)
    torch.testing.assert_close(int8, full, rtol=0.1, atol=0.15 * float(full.std()))


def test_generate_opens_models_with_int8_activations(opened: Callable[..., MTPModel]) -> None:
    settings = {"precision": "int4", "activations": "int8"}
    packed = [packed_of(p) for p in opened(**settings).parameters()]
    assert any(weight is not None and weight.integers for weight in packed)
    with pytest.raises(UserError, match="does not go together with compile=true"):
        opened(**settings, compile=True)
    with pytest.raises(UserError, match="activations=int2 is unknown"):
        opened(**{**settings, "activations": "int2"})


def test_evaluate_measures_losses_with_integers_too(finished: Path) -> None:
    quick = ("precision=int4", "decode.n_prompts=0", "long_range=false")
    full, rounded = (
        evaluated(finished, f"activations={name}", *quick) for name in ("fp32", "int8")
    )
    for tag in ("val/loss_depth_0", "val/loss_depth_1"):
        assert full[tag] != rounded[tag] == pytest.approx(full[tag], abs=0.05)


def test_int8_activations_are_refused_without_the_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_model(2, 1)
    use_precision(model, "int4")
    fake = SimpleNamespace(multiplies_bytes=lambda: 0)
    monkeypatch.setattr(native, "library", fake)
    with pytest.raises(UserError, match="avx512_vnni in /proc/cpuinfo"):
        use_activations(model, "int8")
    monkeypatch.setattr(native, "library", None)
    with pytest.raises(UserError, match="activations=int8 needs a CPU with AVX2"):
        use_activations(model, "int8")
