"""Products of integers (``activations=int8``), against float64 and against themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

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
        found = packed_weight(weight)
    elif kind == Kind.BLOCKS8:  # as Q8_0
        blocks = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).view(-1, 32)
        step = (blocks.abs().amax(1, keepdim=True) / 127).half().float()
        weight = ((blocks / step).round().clamp(-127, 127) * step).view(shape)
        found = packed_weight(weight)
    else:  # by a factor of more bits than fp16 has, and of few enough for exact sums
        bits, group = (4, 32) if kind == Kind.BLOCKS4_FULL else (6, 16)
        weight, scales = k_quants(shape, bits, group, (1 + 2**-12) * 2**-14)
        found = packed_weight(weight, scales)
    assert found is not None and found.kind == kind, found
    return weight, replace(found, integers=True)


def rounded(x: Tensor, group: int) -> Tensor:
    """The rows as products of integers see them, in float64."""
    parts = x.double().unflatten(-1, (-1, group))
    step = parts.abs().amax(-1, keepdim=True) / 127
    return torch.where(step == 0, 0.0, (parts / step).round() * step).flatten(-2)


@pytest.mark.parametrize("kind", [Kind.BLOCKS4, Kind.BLOCKS8, Kind.BLOCKS4_FULL, Kind.BLOCKS8_FULL])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_integers_against_float64(kind: Kind, shape: tuple[int, int]) -> None:
    weight, found = in_blocks(kind, shape, sum(shape))
    group = 16 if kind == Kind.BLOCKS8_FULL else 32
    x = torch.randn(13, shape[1]) * torch.logspace(-3, 3, 13)[:, None]
    product = found.linear(x)
    expected = rounded(x, group) @ weight.double().t()
    size = x.double().abs() @ weight.double().abs().t()
    assert ((product - expected).abs() <= 2e-6 * size).all()
    # A row has the same bits alone and with others, whatever the tile.
    for rows in (1, 2, 3, 4, 5, 7):
        for part in x.split(rows):
            at = int((x == part[0]).all(-1).nonzero()[0, 0])
            assert torch.equal(found.linear(part), product[at : at + len(part)])
    with threads(2):
        assert torch.equal(found.linear(x.repeat(40, 1))[: len(x)], product)


def test_what_is_no_number_stays_in_its_row() -> None:
    _, found = in_blocks(Kind.BLOCKS4, (33, 96), 1)
    x = torch.randn(6, 96)
    product = found.linear(x)
    x[1], x[2, 40], x[4, 70] = 0, float("nan"), float("inf")
    wrong = found.linear(x)
    assert torch.equal(wrong[1], torch.zeros(33))
    assert wrong[2].isnan().all() and wrong[4].isnan().all()
    assert torch.equal(wrong[[0, 3, 5]], product[[0, 3, 5]])


def test_a_marked_weight_multiplies_integers_where_it_is_in_blocks() -> None:
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
        held = packed_of(weight)
        assert held is not None and held.integers and held.kind == Kind.BLOCKS4
        # Also for many tokens, where packed copies are not used else.
        assert torch.equal(linear(x, weight), held.linear(x))
        assert not torch.equal(linear(x, weight), plain)
        torch.testing.assert_close(linear(x, weight), plain, rtol=0.05, atol=0.1)
    unpack(weight)


@pytest.mark.parametrize("rows", [1, 3])
def test_drafts_change_no_bit(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(5, 2)
    use_precision(model, "int4")
    use_activations(model, "int8")
    prompts = random_prompts(5, (4, 9, 2))
    texts = {}
    for name, way in {"plain": {"speculative": False}, "two": {}, "tree": {"tree": [2, 1]}}.items():
        texts[name] = generate(
            model,
            prompts,
            max_new_tokens=40,
            batch_size=rows,
            logprobs=1,
            **way,  # type: ignore[arg-type]
        )
    for name in ("two", "tree"):
        for own, plain in zip(texts[name], texts["plain"], strict=True):
            assert own.token_ids == plain.token_ids
            assert own.logprobs == plain.logprobs
    # It is another arithmetic of the same weights.
    fp32 = small_model(5, 2)
    use_precision(fp32, "int4")
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    with decoding_passes(model), decoding_passes(fp32):
        ours, theirs = (m.head(m(WindowBatch(ids, m.depth))[0]) for m in (model, fp32))
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.15 * float(theirs.std()))


def test_generate_takes_it(opened: Callable[..., MTPModel]) -> None:
    asked = {"precision": "int4", "activations": "int8"}
    held = [packed_of(p) for p in opened(**asked).parameters()]
    assert any(h is not None and h.integers for h in held)
    with pytest.raises(UserError, match="does not go together with compile=true"):
        opened(**asked, compile=True)
    with pytest.raises(UserError, match="activations=int2 is unknown"):
        opened(**{**asked, "activations": "int2"})


def test_without_the_instructions_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(2, 1)
    use_precision(model, "int4")
    fake = SimpleNamespace(multiplies_bytes=lambda: 0)
    monkeypatch.setattr(native, "library", fake)
    with pytest.raises(UserError, match="avx512_vnni in /proc/cpuinfo"):
        use_activations(model, "int8")
    monkeypatch.setattr(native, "library", None)
    with pytest.raises(UserError, match="activations=int8 needs a CPU with AVX2"):
        use_activations(model, "int8")
