"""Rules and terms over all depths of a position: special cases, and refused settings.

``test_cross_product.py`` tests their losses and gradients.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from data_modules.windows import WindowBatch
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective.balance.sampled_depths import SampledDepths
from mtp_lightning.objective.objective import Objective
from mtp_lightning.objective.rules.entropy_mask import EntropyMask
from mtp_lightning.objective.schedule.piecewise import Piecewise
from mtp_lightning.objective.step import OptimizerStep
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.terms.e2e_tv import E2ETV
from mtp_lightning.objective.terms.kl import KL
from tests.losses import gradients, mtp_loss, step_of
from tests.models import build, windows


@pytest.mark.parametrize("variant", ["sequential", "parallel"])
def test_an_entropy_mask_with_an_infinite_threshold_masks_nothing(
    tiny_trunk: TrunkConfig, variant: str
) -> None:
    model, plain = build(tiny_trunk, variant, depth=3), windows(2, 9, 3)
    documents = (torch.arange(plain.tokens.shape[1]) // 6).expand_as(plain.tokens)
    batch = WindowBatch(plain.tokens, 3, documents)
    results, counts = [], batch.counts().tolist()
    for objective in (
        Objective(term=KL()),
        Objective(term=KL(), mask="entropy", tau=math.inf),
        Objective(term=KL(), mask="entropy"),  # a running quantile before its first step
    ):
        total, sums = mtp_loss(model, batch, [0.5, 0.25, 0.125], counts, term=objective)
        total.backward()
        results.append((total, sums, gradients(model)))
    plain_total, plain_sums, plain_grads = results[0]
    for total, sums, grads in results[1:]:
        assert torch.equal(total, plain_total) and torch.equal(sums, plain_sums)
        assert all(torch.equal(gradient, plain_grads[name]) for name, gradient in grads.items())


def test_the_running_quantile_is_updated_if_all_depths_have_weight_0(
    tiny_trunk: TrunkConfig,
) -> None:
    model, batch = build(tiny_trunk, "sequential", depth=1), windows(2, 9, 1)
    objective = Objective(term=KL(), mask="entropy")
    mtp_loss(model, batch, [0.0], [18, 18], term=objective)
    objective.after_backward()
    assert sum(objective.state_dict()["counts"]) == 2 * 8  # changes between adjacent positions


def test_the_running_quantile_is_about_the_exact_one_and_is_stored() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = EntropyMask(None, quantile=0.9)
    assert mask.tau == math.inf
    tokens = {0: torch.zeros(8, 500).long(), 1: torch.zeros(8, 500).long()}
    for _ in range(3):
        mask.keep_masks(torch.randn(8, 500, generator=generator), tokens)
        values = mask.after_backward()
    exact = torch.randn(100_000, generator=generator) * math.sqrt(2)
    assert mask.tau == pytest.approx(exact.quantile(0.9).item(), abs=0.15)
    # Depth 1 counts where neither of two changes is a jump.
    assert 0.7 < values["objective/kept_depth_1"] < 0.9
    loaded = EntropyMask(None, quantile=0.9)
    loaded.load_state_dict(mask.state_dict())
    assert loaded.tau == mask.tau and loaded.state_dict() == mask.state_dict()


OBJECTIVES: dict[str, dict[str, Any]] = {
    "e2e_tv": {"term": E2ETV()},
    "weights": {"term": CrossEntropy(), "weights": "acceptance"},
    "mask": {"term": E2ETV(), "mask": "entropy", "tau": 0.0},
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "heavy"}, "objective.weights=heavy is unknown: choose one of none, exp_decay"),
        ({"mask": "fog"}, "objective.mask=fog is unknown"),
        ({"decay": 2.0}, "decay=2.0 is read by objective.weights=exp_decay alone"),
        ({"smoothing": 0.5, "weights": "exp_decay"}, "read by objective.weights=acceptance alone"),
        ({"tau": 1.0}, "objective.tau=1.0 is read by objective.mask=entropy alone"),
        ({"weights": "exp_decay", "decay": 0}, "objective.decay must be a number above 0"),
        ({"weights": "acceptance", "smoothing": 2}, "smoothing must be a number in"),
        ({"mask": "entropy", "tau": math.nan}, "objective.tau .* must be a number"),
        ({"mask": "entropy", "quantile": 1}, r"objective.quantile must be a number in \(0, 1\)"),
        ({"mask": "entropy", "quantile": 0.5, "tau": 1.0}, "both set the threshold of a jump"),
        ({"confidence": 1}, "objective.confidence must be true or false"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(term=CrossEntropy(), **settings)


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
