"""Rules and terms over all depths of a position: special cases, and where they do not fit.

``test_cross_product.py`` tests their losses and gradients.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective.balance.sampled_depths import SampledDepths
from mtp_lightning.objective.objective import Objective
from mtp_lightning.objective.rules.entropy_mask import EntropyMask
from mtp_lightning.objective.schedule.piecewise import Piecewise
from mtp_lightning.objective.step import OptimizerStep
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.terms.e2e_tv import E2ETV
from mtp_lightning.objective.terms.kl import KL
from tests.losses import mtp_loss, step_of
from tests.models import build, windows


def test_the_running_quantile_is_updated_if_all_depths_have_weight_0(
    tiny_trunk: TrunkConfig,
) -> None:
    model, batch = build(tiny_trunk, "sequential", depth=1), windows(2, 9, 1)
    objective = Objective(term=KL(), mask="entropy")
    mtp_loss(model, batch, [0.0], [18, 18], term=objective)
    objective.after_backward()
    assert sum(objective.state_dict()["counts"]) == 2 * 8  # changes between adjacent positions


def test_the_running_quantile_is_that_of_decayed_counts_and_is_stored() -> None:
    """Of earlier steps alone: the first step masks nothing, and each logs the threshold it used."""
    generator = torch.Generator().manual_seed(0)
    mask = EntropyMask(None, quantile=0.9)
    assert mask.tau == EntropyMask(math.inf).tau == math.inf
    tokens = {k: torch.randint(-1, 3, (8, 500), generator=generator) for k in (0, 1)}
    counts = np.zeros(512)
    for step in range(3):
        tau = mask.tau
        entropy = torch.randn(8, 500, generator=generator)
        change, counted = entropy.diff(dim=1).numpy(), tokens[0][:, :-1].numpy() >= 0
        mask.keep_masks(entropy, tokens)
        values = mask.after_backward()
        assert values.get("objective/tau", math.inf) == tau
        # Depth 1 counts where neither of two changes is a jump.
        jump = np.pad(change > tau, ((0, 0), (0, 2)))
        kept = ~(jump[:, :-1] | jump[:, 1:])[tokens[1].numpy() >= 0]
        assert values["objective/kept_depth_1"] == kept.mean() and kept.all() == (step == 0)
        edges = np.linspace(-16, 16, 513)
        counts = 0.99 * counts + np.histogram(change[counted], edges)[0]
        below = counts.cumsum() / counts.sum()
        assert mask.tau == edges[1:][below >= 0.9][0]
    assert mask.state_dict()["counts"] == pytest.approx(counts)
    loaded = EntropyMask(None, quantile=0.9)
    loaded.load_state_dict(mask.state_dict())
    assert loaded.tau == mask.tau and loaded.state_dict() == mask.state_dict()


OBJECTIVES: dict[str, dict[str, Any]] = {
    "e2e_tv": {"term": E2ETV()},
    "weights": {"term": CrossEntropy(), "weights": "acceptance"},
    "mask": {"term": E2ETV(), "mask": "entropy", "tau": 0.0},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rules_over_depths_are_refused_without_a_depth(tiny_trunk: TrunkConfig, name: str) -> None:
    model = build(tiny_trunk, "sequential", depth=0)
    with pytest.raises(ValueError, match="has nothing to act on at mtp.depth=0"):
        step_of(model, Objective(**OBJECTIVES[name]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rules_over_drafts_are_refused_with_a_stride(tiny_trunk: TrunkConfig, name: str) -> None:
    model = build(tiny_trunk, "linear", depth=2, stride=2)
    with pytest.raises(ValueError, match="mtp.stride=2 skips some"):
        step_of(model, Objective(**OBJECTIVES[name]))
    with pytest.raises(ValueError, match="objective.confidence=true depends on every token"):
        step_of(model, Objective(term=KL(), confidence=True))
    step_of(model, Objective(term=KL(), weights="exp_decay"))


def test_sampled_depths_are_refused_with_rules_over_several_depths(tiny_trunk: TrunkConfig) -> None:
    """The expected gradient would not be that of all depths. Masks do not depend on a depth, and a
    single depth is in every step."""

    def sampled(depth: int, **settings: Any) -> None:
        model = build(tiny_trunk, "sequential", depth=depth)
        OptimizerStep(
            model,
            schedule=Piecewise(depth, 1.0),
            balance=SampledDepths(depth, seed=0),
            objective=Objective(**settings),
        )

    for name in ("e2e_tv", "weights"):
        with pytest.raises(ValueError, match="balance=sampled_depths leaves depths out of a step"):
            sampled(2, **OBJECTIVES[name])
        sampled(1, **OBJECTIVES[name])
    sampled(2, term=KL(), mask="entropy")
