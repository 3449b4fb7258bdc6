"""Switches of imported models: biases, partly rotated heads, RoPE scaling, an epsilon of norms."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from types import MappingProxyType

import pytest
import torch

from mtp_lightning.decoding import generate
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.attention import Attention, GroupedQueryConfig, qkv_width
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.rope import Llama3Scaling, YarnScaling, over_whole_heads, rope_table
from tests import deepseek, reference
from tests.decoding.models import teacher_forced

BIASED = GroupedQueryConfig(qkv_bias=True)
HALF_ROTATED = GroupedQueryConfig(d_rope=4)
NORMED = GroupedQueryConfig(qk_norm=True)
SCALING = Llama3Scaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=1024
)


def test_a_new_bias_is_zero_and_gets_a_gradient(tiny_trunk: TrunkConfig) -> None:
    trunk = replace(tiny_trunk, attention=BIASED)
    model, without = deepseek.build(trunk), deepseek.build(tiny_trunk)
    model.initialize(0)
    without.initialize(0)
    attention, plain = model.trunk.blocks[0].attention, without.trunk.blocks[0].attention
    assert torch.equal(attention.qkv_bias, torch.zeros(qkv_width(trunk)))
    x_BTC = torch.randn(2, 5, trunk.d_model)
    ctx = ForwardContext.of_window(trunk, 5, device=torch.device("cpu"))
    assert torch.equal(attention(x_BTC, ctx), plain(x_BTC, ctx))
    with torch.no_grad():
        attention.qkv_bias.normal_()
    attention(x_BTC, ctx).sum().backward()
    assert attention.qkv_bias.grad.abs().max() > 0


@torch.no_grad()
def test_the_bias_of_the_values_reaches_the_output(tiny_trunk: TrunkConfig) -> None:
    trunk = replace(tiny_trunk, attention=BIASED)
    attention = Attention(trunk, BIASED)
    attention.qkv.weight.zero_()
    attention.out.weight.normal_()
    attention.qkv_bias.normal_()
    x_BTC = torch.randn(1, 4, trunk.d_model)
    ctx = ForwardContext.of_window(trunk, 4, device=torch.device("cpu"))
    value = attention.qkv_bias[-trunk.n_kv_heads * trunk.d_head :].view(trunk.n_kv_heads, -1)
    repeated = value.repeat_interleave(trunk.n_heads // trunk.n_kv_heads, dim=0).flatten()
    expected = (attention.out.weight @ repeated).expand(1, 4, -1)
    torch.testing.assert_close(attention(x_BTC, ctx), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [{"rope_scaling": SCALING}, *({"attention": a} for a in (BIASED, HALF_ROTATED, NORMED))],
)
def test_decoding_with_a_cache_equals_reading_whole_windows(
    tiny_trunk: TrunkConfig, change: dict
) -> None:
    model: MTPModel = deepseek.build(replace(tiny_trunk, **change), depth=2).eval()
    plain, drafted = (
        generate(model, [[1, 2, 3]], max_new_tokens=12, speculative=speculative)[0].token_ids
        for speculative in (False, True)
    )
    (logits,) = teacher_forced(model, [1, 2, 3, *plain], 0)
    assert plain == drafted == logits[2:-1].argmax(-1).tolist()


@pytest.mark.parametrize("masked", [False, True])
def test_only_the_first_part_of_each_head_is_rotated(tiny_trunk: TrunkConfig, masked: bool) -> None:
    """The reference is loops in float64; if heads are rotated whole, it differs."""
    trunk = replace(tiny_trunk, attention=HALF_ROTATED, d_head=8)
    attention = deepseek.build(trunk).trunk.blocks[0].attention
    x_BTC = torch.randn(1, 9, trunk.d_model)
    documents = torch.tensor([[0] * 4 + [1] * 5]) if masked else None
    ctx = ForwardContext.of_window(trunk, 9, device=torch.device("cpu"), documents=documents)
    out = attention(x_BTC, ctx)[0].double()
    weights = {f"a.{name}": w.double() for name, w in attention.state_dict().items()}
    ids = documents[0].tolist() if masked else None
    expected = reference.attention(x_BTC[0].double(), weights, "a", trunk, ids, rotary_dim=4)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    whole = reference.attention(x_BTC[0].double(), weights, "a", trunk, ids)
    assert (out - whole).abs().max() > 1e-3


@pytest.mark.parametrize(("d_rope", "message"), [(3, "must be even"), (10, "more than a head")])
def test_a_wrong_rotated_size_is_refused(
    tiny_trunk: TrunkConfig, d_rope: int, message: str
) -> None:
    with pytest.raises(ValueError, match=f"model.attention.d_rope={d_rope} .*{message}"):
        replace(tiny_trunk, attention=GroupedQueryConfig(d_rope=d_rope))


def test_scaled_frequencies_follow_llama_3s_rule() -> None:
    d_head, theta, position = 16, 10_000.0, 777
    cos, sin = rope_table(torch.tensor([position]), d_head, theta, SCALING)
    cases = set()
    for j in range(d_head // 2):
        frequency = theta ** (-2 * j / d_head)
        wavelength = 2 * math.pi / frequency
        if wavelength < 1024 / 4:
            cases.add("unchanged")
        elif wavelength > 1024 / 1:
            cases.add("divided")
            frequency /= 8
        else:
            cases.add("interpolated")
            smooth = (1024 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / 8 + smooth * frequency
        assert cos[0, j].item() == pytest.approx(math.cos(position * frequency), abs=1e-6)
        assert sin[0, j].item() == pytest.approx(math.sin(position * frequency), abs=1e-6)
    assert cases == {"unchanged", "interpolated", "divided"}
    whole, _ = over_whole_heads(*rope_table(torch.tensor([position]), d_head, theta, SCALING))
    assert torch.equal(whole[0, : d_head // 2], cos[0])


@pytest.mark.parametrize(
    ("theta", "positions", "bounds"),
    [(10_000.0, 4096, (5, 12)), (10_000.0, 64, (0, 5)), (10.0, 911, (10, 31))],
    ids=["inside", "no fast frequency", "no slow frequency"],
)
def test_scaled_frequencies_follow_yarns_rule(
    theta: float, positions: int, bounds: tuple[int, int]
) -> None:
    """Dimension j turns ``positions theta^(-2j/R) / 2 pi`` times; j may be above R/2."""
    scaling = YarnScaling(factor=4.0, original_positions=positions, mscale=1.0, mscale_all_dim=0.7)
    size = 32
    turns = [positions * theta ** (-2 * j / size) / (2 * math.pi) for j in range(size)]
    low = max((j for j in range(size) if turns[j] >= 32), default=0)
    high = min((j for j in range(size) if turns[j] <= 1), default=size - 1)
    assert (low, high) == bounds
    frequency = theta ** -(torch.arange(size // 2, dtype=torch.float64) * 2 / size)
    share = [min(max((j - low) / (high - low), 0.0), 1.0) for j in range(size // 2)]
    expected = [f * (1 - s) + f / 4 * s for f, s in zip(frequency.tolist(), share, strict=True)]
    assert scaling.stretched(frequency, theta).tolist() == pytest.approx(expected)
    scale = 0.1 * math.log(4) + 1
    assert scaling.magnitude == pytest.approx(scale / (0.07 * math.log(4) + 1))
    assert replace(scaling, mscale_all_dim=None).magnitude == pytest.approx(scale)
    assert scaling.score_factor == pytest.approx((0.07 * math.log(4) + 1) ** 2)


def test_a_scaling_may_be_any_mapping() -> None:
    trunk = replace(deepseek.TRUNK, rope_scaling=MappingProxyType(asdict(SCALING)))
    assert trunk.rope_scaling == SCALING


@pytest.mark.parametrize("change", [{"factor": 0}, {"low_freq_factor": 5.0}])
def test_wrong_rope_scaling_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=r"model.rope_scaling"):
        replace(SCALING, **change)


def test_latent_norms_can_have_another_epsilon_than_the_trunk() -> None:
    for latent, eps in (({"norm_eps": 1e-3}, 1e-3), ({}, 1e-5)):
        trunk = deepseek.trunk(norm_eps=1e-5, latent=latent)
        attention = trunk.attention.build(trunk, 0)
        assert (attention.query_norm.eps, attention.kv_norm.eps) == (eps, eps)
