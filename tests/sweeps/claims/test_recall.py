"""Claims continue from committed results, without the folders of their runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sweeps.claims.claim import Claim
from sweeps.claims.hours import pending_of
from sweeps.claims.jobs import jobs
from sweeps.claims.result import Result, judge, make_result, read_results, write_result
from sweeps.claims.reuse import left_to_run, shared_runs, with_stored
from sweeps.claims.run import run
from tests.sweeps.claims.fixture_claims import (
    BEGAN,
    PLAIN,
    SOLVED,
    claim_of,
    observed,
    predict,
    register,
    shifted,
)
from tests.sweeps.fixture_runs import write_run


@pytest.fixture
def claim(tmp_path: Path) -> Claim:
    return claim_of(tmp_path)


@pytest.fixture
def stored(claim: Claim, tmp_path: Path) -> Result:
    """A result of another machine, with the folders of three finished seeds, one failed seed and
    one not begun."""
    values = {"plain": PLAIN[:3], "mtp": shifted(-0.05)[:3]}
    arms = observed(claim, {arm: [*of, "failed", "missing"] for arm, of in values.items()})
    for job in jobs(claim, range(5), tmp_path):
        arms[job.arm][job.seed].folder = job.name
    return json.loads(json.dumps(make_result(claim, arms, BEGAN)))


def test_runs_of_the_stored_result_are_not_run_again(claim, stored, tmp_path):
    assert {(job.arm, job.seed) for job in left_to_run(claim, range(5), tmp_path, stored)} == {
        (arm, seed) for arm in claim.arms for seed in (3, 4)
    }
    assert left_to_run(claim, [1, 2], tmp_path, stored) == []
    assert left_to_run(claim, [1, 2], tmp_path, None) == jobs(claim, [1, 2], tmp_path)
    other = claim_of(tmp_path, seeds=[0, 1, 2])  # another prediction
    assert len(left_to_run(other, [0], tmp_path, stored)) == 2


def test_another_config_than_the_stored_one_is_refused(claim, stored, tmp_path):
    stored["arms"]["mtp"]["seeds"]["1"]["folder"] = "of_another_default"
    with pytest.raises(ValueError, match="settings of mtp have changed.*commit cccc"):
        left_to_run(claim, [4], tmp_path, stored)


def test_a_verdict_counts_runs_of_the_stored_result(claim, stored, tmp_path):
    runs = tmp_path / "runs"
    here = {a: {s: f"{a}{s}" for s in (3, 4)} for a in claim.arms}
    for seed in (3, 4):
        for arm, less in (("plain", 0.0), ("mtp", 0.1)):
            write_run(runs / f"{arm}{seed}", {"seed": seed}, loss=2 * PLAIN[seed] - less)
    register(claim, runs, here, commit="a" * 40)
    results = tmp_path / "results"
    write_result(stored, claim.label, results)
    alone, both = judge(claim, runs), judge(claim, runs, results)
    assert alone["verdict"] == "undecided" and both["verdict"] == "holds"
    assert both["unfinished"] == [] and both["predictions"][0]["n"] == 5
    assert (both["began"], both["predicted_in"]) == BEGAN
    seeds = both["arms"]["plain"]["seeds"]
    assert list(seeds) == ["0", "1", "2", "3", "4"]
    assert seeds["1"] == stored["arms"]["plain"]["seeds"]["1"]
    write_result(both, claim.label, results)
    assert judge(claim, runs, results) == both


def test_started_and_failed_runs_of_the_stored_result_are_kept(claim, stored, tmp_path):
    observed_here = observed(claim, {"plain": [*["missing"] * 3, "running"], "mtp": []})
    both = with_stored(observed_here, claim, {claim.label: stored})
    assert [seed.state for seed in both["plain"].values()] == [*["done"] * 3, "running", "missing"]
    assert [seed.state for seed in both["mtp"].values()] == [*["done"] * 3, "failed", "missing"]
    changed = claim_of(tmp_path, sentence="MTP helps a lot.")
    assert with_stored(observed_here, changed, {claim.label: stored}) == observed_here


def test_a_run_both_here_and_in_the_stored_result_is_one_run(claim, stored):
    stored["arms"]["plain"]["seeds"]["0"]["weights"] = "f" * 64
    here = observed(claim, {"plain": PLAIN[:1], "mtp": []})
    here["plain"][0].folder = stored["arms"]["plain"]["seeds"]["0"]["folder"]
    both = with_stored(here, claim, {claim.label: stored})
    assert both["plain"][0].weights == "f" * 64, "the run's checkpoints may be gone"
    here["plain"][0].folder = "another"
    with pytest.raises(ValueError, match="has another config for it, another: give --runs"):
        with_stored(here, claim, {claim.label: stored})


def store_result_of_another_claim(claim: Claim, runs: Path, folder: Path, **changes: Any) -> None:
    """Store a result of a claim that has the arm ``plain`` under another name, for three seeds."""
    arms = {"control": claim.arms["plain"], "parallel": ["mtp=parallel"]}
    predictions = [predict("control", "above", against="parallel")]
    other = claim_of(folder / "claims", "other", arms=arms, predictions=predictions, **changes)
    runs_by_arm = observed(other, {"control": PLAIN[:3], "parallel": []})
    named = {job.seed: job.name for job in jobs(other, range(3), runs) if job.arm == "control"}
    seeds = {n: replace(seed, folder=named[n]) for n, seed in runs_by_arm["control"].items()}
    result = make_result(other, {"control": seeds, "parallel": {}}, BEGAN)
    write_result(result, "other", folder / "results")


def test_an_arm_that_another_claim_has_run_is_shared(claim, tmp_path):
    results, runs = tmp_path / "results", tmp_path / "runs"
    named = {(job.arm, job.seed): job.name for job in jobs(claim, range(3), runs)}
    store_result_of_another_claim(claim, runs, tmp_path)
    shared = set(shared_runs(claim, read_results(results).values()))
    assert shared == {named["plain", seed] for seed in range(3)}
    here = {arm: {seed: named[arm, seed] for seed in range(3)} for arm in claim.arms}
    for seed in range(3):
        write_run(runs / named["mtp", seed], {"seed": seed}, loss=2 * PLAIN[seed] - 0.1)
    register(claim, runs, here, commit="a" * 40)
    alone, both = judge(claim, runs), judge(claim, runs, results)
    assert (alone["predictions"][0]["n"], both["predictions"][0]["n"]) == (0, 3)
    assert both["arms"]["plain"]["seeds"]["1"]["values"] == {"val/bits_per_byte": PLAIN[1]}


@pytest.mark.parametrize("changes", [{"measure": SOLVED}, {"measure": {"tag": "val/loss"}}])
def test_an_arm_with_another_measure_is_not_shared(claim, tmp_path, changes):
    store_result_of_another_claim(claim, tmp_path / "runs", tmp_path, **changes)
    assert shared_runs(claim, read_results(tmp_path / "results").values()) == {}


def test_shared_runs_are_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = {"plain": ["mtp=none", "mtp.depth=0"], "again": ["mtp=none", "mtp.depth=0"]}
    predictions = [predict("again", "within", 1, against="plain")]
    claim = claim_of(tmp_path / "claims", arms=arms, predictions=predictions, seeds=[0, 1, 2])
    runs = tmp_path / "runs"
    store_result_of_another_claim(claim, runs, tmp_path)
    # A claim that measures something else runs them again.
    measure = {"tag": "val/loss"}
    other = claim_of(
        tmp_path / "claims", "else", arms=arms, predictions=predictions, measure=measure
    )
    for claims in ([claim, other], [other, claim]):
        pending = pending_of(claims, tmp_path / "elsewhere", read_results(tmp_path / "results"))
        assert {p.claim.name: len(p.costs) for p in pending} == {"mine": 0, "else": 5}
    assert run([claim], runs, commits={"mine": "a" * 40}, results=tmp_path / "results") == 0
    assert "Nothing to run" in capsys.readouterr().out
    result = judge(claim, runs, tmp_path / "results")
    assert result["unfinished"] == [] and result["predictions"][0]["n"] == 3
