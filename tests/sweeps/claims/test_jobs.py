"""The runs of a claim, their order, and the runs that claims share."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mtp_lightning.errors import UserError
from mtp_lightning.paths import ROOT
from sweeps.claims.jobs import flops_of, jobs, require_equal
from sweeps.claims.preregistration import (
    Preregistration,
    read_preregistration,
    register,
    write_preregistration,
)
from sweeps.claims.read import names, read_claim
from sweeps.compose import compose_run
from tests.sweeps.claims.fixture_claims import claim_of, conf_with_own_head, predict

RUNS = Path("/nowhere/runs")


def folders(folder: Path, arms: dict[str, list[str]], **changes: object) -> dict[str, str]:
    """The runs' folders by arm, at seed 0."""
    pairs = [predict(arm, "below", 1) for arm in arms]
    claim = claim_of(folder, arms=arms, predictions=pairs, **changes)
    return {job.arm: job.name for job in jobs(claim, [0], RUNS)}


def test_jobs_are_ordered_by_seed_and_then_by_arm(tmp_path: Path) -> None:
    ordered = jobs(claim_of(tmp_path), [3, 1], RUNS)
    assert [(job.seed, job.arm) for job in ordered] == [
        (3, "plain"), (3, "mtp"), (1, "plain"), (1, "mtp"),
    ]  # fmt: skip
    job = ordered[1]
    assert job.name.startswith("sequential_depth-2_seed-3_") and len({j.name for j in ordered}) == 4
    assert job.overrides[:2] == ("mtp.depth=2", "mtp=sequential") and "seed=3" in job.overrides
    assert job.on_cpu and job.folder == RUNS / job.name and job.max_steps == 3500 and job.nodes == 1
    assert f"run_dir={job.folder}" in " ".join(job.command).replace("'", "")
    wide = claim_of(tmp_path, shared=["trainer.num_nodes=2", "trainer.strategy=ddp"])
    assert {job.nodes for job in jobs(wide, [0], RUNS)} == {2}


def test_arms_choose_from_a_folder_of_configs_at_any_place(tmp_path: Path) -> None:
    claim_of(tmp_path, arms={"plain": ["mtp=none"], "mtp": ["mtp=mine"]}, shared=[])
    places = [conf_with_own_head(tmp_path / name) for name in ("my conf", "it's 找, [2]")]
    claims = [read_claim("mine", tmp_path, config_dir=place) for place in places]
    (plain, one), (_, other) = (jobs(claim, [0], RUNS) for claim in claims)
    assert one.name == other.name and one.name.startswith("parallel_depth-2_seed-0_")
    place = one.command.index("--config-dir") + 1
    assert [job.command[place] for job in (one, other)] == list(map(str, places))
    assert flops_of(one) == flops_of(other) > flops_of(plain)
    with pytest.raises(UserError, match="one of your own needs --config-dir"):
        jobs(read_claim("mine", tmp_path), [0], RUNS)


def test_arms_of_one_config_are_one_run(tmp_path: Path) -> None:
    """Also in another claim, which has the depth among its shared overrides."""
    alike = (
        (
            ["mtp=none"],
            ["mtp=none", "mtp_lambda=3", "lambda_schedule=linear_decay"],  # no depth has a weight
            ["mtp.depth=0"],
        ),
        (
            ["mtp=sequential", "balance=none"],
            ["mtp_lambda=0.3", "logger=default", "callbacks.progress.line_seconds=3"],
        ),
        (["mtp_lambda=0.4"],),
        (["mtp=none", "optimizer.lr=0.1"],),
        (["mtp=teacherless", "data=star_graph"],),
        (["mtp=none", "data=star_graph"],),
    )
    arms = {f"{i}_{j}": arm for i, group in enumerate(alike) for j, arm in enumerate(group)}
    names = folders(tmp_path / "a", arms, shared=[])
    by_group = [{names[arm] for arm in arms if arm.startswith(f"{i}_")} for i in range(len(alike))]
    assert [len(group) for group in by_group] == [1] * len(alike)
    assert len(set.union(*by_group)) == len(alike), "different configs are different runs"
    others = folders(tmp_path / "b", {"x": ["mtp=none", "mtp.depth=0"], "y": ["mtp_lambda=0.3"]})
    assert {others["x"]} == by_group[0] and {others["y"]} == by_group[1]


def test_the_documented_overrides_measure_acceptance_on_many_prompts(tmp_path: Path) -> None:
    """Reads the overrides from docs/results.md."""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    shared = page.partition("- **Drafts are measured")[2].partition("`shared: [")[2]
    shared = shared.partition("]`")[0].split()
    documented = [override.strip(",") for override in shared]
    assert len(documented) == 3
    measures = ("decode/tokens_per_step", "decode/sampled/tokens_per_step", "val/overlap_depth_1")
    assert all(f"{tag}" in page for tag in measures)
    predictions = [predict("mtp", "above", 1, measure={"tag": tag}) for tag in measures]
    claim = claim_of(tmp_path, shared=documented, predictions=predictions)
    assert [measure.tag for measure in claim.measures] == list(measures)
    config = OmegaConf.to_container(compose_run(jobs(claim, [0], RUNS)[1].overrides))
    assert isinstance(config, dict) and config["data"]["eval_bytes"] == "all"
    speed, sampled = (config["callbacks"][n] for n in ("speculative_eval", "sampled_acceptance"))
    assert speed["n_prompts"] == sampled["n_prompts"] == 256 and sampled["temperature"] == 1.0


def test_an_arm_that_does_not_compose_is_named(tmp_path: Path) -> None:
    claim = claim_of(tmp_path, arms={"plain": ["mtp=nope"], "mtp": []})
    with pytest.raises(ValueError, match="The arm plain of the claim mine: mtp has no option"):
        jobs(claim, [0], RUNS)


def test_a_preregistration_keeps_runs_and_refuses_another_config(tmp_path: Path) -> None:
    claim = claim_of(tmp_path)
    begun = jobs(claim, [0, 1], RUNS)
    first = Preregistration(digest=claim.digest, commit="c" * 40, began="2026-01-01T00:00:00+00:00")
    write_preregistration(first, claim, tmp_path)
    register(claim, begun, tmp_path, commit="d" * 40)
    stored = read_preregistration(claim, tmp_path)
    assert stored.is_of(claim) and (stored.commit, stored.began) == (first.commit, first.began)
    assert stored.runs["mtp"] == {0: begun[1].name, 1: begun[3].name}
    other = claim_of(tmp_path, shared=["mtp.depth=3"])
    assert not stored.is_of(other)
    with pytest.raises(ValueError, match="has run mtp at seed 0 in sequential_depth-2"):
        register(claim, jobs(other, [0], RUNS)[1:], tmp_path, commit=None)
    (tmp_path / "mine.claim.json").write_text('{"version": 1, "runs": []}')
    with pytest.raises(ValueError, match="cannot be read as version 1"):
        read_preregistration(claim, tmp_path)
    assert read_preregistration(claim, tmp_path / "empty") is None


def test_arms_of_unequal_steps_are_refused_as_equal(tmp_path: Path) -> None:
    arms = {"plain": ["mtp=none"], "mtp": ["trainer.max_steps=7000"]}
    message = r"compares mtp \(7,000 steps\) with plain \(3,500 steps\): give both as many, or"
    with pytest.raises(ValueError, match=message):
        require_equal(claim_of(tmp_path, arms=arms), RUNS)
    matched = {**arms, "mtp": ["compare.match=flops"]}
    with pytest.raises(ValueError, match=r"mtp \(steps by compare.match\) with plain \(3,500"):
        require_equal(claim_of(tmp_path, arms=matched), RUNS)
    require_equal(claim_of(tmp_path, arms=arms, equal="nothing"), RUNS)
    require_equal(claim_of(tmp_path), RUNS)


def test_arms_whose_equal_steps_cost_different_flops_are_refused_as_equal(tmp_path: Path) -> None:
    arms = {"plain": ["mtp=none"], "mtp": ["mtp=sequential"]}
    message = r"compares mtp with plain, whose steps differ by [\d.]+% in FLOPs: add compare.match"
    with pytest.raises(UserError, match=message):
        require_equal(claim_of(tmp_path, arms=arms, equal="flops", shared=[]), RUNS)
    matched = ["compare.match=flops"]
    require_equal(claim_of(tmp_path, arms=arms, equal="flops", shared=matched), RUNS)
    alike = {"plain": ["mtp_lambda=0.1"], "mtp": ["mtp_lambda=0.3"]}
    require_equal(claim_of(tmp_path, arms=alike, equal="flops"), RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_all_arms_of_the_projects_claims_compose(name: str) -> None:
    claim = read_claim(name)
    first_jobs = jobs(claim, claim.scale.seeds[:1], RUNS)
    assert [job.arm for job in first_jobs] == list(claim.arms)
    parents = {job.name for job in first_jobs}
    assert all(job.parent in parents for job in first_jobs if job.parent is not None)
    assert len(parents) == len(first_jobs), "two arms are the same run"
