"""A checkpoint's config must fit its tensors, and these must be finite."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_lightning.errors import UserError
from mtp_lightning.model import ModelConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.opening import open_model
from mtp_lightning.run import checkpoints, loading
from mtp_lightning.run.status import write_status
from tests.models import build, checkpoint_of


def replace_checkpoint(monkeypatch: pytest.MonkeyPatch, checkpoint: dict[str, Any]) -> None:
    """Make ``x.ckpt`` hold a checkpoint."""
    monkeypatch.setattr(loading, "read_checkpoint", lambda *_, **__: (Path("x.ckpt"), checkpoint))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 10**12}, "weights, and it holds"),
        ({"d_ff": 10**11}, "weights, and it holds"),
        ({"n_layers": 10**9}, "asks for 1,000,000,000 layers"),
    ],
)
def test_a_forged_config_is_refused_before_memory_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
    tiny_trunk: TrunkConfig,
    sequential: SequentialConfig,
    change: dict[str, int],
    words: str,
) -> None:
    model = build(tiny_trunk, sequential)
    checkpoint = checkpoint_of(model)
    forged = ModelConfig(trunk=replace(tiny_trunk, **change), mtp=sequential)
    checkpoint["model_config"] = forged.to_dict()
    replace_checkpoint(monkeypatch, checkpoint)
    began = time.monotonic()
    with pytest.raises(ValueError, match="x.ckpt is damaged or forged: its config asks") as error:
        open_model("x.ckpt")
    assert words in str(error.value) and time.monotonic() - began < 60
    checkpoint["model_config"] = model.config.to_dict()
    assert open_model("x.ckpt").step == 3


def test_the_newest_checkpoint_takes_the_place_of_a_damaged_best_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name, step in (("best", 10), ("previous", 20), ("last", 30)):
        checkpoints.save({"global_step": step}, folder / f"{name}.ckpt")
    best = folder / "best.ckpt"
    assert loading.find_checkpoint(tmp_path) == best
    best.write_bytes(best.read_bytes()[:-10])
    assert loading.find_checkpoint(tmp_path) == folder / "last.ckpt"


def test_an_interrupted_job_names_the_command_of_its_sweep(tmp_path: Path) -> None:
    """Continuing a job alone would leave the others of its sweep."""
    checkpoints.save({"global_step": 7}, tmp_path / "checkpoints" / "last.ckpt")
    alone = f"interrupted; step 7 is saved: the same command with run_dir={tmp_path} continues."
    assert loading.describe_interrupt(tmp_path) == alone
    write_status(tmp_path, [], "running")
    in_sweep = "interrupted; step 7 is saved: the command of its sweep continues."
    assert loading.describe_interrupt(tmp_path) == in_sweep
    write_status(tmp_path, [], "interrupted")
    assert loading.describe_interrupt(tmp_path) == alone, "the job is continued alone"


def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"x\.ckpt is not a checkpoint of this platform"):
        loading.read_checkpoint(tmp_path / "x.ckpt", needs=["model_config"])
    (tmp_path / "notes.txt").write_text("no checkpoint")
    with pytest.raises(UserError, match=r"notes\.txt is not a checkpoint: give a run folder"):
        open_model(tmp_path / "notes.txt")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_are_not_finite_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
    tiny_trunk: TrunkConfig,
    sequential: SequentialConfig,
    value: float,
    dtype: torch.dtype,
) -> None:
    checkpoint = checkpoint_of(build(tiny_trunk, sequential).to(dtype))
    replace_checkpoint(monkeypatch, checkpoint)
    largest = torch.finfo(dtype).max
    checkpoint["state_dict"]["model.trunk.norm.weight"][:] = largest  # whose sum overflows
    assert open_model("x.ckpt").model.trunk.norm.weight[3] == largest
    name = "mtp.depths.1.block.feed_forward.down.weight"
    checkpoint["state_dict"][f"model.{name}"][5, 7] = value
    with pytest.raises(UserError, match=f"x.ckpt holds NaN or infinity in {name}: .* earlier"):
        open_model("x.ckpt")
    checkpoint["state_dict"]["model.trunk.norm.weight"][0] = value
    with pytest.raises(UserError, match="infinity in trunk.norm.weight and 1 more: "):
        open_model("x.ckpt")


def test_a_config_that_describes_no_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for config in ([1, 2], {"trunk": [1]}, {"trunk": {"d_model": 8}}):
        replace_checkpoint(monkeypatch, {"model_config": config})
        with pytest.raises(UserError, match="x.ckpt describes no model"):
            open_model("x.ckpt")
