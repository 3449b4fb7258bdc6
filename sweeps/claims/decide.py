"""Decides a claim's predictions from the numbers of its runs, by the claim's own thresholds.

A prediction names a region; its effect lies inside or outside. The p-value is the smallest level at
which the effect's interval excludes the nearest boundary, so interval and test agree. Holm's
correction covers all predictions of the claim. Those without a test, and those that cannot be
decided yet, count as p = 1, so their later runs cannot weaken another verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mtp_lightning.run.solved import is_above
from sweeps.claims.claim import Claim, ClaimMeasure, ClaimPrediction
from sweeps.claims.observe import ArmRun, Arms
from sweeps.report.compare import FACT
from sweeps.report.equivalent import Spent, gain_over
from sweeps.report.statistics import LEVEL, Share, holm, paired, share, unpaired

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
# Reasons that more seeds could remove: too few seeds, noise, or noise after the correction.
FEW, NOISE, UNCORRECTED = (
    "n = ",
    "the threshold is within the noise",
    "not beyond noise by Holm's correction",
)
PAIRED, ALONE, FISHER, BINOMIAL = "paired t", "t", "Fisher", "binomial"

# The largest relative difference of two arms in the resource that they should spend alike.
MOST_APART = {"steps": 0.0, "flops": 0.02, "parameters": 0.02, "seconds": 0.1}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one prediction."""

    prediction: ClaimPrediction  # the claim's
    verdict: str = UNDECIDED  # HOLDS, FAILS or UNDECIDED
    why: str = ""  # the reason of UNDECIDED
    test: str | None = None  # its name; None without numbers
    # Mean difference, mean, difference of shares, or share; None without numbers.
    effect: float | None = None
    # Lower end of the effect's 95 % interval, uncorrected; None for two shares and one seed.
    low: float | None = None
    high: float | None = None  # its upper end
    n: int = 0  # seeds or pairs; the smaller number of seeds for two shares
    p: float | None = None  # p-value of the test against the boundary; None without one
    # The p-value after Holm's correction over the claim's predictions.
    adjusted: float | None = None
    own: Share | None = None  # the arm's share of seeds that solve, where that is measured
    other: Share | None = None  # the same share of the arm that it is compared with


def decide(claim: Claim, arms: Arms) -> list[Finding]:
    """Decide every prediction of a claim from the observed runs of its arms."""
    tests = [_test(prediction, arms) for prediction in claim.predictions]
    tests = [replace(test, why=_obstacle(claim, arms, test)) for test in tests]
    adjusted = holm([1.0 if test.p is None or test.why else test.p for test in tests])
    return [_decided(claim, test, p) for test, p in zip(tests, adjusted, strict=True)]


def overall(verdicts: Sequence[str]) -> str:
    """A claim holds if all its predictions do, and does not if one of them does not."""
    if FAILS in verdicts:
        return FAILS
    return HOLDS if all(verdict == HOLDS for verdict in verdicts) else UNDECIDED


def arm_share(runs: Mapping[int, ArmRun], measure: ClaimMeasure) -> Share | None:
    """The share of an arm's finished seeds above the level; None without a finished seed."""
    assert measure.solved is not None
    values = _read(runs, measure)
    if not values:
        return None
    return share(sum(is_above(value, measure.solved) for value in values.values()), len(values))


def _read(runs: Mapping[int, ArmRun], measure: ClaimMeasure) -> dict[int, float]:
    """The measured value of each finished run of an arm, by seed."""
    key = measure.key
    return {seed: run.values[key] for seed, run in runs.items() if run.done and key in run.values}


def _values(arms: Arms, arm: str, measure: ClaimMeasure) -> dict[int, float]:
    """The tested values by seed: the measured values, or the logarithms of the gains."""
    if not measure.is_ratio:
        return _read(arms[arm], measure)
    gains = {seed: gain_of(arms, arm, seed, measure) for seed in arms[arm]}
    return {s: math.log(gain) for s, gain in gains.items() if isinstance(gain, float)}


def gain_of(arms: Arms, arm: str, seed: int, measure: ClaimMeasure) -> float | str | None:
    """The compute-equivalent gain of an arm's run over plain runs of its seed, or the reason why it
    has none; None if one of them is not finished."""
    names = (arm, *measure.curve_of(arm))
    runs = [(name, run) for name in names if (run := arms[name].get(seed)) and run.done]
    if len(runs) < len(names):
        return None
    costs = []
    for name, run in runs:
        numbers = run.costs | run.values
        if missing := [key for key in ("flops", "step", measure.key) if key not in numbers]:
            return f"{name} has no {missing[0]}"
        flops, steps, loss = numbers["flops"], numbers["step"], numbers[measure.key]
        costs.append(Spent(flops=flops, loss=loss, steps=steps))
    arm_cost, *plain = costs
    gain = gain_over(plain, arm_cost)
    if isinstance(gain, str):
        return gain
    return gain.total if measure.part == "total" else gain.effect


def _decided(claim: Claim, test: Finding, adjusted: float) -> Finding:
    """A test with its verdict; ``test.why`` is a reason against any."""
    why, verdict = test.why, UNDECIDED
    if test.test is not None and not why:
        if adjusted < LEVEL:
            verdict = HOLDS if _inside(test.prediction, test.effect or 0.0) else FAILS
        elif test.p is not None and test.p < LEVEL:
            why = f"{UNCORRECTED} over {len(claim.predictions)}"
        else:
            why = NOISE
    return replace(test, verdict=verdict, why=why, adjusted=None if test.p is None else adjusted)


def _inside(prediction: ClaimPrediction, effect: float) -> bool:
    if prediction.side == "within":
        return abs(effect) < prediction.by
    return effect > prediction.by if prediction.side == "above" else effect < prediction.by


def boundary(side: str, by: float, effect: float) -> float:
    """The end of the predicted region that is nearest to the effect."""
    return -by if side == "within" and effect < 0 else by


def _test(prediction: ClaimPrediction, arms: Arms) -> Finding:
    """The test of a prediction, not yet decided; without numbers if an arm has no finished seed.
    ``why`` says if all seeds have the same difference, which has no noise to test."""
    measure, against = prediction.measure, prediction.against
    runs = [(name, seed) for name in _names(prediction) for seed in arms[name]]
    if measure.is_ratio and any(isinstance(gain_of(arms, *run, measure), str) for run in runs):
        # A seed beyond the curve would be the best or the worst, so a mean without it is biased.
        return Finding(prediction=prediction)
    if measure.solved is None:
        values = _values(arms, prediction.arm, measure)
        reference = None if against is None else _values(arms, against, measure)
        return _of_values(prediction, values, reference)
    own = arm_share(arms[prediction.arm], measure)
    other = None if against is None else arm_share(arms[against], measure)
    if own is None or (against is not None and other is None):
        return Finding(prediction=prediction)
    finding = Finding(prediction=prediction, n=own.n, own=own, other=other)
    if other is not None:
        n, p = min(own.n, other.n), unpaired(own, other).p
        return replace(finding, test=FISHER, effect=own.rate - other.rate, n=n, p=p)
    from scipy import stats

    # Two-sided like the interval: twice the smaller tail.
    by = min(max(boundary(prediction.side, prediction.by, own.rate), 0.0), 1.0)
    tails = (stats.binom.sf(own.count - 1, own.n, by), stats.binom.cdf(own.count, own.n, by))
    p = min(1.0, 2 * float(min(tails)))
    return replace(finding, test=BINOMIAL, effect=own.rate, low=own.low, high=own.high, p=p)


def _of_values(
    prediction: ClaimPrediction, values: Mapping[int, float], reference: Mapping[int, float] | None
) -> Finding:
    """The t-test of an arm's values, or of paired differences, against the nearest boundary."""
    baseline = dict.fromkeys(values, 0.0) if reference is None else reference
    effect = paired(values, baseline)
    if effect is None:
        return Finding(prediction=prediction)
    mean, half = effect.difference.mean, effect.difference.half
    ratio = prediction.measure.is_ratio
    by = math.log(prediction.by) if ratio else boundary(prediction.side, prediction.by, mean)
    from_boundary = paired(values, {seed: value + by for seed, value in baseline.items()})
    assert from_boundary is not None
    to_effect = math.exp if ratio else float
    return Finding(
        prediction=prediction,
        why=FACT if from_boundary.constant else "",
        test=ALONE if reference is None else PAIRED,
        effect=to_effect(mean),
        low=None if half is None else to_effect(mean - half),
        high=None if half is None else to_effect(mean + half),
        n=effect.difference.n,
        p=from_boundary.p,
    )


def _names(prediction: ClaimPrediction) -> list[str]:
    """The arm of a prediction, and the one that it is compared with."""
    return [name for name in (prediction.arm, prediction.against) if name is not None]


def _obstacle(claim: Claim, arms: Arms, test: Finding) -> str:
    """A reason against any verdict that does not depend on the effect; empty without one."""
    measure = test.prediction.measure
    names = _names(test.prediction)
    for name in names:
        for seed, run in arms[name].items():
            if run.state == "failed":
                return f"{name} failed at seed {seed}, and no seed is dropped"
            if run.done and measure.key not in run.values:
                return f"{name} has no {measure.tag} at seed {seed}"
            gain = gain_of(arms, name, seed, measure) if run.done and measure.is_ratio else 1.0
            if not isinstance(gain, float):
                why = gain or "a run of the plain curve is not finished"
                return f"{name} at seed {seed}: {why}"
    if test.test is None:
        return "no seed is finished" if len(names) < 2 else "no seed is finished in both arms"
    if test.n < claim.scale.minimum:
        return f"{FEW}{test.n} is below the claim's minimum of {claim.scale.minimum}"
    done = [[run for run in arms[name].values() if run.done] for name in names]
    curves = [arm for name in names for arm in measure.curve_of(name)] if measure.is_ratio else []
    if len({run.text for name in (*names, *curves) for run in arms[name].values() if run.done}) > 1:
        return "the arms were evaluated on different texts"
    return test.why or (_unequal(claim.equal, *done) if len(names) == 2 else "")


def _unequal(resource: str, own: Sequence[ArmRun], other: Sequence[ArmRun]) -> str:
    """How far two arms differ in the resource that they should spend alike; empty if they agree."""
    if resource == "nothing":
        return ""
    if any(resource not in run.costs for run in (*own, *other)):
        return f"the runs do not say their {resource}"
    a, b = (math.fsum(run.costs[resource] for run in runs) / len(runs) for runs in (own, other))
    gap = abs(a - b) / max(b, 1e-300)
    return f"the arms differ by {gap:.1%} in {resource}" if gap > MOST_APART[resource] else ""
