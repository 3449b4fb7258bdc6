"""Register tokens: they change no token's state, and their offset depends only on the step.

``tests/objective/test_cross_product.py`` compares losses and gradients with the definitions in
``tests/objective/states.py``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from data_modules.windows import RandomKey
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.mla import LatentAttentionConfig
from mtp_lightning.nn.moe import ExpertsConfig
from tests.models import build
from tests.mtp.summaries import ahead_windows


def keys_of_every_offset(model: torch.nn.Module, most: int) -> dict[int, RandomKey]:
    keys = {model.mtp.offset(key): key for key in (RandomKey(0, s) for s in range(200))}
    assert sorted(keys) == list(range(1, most + 1))
    return keys


TRUNKS = {
    "dense": {},
    "latent": {
        "n_kv_heads": 4,
        "attention": LatentAttentionConfig(q_rank=None, kv_rank=16, d_nope=8, d_rope=4, d_value=8),
        "d_head": None,
    },
    "experts": {"feed_forward": ExpertsConfig(n_routed=6, n_shared=1, top_k=2, d_expert=16)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_registers_change_no_state_of_a_token(
    tiny_trunk: TrunkConfig, trunk: str, dtype: torch.dtype
) -> None:
    """The tokens' states have the same bits for any contents and offset of the registers, and are
    within rounding of a pass without registers. With experts, whose products round by their number
    of tokens, both hold within rounding."""
    bound = 1e-12 if dtype == torch.float64 else 1e-4
    model = build(replace(tiny_trunk, **TRUNKS[trunk]), "registers", lookahead=5).to(dtype)
    for documents in (False, True):
        batch = ahead_windows(2, 40, 5, documents=documents)
        plain = model(batch)
        assert list(plain) == [0]
        keys = keys_of_every_offset(model, 5)
        states = [model(replace(batch, key=keys[d])) for d in (1, 5)]
        with torch.no_grad():
            model.mtp.register.add_(3.0)
        states.append(model(replace(batch, key=keys[5])))
        for state in states:
            if trunk == "experts":
                torch.testing.assert_close(state[0], states[0][0], rtol=bound, atol=bound)
            else:
                assert torch.equal(state[0], states[0][0])
            assert not torch.allclose(state[1], state[0], atol=1e-2)
        torch.testing.assert_close(states[0][0], plain[0], rtol=bound, atol=bound)


def test_the_offset_depends_only_on_the_seed_and_the_step(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, "registers", lookahead=4)
    drawn = [model.mtp.offset(RandomKey(3, step)) for step in range(400)]
    assert all(80 < drawn.count(d) < 120 for d in (1, 2, 3, 4))
    later = [model.mtp.offset(RandomKey(3, step, first_row=9)) for step in range(400)]
    assert drawn == later
    assert drawn != [model.mtp.offset(RandomKey(4, step)) for step in range(400)]
