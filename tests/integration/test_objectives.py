"""Every objective in real runs: its terms, precisions, two processes, resuming, decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration import helpers
from tests.integration.conftest import Once
from tests.integration.helpers import CONF, CONSTANT, DDP, column, rows, train_here, typed, weights
from tests.integration.several import run_all

pytestmark = pytest.mark.slow

OBJECTIVES = sorted({file.stem for file in (CONF / "objective").glob("*.yaml")} - {"base"})
ALL = typed(
    "objective=mix objective.terms={kl:1,e2e_tv:0.5,feature:0.1,ce:0.2,eal:0.3,wtv:0.1,anchor:0.1} "
    "objective.weights=acceptance objective.mask=entropy objective.quantile=0.8 "
    "objective.confidence=true"
)
LONG = {**ALL, **CONSTANT, "trainer.max_steps": 12}


@pytest.fixture(scope="module")
def run(once: Once, cache: Path) -> Path:
    """A run of all terms and rules at once."""
    return once("all-objectives", lambda folder: train_here(folder, cache, LONG))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_and_logs_its_terms(tmp_path, cache, objective):
    terms = {"objective.terms": "{ce: 0.1, tv: 0.9}"} if objective == "mix" else {}
    settings: dict[str, Any] = {"objective": objective, **terms, "trainer.max_steps": 4}
    summary = train_here(tmp_path / objective, cache, settings)
    assert summary["step"] == 4 and summary["val/loss_depth_1"] > 0
    tags = rows(tmp_path / objective)[0].keys()
    logged = {tag.rpartition("/")[2] for tag in tags if tag.startswith("train/loss_depth_1/")}
    mixtures = {"mix": {"ce", "tv"}, "feature": {"kl", "feature"}, "nextlat": {"kl", "feature"}}
    mixtures["anchor"] = {"ce", "anchor_latent", "anchor_semantic"}
    assert logged == mixtures.get(objective, set())


def test_two_processes_equal_one(tmp_path: Path, cache: Path) -> None:
    common = {
        **ALL, "trainer.precision": "64-true", "data.document_mask": "true",
        "data.source.documents": 1200, "trainer.max_steps": 6,
    }  # fmt: skip
    two = DDP | typed("data.batch_size=2 trainer.accumulate_grad_batches=2")
    variants = ("sequential", "parallel")
    runs = {variant: common | two | {"mtp": variant} for variant in variants}
    run_all(tmp_path, cache, runs, processes=2)
    for variant in variants:
        one = tmp_path / f"{variant}-one"
        train_here(one, cache, common | {"mtp": variant, "data.batch_size": 8})
        helpers.assert_near_rows(tmp_path / variant, one)
        assert len(rows(one)) == 6
        assert {"objective/tau", "confidence/error_depth_2"} <= rows(one)[-1].keys()
        two_weights = weights(tmp_path / variant)
        assert "mtp.confidence.weight" in " ".join(two_weights)
        torch.testing.assert_close(two_weights, weights(one), rtol=1e-5, atol=1e-7)


def test_a_run_of_all_terms_resumes_exactly(tmp_path: Path, cache: Path, run: Path) -> None:
    """The running quantile continues from its stored state."""
    train_here(tmp_path, cache, {**LONG, "trainer.max_steps": 6})
    assert sum(helpers.checkpoint(tmp_path)["objective"]["counts"]) > 0
    train_here(tmp_path, cache, LONG)
    helpers.assert_same_weights(run, tmp_path)
    for tag in ("objective/tau", "train/loss", "confidence/error_depth_1"):
        assert column(run, tag) == column(tmp_path, tag), tag


@pytest.mark.parametrize(
    ("variant", "objective"), [("sequential", "kl"), ("parallel", "kl"), ("sequential", "e2e_tv")]
)
def test_matched_flops_include_the_teachers_pass(tmp_path, cache, variant, objective):
    common = typed("compare.match=flops trainer.max_steps=30 trainer.val_check_interval=30")
    common["mtp"] = variant
    summaries = {}
    for name in ("ce", objective):
        summaries[name] = train_here(tmp_path / name, cache, {**common, "objective": name})
        assert summaries[name]["flops"] == summaries[name]["compare"]["reached"]
    # The teacher is then the main prediction's pass.
    shared = objective == "kl" and variant == "sequential"
    cost = [summaries[name]["flops_per_token"] for name in ("ce", objective)]
    assert cost[0] == cost[1] if shared else cost[0] < cost[1]
    assert (summaries[objective]["step"] < summaries["ce"]["step"]) == (not shared)
