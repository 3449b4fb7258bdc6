"""The runs of a claim, their order, and the runs that claims share."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mtp_lightning.errors import UserError
from mtp_lightning.paths import ROOT
from sweeps.claims.hours import flops_of
from sweeps.claims.jobs import config_digest, jobs, require_equal_steps
from sweeps.claims.preregistration import (
    Preregistration,
    read_preregistration,
    write_preregistration,
)
from sweeps.claims.read import names, read_claim
from sweeps.compose import compose_run
from tests.sweeps.claims.fixture_claims import claim_of, own_conf, predict

RUNS = Path("/nowhere/runs")


def folders(folder: Path, arms: dict[str, list[str]], **changes: object) -> dict[str, str]:
    """The runs' folders by arm, at seed 0."""
    pairs = [predict(arm, "below", 1) for arm in arms]
    claim = claim_of(folder, arms=arms, predictions=pairs, **changes)
    return {job.arm: job.name for job in jobs(claim, [0], RUNS)}


def test_seed_by_seed_over_all_arms(tmp_path: Path) -> None:
    claim = claim_of(tmp_path)
    found = jobs(claim, [3, 1], RUNS)
    assert [(job.seed, job.arm) for job in found] == [
        (3, "plain"), (3, "mtp"), (1, "plain"), (1, "mtp"),
    ]  # fmt: skip
    job = found[1]
    assert job.name.startswith("sequential_depth-2_seed-3_") and len({j.name for j in found}) == 4
    assert job.overrides[:2] == ("mtp.depth=2", "mtp=sequential") and "seed=3" in job.overrides
    assert job.on_cpu and job.folder == RUNS / job.name and job.max_steps == 3500
    assert f"run_dir={job.folder}" in " ".join(job.command).replace("'", "")


def test_a_run_asks_for_the_machines_of_its_config(tmp_path: Path) -> None:
    wide = ["trainer.num_nodes=2", "trainer.strategy=ddp"]
    assert {job.nodes for job in jobs(claim_of(tmp_path, shared=wide), [0], RUNS)} == {2}


def test_arms_choose_from_a_folder_of_configs_at_any_place(tmp_path: Path) -> None:
    claim_of(tmp_path, arms={"plain": ["mtp=none"], "mtp": ["mtp=mine"]}, shared=[])
    places = [own_conf(tmp_path / name) for name in ("my conf", "it's 找, [2]")]
    found = [jobs(read_claim("mine", tmp_path, config_dir=place), [0], RUNS) for place in places]
    (_, one), (_, other) = found
    assert one.name == other.name and one.name.startswith("parallel_depth-2_seed-0_")
    place = one.command.index("--config-dir") + 1
    assert [job.command[place] for job in (one, other)] == list(map(str, places))
    assert flops_of(one) == flops_of(other) > flops_of(found[0][0])
    with pytest.raises(UserError, match="one of your own needs --config-dir"):
        jobs(read_claim("mine", tmp_path), [0], RUNS)


def test_the_same_config_is_the_same_run_in_another_claim(tmp_path: Path) -> None:
    one = folders(tmp_path / "a", {"x": ["mtp=none", "mtp.depth=0"], "y": ["mtp_lambda=0.3"]})
    # written differently, computed alike
    arms = {
        "control": ["mtp=none"],
        "heads": ["mtp=sequential", "balance=none"],
        "logs": ["mtp_lambda=0.3", "logger=default", "callbacks.progress.line_seconds=3"],
        "else": ["mtp_lambda=0.4"],
    }
    other = folders(tmp_path / "b", arms, shared=[])
    assert one["x"] == other["control"]
    assert one["y"] == other["heads"] == other["logs"] != other["else"]


def test_weights_of_depths_are_nothing_to_a_run_without_depths(tmp_path: Path) -> None:
    arms = {
        "a": ["mtp=none", "mtp_lambda=0.1"],
        "b": ["mtp=none", "mtp_lambda=3", "lambda_schedule=linear_decay"],
        "c": ["mtp.depth=0"],
        "d": ["mtp=none", "optimizer.lr=0.1"],
        "teacherless": ["mtp=teacherless", "data=star_graph"],
        "plain_star": ["mtp=none", "data=star_graph"],
    }
    found = folders(tmp_path, arms, shared=[])
    assert found["a"] == found["b"] == found["c"] != found["d"]
    assert found["teacherless"] != found["plain_star"]


def test_a_claim_asks_for_acceptance_on_many_prompts(tmp_path: Path) -> None:
    """The overrides that docs/results.md names."""
    said = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    shared = said.partition("- **Drafts are measured")[2].partition("`shared: [")[2]
    shared = shared.partition("]`")[0].split()
    asked = [override.strip(",") for override in shared]
    assert len(asked) == 3
    measures = ("decode/tokens_per_step", "decode/sampled/tokens_per_step", "val/overlap_depth_1")
    assert all(f"{tag}" in said for tag in measures)
    predictions = [predict("mtp", "above", 1, measure={"tag": tag}) for tag in measures]
    claim = claim_of(tmp_path, shared=asked, predictions=predictions)
    assert [measure.tag for measure in claim.measures] == list(measures)
    config = OmegaConf.to_container(compose_run(jobs(claim, [0], RUNS)[1].overrides))
    assert isinstance(config, dict) and config["data"]["eval_bytes"] == "all"
    speed, sampled = (config["callbacks"][n] for n in ("speculative_eval", "sampled_acceptance"))
    assert speed["n_prompts"] == sampled["n_prompts"] == 256 and sampled["temperature"] == 1.0


def test_the_digest_leaves_out_where_it_lies() -> None:
    def of(*overrides: str) -> str:
        content = OmegaConf.to_container(compose_run([*overrides, "paths.output_dir=x"]))
        assert isinstance(content, dict)
        return config_digest(content)

    assert of() == of("run_dir=elsewhere", "paths.cache_dir=there", "sweep.retry_failed=true")
    assert of() != of("trainer.num_threads=1") != of("seed=1")


def test_an_arm_that_does_not_compose_is_named(tmp_path: Path) -> None:
    claim = claim_of(tmp_path, arms={"plain": ["mtp=nope"], "mtp": []})
    with pytest.raises(ValueError, match="The arm plain of the claim mine: mtp has no option"):
        jobs(claim, [0], RUNS)


def test_a_register_keeps_every_run_and_refuses_another_config(tmp_path: Path) -> None:
    claim = claim_of(tmp_path)
    found = jobs(claim, [0, 1], RUNS)
    preregistration = Preregistration(digest=claim.digest, commit="c" * 40)
    preregistration.add(claim, found)
    write_preregistration(preregistration, claim, tmp_path)
    again = read_preregistration(claim, tmp_path)
    assert again == preregistration and again.is_of(claim)
    assert again.runs["mtp"] == {0: found[1].name, 1: found[3].name}
    other = claim_of(tmp_path, shared=["mtp.depth=3"])
    assert not again.is_of(other)
    with pytest.raises(ValueError, match="has run mtp at seed 0 in sequential_depth-2"):
        again.add(claim, jobs(other, [0], RUNS)[1:])
    (tmp_path / "mine.claim.json").write_text('{"version": 1, "runs": []}')
    with pytest.raises(ValueError, match="cannot be read as version 1"):
        read_preregistration(claim, tmp_path)
    assert read_preregistration(claim, tmp_path / "empty") is None


def test_arms_of_unequal_steps_are_not_begun_as_equal_ones(tmp_path: Path) -> None:
    arms = {"plain": ["mtp=none"], "mtp": ["trainer.max_steps=7000"]}
    why = r"compares mtp \(7000 steps\) with plain \(3500\): give both as many, or write equal"
    with pytest.raises(ValueError, match=why):
        require_equal_steps(claim_of(tmp_path, arms=arms), RUNS)
    require_equal_steps(claim_of(tmp_path, arms=arms, equal="nothing"), RUNS)
    require_equal_steps(claim_of(tmp_path), RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_all_arms_of_the_claims_that_there_are_settle(name: str) -> None:
    claim = read_claim(name)
    found = jobs(claim, claim.scale.seeds[:1], RUNS)
    assert [job.arm for job in found] == list(claim.arms)
    parents = {job.name for job in found}
    assert all(job.parent in parents for job in found if job.parent is not None)
    assert len(parents) == len(found), "two arms are the same run"
