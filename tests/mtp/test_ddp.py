"""Heads whose gradients come from one node of the graph, under data parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.helpers import column, command, execute, train_here, weights

COMMON = {
    "mtp.depth": 3,
    # Documents of about 50 bytes: every rank and micro-batch has counts of its own.
    "data.document_mask": "true",
    "data.source.documents": 1200,
    "trainer.max_steps": 5,
    "trainer.precision": "64-true",
}


@pytest.mark.parametrize(
    "mtp",
    [
        # One block of the trunk is left for the heads to branch from.
        {"mtp": "parallel", "model.n_layers": 2},
        {"mtp": "linear", "mtp.correction": "mlp"},
        {"mtp": "linear", "mtp.correction": "markov"},
        {"mtp": "joint"},
        {"mtp": "nextlat"},
    ],
    ids=lambda mtp: " ".join(map(str, mtp.values())),
)
def test_two_processes_train_heads_as_one_does(tmp_path: Path, mtp: dict[str, object]) -> None:
    common = {**COMMON, **mtp}
    two = {
        "trainer.devices": 2,
        "trainer.strategy": "ddp",
        "data.batch_size": 2,
        "trainer.accumulate_grad_batches": 2,
    }
    cache = tmp_path / "cache"
    done = execute(command(tmp_path / "two", cache, common | two))
    assert done.returncode == 0, done.stderr
    train_here(tmp_path / "one", cache, common | {"data.batch_size": 8})
    for k in range(4):
        tag = f"train/loss_depth_{k}"
        shared, alone = column(tmp_path / "two", tag), column(tmp_path / "one", tag)
        assert list(shared) == list(alone) == [1, 2, 3, 4, 5]
        assert list(shared.values()) == pytest.approx(list(alone.values()), rel=1e-5)
    expected = weights(tmp_path / "one")
    for name, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_accumulation_does_not_change_what_is_mixed(tmp_path: Path) -> None:
    common = {**COMMON, "mtp.hidden_state_mixing": "true"}
    cache = tmp_path / "cache"
    train_here(tmp_path / "whole", cache, common | {"data.batch_size": 4})
    split = {"data.batch_size": 1, "trainer.accumulate_grad_batches": 4}
    train_here(tmp_path / "split", cache, common | split)
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "split").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)
