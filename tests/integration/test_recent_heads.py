"""Heads of recent papers in real runs: trained, stopped, resumed, evaluated, decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtp_lightning.decoding import generate
from mtp_lightning.opening import open_model
from tests.integration import helpers
from tests.integration.helpers import TASK, assert_equal, column, train_here, typed, weights

pytestmark = pytest.mark.slow

HEADS: dict[str, dict[str, Any]] = {
    "joint": {"mtp": "joint"},
    "nextlat": {"mtp": "nextlat"},
    "eagle": {"mtp": "eagle", "mtp.depth": 3, "mtp.draft_vocab": 60},
    "markov": {"mtp": "linear", "mtp.correction": "markov", "mtp.correction_rank": 8},
    "selector": {"mtp": "parallel", "mtp.correction": "selector", "mtp.correction_rank": 8},
    "stride": {"mtp": "linear", "mtp.stride": 2},
    "rank": {"mtp": "linear", "mtp.rank": 3},
    "masked": {"mtp": "masked", "mtp.depth": 2, "mtp.lora_rank": 4},
    "dflash": {"mtp": "dflash", "mtp.depth": 3},
}
SETTINGS = typed(
    "data.document_mask=true trainer.accumulate_grad_batches=2 "
    "callbacks.checkpoints.every_n_steps=5"
)


@pytest.mark.parametrize("head", HEADS)
def test_a_resumed_run_is_identical_and_its_drafts_are_lossless(tmp_path, cache, head):
    settings = HEADS[head] | SETTINGS
    summary = train_here(tmp_path / "whole", cache, settings)
    helpers.resume_from_previous(tmp_path / "whole", tmp_path / "parts", cache, settings)
    assert summary["val/loss_depth_2"] > 0
    assert summary["mtp_reads_tokens"] is (head != "stride")
    model = open_model(tmp_path / "whole").model
    assert model.config.mtp.variant == settings["mtp"]
    prompts = [[1, 2, 3], [200, 7]]
    drafted, plain = (
        generate(model, prompts, max_new_tokens=12, speculative=way) for way in (True, False)
    )
    assert [g.token_ids for g in drafted] == [g.token_ids for g in plain]
    assert (sum(g.drafts_reached[0] for g in drafted if g.drafts_reached) > 0) is (head != "stride")


@pytest.mark.parametrize("settings", [HEADS["eagle"], {"objective": "kl"}], ids=["eagle", "kl"])
def test_a_frozen_trunk_is_not_changed(tmp_path, cache, settings):
    train_here(tmp_path / "base", cache, {"mtp": "none", "mtp.depth": None})
    frozen = {"mtp.freeze_trunk": "true", "init_from": tmp_path / "base", "trainer.max_steps": 20}
    train_here(tmp_path / "heads", cache, frozen | settings)
    losses = list(column(tmp_path / "heads", "train/loss_depth_1").values())
    assert losses[-1] < losses[0]
    before, after = weights(tmp_path / "base"), weights(tmp_path / "heads")
    assert_equal({name: after[name] for name in before}, before)


@pytest.mark.parametrize("head", ["joint", "nextlat", "eagle", "stride", "masked", "dflash"])
def test_a_head_trains_on_a_task(tmp_path: Path, cache: Path, head: str) -> None:
    settings = HEADS[head] | ({"mtp.draft_vocab": None} if head == "eagle" else {})
    summary = train_here(tmp_path / "run", cache, {**TASK, "mtp.depth": 1, **settings})
    losses = list(column(tmp_path / "run", "train/loss_depth_1").values())
    assert losses[-1] < losses[0] and summary["val/loss_depth_1"] < losses[0]


def test_a_stride_with_depth_0_is_a_plain_run(tmp_path: Path, cache: Path) -> None:
    summary = train_here(tmp_path, cache, typed("mtp=parallel mtp.depth=0 mtp.stride=3"))
    assert summary["val/loss_depth_0"] > 0 and "val/loss_depth_1" not in summary
