"""Parameters and FLOPs, which are counted on the meta device, against closed forms.

``test_cross_product.py``, ``test_step.py`` and ``balance/test_gradients.py`` compare the FLOPs of a
step with those of the operators that it calls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from mtp_lightning.errors import UserError
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.attention import GroupedQueryConfig
from mtp_lightning.nn.components import FeedForwardConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.mla import LatentAttentionConfig
from mtp_lightning.nn.moe import ExpertsConfig
from mtp_lightning.objective.cost import StepCost, forward_flops
from tests import closed_forms

EXPERTS = ExpertsConfig(n_routed=6, n_shared=1, top_k=2, d_expert=16, first_k_dense=1)
LATENT = LatentAttentionConfig(kv_rank=8, q_rank=12, d_nope=8, d_rope=4, d_value=10)
TRUNKS: dict[str, dict[str, Any]] = {
    "dense": {"attention": GroupedQueryConfig(qk_norm=True, qkv_bias=True), "recompute": True},
    "untied experts": {"tie_embeddings": False, "feed_forward": EXPERTS},
    "latent": {"n_kv_heads": 4, "attention": replace(LATENT, q_rank=None)},
    "deepseek": {"n_kv_heads": 4, "attention": LATENT, "feed_forward": EXPERTS},
}
HEADS: dict[str, list[dict[str, Any]]] = {
    "none": [{}],
    "sequential": [{}, {"share_layers": True}, {"token_dropout": 1.0, "confidence": True}],
    "parallel": [
        {},
        {"correction": "mlp"},
        {"correction": "markov"},
        {"correction": "selector"},
        {"stride": 2},
    ],
    "linear": [
        {},
        {"correction": "mlp"},
        {"correction": "markov"},
        {"correction": "selector", "correction_rank": 5},
        {"rank": 3},
    ],
    "joint": [{}],
    "nextlat": [{}],
    "parameter_free": [{}],
    "teacherless": [{}],
    "top": [{"lookahead": 6}],
    "bag": [{"lookahead": 6}],
    "registers": [{"lookahead": 6}],
    "eagle": [{}, {"draft_vocab": 11}],
    "masked": [{}, {"lora_rank": 3, "consistency": 0.0}],
    "dflash": [
        {},
        {"blocks": 2},
        {"correction": "markov"},
        {"correction": "selector", "correction_rank": 5},
    ],
}
# These refuse latent attention.
PLAIN_TRUNKS_ONLY = ("eagle", "masked", "dflash")
SWITCHES: list[dict[str, Any]] = [
    {},
    {"detach": "trunk"},
    {"detach": "all", "branch": "before_last"},
    {"freeze_trunk": True, "branch": "final"},
]
# The number of configs that are not refused.
ACCEPTED = {
    "none": 1, "sequential": 12, "parallel": 20, "linear": 17, "joint": 4, "nextlat": 4,
    "parameter_free": 1, "teacherless": 1, "top": 2, "bag": 2, "registers": 1, "eagle": 4,
    "masked": 2, "dflash": 8,
}  # fmt: skip
T = 12
PLAIN = ["dense", "untied experts"]


def trunk_of(name: str) -> TrunkConfig:
    sizes = {"vocab_size": 37, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    return TrunkConfig(**{**sizes, "d_ff": 48, **TRUNKS[name]})


def configs(head: str, *, all_switches: bool = True) -> list[MTPConfig]:
    """The head's variants with all switches; without ``all_switches``, only the first variant has
    them."""
    accepted = []
    for number, variant in enumerate(HEADS[head]):
        for switches in SWITCHES if all_switches or number == 0 else SWITCHES[:1]:
            kind = MTPConfig.find(head)
            for depth in ({"depth": 3}, {}):  # a head of a fixed depth takes no depth
                try:
                    accepted.append(kind(**variant, **switches, **depth))
                except (UserError, TypeError):
                    continue
                break
    return accepted


def test_every_head_is_tested() -> None:
    # configs() imports the heads.
    assert {head: len(configs(head)) for head in HEADS} == ACCEPTED
    kinds = MTPConfig._variants.items()
    assert {k for k, v in kinds if v.__module__.startswith("mtp_lightning.")} == HEADS.keys()


@pytest.mark.parametrize("head", HEADS)
def test_parameters_are_those_of_the_closed_form_and_of_the_model(head: str) -> None:
    trunks = PLAIN if head in PLAIN_TRUNKS_ONLY else list(TRUNKS)
    for number, mtp in enumerate(configs(head)):
        config = ModelConfig(trunk=trunk_of(trunks[number % len(trunks)]), mtp=mtp)
        model = MTPModel(config)
        assert config.num_params() == sum(p.numel() for p in model.parameters())
        of_trunk = closed_forms.trunk_params(config.trunk)
        assert config.num_trunk_params() == of_trunk
        assert config.num_params() == of_trunk + closed_forms.stack_params(config)
        looked_up = 0 if config.trunk.tie_embeddings else model.trunk.embedding.weight.numel()
        idle = sum(
            p[EXPERTS.top_k :].numel()
            for name, p in model.named_parameters()
            if ".experts." in name
        )
        assert config.num_active_params() == config.num_params() - idle - looked_up


@pytest.mark.parametrize("head", HEADS)
def test_flops_of_a_step_are_those_of_the_closed_form(head: str) -> None:
    trunks = PLAIN if head in PLAIN_TRUNKS_ONLY else list(TRUNKS)
    for number, mtp in enumerate(configs(head, all_switches=False)):
        config = ModelConfig(trunk=trunk_of(trunks[number % len(trunks)]), mtp=mtp)
        cost, depths = StepCost(config), list(range(1, mtp.depth + 1))
        for active in (depths, depths[1:2]) if number == 0 else (depths,):
            expected = closed_forms.training(config, T, active)
            assert cost.per_token(T, active) == expected, (mtp, active)
            assert cost(T, active, main=mtp.trains_trunk) == T * expected
        if number == 0 and head in ("sequential", "joint", "registers", "masked"):
            # The share of attention grows with the window.
            assert cost.per_token(2 * T) == closed_forms.training(config, 2 * T, depths)


def test_flops_of_a_forward_pass_are_those_of_the_closed_form() -> None:
    config = ModelConfig(trunk=trunk_of("deepseek"), mtp=MTPConfig.find("sequential")(depth=2))
    trunk = config.trunk
    blocks = sum(closed_forms.block(trunk, T, layer)[1] for layer in range(trunk.n_layers))
    stack, _ = closed_forms.stack_flops(config, T, [1, 2])
    head = 3 * 2 * trunk.d_model * trunk.vocab_size
    assert forward_flops(config, T) == T * (blocks + stack + head)


def test_flops_are_counted_under_anomaly_detection() -> None:
    config = ModelConfig(trunk=trunk_of("dense"), mtp=MTPConfig.find("joint")(depth=2))
    with torch.autograd.set_detect_anomaly(True):
        assert StepCost(config).per_token(T) == closed_forms.training(config, T, [1, 2])
        assert torch.is_anomaly_enabled()


def test_a_step_of_the_same_kind_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = StepCost(ModelConfig(trunk=trunk_of("dense"), mtp=MTPConfig.find("joint")(depth=2)))
    first = cost(T, [1, 2])
    monkeypatch.setattr(ModelConfig, "on_meta", None)
    assert cost(T, (1, 2)) == first
    with pytest.raises(TypeError):
        cost(T, [1])


def test_a_large_model_takes_no_memory() -> None:
    trunk = TrunkConfig(
        vocab_size=129_280, d_model=7168, n_layers=3, n_heads=128, n_kv_heads=128, d_ff=18_432
    )
    config = ModelConfig(trunk=trunk, mtp=MTPConfig.find("sequential")(depth=1))
    assert StepCost(config).per_token(4096) == closed_forms.training(config, 4096, [1])


@dataclass(frozen=True, kw_only=True)
class CappedConfig(FeedForwardConfig, variant="test_capped"):
    """A user's layer that reads a value of a tensor."""

    def build(self, trunk, layer):
        return Capped(trunk.d_model)


class Capped(nn.Linear):
    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, d_model)

    def forward(self, x_BTC, ctx=None):
        return super().forward(x_BTC) / max(x_BTC.max().item(), 1.0)


def test_a_layer_that_reads_values_is_refused() -> None:
    trunk = replace(trunk_of("dense"), feed_forward=CappedConfig())
    config = ModelConfig(trunk=trunk, mtp=MTPConfig.find("none")())
    with pytest.raises(UserError, match="FLOPs are counted on the meta device"):
        StepCost(config).per_token(T)


def test_sizes_that_are_too_large_for_a_tensor_are_refused() -> None:
    for d_model in (2**60, 2**62):
        trunk = replace(trunk_of("dense"), d_model=d_model, d_head=8)
        with pytest.raises(UserError, match="too large to count"):
            ModelConfig(trunk=trunk, mtp=MTPConfig.find("none")()).num_params()
