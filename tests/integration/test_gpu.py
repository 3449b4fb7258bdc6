"""What only a CUDA device can show: the same losses as on a CPU, and drafts that change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtp_lightning.decoding import generate
from mtp_lightning.run.loading import load_run
from tests.integration.helpers import rows, train_here

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.mark.parametrize("mtp", ["sequential", "parallel"])
def test_losses_are_those_of_a_cpu(tmp_path: Path, cache: Path, mtp: str) -> None:
    settings = {"mtp": mtp, "trainer.max_steps": 20}
    for accelerator in ("cpu", "cuda"):
        train_here(tmp_path / accelerator, cache, settings | {"trainer.accelerator": accelerator})
    on_cpu, on_gpu = rows(tmp_path / "cpu"), rows(tmp_path / "cuda")
    for a, b in zip(on_cpu, on_gpu, strict=True):
        if "train/loss" in a:
            assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-4)


def test_greedy_drafts_change_nothing(tmp_path: Path, cache: Path) -> None:
    train_here(tmp_path, cache, {"trainer.accelerator": "cuda", "trainer.max_steps": 30})
    model = load_run(tmp_path, device="cuda").model
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    drafted, plain = (
        generate(model, prompts, max_new_tokens=40, speculative=speculative)
        for speculative in (True, False)
    )
    assert [g.token_ids for g in drafted] == [g.token_ids for g in plain]
