"""Settings of objectives, schedules and balance rules that are refused, with their messages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from mtp_lightning.model import ModelConfig
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective.balance.base import Balance
from mtp_lightning.objective.balance.cosine_gate import CosineGate
from mtp_lightning.objective.balance.dwa import DWA
from mtp_lightning.objective.balance.gradients import require_measurable
from mtp_lightning.objective.balance.gradnorm import GradNorm
from mtp_lightning.objective.balance.sampled_depths import SampledDepths
from mtp_lightning.objective.balance.trunk_ratio import TrunkRatio
from mtp_lightning.objective.objective import CROSS_ENTROPY, Objective
from mtp_lightning.objective.schedule import published
from mtp_lightning.objective.schedule.piecewise import Piecewise
from mtp_lightning.objective.terms.anchor import Anchor
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.terms.feature import Feature
from mtp_lightning.objective.terms.kl import KL
from mtp_lightning.objective.terms.lk import LK
from mtp_lightning.objective.terms.mixture import Mixture
from mtp_lightning.objective.terms.wtv import WTV

SCHEDULES: list[tuple[Callable[[], Any], str]] = [
    (lambda: published.constant(2, [0.3]), "1 numbers.*mtp.depth is 2"),
    (lambda: Piecewise(2, 0.3, {0: [1, 2, 3]}), "3 numbers.*mtp.depth is 2"),
    (lambda: published.constant(2, -0.3), "-0.3"),
    (lambda: published.constant(2, [0.3, math.nan]), "entry 2.*nan"),
    (lambda: Piecewise(2, 0.3, {0: math.inf}), "inf"),
    (lambda: Piecewise(2, 0.3, {1.5: 1}), r"\[0, 1\].*1.5"),
    (lambda: Piecewise(2, 0.3, {-1: 1}, unit="steps"), "steps.*-1"),
    (lambda: Piecewise(2, 0.3, "{0: 1}"), "must map.*{0: 1}"),
    (lambda: Piecewise(2, 0.3, {"10/14.8": 1}), "10/14.8"),
    (lambda: Piecewise(2, 0.3, {0: "0.3"}), "'0.3'"),
    (lambda: Piecewise(2, "0.3"), "mtp_lambda.*'0.3'"),
    (lambda: Piecewise(2, 0.3, {}), "must map.*{}"),
    (lambda: Piecewise(2, 0.3, {0: 1}, unit="epochs"), "epochs.*tokens"),
    (lambda: Piecewise(2, 0.3, {0: 1}, interpolation="spline"), "spline.*cosine"),
    (lambda: Piecewise(-1, 0.3), "-1"),
    (lambda: published.modded_nanogpt(3, 0.3), "mtp.depth=2.*mtp.depth=3"),
    (lambda: published.geometric(2, 0.3, beta=0), "beta.*0"),
    (lambda: published.deepseek_v3(2, 0.3, unit="tokens"), "tokens.*length"),
    (lambda: published.linear_decay(2, 0.3, length=10), "length.*fraction"),
]
RULES: list[tuple[Callable[[], Any], str]] = [
    (lambda: type("Mine", (Balance,), {})(2), 'Mine has no name, .* such as name = "mine"'),
    (lambda: DWA(2, temperature=0), "balance.temperature .* not 0"),
    (lambda: DWA(2, window_steps=0), "balance.window_steps .* not 0"),
    (lambda: GradNorm(2, alpha=-1), "balance.alpha .* not -1"),
    (lambda: GradNorm(2, lr=0), "balance.lr .* not 0"),
    (lambda: GradNorm(2, every_n_steps=True), "balance.every_n_steps .* not True"),
    (lambda: CosineGate(2, ema=1.0), "balance.ema .* not 1.0"),
    (lambda: TrunkRatio(2, rate=0), "balance.rate .* not 0"),
    (lambda: TrunkRatio(2, ratio="much"), "balance.ratio .* not 'much'"),  # type: ignore[arg-type]
    (lambda: TrunkRatio(2, frozen=2), "balance.frozen .* not 2"),
    (lambda: SampledDepths(2, seed=0, probabilities="some"), "balance.probabilities .*'some'"),
    (lambda: SampledDepths(2, seed=0, probabilities=[1.0]), "mtp.depth=2 numbers"),
    (lambda: SampledDepths(2, seed=0, probabilities=[1.0, 0.0]), "numbers above 0"),
]
TERMS: list[tuple[Callable[[], Any], str]] = [
    (lambda: KL(temperature=0), "objective.temperature must be a number above 0, not 0"),
    (lambda: KL(temperature=-1), "temperature must be a number above 0"),
    (lambda: KL(beta=0), r"objective.beta \(0 is objective=ce\) must be a number in \(0, 1\]"),
    (lambda: WTV(0), "greedy decoding is objective=eal.* must be a number above 0, not 0"),
    (lambda: LK(rate=-1), "objective.rate must be a number of at least 0"),
    (lambda: Feature(normalise=2), "feature.normalise must be true or false"),
    (lambda: Mixture({}), "objective.terms names no term"),
    (lambda: Mixture({"cee": 1}), "has cee, which is unknown: choose among .*ce"),
    (lambda: Mixture({"ce": 0}), "the weight of ce in objective.terms must be a number above 0"),
    (lambda: Mixture({"kl": {"temperature": 2}}), "the weight of kl .* not None"),
    (lambda: Mixture({"kl": {"weight": 1, "heat": 2}}), "terms.kl refuses its settings"),
    (lambda: Mixture({"ce": 1, "kl": {"weight": 1, "beta": 0.5}}), "has ce twice"),
    (lambda: Mixture({"feature": 1}), "does not train what the depths predict"),
    (lambda: Mixture({"anchor": 1}), "does not train what the depths predict"),
    (lambda: Mixture({"own": {"weight": 1, "term": "x"}}), "terms.own must be {weight"),
    (lambda: Anchor(latent=0, semantic=0), "latent=0 and anchor.semantic=0 leave nothing"),
    (lambda: Anchor(padded=1), "anchor.padded must be true or false"),  # type: ignore[arg-type]
    (lambda: Anchor(semantic=-1), "anchor.semantic must be a number of at least 0"),
]
OBJECTIVES: list[tuple[dict[str, Any], str]] = [
    ({"train_head": "no"}, "objective.train_head must be true or"),
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
]


@pytest.mark.parametrize(("make", "message"), [*SCHEDULES, *RULES, *TERMS])
def test_wrong_settings_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("settings", "message"), OBJECTIVES)
def test_wrong_settings_of_an_objective_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(term=CrossEntropy(), **settings)


@pytest.mark.parametrize("option", [{"confidence": True}, {"weights": "acceptance"}])
def test_the_acceptance_of_drafts_needs_the_whole_vocabulary(option: dict[str, Any]) -> None:
    """Without the other tokens, whose probability is not known, it would be too high."""
    frozen = MTPConfig.find("linear")(depth=1, freeze_trunk=True)
    Objective(term=CrossEntropy(), **option).check(frozen)
    with pytest.raises(ValueError, match="and objective.draft_vocab=7 leaves out tokens, which"):
        Objective(term=CrossEntropy(), draft_vocab=7, **option).check(frozen)


@pytest.mark.parametrize(
    ("variant", "switches", "layers", "message"),
    [
        ("sequential", {"freeze_trunk": True}, 2, "mtp.freeze_trunk=true"),
        ("linear", {"detach": "all"}, 2, "mtp.detach=all"),
        ("sequential", {"detach": "trunk"}, 2, "mtp.detach=trunk"),
        ("parallel", {}, 1, "model.n_layers=1"),
    ],
)
def test_rules_that_measure_are_refused_if_no_depth_reaches_the_trunk(
    variant: str, switches: dict[str, Any], layers: int, message: str
) -> None:
    sizes = {"vocab_size": 9, "d_model": 8, "n_heads": 1, "n_kv_heads": 1, "d_ff": 8}
    trunk = TrunkConfig(**sizes, n_layers=layers)
    config = ModelConfig(trunk=trunk, mtp=MTPConfig.find(variant)(depth=1, **switches))
    with pytest.raises(ValueError, match=f"balance=gradnorm measures .*{message}"):
        require_measurable(config, CROSS_ENTROPY, setting="balance=gradnorm")
