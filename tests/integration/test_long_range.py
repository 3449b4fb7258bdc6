"""``callbacks=long_range`` in a real run, and the same numbers by ``evaluate``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.helpers import assert_same_weights, column, evaluated, rows, train_here

SETTINGS = {"callbacks": "long_range", "data.seq_len": 32}


@pytest.mark.slow
def test_long_range_changes_no_training_and_evaluate_repeats_it(tmp_path, cache):
    summary = train_here(tmp_path / "with", cache, SETTINGS)
    train_here(tmp_path / "without", cache, {"data.seq_len": 32})
    assert_same_weights(tmp_path / "with", tmp_path / "without")
    for step, row in enumerate(rows(tmp_path / "without")):
        assert row.items() <= rows(tmp_path / "with")[step].items()
    tags = {tag for tag in summary if tag.startswith(("val/", "decode/"))}
    names = "loss_position_1 loss_position_16-32_depth_2 context_score context_gain_16 "
    names += "effective_context accuracy_no_repeat accuracy_random_repeat_16"
    assert {f"val/{tag}" for tag in names.split()} < tags
    assert "decode/acceptance_slope_entropy" in tags
    assert set(column(tmp_path / "with", "val/context_gain_16")) == {5, 10}
    last = tmp_path / "with" / "checkpoints" / "last.ckpt"
    metrics = evaluated(last)
    for tag in tags:
        if tag.startswith(("val/loss_position", "val/context", "val/accuracy", "val/effective")):
            assert metrics[tag] == pytest.approx(summary[tag], abs=1e-5), tag
    without = evaluated(last, "long_range=false", "decode.n_prompts=0")
    assert not [tag for tag in without if "position" in tag or "context" in tag]


def test_a_model_without_drafts_has_no_acceptance_slope(tmp_path: Path, cache: Path) -> None:
    settings = {**SETTINGS, "mtp": "none", "mtp.depth": None}
    summary = train_here(tmp_path, cache, settings)
    assert "val/context_gain_16" in summary
    assert not [tag for tag in summary if tag.startswith("decode/acceptance")]
