"""All three verdicts on results made by hand, for values and for shares of seeds that solve."""

from __future__ import annotations

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
from tests.sweeps.claims.fixture_claims import (
    PLAIN,
    SOLVED,
    claim_of,
    moved,
    observed,
    predict,
    rights,
)


def one(claim: Claim, values: dict[str, Any], **options: Any) -> Finding:
    (finding,) = decide(claim, observed(claim, values, **options))
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
    ("by", "scale", "verdict"), [(-0.05, 1.0, HOLDS), (0.05, 1.0, FAILS), (-0.002, 3.0, UNDECIDED)]
)
def test_a_paired_difference(tmp_path: Path, by: float, scale: float, verdict: str) -> None:
    found = one(predicting(tmp_path), {"plain": PLAIN, "mtp": moved(by, scale)})
    assert found.verdict == verdict and found.test == PAIRED and found.n == 5
    reference = stats.ttest_rel(moved(by, scale), PLAIN)
    low, high = reference.confidence_interval(0.95)
    assert found.p == pytest.approx(reference.pvalue, rel=1e-6)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert bool(found.why) == (verdict == UNDECIDED)


def test_pairs_are_by_seed_and_not_by_place(tmp_path: Path) -> None:
    claim = predicting(tmp_path)
    arms = observed(claim, {"plain": PLAIN, "mtp": moved(-0.05)})
    turned = {"plain": arms["plain"], "mtp": dict(reversed(arms["mtp"].items()))}
    assert decide(claim, turned) == decide(claim, arms)


@pytest.mark.parametrize(
    ("side", "by", "effect", "verdict"),
    [
        ("below", -0.03, -0.05, HOLDS),
        ("below", -0.05, -0.05, UNDECIDED),
        ("below", -0.07, -0.05, FAILS),
        ("above", -0.02, 0.0, HOLDS),
        ("above", 0.02, 0.0, FAILS),
        ("within", 0.02, 0.004, HOLDS),
        ("within", 0.02, -0.004, HOLDS),
        ("within", 0.02, 0.0205, UNDECIDED),
        ("within", 0.02, -0.05, FAILS),
    ],
)
def test_thresholds(tmp_path: Path, side: str, by: float, effect: float, verdict: str) -> None:
    found = one(predicting(tmp_path, side=side, by=by), {"plain": PLAIN, "mtp": moved(effect)})
    assert found.verdict == verdict
    # The interval and the test say the same.
    ends = (-by, by) if side == "within" else (by, by)
    straddles = any(found.low < end < found.high for end in ends)
    assert straddles == (verdict == UNDECIDED)


def test_an_arm_alone_against_a_threshold(tmp_path: Path) -> None:
    claim = predicting(tmp_path, against=None, side="above", by=0.85)
    rates = (0.90, 0.93, 0.91, 0.88, 0.92)
    found = one(claim, {"plain": PLAIN, "mtp": rates})
    assert found.verdict == HOLDS and found.test == ALONE
    assert found.p == pytest.approx(stats.ttest_1samp(rates, 0.85).pvalue, rel=1e-6)
    low = one(claim, {"plain": PLAIN, "mtp": tuple(r - 0.3 for r in rates)})
    assert low.verdict == FAILS
    assert one(claim, {"plain": PLAIN, "mtp": (0.9, 0.8, 0.86, 0.83, 0.88)}).verdict == UNDECIDED


def solving(folder: Path, side: str = "above", **prediction: Any) -> Claim:
    return predicting(folder, side, measure=SOLVED, seeds=list(range(8)), **prediction)


@pytest.mark.parametrize(
    ("plain", "mtp", "verdict"), [(0, 7, HOLDS), (7, 0, FAILS), (2, 4, UNDECIDED)]
)
def test_shares_of_seeds_that_solve(tmp_path: Path, plain: int, mtp: int, verdict: str) -> None:
    found = one(solving(tmp_path), {"plain": rights(plain), "mtp": rights(mtp)})
    assert found.verdict == verdict and found.test == FISHER
    table = [[mtp, 8 - mtp], [plain, 8 - plain]]
    assert found.p == pytest.approx(stats.fisher_exact(table).pvalue)
    assert found.effect == pytest.approx((mtp - plain) / 8)
    for share, count in ((found.own, mtp), (found.other, plain)):
        exact = stats.binomtest(count, 8).proportion_ci(0.95, "exact")
        assert (share.low, share.high) == (pytest.approx(exact.low), pytest.approx(exact.high))


@pytest.mark.parametrize(("solved", "verdict"), [(0, HOLDS), (8, FAILS), (3, UNDECIDED)])
def test_a_share_alone(tmp_path: Path, solved: int, verdict: str) -> None:
    claim = solving(tmp_path, against=None, side="below", by=0.5)
    found = one(claim, {"plain": rights(0), "mtp": rights(solved)})
    assert found.verdict == verdict and found.test == BINOMIAL
    assert (found.low < 0.5 < found.high) == (verdict == UNDECIDED)


@pytest.mark.parametrize("count", range(9))
@pytest.mark.parametrize("by", [0.05, 0.3, 0.5, 0.85])
def test_the_binomials_p_agrees_with_clopper_and_pearson(tmp_path, count, by):
    claim = solving(tmp_path, against=None, side="below", by=by)
    found = one(claim, {"plain": rights(0), "mtp": rights(count)})
    for level in (0.8, 0.95, 0.99):
        ends = stats.binomtest(count, 8).proportion_ci(level, "exact")
        assert (ends.low <= by <= ends.high) == (found.p >= 1 - level)


def test_holm_is_over_the_claims_predictions(tmp_path: Path) -> None:
    arms = {"plain": [], "mtp": ["mtp_lambda=1"], "b": ["mtp_lambda=2"], "c": ["mtp_lambda=3"]}
    pairs = [predict(a, "below", against="plain") for a in ("mtp", "b", "c")]
    claim = claim_of(tmp_path, arms=arms, predictions=pairs)
    values = {"plain": PLAIN, "mtp": moved(-0.05), "b": moved(-0.012, 2.8), "c": moved(0.0, 2.0)}
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


def test_too_few_pairs(tmp_path: Path) -> None:
    waiting = [*moved(-0.05)[:2], "running", "missing", "missing"]
    found = one(predicting(tmp_path), {"plain": PLAIN, "mtp": waiting})
    assert found.verdict == UNDECIDED and found.n == 2
    assert found.why == "n = 2 is below the claim's minimum of 3"
    assert found.effect is not None and found.low is not None, "the numbers are shown"
    nothing = one(predicting(tmp_path), {"plain": PLAIN, "mtp": ["missing"] * 5})
    assert nothing.verdict == UNDECIDED and nothing.effect is None
    single = one(predicting(tmp_path), {"plain": PLAIN, "mtp": [1.9, *["missing"] * 4]})
    assert single.low is None and single.verdict == UNDECIDED


def test_a_prefix_of_seeds_is_enough_where_the_claim_says_so(tmp_path: Path) -> None:
    waiting = [*moved(-0.05)[:4], "running"]
    found = one(predicting(tmp_path), {"plain": PLAIN, "mtp": waiting})
    assert found.verdict == HOLDS and found.n == 4


@pytest.mark.parametrize("bad", ["failed", None])
def test_no_seed_is_dropped(tmp_path: Path, bad: str | None) -> None:
    found = one(predicting(tmp_path), {"plain": PLAIN, "mtp": [*moved(-0.05)[:4], bad]})
    assert found.verdict == UNDECIDED and "seed 4" in found.why
    shares = one(solving(tmp_path), {"plain": rights(0), "mtp": [*rights(7, 7), bad]})
    assert shares.verdict == UNDECIDED


def test_other_texts_and_unequal_costs_are_not_compared(tmp_path: Path) -> None:
    values = {"plain": PLAIN, "mtp": moved(-0.05)}
    claim = predicting(tmp_path)
    assert "different texts" in one(claim, values, texts={"mtp": "f" * 32}).why
    assert "5.0% in steps" in one(claim, values, costs={"mtp": 1050.0}).why
    claim = predicting(tmp_path, equal="flops")
    assert one(claim, values, costs={"mtp": 1010.0}).verdict == HOLDS
    assert one(claim, values, costs={"mtp": 1050.0}).verdict == UNDECIDED


def test_what_is_the_same_at_every_seed_has_no_test(tmp_path: Path) -> None:
    found = one(predicting(tmp_path), {"plain": PLAIN, "mtp": PLAIN})
    assert found.verdict == UNDECIDED and "no variance to test" in found.why


def test_a_claim_is_all_of_its_predictions() -> None:
    assert overall([HOLDS, HOLDS]) == HOLDS
    assert overall([HOLDS, UNDECIDED]) == UNDECIDED
    assert overall([HOLDS, UNDECIDED, FAILS]) == FAILS


def test_a_prediction_that_waits_for_seeds_weakens_no_other_when_they_come(tmp_path: Path) -> None:
    """Its p-value so far does not count in Holm's correction, and is larger later."""
    predictions = [predict(arm, "below", against="plain") for arm in ("mtp", "few")]
    arms = {"plain": ["mtp=none"], "mtp": ["mtp=sequential"], "few": ["mtp=linear"]}
    claim = claim_of(tmp_path, arms=arms, predictions=predictions, minimum=5)
    values = {"plain": PLAIN, "mtp": moved(-0.0035), "few": moved(-0.05)[:3]}
    first, waiting = decide(claim, observed(claim, values))
    assert waiting.why.startswith("n = 3") and waiting.p is not None and waiting.p < 0.002
    assert first.p is not None and first.adjusted == pytest.approx(min(1.0, 2 * first.p))
