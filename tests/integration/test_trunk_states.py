"""``data.cache_states``: a frozen trunk's states from the disk train bit-identical heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_modules.seal import seal
from data_modules.window_dataset import STATES
from mtp_lightning.experiment import trunk_states
from mtp_lightning.experiment.training import prepare
from mtp_lightning.processes import Peers
from tests.integration import helpers
from tests.integration.conftest import Once

# A run of several epochs.
HEADS = helpers.CONSTANT | helpers.typed(
    "mtp.freeze_trunk=true data.source.size=1200 data.source.documents=12 trainer.max_steps=40 "
    "trainer.val_check_interval=20 callbacks.checkpoints.every_n_steps=20"
)
CACHED = {"data.cache_states": "true"}


@pytest.fixture(scope="module")
def trunk(once: Once, cache: Path) -> Path:
    settings = helpers.typed(
        "mtp=none mtp.depth model.n_layers=2 trainer.max_steps=20 trainer.val_check_interval=20"
    )
    return once("trunk-of-states", lambda folder: helpers.train_here(folder, cache, settings))


def heads(trunk: Path, **changes: Any) -> dict[str, Any]:
    return {**HEADS, "model.n_layers": 2, "init_from": trunk, **changes}


SWITCHES: dict[str, dict[str, Any]] = {
    "final": {},
    "two states": {"mtp.input_norm": "pre", "data.document_mask": "true"},
    "taught": {"objective": "kl", "mtp.init": "last_block", "trainer.accumulate_grad_batches": 2}
    | {"data.train_windows": 20},
    "few": {"data.train_windows": 9, "data.document_mask": "true", "trainer.precision": "64-true"},
    "side by side": {"mtp": "parallel"},
    "three states": {"mtp": "eagle", "mtp.draft_vocab": 60},
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c == "taught" else pytest.mark.slow) for c in SWITCHES]
)
def test_cached_states_train_the_same_heads(trunk: Path, tmp_path: Path, case: str) -> None:
    settings = heads(trunk, **SWITCHES[case])
    plain = helpers.train_here(tmp_path / "computed", tmp_path / "cache", settings)
    cached = helpers.train_here(tmp_path / "read", tmp_path / "cache", {**settings, **CACHED})
    helpers.assert_same_weights(tmp_path / "computed", tmp_path / "read")
    computed_losses, cached_losses = (
        helpers.column(tmp_path / n, "train/loss_depth_2") for n in ("computed", "read")
    )
    assert computed_losses == cached_losses and len(computed_losses) == 40
    assert plain["val/loss_depth_1"] == cached["val/loss_depth_1"]
    assert cached["flops"] < 0.9 * plain["flops"], "cached states cost no FLOPs"


def test_states_are_computed_with_the_products_of_a_step(trunk, tmp_path, monkeypatch) -> None:
    """On a GPU, a bf16-mixed step rounds its fp32 products to TF32."""
    seen = []
    states = lambda *_: seen.append(torch.get_float32_matmul_precision())  # noqa: E731
    monkeypatch.setattr(trunk_states, "keep_states", states)
    torch.set_float32_matmul_precision("medium")  # as another run in this process may have set it
    try:
        cfg = helpers.config(tmp_path / "run", tmp_path / "cache", heads(trunk, **CACHED))
        prepare(cfg, tmp_path, Peers())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"]


@pytest.mark.slow
def test_states_are_computed_once_and_a_resumed_run_reads_them(trunk: Path, tmp_path: Path) -> None:
    settings = heads(trunk, **CACHED)
    cache = tmp_path / "cache"
    helpers.train_here(tmp_path / "whole", cache, settings)
    (file,) = cache.glob(f"trunk_states/*/{STATES}")
    before = file.stat().st_mtime_ns
    helpers.train_here(tmp_path / "halves", cache, {**settings, "trainer.max_steps": 20})
    helpers.train_here(tmp_path / "halves", cache, settings)
    helpers.assert_same_weights(tmp_path / "whole", tmp_path / "halves")
    helpers.train_here(tmp_path / "other", cache, {**settings, "mtp": "linear", "seed": 3})
    assert [file] == list(cache.glob(f"trunk_states/*/{STATES}"))
    assert file.stat().st_mtime_ns == before
    # The file is read: other numbers in it give other heads.
    states = np.load(file, mmap_mode="r+")
    states[:] = states[:] * 2
    states.flush()
    with pytest.raises(ValueError, match=f"damaged .{STATES} has other contents"):
        helpers.train_here(tmp_path / "damaged", cache, settings)
    (file.parent / "digests.json").unlink()
    seal(file.parent)
    helpers.train_here(tmp_path / "doubled", cache, settings)
    with pytest.raises(AssertionError):
        helpers.assert_same_weights(tmp_path / "whole", tmp_path / "doubled")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mtp.freeze_trunk": "false"}, "this run trains its trunk: set mtp.freeze_trunk=true"),
        ({"mtp": "none", "mtp.depth": None, "mtp.freeze_trunk": None}, "mtp=none needs it"),
    ],
)
def test_a_trained_trunk_is_refused(trunk, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        helpers.train_here(tmp_path / "run", tmp_path / "cache", heads(trunk, **CACHED, **changes))
