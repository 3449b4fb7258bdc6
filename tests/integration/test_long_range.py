"""``callbacks=long_range`` in a real run, and the same numbers by ``evaluate``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.helpers import assert_same_weights, column, evaluated, rows, train_here

SETTINGS = {"callbacks": "long_range", "data.seq_len": 32}


@pytest.mark.slow
def test_training_is_the_same_and_evaluate_agrees(tmp_path: Path, cache: Path) -> None:
    summary = train_here(tmp_path / "with", cache, SETTINGS)
    train_here(tmp_path / "without", cache, {"data.seq_len": 32})
    assert_same_weights(tmp_path / "with", tmp_path / "without")
    for step, row in enumerate(rows(tmp_path / "without")):
        assert row.items() <= rows(tmp_path / "with")[step].items()
    tags = {tag for tag in summary if tag.startswith(("val/", "decode/"))}
    some = "loss_position_1 loss_position_16-32_depth_2 context_score context_gain_16 "
    some += "effective_context accuracy_no_repeat accuracy_random_repeat_16"
    assert {f"val/{tag}" for tag in some.split()} < tags
    assert "decode/acceptance_slope_entropy" in tags
    assert set(column(tmp_path / "with", "val/context_gain_16")) == {5, 10}
    last = tmp_path / "with" / "checkpoints" / "last.ckpt"
    found = evaluated(last)
    for tag in tags:
        if tag.startswith(("val/loss_position", "val/context", "val/accuracy", "val/effective")):
            assert found[tag] == pytest.approx(summary[tag], abs=1e-5), tag
    without = evaluated(last, "long_range=false", "decode.n_prompts=0")
    assert not [tag for tag in without if "position" in tag or "context" in tag]


def test_a_model_without_drafts(tmp_path: Path, cache: Path) -> None:
    settings = {**SETTINGS, "mtp": "none", "mtp.depth": None}
    summary = train_here(tmp_path, cache, settings)
    assert "val/context_gain_16" in summary
    assert not [tag for tag in summary if tag.startswith("decode/acceptance")]
