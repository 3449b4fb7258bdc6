"""Digests and files of the final weights of runs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtp_lightning.run import checkpoints
from mtp_lightning.run.layout import CHECKPOINTS, LAST
from sweeps.claims.jobs import jobs
from sweeps.claims.observe import ArmRun, digest_of, last_weights
from sweeps.claims.weights import write_weights
from tests.sweeps.claims.fixture_claims import claim_of

STATE = {
    "model.b": torch.arange(6.0).view(2, 3).t(),  # not contiguous
    "model.a": torch.tensor(3.5, dtype=torch.bfloat16),
    "balance.x": torch.ones(2),
}


def finish(run: Path, state: dict[str, torch.Tensor] = STATE) -> Path:
    """A run's folder that has ended with these tensors."""
    (run / CHECKPOINTS).mkdir(parents=True)
    checkpoints.save({"state_dict": state, "global_step": 1}, run / CHECKPOINTS / LAST)
    return run


def digest(run: Path) -> str:
    weights = last_weights(run)
    assert weights is not None
    return digest_of(weights)


def test_the_digest_covers_names_types_shapes_and_numbers(tmp_path: Path) -> None:
    by_hand = hashlib.sha256(
        b"a torch.bfloat16 []\n" + bytes([0x60, 0x40])
        + b"b torch.float32 [3, 2]\n" + torch.tensor([0.0, 3, 1, 4, 2, 5]).numpy().tobytes()
    )  # fmt: skip
    assert digest(finish(tmp_path / "run")) == by_hand.hexdigest()
    assert last_weights(tmp_path) is None
    for name, change in (
        ("number", {"model.a": torch.tensor(3.0, dtype=torch.bfloat16)}),
        ("type", {"model.a": torch.tensor(3.5)}),
        ("shape", {"model.b": torch.arange(6.0).view(2, 3)}),
        ("name", {"model.c": torch.ones(1)}),
    ):
        assert digest(finish(tmp_path / name, STATE | change)) != by_hand.hexdigest()
    # Tensors outside the model do not count.
    with_other_objects = STATE | {"balance.x": torch.zeros(3)}
    assert digest(finish(tmp_path / "else", with_other_objects)) == by_hand.hexdigest()
    (tmp_path / "run" / CHECKPOINTS / LAST).write_bytes(b"cut")
    assert last_weights(tmp_path / "run") is None


@pytest.mark.extras
def test_weights_are_written_and_compared(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    claim = claim_of(tmp_path / "claims")
    plain, mtp = jobs(claim, [0], tmp_path)[:2]
    stored = digest(finish(tmp_path / plain.name))
    finish(tmp_path / mtp.name, {**STATE, "model.tied": STATE["model.b"]})
    done = ArmRun(folder="x", state="done", weights=stored, commit="c" * 40, machine="a machine")

    def written(**stored: ArmRun) -> list[str]:
        runs = {arm: {0: seed} for arm, seed in stored.items()}
        folder, arms = tmp_path / "to", list(claim.arms)
        lines, lost = write_weights(claim, tmp_path, folder, seeds=[0, 1], arms=arms, stored=runs)
        assert lost == 2 and all(
            "has no weights left: delete the folder" in line for line in lines[2:]
        )
        return lines[:2]

    same, unknown = written(plain=done)
    assert same.endswith(f"plain_seed-0.safetensors: weights {stored[:12]}, those of the result")
    assert unknown.endswith("the result has no digest of this run")
    other, _ = written(plain=replace(done, weights="0" * 64))
    assert other.endswith("the result's are 000000000000, made by commit cccccccc on a machine")
    tensors = safetensors.load_file(tmp_path / "to" / "plain_seed-0.safetensors")
    assert set(tensors) == {"a", "b"} and torch.equal(tensors["b"], STATE["model.b"])
    only, lost = write_weights(claim, tmp_path, tmp_path / "to", seeds=[0], arms=["mtp"], stored={})
    assert len(only) == 1 and "mtp_seed-0" in only[0] and lost == 0
