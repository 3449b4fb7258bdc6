"""Heads whose gradients come from one autograd node, under data parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.several import assert_two_train_as_one

HEADS: dict[str, dict[str, object]] = {
    # The heads branch off before the last block, so that one block is shared.
    "parallel": {"mtp": "parallel", "model.n_layers": 2},
    "linear_selector": {"mtp": "linear", "mtp.correction": "selector", "mtp.correction_rank": 8},
    "nextlat": {"mtp": "nextlat"},
    "eagle": {"mtp": "eagle", "mtp.draft_vocab": 60},
    "masked": {"mtp": "masked"},
    "dflash": {"mtp": "dflash"},
}


@pytest.mark.slow
def test_two_processes_train_heads_as_one_does(tmp_path: Path, cache: Path) -> None:
    runs = {name: {"mtp.depth": 3} | mtp for name, mtp in HEADS.items()}
    assert_two_train_as_one(tmp_path, cache, runs)
