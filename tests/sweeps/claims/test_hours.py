"""Costs of pending runs, seeds that fit into a time, and seeds that would decide a claim."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mtp_lightning.system import this_machine
from sweeps.claims.claim import Claim
from sweeps.claims.hours import (
    BY_FLOPS,
    EXPECTED,
    MEASURED,
    Cost,
    Pending,
    fitting,
    flops_of,
    makespan,
    pending_of,
)
from sweeps.claims.jobs import jobs
from sweeps.claims.pages import pages
from sweeps.claims.power import seeds_needed
from sweeps.claims.read import read_claim
from sweeps.claims.result import Result, make_result, with_own_costs, write_result
from tests.sweeps.claims.fixture_claims import (
    BEGAN,
    PLAIN,
    SOLVED,
    claim_of,
    finished_run,
    observed,
    output_of,
    predict,
    result_of,
    shifted,
    solved_seeds,
    with_pages,
    write_claim,
)

HERE, ELSEWHERE = this_machine(), "Linux aarch64, 99 cores"
SMALL = ["experiment=small_text"]


def finished(claim: Claim, done: dict[str, dict[int, tuple[float, str]]]) -> Result:
    """A result of runs of 500 steps and 1e12 FLOPs; ``done`` has their minutes and machines."""
    arms = observed(claim, {arm: ["missing"] * len(claim.scale.seeds) for arm in claim.arms})
    for arm, of_arm in done.items():
        for seed, (minutes, machine) in of_arm.items():
            costs = {"step": 500.0, "flops": 1e12, "seconds": minutes * 60}
            facts = {"values": {"val/bits_per_byte": 1.0}, "costs": costs, "machine": machine}
            arms[arm][seed] = finished_run(f"{arm}-{seed}", ended=None, **facts)
    return make_result(claim, arms, BEGAN)


def test_a_pending_run_costs_what_its_arm_took_here(tmp_path: Path) -> None:
    claim = claim_of(tmp_path, shared=SMALL, minutes=600)
    minutes_here = {s: (m, HERE) for s, m in enumerate((30.0, 60.0, 45.0))}
    on_its_gpu = (90.0, f"{HERE}, NVIDIA H100")
    done = {"plain": minutes_here | {3: (600.0, ELSEWHERE)}, "mtp": {0: on_its_gpu}}
    (left,) = pending_of([claim], tmp_path / "runs", {"mine": finished(claim, done)})
    assert left.done == 5 and left.seeds == [1, 2, 3, 4]
    costs = [("mtp", 1, 1.5), ("mtp", 2, 1.5), ("mtp", 3, 1.5), ("plain", 4, 0.75), ("mtp", 4, 1.5)]
    assert [(c.arm, c.seed, c.hours) for c in left.costs] == costs
    assert {c.source for c in left.costs} == {MEASURED}
    assert left.hours == 6.75 and left.sources == "5 measured"
    # Without a run on this machine, runs of other machines count and are marked.
    elsewhere = {arm: {0: (60.0, ELSEWHERE)} for arm in claim.arms}
    (left,) = pending_of([claim], tmp_path / "runs", {"mine": finished(claim, elsewhere)})
    assert left.hours == 8 and left.sources == "8 measured elsewhere"


def test_an_arm_without_a_finished_seed_costs_its_flops(tmp_path, monkeypatch):
    monkeypatch.setattr("sweeps.claims.hours.flops_of", lambda job: 3e12)
    claim = claim_of(tmp_path, shared=SMALL, minutes=600, seeds=[0, 4], minimum=2)
    results = {"mine": finished(claim, {"plain": {0: (100.0, HERE)}})}
    (left,) = pending_of([claim], tmp_path / "runs", results)
    cost_of = {cost.arm: cost for cost in left.costs if cost.seed == 4}
    assert cost_of["plain"].source == MEASURED and cost_of["mtp"].source == BY_FLOPS
    # 1e12 FLOPs took 100 minutes.
    assert cost_of["mtp"].hours == pytest.approx(3 * 100 / 60)
    # Without counting FLOPs or without any finished run, the claim's estimate counts.
    (quick,) = pending_of([claim], tmp_path / "runs", results, count_flops=False)
    assert {c.hours for c in quick.costs if c.arm == "mtp"} == {2.5}
    assert {c.source for c in quick.costs if c.arm == "mtp"} == {EXPECTED}
    (left,) = pending_of([claim], tmp_path / "runs", {})
    assert {c.source for c in left.costs} == {EXPECTED} and left.hours == pytest.approx(10)


def test_a_branch_costs_only_its_own_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seconds and FLOPs of a branch include those of the run that it continues."""
    monkeypatch.setattr("sweeps.claims.hours.flops_of", lambda job: 2e12)
    arms = {
        "long": [],
        "short": ["trainer.max_steps=500", "branch_from=long@400"],
        "next": ["trainer.max_steps=1000", "branch_from=long@800"],
    }
    predictions = [predict("long", "below", 1, against="short")]
    changes = {"arms": arms, "seeds": [0, 1], "minimum": 2, "predictions": predictions}
    claim = claim_of(tmp_path, shared=SMALL, **changes)
    result = finished(claim, {"short": {0: (100.0, HERE)}})
    (left,) = pending_of([claim], tmp_path / "runs", {"mine": result})
    hours_of = {cost.arm: cost.hours for cost in left.costs if cost.seed == 1}
    # A fifth of 1e12 FLOPs took a fifth of 100 minutes.
    assert (hours_of["short"], hours_of["next"]) == pytest.approx((20 / 60, 200 / 60))
    assert result["minutes"] == 20


def test_a_branch_whose_summary_lacks_costs_is_judged(tmp_path: Path) -> None:
    arms = {"long": [], "short": ["trainer.max_steps=500", "branch_from=long@400"]}
    predictions = [predict("short", "below", 1, against="long")]
    changes = {"equal": "flops", "arms": arms, "predictions": predictions}
    claim = claim_of(tmp_path, shared=SMALL, **changes)
    for costs, own in (({}, {}), ({"step": 500.0, "seconds": 50.0}, {"seconds": 10.0})):
        runs = observed(claim, {"long": PLAIN, "short": shifted(-0.05)})
        runs["short"] = {seed: replace(r, costs=costs) for seed, r in runs["short"].items()}
        result = make_result(claim, runs, BEGAN)
        (prediction,) = result["predictions"]
        assert prediction["why"] == "the runs do not say their flops"
        own_run = with_own_costs(claim, "short", runs["short"][0])
        assert own_run.costs == pytest.approx({**costs, **own})


def test_estimated_flops_are_those_of_stored_results(tmp_path: Path) -> None:
    """Of results/text_equal_flops.json: plain training, and arms of compare.match=flops; of
    results/curriculum.json and results/balance_rules.json: two depths, of which a curriculum
    computes only some at first, and a rule that measures gradients."""
    deep = ["mtp=sequential", "mtp.depth=2"]
    arms = {
        "plain": ["mtp=none"],
        "heads": ["mtp=sequential", "mtp.depth=1", "compare.match=flops"],
        "deep": deep,
        "forward": [*deep, "lambda_schedule=forward_curriculum"],
        "gradnorm": [*deep, "balance=gradnorm", "balance.every_n_steps=10"],
    }
    predictions = [predict("plain", "below", 1)]
    claim = claim_of(tmp_path, arms=arms, shared=SMALL, predictions=predictions)
    flops = {job.arm: flops_of(job) for job in jobs(claim, [0], tmp_path)}
    assert flops["plain"] == pytest.approx(1736835072000, rel=0.01)
    assert flops["heads"] == pytest.approx(flops["plain"], rel=0.001)
    assert flops["deep"] == pytest.approx(2857500672000, rel=0.01)
    assert flops["forward"] == pytest.approx(2296607539200, rel=0.01)
    assert flops["gradnorm"] == pytest.approx(3100639232000, rel=0.01)


def test_flops_count_all_devices_and_what_a_run_is_matched_to(tmp_path: Path) -> None:
    (reference := tmp_path / "finished").mkdir()
    costs = {"parameters": 100_000, "flops": 5e11}
    (reference / "summary.json").write_text(json.dumps(costs))
    arms = {
        "plain": ["mtp=none"],
        "two": ["mtp=none", "trainer.devices=2", "trainer.strategy=ddp"],
        "as_long": ["compare.match=flops", f"compare.reference={reference}"],
        "lost": ["compare.match=flops", f"compare.reference={tmp_path / 'gone'}"],
        "heads": ["model.n_layers=3"],
        "as_large": ["model.n_layers=3", "compare.match=parameters"],
    }
    predictions = [predict("plain", "below", 1)]
    claim = claim_of(tmp_path, arms=arms, shared=SMALL, predictions=predictions)
    flops = {job.arm: flops_of(job) for job in jobs(claim, [0], tmp_path)}
    assert flops["two"] == pytest.approx(2 * flops["plain"])
    assert flops["as_long"] == pytest.approx(5e11, rel=0.01)
    assert flops["lost"] is None
    assert flops["as_large"] < 0.9 * flops["heads"]


def test_flops_are_unknown_for_the_trunk_of_another_model(tmp_path: Path) -> None:
    arms = {"base": ["objective=kl"], "next": ["objective=tv", "init_from=base"]}
    predictions = [predict("next", "below", 1, against="base")]
    shared = ["experiment=smollm2_heads"]
    claim = claim_of(tmp_path, arms=arms, shared=shared, predictions=predictions)
    assert [flops_of(job) for job in jobs(claim, [0], tmp_path)] == [None, None]


def test_flops_are_unknown_for_a_tokenizer_that_says_no_size(tmp_path: Path) -> None:
    arms = {
        "byte": ["tokenizer=byte"],
        "ids": ["tokenizer=ids", "tokenizer.vocab_size=257", "tokenizer.eot_id=256"],
        "pretrained": ["tokenizer=pretrained", "tokenizer.path=gpt2"],
    }
    predictions = [predict("pretrained", "below", 1, against="byte")]
    write_claim(tmp_path, arms=arms, shared=SMALL, predictions=predictions)
    claim = read_claim("mine", tmp_path, allow=["huggingface"])
    byte, ids, pretrained = (flops_of(job) for job in jobs(claim, [0], tmp_path))
    assert byte == ids and pretrained is None


def pending(name: str, seeds: int, hours: list[float], claim: Claim) -> Pending:
    costs = [Cost(f"a{i}", s, h, MEASURED) for s in range(seeds) for i, h in enumerate(hours)]
    return Pending(replace(claim, name=name), 0, tuple(costs))


def test_whole_seeds_are_planned_in_the_order_of_the_claims(tmp_path: Path) -> None:
    claim = claim_of(tmp_path)
    runs = {"x": (3, [1, 1]), "y": (2, [3, 3]), "z": (2, [0.5])}
    claims = [pending(name, *of_claim, claim) for name, of_claim in runs.items()]
    assert makespan([1, 1, 1], 2) == 2 and makespan([2, 1, 1], 2) == 2 and makespan([], 2) == 0

    def plan(hours: float, cores: int) -> dict[str, list[int]]:
        return {each.claim.name: seeds for each, seeds in fitting(claims, hours=hours, cores=cores)}

    assert plan(6, 1) == {"x": [0, 1, 2]}
    assert plan(6.5, 1) == {"x": [0, 1, 2], "z": [0]}
    assert plan(3, 2) == {"x": [0, 1, 2]}
    assert plan(6, 2) == {"x": [0, 1, 2], "y": [0]}
    assert plan(0.4, 2) == {}
    assert plan(6, 2_000_000_000) == plan(6, 100)


def test_the_command_prints_costs_a_plan_and_a_command(tmp_path, capsys, monkeypatch):
    claims = tmp_path / "claims"
    claim = claim_of(claims, shared=SMALL)
    minutes = {arm: {0: (60.0, HERE)} for arm in claim.arms}
    write_result(finished(claim, minutes), "mine", tmp_path / "results")
    options = ["--claims", claims, "--runs", tmp_path / "runs"]
    # The stored runs have names of another config: this checkout cannot continue them.
    out = output_of(capsys, "hours", *options, "--hours", 3, "--cores", 2)
    assert "mine was run with another config" in out and "not one seed fits" in out
    monkeypatch.setattr("sweeps.claims.__main__.left_to_run", lambda *_: [])
    out = output_of(capsys, "hours", *options, "--hours", 3, "--cores", 2)
    for line in (r"mine +8 +8\.00  8 measured", r"all +8 +8\.00", r"mine   1 2 3 +3 of 4 +6\.00"):
        assert re.search(f"^{line}$", out, re.MULTILINE), line
    out = output_of(capsys, "hours", *options, "--allow", "ours", "--hours", 3, "--cores", 2)
    command = f"python -m sweeps.claims run mine --claims {claims} --allow ours --seeds 1 2 3"
    command += f" --jobs 2 --runs {tmp_path / 'runs'}"
    assert out.splitlines()[-1] == command
    assert "not one seed fits" in output_of(capsys, "hours", "mine", *options, "--hours", 0.5)
    for wrong, message in (("--hours=0", "above 0"), ("--hours=1 --cores=0", "at least 1")):
        assert message in output_of(capsys, "hours", *options, *wrong.split(), code=1)
    every_seed = {arm: dict.fromkeys(claim.scale.seeds, (60.0, HERE)) for arm in claim.arms}
    write_result(finished(claim, every_seed), "mine", tmp_path / "done" / "results")
    out = output_of(capsys, "hours", *options, "--root", tmp_path / "done", "--hours", 3)
    assert out.splitlines()[-1].split() == ["all", "0", "0.00"], "nothing is left to plan"
    (line,) = output_of(capsys, "list", *options).splitlines()[1:]
    assert re.match(r"mine +0/1  undecided +2/10 +8\.0  MTP helps\.$", line), line


def entries_of(folder: Path, values: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    return result_of(claim_of(folder, seeds=list(range(20)), **changes), values)["predictions"]


@pytest.mark.parametrize(
    ("plain", "mtp", "minimum", "needed"),
    [
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.21], 3, None),  # decided
        ([2.0, 2.1, 2.2], [2.3, 1.9, 2.4, "failed"], 3, None),
        ([2.0], [1.0], 3, None),  # no noise is known
        ([2.0, 2.1, 2.2], [1.9, 2.0, 2.1], 3, None),  # equal at every seed
        ([2.0, 2.1, 2.2], [1.0, 1.101, 1.19], 5, 5),  # at least the claim's own minimum
        ([2.0, 2.1], [1.0, 1.101], 5, None),  # too few to estimate the noise
        ([2.0] * 3, [1.0] * 3, 5, None),
    ],
)
def test_few_seeds_are_needed_or_their_number_is_unknown(tmp_path, plain, mtp, minimum, needed):
    entries = entries_of(tmp_path, {"plain": plain, "mtp": mtp}, minimum=minimum)
    assert seeds_needed(entries, minimum) == [needed]


@pytest.mark.parametrize(("deviation", "by"), [(0.02, 0.0), (0.035, 0.0), (0.075, -0.01)])
def test_estimates_of_seeds_agree_with_simulation(tmp_path, deviation, by):
    """The estimate is the smallest number of seeds that decides in four of five simulated cases,
    also where the normal approximation is far off."""
    random = np.random.default_rng(1)
    noise = np.array([-1.0, 0.2, 0.8])
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    moved = [2 + by - 0.03 + deviation * n for n in noise]
    predictions = [predict("mtp", "below", by, against="plain")]
    values = {"plain": [2.0] * 3, "mtp": moved}
    (number,) = seeds_needed(entries_of(tmp_path, values, predictions=predictions), 3)
    assert number is not None and number > 3

    def decided(n: int) -> float:
        drawn = -0.03 + deviation * random.normal(size=(20_000, n))
        t = drawn.mean(1) / drawn.std(1, ddof=1) * math.sqrt(n)
        return float((t < -stats.t.isf(0.025, n - 1)).mean())

    assert decided(number) > 0.79 and decided(number - 1) < 0.81


def test_the_correction_for_other_predictions_needs_more_seeds(tmp_path: Path) -> None:
    one = [predict("mtp", "below", against="plain")]
    both = [*one, predict("mtp", "above", 0.3, against="plain")]
    values = {"plain": [2.0, 2.1, 2.2], "mtp": [2.3, 1.9, 2.4]}
    (alone,) = seeds_needed(entries_of(tmp_path, values, predictions=one), 3)
    corrected = seeds_needed(entries_of(tmp_path, values, predictions=both), 3)
    assert max(corrected) > 3 and corrected[0] >= alone


def test_seeds_for_shares_are_estimated_and_on_the_page(tmp_path: Path) -> None:
    claims = tmp_path / "claims"
    more = [predict("mtp", "above", against="plain"), predict("mtp", "above", 0.4)]
    claim = claim_of(claims, measure=SOLVED, minimum=3, predictions=more, seeds=list(range(10)))
    result = result_of(claim, solved_seeds(3, 5))
    n = 8
    p, q = 6 / (n + 2), 4 / (n + 2)
    z = [1.959964 + 0.841621, 2.241403 + 0.841621]
    ps = [entry["p"] for entry in result["predictions"]]
    of_two = (p * (1 - p) + q * (1 - q)) / (2 / n) ** 2
    of_one = p * (1 - p) / (5 / n - 0.4) ** 2
    both = enumerate((of_two, of_one))
    expected = [math.ceil(z[ps[i] < ps[1 - i]] ** 2 * each) for i, each in both]
    assert seeds_needed(result["predictions"], 3) == expected
    write_result(result, "mine", with_pages(tmp_path) / "results")
    page = pages(tmp_path, claims)[tmp_path / "docs" / "results.md"]
    assert f"the noise; about {expected[0]} seeds per arm would decide it |" in page
