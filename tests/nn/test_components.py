"""Layers and their configs: each variant's weight map against the built module, a user's layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from mtp_lightning.decoding import compiled, generate
from mtp_lightning.interop.weight_map import layer_weights
from mtp_lightning.nn.attention import Attention, GroupedQueryConfig
from mtp_lightning.nn.components import AttentionConfig, FeedForwardConfig, LayerConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.feed_forward import DenseConfig
from mtp_lightning.nn.linear import ZeroLinear
from mtp_lightning.nn.mla import LatentAttentionConfig
from mtp_lightning.registry import Registered
from tests import deepseek
from tests.decoding.models import ids_of, random_prompts, steer_drafts, teacher_forced
from tests.interop import folders
from tests.losses import mtp_loss
from tests.models import target_counts, windows


@dataclass(frozen=True, kw_only=True)
class WindowConfig(GroupedQueryConfig, variant="test_window"):
    """A user's attention: each token sees the last ``window`` ones. It overrides only ``build``."""

    window: int

    def build(self, trunk, layer):
        return WindowAttention(trunk, self)


class WindowAttention(Attention):
    def __init__(self, trunk, config: WindowConfig) -> None:
        super().__init__(trunk, config)
        self.window = config.window

    def forward(self, x_BTC: Tensor, ctx: ForwardContext, layer: int = 0) -> Tensor:
        if ctx.cache is not None:
            distance = ctx.cache.distances()
            hidden = (distance < 0) | (distance >= self.window)
            mask = torch.zeros(hidden.shape, dtype=x_BTC.dtype).masked_fill(hidden, -torch.inf)
        else:
            at = torch.arange(x_BTC.shape[1])
            distance = at.unsqueeze(1) - at
            mask = (distance >= 0) & (distance < self.window)
            mask = mask if ctx.mask is None else mask & ctx.mask
        return super().forward(x_BTC, replace(ctx, mask=mask), layer)


@dataclass(frozen=True, kw_only=True)
class SquaredConfig(FeedForwardConfig, variant="test_squared"):
    """A user's feed-forward layer: its width in the modules' blocks differs; a field is a list."""

    widths: list[int]

    def build(self, trunk, layer):
        return Squared(trunk.d_model, self.widths[0 if layer is None else 1])


class Squared(nn.Module):
    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, width)
        self.down = ZeroLinear(width, d_model)

    def forward(self, x_BTC: Tensor, ctx: ForwardContext | None = None) -> Tensor:
        return self.down(self.up(x_BTC).relu().square())


def users_trunk(**changes) -> TrunkConfig:
    sizes = {"vocab_size": 37, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    layers = {"attention": WindowConfig(window=6), "feed_forward": SquaredConfig(widths=[24, 40])}
    return TrunkConfig(**{**sizes, "d_ff": 48, "tie_embeddings": False, **layers, **changes})


LATENT, EXPERTS = deepseek.LATENT, deepseek.EXPERTS
LAYERS: dict[str, LayerConfig] = {
    "grouped": GroupedQueryConfig(),
    "grouped with all": GroupedQueryConfig(qk_norm=True, qkv_bias=True),
    "grouped, half rotated": GroupedQueryConfig(qk_norm=True, qkv_bias=True, d_rope=4),
    "latent": LATENT,
    "latent, direct": replace(LATENT, q_rank=None),
    "dense": DenseConfig(),
    "experts": EXPERTS,
    "experts alone": replace(EXPERTS, n_shared=0, first_k_dense=0),
    "window": WindowConfig(window=3, qk_norm=True),
    "squared": SquaredConfig(widths=[24, 40]),
}


def test_every_variant_is_tested() -> None:
    kinds = {*AttentionConfig._variants.values(), *FeedForwardConfig._variants.values()}
    tested = {type(layer) for layer in LAYERS.values()}
    assert {k for k in kinds if k.__module__.startswith(("mtp_lightning.", __name__))} == tested


@pytest.mark.parametrize("name", LAYERS)
def test_the_weight_map_of_a_layer_has_its_weights_and_shapes(name: str) -> None:
    config = LAYERS[name]
    trunk = users_trunk(n_kv_heads=4, **{config.family: config})
    if name == "squared":
        with pytest.raises(ValueError, match="feed_forward of the variant test_squared cannot be"):
            layer_weights(config, trunk, 1)
        return
    for layer in (0, 1, None):
        weights = config.build(trunk, layer).state_dict()
        places = list(layer_weights(config, trunk, layer))
        assert sorted(place.own for place in places) == sorted(weights)
        for place in places:
            rows = weights[place.own] if place.stacked is None else weights[place.own].flatten(0, 1)
            assert sum(shape[0] for _, shape in place.parts) == rows.shape[0]
            assert all(shape[1:] == rows.shape[1:] for _, shape in place.parts)


def test_a_users_layers_train_and_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache, drafts and several rows, texts are those of teacher forcing; one prompt is
    longer than the window."""
    model, batch = deepseek.build(users_trunk(init_std=0.3), depth=2), windows(4, 20, 2)
    mtp_loss(model, batch, [0.1, 0.1], target_counts(batch).tolist())[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    model.eval()
    assert model.config.num_params() == sum(p.numel() for p in model.parameters())
    prompts = random_prompts(0, (2, 9, 21))
    options = {"max_new_tokens": 14}
    plain = ids_of(generate(model, prompts, speculative=False, **options))
    for prompt, tokens in zip(prompts, plain, strict=True):
        (logits,) = teacher_forced(model, prompt + tokens, 0)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
    steer_drafts(monkeypatch, prompts, plain, chance=0.7)
    assert ids_of(generate(model, prompts, **options)) == plain
    monkeypatch.setattr(compiled, "program", lambda function, inputs: function)
    assert ids_of(generate(model, prompts, compile=True, batch_size=1, **options)) == plain


def test_a_users_random_layer_is_recomputed_with_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def noisy(self: Squared, x_BTC: Tensor, ctx: ForwardContext | None = None) -> Tensor:
        return self.down(torch.dropout(self.up(x_BTC), 0.5, train=True))

    monkeypatch.setattr(Squared, "forward", noisy)
    gradients = []
    for recompute in (False, True):
        model = deepseek.build(users_trunk(recompute=recompute), depth=1).train()
        batch = windows(4, 20, 1)
        torch.manual_seed(0)
        loss, *_ = mtp_loss(model, batch, [0.1], target_counts(batch).tolist())
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_users_layer_sets_its_first_weights_in_the_trunk_and_in_modules() -> None:
    model = deepseek.build(users_trunk(), depth=1)
    model.initialize(0)
    layers = [layer for layer in model.modules() if isinstance(layer, Squared)]
    assert len(layers) == 3 and not any(layer.down.weight.any() for layer in layers)


def test_a_checkpoint_names_the_variants_of_layers_and_their_modules() -> None:
    trunk = users_trunk()
    stored = trunk.to_dict()
    assert stored["attention"] == {
        "variant": "test_window", "module": __name__,
        "qk_norm": False, "qkv_bias": False, "d_rope": None, "window": 6,
    }  # fmt: skip
    assert TrunkConfig.from_dict(stored) == trunk
    stored["attention"] = {"variant": "nowhere", "module": "my_ideas.window"}
    with pytest.raises(ValueError, match=r"attention=nowhere .* say 'allow=\[my_ideas\]'"):
        TrunkConfig.from_dict(stored)
    for config in (deepseek.TRUNK, deepseek.trunk(latent={"q_rank": None})):
        stored = config.to_dict()
        assert TrunkConfig.from_dict(stored) == config
    stored["feed_forward"]["n_router"] = 4
    with pytest.raises(ValueError, match="n_router"):
        TrunkConfig.from_dict(stored)


def test_a_variant_keeps_the_newer_settings_of_its_base() -> None:
    """Settings that older checkpoints lack are stored unless they have their value there."""

    @dataclass(frozen=True)
    class Base(Registered, family="test_newer"):
        newer = {"first": 0}
        first: int = 0

    @dataclass(frozen=True)
    class Own(Base, variant="test_own"):
        newer = {"second": 1}
        second: int = 1

    name = {"variant": "test_own", "module": __name__}
    assert Own().to_dict() == name
    assert Own(first=2, second=3).to_dict() == name | {"first": 2, "second": 3}


@pytest.mark.parametrize("value", [None, "window", EXPERTS])
def test_a_value_that_is_not_a_layer_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="model.attention must name a layer's config by _target_"):
        users_trunk(attention=value)


def test_a_users_layer_is_not_exported(tmp_path: Path) -> None:
    """Although it has the weights of a known layout."""
    assert isinstance(LATENT, LatentAttentionConfig)
    model = deepseek.build(users_trunk(feed_forward=DenseConfig()), depth=1)
    with pytest.raises(ValueError, match="model.attention=test_window .* cannot be exported"):
        folders.write(tmp_path / "one", model)
    assert not (tmp_path / "one").exists()


def test_a_yaml_can_name_a_users_layer(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    lines = [
        "defaults: [nano]",
        "attention:",
        f"  _target_: {__name__}.WindowConfig",
        "  window: 64",
    ]
    (tmp_path / "model" / "mine.yaml").write_text("\n".join(lines))
    conf = str(Path(__file__).parents[2] / "conf")
    with initialize_config_dir(version_base="1.3", config_dir=conf):
        overrides = ["model=mine", f"hydra.searchpath=[file://{tmp_path}]"]
        model = compose("config", overrides=overrides).model
    trunk = instantiate(model, vocab_size=300, _convert_="all")
    assert trunk.attention == WindowConfig(window=64)
    assert (trunk.n_layers, trunk.feed_forward) == (8, DenseConfig())
