"""A run that ends early, or cannot continue, says so in one line and keeps what it has saved."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration import helpers
from tests.integration.helpers import assert_equal, checkpoint, fails, rows, train_here, weights

EXPLODES = helpers.typed(
    "trainer.max_steps=60 trainer.val_check_interval=50 trainer.gradient_clip_val=null "
    "optimizer.lr=1e30"
)


def test_loss_that_explodes(tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_here(tmp_path, cache, {"trainer.max_steps": 4})
    last = tmp_path / "checkpoints" / "last.ckpt"
    good = weights(tmp_path)
    error = fails(capfd, tmp_path, cache, EXPLODES)
    step = re.search(r"not finite at optimizer step (\d+): depth 0", error)
    assert step is not None and 5 <= int(step[1]) <= 8, error
    assert f"{last} (step 4)" in error
    assert_equal(weights(tmp_path), good)
    # With a good setting, the run continues from there.
    assert train_here(tmp_path, cache)["step"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_while_saving(tmp_path, cache, capfd, monkeypatch, code):
    from mtp_lightning.run import checkpoints

    every = {"callbacks.checkpoints.every_n_steps": 3, "trainer.max_steps": 10}
    saves, real = [], torch.save

    def save(content: Any, file: Any) -> None:
        saves.append(content["global_step"])
        if content["global_step"] > 3:
            file.write(b"half of a checkpoint")
            raise OSError(code, "No space left on device")
        real(content, file)

    monkeypatch.setattr(checkpoints.torch, "save", save)
    error = fails(capfd, tmp_path, cache, every)
    assert "No space left" in error and "last.ckpt" in error and "intact" in error
    assert saves[0] == 3 and len(saves) == 2
    monkeypatch.undo()
    assert checkpoint(tmp_path)["global_step"] == 3
    assert list((tmp_path / "checkpoints").glob(".*")) == []
    train_here(tmp_path, cache, every)
    train_here(tmp_path / "whole", cache, every)
    assert rows(tmp_path) == rows(tmp_path / "whole")


def test_checkpoint_of_another_architecture(tmp_path, cache, copied, capfd):
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    error = fails(capfd, tmp_path, cache, {"model.n_layers": 2, "mtp.depth": 3})
    for key in ("trunk.n_layers: 1 -> 2", "mtp.depth: 2 -> 3", "run_dir"):
        assert key in error
    assert {path: path.read_bytes() for path in files} == before
    assert "variant" in fails(capfd, tmp_path, cache, {"mtp": "none", "mtp.depth": 0})
    other = {"tokenizer": "bpe", "tokenizer.vocab_size": 300}
    assert "vocab_size: 257 -> 300" in fails(capfd, tmp_path, cache, other)


def test_resumed_with_other_data(tmp_path, cache, copied, capfd):
    other = {"data.source.size": 30_000, "trainer.max_steps": 20}
    assert "was trained on other data" in fails(capfd, tmp_path, cache, other)
    assert checkpoint(tmp_path)["global_step"] == 10
