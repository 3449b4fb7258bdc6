"""The decoding check of a validation: what it counts, and that it fails loudly."""

from __future__ import annotations

import pytest
import torch

from mtp_lightning.callbacks.speculative_eval import SpeculativeEval, rates, require_same_greedy
from mtp_lightning.decoding import Generation, generate
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig


def generation(accepted: list[int], reached: list[int], passes: int, new: int) -> Generation:
    return Generation(
        token_ids=[0] * new,
        text=None,
        finish_reason="length",
        new_tokens=new,
        seconds=1.0,
        tokens_per_second=float(new),
        verify_passes=passes,
        tokens_per_step=(new - 1) / passes,
        acceptance=[a / r for a, r in zip(accepted, reached, strict=True)],
        drafts_accepted=accepted,
        drafts_reached=reached,
        accepted_mask=[False] * new,
    )


def test_rates_are_pooled_not_averaged() -> None:
    found = rates([generation([9, 3], [10, 9], 10, 23), generation([0, 0], [2, 1], 2, 3)])
    assert found["decode/acceptance_position_1"] == pytest.approx(9 / 12)
    assert found["decode/acceptance_position_2"] == pytest.approx(3 / 10)
    assert found["decode/tokens_per_step"] == pytest.approx((22 + 2) / 12)


@pytest.fixture
def model(tiny_trunk: TrunkConfig) -> MTPModel:
    model = MTPModel(ModelConfig(trunk=tiny_trunk, mtp=SequentialConfig(depth=2)))
    model.initialise(0)
    return model.eval()


def test_a_wrong_token_is_a_defect(model: MTPModel) -> None:
    prompt = [1, 2, 3]
    (right,) = generate(model, [prompt], max_new_tokens=8, speculative=False)
    require_same_greedy(model, prompt, right.token_ids, list(right.token_ids))
    wrong = list(right.token_ids)
    wrong[4] = (wrong[4] + 1) % 37
    with pytest.raises(RuntimeError, match="at new token 4 after the prompt"):
        require_same_greedy(model, prompt, right.token_ids, wrong)
    with pytest.raises(RuntimeError, match="at new token 7"):
        require_same_greedy(model, prompt, right.token_ids, right.token_ids[:-1])


def test_a_tie_is_none(model: MTPModel) -> None:
    """Where two tokens have the same logit, rounding may choose either."""
    prompt = [1, 2, 3]
    (right,) = generate(model, [prompt], max_new_tokens=4, speculative=False)
    chosen = right.token_ids[2]
    twin = (chosen + 1) % 37
    with torch.no_grad():
        model.trunk.embedding.weight[twin] = model.trunk.embedding.weight[chosen]
    (again,) = generate(model, [prompt], max_new_tokens=4, speculative=False)
    at = next(i for i, token in enumerate(again.token_ids) if token in (chosen, twin))
    other = list(again.token_ids)
    other[at] = chosen if other[at] == twin else twin
    require_same_greedy(model, prompt, again.token_ids, other)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="n_prompts must be at least 1, not 0"):
        SpeculativeEval(n_prompts=0)
