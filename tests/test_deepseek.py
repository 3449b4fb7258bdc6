"""The DeepSeek-V3 trunk as a whole: counts, presets, recomputation, QK-norm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate

from data_modules.windows import WindowBatch
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.dflash import DFlashConfig
from mtp_lightning.mtp.eagle import EagleConfig
from mtp_lightning.mtp.masked import MaskedConfig
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.parallel import ParallelConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.attention import GroupedQueryConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.mla import LatentAttentionConfig
from mtp_lightning.nn.moe import ExpertsConfig, routers_of
from mtp_lightning.paths import CONF
from tests import deepseek, deepseek_reference, models, reference
from tests.integration.helpers import composed
from tests.losses import reported_loss

SIZES = ["nano", "micro", "tiny", "small", "medium", "large"]


def preset(name: str, vocab_size: int) -> TrunkConfig:
    model = composed("config", [f"model={name}"]).model
    return instantiate(model, vocab_size=vocab_size, _convert_="all")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_kv_heads": 2}, "n_kv_heads=2 must be model.n_heads=4 with latent attention"),
        ({"latent": {"d_rope": 3}}, "d_rope=3 must be even"),
        ({"latent": {"kv_rank": 0}}, "attention.kv_rank must be a whole number"),
        ({"experts": {"first_k_dense": 4}}, "first_k_dense=4 is more than model.n_layers=3"),
    ],
)
def test_bad_shapes_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deepseek.trunk(**change)


@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states_equal_the_equations(masked: bool) -> None:
    config = deepseek.TRUNK
    model = deepseek.build(config, depth=1)
    w = {name: t.double() for name, t in model.state_dict().items()}
    tokens = torch.randint(0, 37, (1, 13))
    documents = torch.tensor([[0] * 4 + [1] * 9]) if masked else None
    hidden = model(WindowBatch(tokens, 1, documents))
    window_documents = documents[0, :11].tolist() if documents is not None else None

    x = w["trunk.embedding.weight"][tokens[0, :11]]
    for layer in range(3):
        x = deepseek_reference.block(
            x, w, f"trunk.blocks.{layer}", config, experts=layer > 0, documents=window_documents
        )
    h = reference.rms_norm(x, w["trunk.norm.weight"], config.norm_eps)
    torch.testing.assert_close(hidden[0][0].double(), h, rtol=1e-4, atol=1e-4)
    p = "mtp.depths.0"
    e = w["trunk.embedding.weight"][tokens[0, 1:12]]
    e = reference.rms_norm(e, w[f"{p}.enorm.weight"], config.norm_eps)
    h = reference.rms_norm(h, w[f"{p}.hnorm.weight"], config.norm_eps)
    x = torch.cat((e, h), -1) @ w[f"{p}.eh_proj.weight"].T
    x = deepseek_reference.block(
        x, w, f"{p}.block", config, experts=True, documents=window_documents
    )
    h = reference.rms_norm(x, w[f"{p}.norm.weight"], config.norm_eps)
    torch.testing.assert_close(hidden[1][0].double(), h, rtol=1e-4, atol=1e-4)


def dense(**changes: object) -> TrunkConfig:
    sizes = {"vocab_size": 37, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    return TrunkConfig(**{**sizes, "d_ff": 48, **changes})


EXPERTS = ExpertsConfig(n_routed=6, n_shared=1, top_k=2, d_expert=16, first_k_dense=1)
BALANCED = deepseek.trunk(experts={"sequence_loss": 0.1})


@pytest.mark.parametrize(
    ("trunk", "head"),
    [
        *(
            (dense(), head)
            for head in (SequentialConfig, ParallelConfig, EagleConfig, DFlashConfig)
        ),
        *((BALANCED, head) for head in (SequentialConfig, ParallelConfig)),
        (dense(feed_forward=EXPERTS), MaskedConfig),
    ],
)
def test_recomputation_changes_no_bit(trunk: TrunkConfig, head: type) -> None:
    losses, gradients, loads, saved = [], [], [], []
    for recompute in (False, True):
        config = replace(trunk, recompute=recompute)
        model = models.build(config, head(depth=2))
        tokens = torch.randint(0, 37, (2, 40), generator=torch.Generator().manual_seed(0))
        saved_bytes: dict[int, int] = {}

        def pack(t: torch.Tensor, saved_bytes: dict[int, int] = saved_bytes) -> torch.Tensor:
            saved_bytes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            final, _ = model.run_trunk(WindowBatch(tokens, 2), [1, 2])
        assert final.requires_grad
        saved.append(sum(saved_bytes.values()))
        loss, _, reported = reported_loss(model, WindowBatch(tokens, 2), [0.1, 0.1], [74] * 3)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters()])
        loads.append([reported.loads[router] for router in routers_of(model).values()])
    assert losses[0] == losses[1]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*loads, strict=True):
        assert torch.equal(a, b) and a.sum() == 74 * 2
    assert saved[1] < saved[0] / 2


def test_qk_norm_equals_the_equations() -> None:
    """Plain attention on queries and keys that are normed by hand."""
    config = dense(attention=GroupedQueryConfig(qk_norm=True))
    layer = models.build(config, NoMTPConfig()).trunk.blocks[0].attention
    x = torch.randn(1, 9, 32)
    actual = layer(x, ForwardContext.of_window(config, 9, device=x.device))[0].double()
    w = {name: t.double() for name, t in layer.state_dict().items()}
    q, k, v = (x[0].double() @ w["qkv.weight"].T).view(9, 8, 8).split([4, 2, 2], dim=1)
    q = reference.rms_norm(q, w["query_norm.weight"], config.norm_eps)
    k = reference.rms_norm(k, w["key_norm.weight"], config.norm_eps)
    for x in (q, k):
        for t, heads in enumerate(x):
            for head in heads:
                head.copy_(reference.rotate(head, t, 10_000.0))
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True
    )
    expected = expected.transpose(0, 1).flatten(1) @ w["out.weight"].T
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_presets_have_as_many_active_parameters_as_the_dense_ones(size: str) -> None:
    vocab_size = 4096 if size in SIZES[:3] else 32_768
    trunks = preset(f"deepseek_{size}", vocab_size), preset(size, vocab_size)
    assert isinstance(trunks[0].attention, LatentAttentionConfig)
    assert isinstance(trunks[0].feed_forward, ExpertsConfig)
    config, same_word = (ModelConfig(trunk=trunk, mtp=NoMTPConfig()) for trunk in trunks)
    assert config.num_active_params() == pytest.approx(same_word.num_params(), rel=0.1)
    header = (CONF / f"model/deepseek_{size}.yaml").read_text().splitlines()[0]
    for value in (config.num_params(), config.num_active_params()):
        assert f"{short(value)}" in header


def short(value: int) -> str:
    if value >= 1e9:
        return f"{value / 1e9:.1f} B"
    return f"{value / 1e6:.1f} M" if value < 1e7 else f"{value / 1e6:.0f} M"


def test_deepseek_v3_has_its_published_counts() -> None:
    """README_WEIGHTS of DeepSeek-V3: 671 B; 36.7 B active; 11.5 B in the module, 14 B with
    copies of the embedding and the head (0.9 B each)."""
    config = ModelConfig(trunk=preset("deepseek_v3", 129_280), mtp=SequentialConfig(depth=1))
    trunk = config.trunk
    with torch.device("meta"):
        model = MTPModel(config)
    module_params = sum(p.numel() for p in model.mtp.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert total == config.num_params() and total - module_params == config.num_trunk_params()
    assert round(config.num_trunk_params() / 1e9) == 671
    active = replace(config, mtp=NoMTPConfig()).num_active_params()
    assert round(active / 1e9) == 37 and active / 1e9 == pytest.approx(36.7, abs=0.1)
    assert module_params / 1e9 == pytest.approx(11.5, abs=0.15)
    stored_again = 2 * trunk.vocab_size * trunk.d_model
    assert (module_params + stored_again) / 1e9 == pytest.approx(13.5, abs=0.1)
    assert model.trunk.blocks[2].feed_forward.gate_up.weight.shape == (2 * 18_432, 7168)
    assert model.trunk.blocks[3].feed_forward.experts.down.shape == (256, 7168, 2048)
