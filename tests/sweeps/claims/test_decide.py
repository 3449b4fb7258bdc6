"""The three verdicts on values and on shares of solved seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from sweeps.claims.claim import Claim
from sweeps.claims.decide import (
    ALONE,
    BINOMIAL,
    FAILS,
    FISHER,
    HOLDS,
    PAIRED,
    UNDECIDED,
    Finding,
    decide,
    overall,
)
from sweeps.report.statistics import share, unpaired
from tests.sweeps.claims.fixture_claims import (
    PLAIN,
    SOLVED,
    claim_of,
    exact_matches,
    observed,
    predict,
    shifted,
)


def finding_of(claim: Claim, mtp: Any, plain: Any = PLAIN, **options: Any) -> Finding:
    """The finding of a claim's only prediction, from the values of its two arms by seed."""
    (finding,) = decide(claim, observed(claim, {"plain": plain, "mtp": mtp}, **options))
    return finding


def predicting(
    folder: Path,
    side: str = "below",
    by: float | None = None,
    against: str | None = "plain",
    **changes: Any,
) -> Claim:
    return claim_of(folder, predictions=[predict("mtp", side, by, against=against)], **changes)


@pytest.mark.parametrize(
    ("side", "by", "effect", "scale", "verdict"),
    [
        ("below", 0, -0.05, 1, HOLDS),
        ("below", 0, 0.05, 1, FAILS),
        ("below", 0, -0.002, 3, UNDECIDED),
        ("below", -0.03, -0.05, 1, HOLDS),
        ("below", -0.05, -0.05, 1, UNDECIDED),
        ("below", -0.07, -0.05, 1, FAILS),
        ("above", -0.02, 0.0, 1, HOLDS),
        ("above", 0.02, 0.0, 1, FAILS),
        ("within", 0.02, 0.004, 1, HOLDS),
        ("within", 0.02, -0.004, 1, HOLDS),
        ("within", 0.02, 0.0205, 1, UNDECIDED),
        ("within", 0.02, -0.05, 1, FAILS),
    ],
)
def test_paired_differences_agree_with_scipy(tmp_path, side, by, effect, scale, verdict):
    values = shifted(effect, scale)
    finding = finding_of(predicting(tmp_path, side, by), values)
    assert (finding.verdict, finding.test, finding.n) == (verdict, PAIRED, 5)
    assert bool(finding.why) == (verdict == UNDECIDED)
    end = -by if side == "within" and effect < 0 else by  # the nearest one
    assert finding.p == pytest.approx(
        stats.ttest_rel(values, [p + end for p in PLAIN]).pvalue, rel=1e-6
    )
    low, high = stats.ttest_rel(values, PLAIN).confidence_interval(0.95)
    assert (finding.low, finding.high) == (pytest.approx(low), pytest.approx(high))
    assert (low < end < high) == (verdict == UNDECIDED), "the interval agrees with the test"


def test_an_arm_alone_is_tested_against_a_threshold(tmp_path: Path) -> None:
    claim = predicting(tmp_path, against=None, side="above", by=0.85)
    rates = (0.90, 0.93, 0.91, 0.88, 0.92)
    finding = finding_of(claim, rates)
    assert finding.verdict == HOLDS and finding.test == ALONE
    assert finding.p == pytest.approx(stats.ttest_1samp(rates, 0.85).pvalue, rel=1e-6)
    low = finding_of(claim, tuple(r - 0.3 for r in rates))
    assert low.verdict == FAILS
    assert finding_of(claim, (0.9, 0.8, 0.86, 0.83, 0.88)).verdict == UNDECIDED


def solving(folder: Path, side: str = "above", **prediction: Any) -> Claim:
    return predicting(folder, side, measure=SOLVED, seeds=list(range(8)), **prediction)


@pytest.mark.parametrize(
    ("plain", "mtp", "verdict"), [(0, 7, HOLDS), (7, 0, FAILS), (2, 4, UNDECIDED)]
)
def test_shares_of_seeds_are_compared_by_fishers_test(tmp_path, plain, mtp, verdict):
    finding = finding_of(solving(tmp_path), exact_matches(mtp), exact_matches(plain))
    assert (finding.verdict, finding.test) == (verdict, FISHER)
    assert (finding.own, finding.other) == (share(mtp, 8), share(plain, 8))
    assert finding.p == unpaired(share(mtp, 8), share(plain, 8)).p
    assert finding.effect == pytest.approx((mtp - plain) / 8)


@pytest.mark.parametrize("count", [0, 1, 3, 7, 8])
@pytest.mark.parametrize("by", [0.05, 0.5, 0.85])
def test_one_share_against_a_threshold_agrees_with_clopper_and_pearson(tmp_path, count, by):
    claim = solving(tmp_path, against=None, side="below", by=by)
    finding = finding_of(claim, exact_matches(count), exact_matches(0))
    for level in (0.8, 0.95, 0.99):
        ends = stats.binomtest(count, 8).proportion_ci(level, "exact")
        assert (ends.low <= by <= ends.high) == (finding.p >= 1 - level)
    inside = HOLDS if count / 8 < by else FAILS
    assert finding.verdict == (UNDECIDED if finding.low <= by <= finding.high else inside)
    assert finding.test == BINOMIAL


def test_holms_correction_is_over_the_predictions_of_a_claim(tmp_path: Path) -> None:
    arms = {"plain": [], "mtp": ["mtp_lambda=1"], "b": ["mtp_lambda=2"], "c": ["mtp_lambda=3"]}
    pairs = [predict(a, "below", against="plain") for a in ("mtp", "b", "c")]
    claim = claim_of(tmp_path, arms=arms, predictions=pairs)
    values = {"plain": PLAIN, "mtp": shifted(-0.05)}
    values |= {"b": shifted(-0.012, 2.8), "c": shifted(0.0, 2.0)}
    first, second, third = decide(claim, observed(claim, values))
    assert None not in (first.p, second.p, third.p)
    assert first.adjusted == pytest.approx(3 * first.p)
    assert second.adjusted == pytest.approx(2 * second.p)
    assert second.p < 0.05 < second.adjusted
    assert (first.verdict, second.verdict, third.verdict) == (HOLDS, UNDECIDED, UNDECIDED)
    assert "Holm's correction over 3" in second.why
    # An arm that has not run counts as a test, so later runs cannot weaken an earlier verdict.
    less = {**values, "c": ["missing"] * 5}
    assert decide(claim, observed(claim, less))[1].adjusted == pytest.approx(second.adjusted)


def test_fewer_seeds_than_the_minimum_are_undecided(tmp_path: Path) -> None:
    waiting = [*shifted(-0.05)[:2], "running", "missing", "missing"]
    finding = finding_of(predicting(tmp_path), waiting)
    assert finding.verdict == UNDECIDED and finding.n == 2
    assert finding.why == "n = 2 is below the claim's minimum of 3"
    assert finding.effect is not None and finding.low is not None
    nothing = finding_of(predicting(tmp_path), ["missing"] * 5)
    assert nothing.verdict == UNDECIDED and nothing.effect is None
    single = finding_of(predicting(tmp_path), [1.9, *["missing"] * 4])
    assert single.low is None and single.verdict == UNDECIDED
    enough = finding_of(predicting(tmp_path), [*shifted(-0.05)[:4], "running"])
    assert enough.verdict == HOLDS and enough.n == 4


@pytest.mark.parametrize("bad", ["failed", None])
def test_a_failed_seed_leaves_the_verdict_undecided(tmp_path: Path, bad: str | None) -> None:
    finding = finding_of(predicting(tmp_path), [*shifted(-0.05)[:4], bad])
    assert finding.verdict == UNDECIDED and "seed 4" in finding.why
    shares = finding_of(solving(tmp_path), [*exact_matches(7, 7), bad], exact_matches(0))
    assert shares.verdict == UNDECIDED


def test_other_texts_and_unequal_costs_are_not_compared(tmp_path: Path) -> None:
    claim, mtp = predicting(tmp_path), shifted(-0.05)
    assert "different texts" in finding_of(claim, mtp, texts={"mtp": "f" * 32}).why
    assert "5.0% in steps" in finding_of(claim, mtp, costs={"mtp": 1050.0}).why
    claim = predicting(tmp_path, equal="flops")
    assert finding_of(claim, mtp, costs={"mtp": 1010.0}).verdict == HOLDS
    assert finding_of(claim, mtp, costs={"mtp": 1050.0}).verdict == UNDECIDED


def test_a_run_that_does_not_say_its_cost_leaves_the_verdict_undecided(tmp_path: Path) -> None:
    claim = predicting(tmp_path, equal="flops")
    arms = observed(claim, {"plain": PLAIN, "mtp": shifted(-0.05)})
    assert decide(claim, arms)[0].verdict == HOLDS
    arms["mtp"][2] = replace(arms["mtp"][2], costs={"seconds": 60.0})
    (finding,) = decide(claim, arms)
    assert (finding.verdict, finding.why) == (UNDECIDED, "the runs do not say their flops")


def test_a_difference_equal_at_every_seed_has_no_test(tmp_path: Path) -> None:
    finding = finding_of(predicting(tmp_path), PLAIN)
    assert finding.verdict == UNDECIDED and "no variance to test" in finding.why


def test_a_claim_holds_if_all_its_predictions_hold() -> None:
    assert overall([HOLDS, HOLDS]) == HOLDS
    assert overall([HOLDS, UNDECIDED]) == UNDECIDED
    assert overall([HOLDS, UNDECIDED, FAILS]) == FAILS


def test_predictions_waiting_for_seeds_count_fully_in_holms_correction(tmp_path: Path) -> None:
    """Otherwise their later, larger p-values could weaken the verdicts of other predictions."""
    predictions = [predict(arm, "below", against="plain") for arm in ("mtp", "few")]
    arms = {"plain": ["mtp=none"], "mtp": ["mtp=sequential"], "few": ["mtp=linear"]}
    claim = claim_of(tmp_path, arms=arms, predictions=predictions, minimum=5)
    values = {"plain": PLAIN, "mtp": shifted(-0.0035), "few": shifted(-0.05)[:3]}
    first, waiting = decide(claim, observed(claim, values))
    assert waiting.why.startswith("n = 3") and waiting.p is not None and waiting.p < 0.002
    assert first.p is not None and first.adjusted == pytest.approx(min(1.0, 2 * first.p))
