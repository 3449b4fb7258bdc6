"""Register tokens, against the trunk in float64 with loops, one register at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.inputs import RandomKey
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.registers import RegistersConfig
from mtp_lightning.nn.attention import Positions
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.mla import LatentAttentionConfig
from mtp_lightning.nn.moe import ExpertsConfig
from tests import reference
from tests.losses import mtp_loss
from tests.models import build
from tests.mtp.summaries import ahead_windows

KEYS = [RandomKey(0, step) for step in range(8)]


def keys_of_every_offset(model: torch.nn.Module, most: int) -> dict[int, RandomKey]:
    found = {model.mtp.offset(key): key for key in (RandomKey(0, s) for s in range(200))}
    assert sorted(found) == list(range(1, most + 1))
    return found


def register_state(
    tokens: Tensor, j: int, d: int, w: dict[str, Tensor], c: TrunkConfig, documents: Tensor | None
) -> Tensor:
    """One register alone at the end of its tokens: the trunk's equations over x_0 .. x_j of its
    document and the register, whose position is j + d - 1 (2505.10518, section 3)."""
    start = 0
    if documents is not None:
        start = int((documents[: j + 1] == documents[j]).nonzero()[0])
    places = [*range(start, j + 1), j + d - 1]
    x = torch.cat((w["trunk.embedding.weight"][tokens[start : j + 1]], w["mtp.register"]))
    for layer in range(c.n_layers):
        p = f"trunk.blocks.{layer}"
        normed = reference.rms_norm(x, w[f"{p}.attention_norm.weight"], c.norm_eps)
        x = x + attention_at(normed, places, w, f"{p}.attention", c)
        normed = reference.rms_norm(x, w[f"{p}.feed_forward_norm.weight"], c.norm_eps)
        gate, up = (normed @ w[f"{p}.feed_forward.gate_up.weight"].T).split(c.d_ff, dim=-1)
        x = x + gate * torch.sigmoid(gate) * up @ w[f"{p}.feed_forward.down.weight"].T
    return reference.rms_norm(x[-1], w["trunk.norm.weight"], c.norm_eps)


def attention_at(
    x: Tensor, places: list[int], w: dict[str, Tensor], prefix: str, c: TrunkConfig
) -> Tensor:
    h, n, m = c.d_head, c.n_heads, c.n_kv_heads
    qkv = x @ w[f"{prefix}.qkv.weight"].T
    out = torch.zeros(len(places), n * h, dtype=torch.float64)
    for head in range(n):
        kv = head // (n // m)
        for a, place in enumerate(places):
            q = reference.rotate(qkv[a, head * h : (head + 1) * h], place, c.rope_theta)
            scores, values = [], []
            for b in range(a + 1):
                k = qkv[b, (n + kv) * h : (n + kv + 1) * h]
                scores.append(q @ reference.rotate(k, places[b], c.rope_theta) / h**0.5)
                values.append(qkv[b, (n + m + kv) * h : (n + m + kv + 1) * h])
            share = torch.softmax(torch.stack(scores), 0)
            out[a, head * h : (head + 1) * h] = share @ torch.stack(values)
    return out @ w[f"{prefix}.out.weight"].T


@pytest.mark.parametrize("documents", [False, True])
def test_states_and_loss(tiny_trunk: TrunkConfig, documents: bool) -> None:
    """Both ends of d, in one document and in several, with tokens that are no targets."""
    model = build(tiny_trunk, RegistersConfig(lookahead=7)).double()
    weights = dict(model.state_dict())
    batch = ahead_windows(1, 6, 7, documents=documents, scored=documents)
    tokens = batch.tokens[0]
    keys = keys_of_every_offset(model, 7)
    for d in (1, 3, 7):
        hidden = model(batch, key=keys[d])
        ids = None if batch.documents is None else batch.documents[0]
        summed, count = torch.zeros((), dtype=torch.float64), 0
        for j in range(6):
            state = register_state(tokens, j, d, weights, tiny_trunk, ids)
            torch.testing.assert_close(hidden[1][0, j], state)
            same = ids is None or ids[j] == ids[j + d]
            if same and (batch.scored is None or batch.scored[0, j + d]):
                logits = weights["head.weight"] @ state
                summed = summed + torch.logsumexp(logits, 0) - logits[tokens[j + d]]
                count += 1
        assert model.mtp.target_depth(1, keys[d]) == d - 1
        assert int((batch.targets(d - 1) >= 0).sum()) == count
        _, sums = mtp_loss(model, batch, [1.0], [6, max(count, 1)], key=keys[d])
        torch.testing.assert_close(sums[1], summed)


def test_the_first_register_repeats_the_next_token_from_its_own_vector(
    tiny_trunk: TrunkConfig,
) -> None:
    model = build(tiny_trunk, RegistersConfig(lookahead=1))
    batch = ahead_windows(2, 6, 1)
    assert torch.equal(batch.targets(model.mtp.target_depth(1, KEYS[0])), batch.targets(0))


TRUNKS = {
    "dense": {},
    "latent": {
        "n_kv_heads": 4,
        "attention": LatentAttentionConfig(q_rank=None, kv_rank=16, d_nope=8, d_rope=4, d_value=8),
        "d_head": None,
    },
    "experts": {
        "feed_forward": ExpertsConfig(n_routed=6, n_shared=1, top_k=2, d_expert=16),
    },
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_registers_change_no_token(tiny_trunk: TrunkConfig, trunk: str, dtype: torch.dtype) -> None:
    """To the bit whatever they hold and mean (with experts, whose products round by how many
    tokens they get, within rounding); within rounding of a pass without them."""
    bound = 1e-12 if dtype == torch.float64 else 1e-4
    model = build(replace(tiny_trunk, **TRUNKS[trunk]), RegistersConfig(lookahead=5)).to(dtype)
    for documents in (False, True):
        batch = ahead_windows(2, 40, 5, documents=documents)
        plain = model(batch)
        assert list(plain) == [0]
        keys = keys_of_every_offset(model, 5)
        states = [model(batch, key=keys[d]) for d in (1, 5)]
        with torch.no_grad():
            model.mtp.register.add_(3.0)
        states.append(model(batch, key=keys[5]))
        for state in states:
            if trunk == "experts":
                torch.testing.assert_close(state[0], states[0][0], rtol=bound, atol=bound)
            else:
                assert torch.equal(state[0], states[0][0])
            assert not torch.allclose(state[1], state[0], atol=1e-2)
        torch.testing.assert_close(states[0][0], plain[0], rtol=bound, atol=bound)


def test_gradients_of_registers_alone_move_no_token_of_the_window(tiny_trunk: TrunkConfig) -> None:
    """No register sees a token behind its own, and no other register."""
    model = build(tiny_trunk, RegistersConfig(lookahead=4)).double()
    batch = ahead_windows(1, 8, 4)
    key = KEYS[0]
    embedded = model.trunk.embedding(batch.tokens[:, :8]).detach().requires_grad_()
    positions = Positions.of_window(
        model.config.trunk, 8, device=embedded.device, dtype=torch.float64
    )
    tokens, registers = model.mtp.through_trunk(model.trunk, embedded, positions, key)
    (grad,) = torch.autograd.grad(registers[0, 3].sum(), embedded, retain_graph=True)
    assert bool((grad[0, :4].abs().amax(-1) > 0).all()) and not grad[0, 4:].any()
    (grad,) = torch.autograd.grad(tokens.final.sum(), model.mtp.register, retain_graph=True)
    assert not grad.any()


def test_the_offset_is_the_steps_alone(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, RegistersConfig(lookahead=4))
    drawn = [model.mtp.offset(RandomKey(3, step)) for step in range(400)]
    assert all(80 < drawn.count(d) < 120 for d in (1, 2, 3, 4))
    later = [model.mtp.offset(RandomKey(3, step, first_row=9)) for step in range(400)]
    assert drawn == later
    assert drawn != [model.mtp.offset(RandomKey(4, step)) for step in range(400)]


def test_without_registers_it_is_plain_training(tiny_trunk: TrunkConfig) -> None:
    batch = ahead_windows(2, 9, 4)
    totals = []
    for config in (RegistersConfig(), NoMTPConfig()):
        model = build(tiny_trunk, config)
        rows = batch if config.depth else WindowBatch(batch.tokens[:, :10], 0)
        total, _ = mtp_loss(model, rows, [0.0] * config.depth, [18] * (config.depth + 1))
        totals.append(total)
    assert torch.equal(*totals)


def test_bad_settings_are_named(tiny_trunk: TrunkConfig) -> None:
    for settings, message in (
        ({"depth": 2}, "mtp=registers has one loss .* mtp.depth=2: set it 1"),
        ({"lookahead": 0}, "mtp.lookahead must be a whole number of at least 1, not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            RegistersConfig(**settings)
    RegistersConfig(lookahead=9).check_window(8)
    with pytest.raises(ValueError, match=r"mtp.lookahead=9 is beyond .* data.seq_len \+ 1 = 8 tok"):
        RegistersConfig(lookahead=9).check_window(7)
    assert MTPConfig.from_dict(RegistersConfig().to_dict()) == RegistersConfig()
