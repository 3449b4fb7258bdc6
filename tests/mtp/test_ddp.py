"""Heads whose gradients come from one autograd node, under data parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.helpers import column, train_here, weights
from tests.integration.several import run_all

COMMON = {
    "mtp.depth": 3,
    # Documents of about 50 bytes, so that the counts of ranks and micro-batches differ.
    "data.document_mask": "true",
    "data.source.documents": 1200,
    "trainer.max_steps": 5,
    "trainer.precision": "64-true",
}


HEADS: dict[str, dict[str, object]] = {
    # The heads branch off before the last block, so that one block is shared.
    "parallel": {"mtp": "parallel", "model.n_layers": 2},
    "linear_selector": {"mtp": "linear", "mtp.correction": "selector", "mtp.correction_rank": 8},
    "nextlat": {"mtp": "nextlat"},
    "eagle": {"mtp": "eagle", "mtp.draft_vocab": 60},
    "masked": {"mtp": "masked"},
}


@pytest.mark.slow
def test_two_processes_train_heads_as_one_does(tmp_path: Path, cache: Path) -> None:
    two = {
        "trainer.devices": 2,
        "trainer.strategy": "ddp",
        "data.batch_size": 2,
        "trainer.accumulate_grad_batches": 2,
    }
    runs = tmp_path / "two"
    runs.mkdir()
    run_all(runs, cache, {name: COMMON | mtp | two for name, mtp in HEADS.items()}, processes=2)
    for name, mtp in HEADS.items():
        train_here(tmp_path / name, cache, COMMON | mtp | {"data.batch_size": 8})
        for k in range(4):
            tag = f"train/loss_depth_{k}"
            losses, expected = column(runs / name, tag), column(tmp_path / name, tag)
            assert list(losses) == list(expected) == [1, 2, 3, 4, 5]
            assert list(losses.values()) == pytest.approx(list(expected.values()), rel=1e-5), name
        alone = weights(tmp_path / name)
        for key, tensor in weights(runs / name).items():
            torch.testing.assert_close(tensor, alone[key], rtol=1e-4, atol=1e-6, msg=key)
