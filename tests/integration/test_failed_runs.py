"""A run that fails or cannot resume prints one line and keeps its checkpoints."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from tests.data_modules.test_tokenizers import library_file
from tests.integration import helpers
from tests.integration.helpers import assert_equal, checkpoint, fails, rows, train_here, weights

EXPLODES = helpers.typed(
    "trainer.max_steps=60 trainer.val_check_interval=50 trainer.gradient_clip_val=null "
    "optimizer.lr=1e30"
)


def test_an_exploding_loss_ends_the_run_and_keeps_its_checkpoint(tmp_path, cache, capfd):
    train_here(tmp_path, cache, {"trainer.max_steps": 4})
    last = tmp_path / "checkpoints" / "last.ckpt"
    saved = weights(tmp_path)
    error = fails(capfd, tmp_path, cache, EXPLODES)
    step = re.search(r"not finite at optimizer step (\d+): depth 0", error)
    assert step is not None and 5 <= int(step[1]) <= 8, error
    assert f"{last} (step 4)" in error
    assert_equal(weights(tmp_path), saved)
    # With a usable learning rate, the run continues from there.
    assert train_here(tmp_path, cache)["step"] == 10


def test_a_run_whose_checkpoints_cannot_be_read_is_not_begun_anew(copied, cache, capfd):
    files = sorted((copied / "checkpoints").iterdir())
    for file in files:
        damaged = bytearray(file.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        file.unlink()  # it may be a link to another one
        file.write_bytes(damaged)
    before = {file: file.read_bytes() for file in [*files, copied / "metrics.csv"]}
    error = fails(capfd, copied, cache, {"trainer.max_steps": 20})
    assert f"holds {len(files)} checkpoints that cannot be read" in error
    assert {file: file.read_bytes() for file in before} == before


def test_a_checkpoint_of_another_program_is_refused(tmp_path, cache, capfd):
    (tmp_path / "checkpoints").mkdir()
    torch.save(
        {"global_step": 5, "state_dict": {}}, tmp_path / "checkpoints" / "epoch=0-step=5.ckpt"
    )
    assert "step=5.ckpt is of another program" in fails(capfd, tmp_path, cache, {})


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, cache, capfd, monkeypatch, code):
    from mtp_lightning.run import checkpoints

    settings = {"callbacks.checkpoints.every_n_steps": 3, "trainer.max_steps": 10}
    saves, real = [], torch.save

    def save(content: Any, file: Any) -> None:
        saves.append(content["global_step"])
        if content["global_step"] > 3:
            file.write(b"half of a checkpoint")
            raise OSError(code, "No space left on device")
        real(content, file)

    monkeypatch.setattr(checkpoints.torch, "save", save)
    error = fails(capfd, tmp_path, cache, settings)
    assert "No space left" in error and "last.ckpt" in error and "intact" in error
    assert saves[0] == 3 and len(saves) == 2
    monkeypatch.undo()
    assert checkpoint(tmp_path)["global_step"] == 3
    assert list((tmp_path / "checkpoints").glob(".*")) == []
    train_here(tmp_path, cache, settings)
    train_here(tmp_path / "whole", cache, settings)
    assert rows(tmp_path) == rows(tmp_path / "whole")


def test_a_full_disk_keeps_the_config_of_a_finished_run(copied, cache, capfd, monkeypatch):
    before = (copied / "config.yaml").read_bytes()

    def save(config: Any, file: Any, **more: Any) -> None:
        Path(file).write_text("half: of a")
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(OmegaConf, "save", save)
    assert "No space left on device" in fails(capfd, copied, cache, {})
    assert (copied / "config.yaml").read_bytes() == before
    assert not list(copied.glob(".*.tmp"))


def test_resuming_with_another_architecture_is_refused(tmp_path, cache, copied, capfd):
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    error = fails(capfd, tmp_path, cache, {"model.n_layers": 2, "mtp.depth": 3})
    for key in ("trunk.n_layers: 1 -> 2", "mtp.depth: 2 -> 3", "run_dir"):
        assert key in error
    assert {path: path.read_bytes() for path in files} == before
    assert "variant" in fails(capfd, tmp_path, cache, {"mtp": "none", "mtp.depth": 0})
    other = {"tokenizer": "bpe", "tokenizer.vocab_size": 300}
    assert "vocab_size: 257 -> 300" in fails(capfd, tmp_path, cache, other)


def test_resuming_with_other_data_is_refused(tmp_path, cache, copied, capfd):
    other = {"data.source.size": 30_000, "trainer.max_steps": 20}
    assert "was trained on other data" in fails(capfd, tmp_path, cache, other)
    assert checkpoint(tmp_path)["global_step"] == 10


def test_an_evaluation_on_a_changed_text_says_so(tmp_path, cache, caplog):
    text, run = tmp_path / "text.txt", tmp_path / "run"
    for lines in (900, 1000):
        text.write_text("".join(f"line {i} of {i % 7}\n" for i in range(lines)))
        if not run.exists():
            train_here(run, cache, {"data": "text", "data.paths": text, "trainer.max_steps": 1})
        helpers.evaluated(run, f"paths.cache_dir={cache}", "decode.n_prompts=0")
        assert ("evaluation text has changed" in caplog.text) == (lines > 900)


def test_a_run_continues_with_its_tokenizer_in_another_place(tmp_path, cache, capfd):
    for name, special in (("here", "</s>"), ("there", "</s>"), ("other", "<eos>")):
        (tmp_path / name).mkdir()
        library_file(tmp_path / name / "tokenizer.json", [special])
    settings = {"tokenizer": "pretrained", "trainer.max_steps": 1}
    run, there = tmp_path / "run", {"tokenizer.path": tmp_path / "there"}
    train_here(run, cache, settings | {"tokenizer.path": tmp_path / "here" / "tokenizer.json"})
    shutil.rmtree(tmp_path / "here")
    longer = settings | {"trainer.max_steps": 2}
    error = fails(capfd, run, cache, longer | {"tokenizer.path": tmp_path / "other"})
    assert "trained with the tokenizer" in error and "'</s>'" in error
    assert train_here(run, cache, longer | there)["step"] == 2
    assert train_here(tmp_path / "next", cache, settings | there | {"init_from": run})["step"] == 1
