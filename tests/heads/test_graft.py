"""``doctor.py graft``: the MTP layers of a base model on a fine-tuned copy of its trunk."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_modules.windows import WindowBatch
from mtp_lightning.apps import doctor
from mtp_lightning.heads import graft
from mtp_lightning.interop.exporting import trunk_alone
from mtp_lightning.model import ModelConfig
from mtp_lightning.mtp.parallel import ParallelConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.opening import open_model, read_model
from tests import models
from tests.heads.conftest import Refused
from tests.integration import helpers
from tests.interop import folders
from tests.interop.folders import read_folder

SETTINGS = {
    "mtp.depth": 2, "trainer.max_steps": 300, "trainer.val_check_interval": 300,
    "optimizer.lr": 0.01, "data.batch_size": 8, "data.seq_len": 64, "trainer.num_threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    path = tmp_path_factory.mktemp("graft")
    helpers.train_here(path / "base", cache, SETTINGS)
    return path / "base"


def tuned(base: Path, folder: Path, *, by: float, context: int = 64) -> Path:
    """A folder with the base's trunk without MTP layers, after noise of ``by`` standard deviations
    was added to its matrices."""
    run = open_model(base)
    trunk = trunk_alone(run.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trunk.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(by * parameter.std() * noise)
    folders.write(folder, trunk, run.tokenizer, max_positions=context)
    return folder


def command(words: list[str]) -> None:
    doctor.main(["graft", *words])


def export_here(name: str, result: Path, command: Any) -> None:
    """Exports in this process and without verification."""
    settings = dict(word.split("=") for word in command[1:])
    assert name == "export"
    options = {"verify": False, "max_positions": int(settings["max_positions"])}
    folders.export_run(settings["checkpoint"], settings["output"], **options)


def test_layers_that_still_agree_with_the_trunk_are_exported(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
) -> None:
    monkeypatch.setattr("mtp_lightning.heads.phases.run_phase", export_here)
    folder = tuned(base, tmp_path / "tuned", by=0.01)
    words = [str(base), str(folder), "--output", str(tmp_path / "out")]
    command(words)
    output = capsys.readouterr().out
    assert "20 tensors" in output and "of the names and shapes needed" in output
    assert "with the tuned trunk" in output and "with the base's trunk" in output
    assert "after training on" not in output
    exported = read_folder(tmp_path / "out" / "model")
    base_weights, tuned_weights = (open_model(path).model.state_dict() for path in (base, folder))
    for name, weight in exported.weights.items():
        source = base_weights if name.startswith("mtp.") else tuned_weights
        assert torch.equal(weight, source[name]), name
    assert "exists: choose another --output" in refused(command, *words)
    # The tokens that the layers were trained to draft are the base's.
    layered = tmp_path / "base"
    folders.write(layered, open_model(base).model, draft_vocab=40)
    command([str(layered), str(folder), "--output", str(tmp_path / "short")])
    assert open_model(tmp_path / "short" / "model").run_config["objective"] == {"draft_vocab": 40}
    # The layers of an earlier start are replaced.
    shutil.rmtree(tmp_path / "out" / "model")
    stale = tmp_path / "out" / "grafted" / "mtp_heads.safetensors"
    stale.write_bytes(b"of another stack")
    command(words)
    assert not stale.exists()
    assert read_folder(tmp_path / "out" / "model").weights.keys() == base_weights.keys()


@pytest.mark.parametrize(
    ("rescored", "draft_vocab"), [(False, None), (False, 7), (True, None)], ids=str
)
def test_agreement_of_depths_with_the_trunk_equals_that_of_a_loop(
    base: Path, rescored: bool, draft_vocab: int | None
) -> None:
    """The drafts are those that a rescorer chooses."""
    model = open_model(base).model
    if rescored:
        mtp = ParallelConfig(depth=2, correction="selector")
        model = models.build(folders.dense(vocab_size=50, init_std=0.3), mtp)
    text = torch.randint(50, (20,), generator=torch.Generator().manual_seed(0))
    agreement = graft.agreement_of_depths(model, [text], draft_vocab)
    assert [len(rights) for rights in agreement.rights.values()] == [16, 15]
    with torch.no_grad():
        hidden = model(WindowBatch(text.unsqueeze(0), 2))
        chosen = model.head(hidden[0])[0].argmax(-1)
        for k in (1, 2):
            logits = model.draft_logits(k, hidden[k][0], text[k : k + len(chosen)])
            drafts = logits[:, :draft_vocab].argmax(-1)
            assert torch.equal(agreement.rights[k], drafts[:-k] == chosen[k:])
            alone = model.head(hidden[k])[0][:, :draft_vocab].argmax(-1)
            assert torch.equal(drafts, alone) != rescored


def test_layers_that_cannot_draft_are_refused(base: Path) -> None:
    model = models.build(folders.dense(vocab_size=50), ParallelConfig(depth=2, stride=2))
    stored = replace(read_model(base), config=model.config, weights=model.state_dict())
    with pytest.raises(ValueError, match="cannot draft: .*stride"):
        graft.grafted(stored, replace(open_model(base), model=model))


def test_an_agreement_fell_only_if_the_difference_is_more_than_chance() -> None:
    def agreement(right: list[bool]) -> graft.Agreement[int]:
        return graft.Agreement({1: torch.tensor(right)}, 0.1)

    quarter, half = [True, False, False, False] * 10, [True, True, False, True] * 10
    assert agreement(quarter).fell_from(agreement(half))
    assert not agreement([True, True, False] * 10).fell_from(agreement([True, False, True] * 10))
    assert not agreement([True] * 39 + [False]).fell_from(agreement([True] * 40))


def test_models_and_arguments_that_do_not_fit_are_refused(
    base: Path, tmp_path: Path, refused: Refused
) -> None:
    folder = tuned(base, tmp_path / "tuned", by=0.0)
    assert "has no MTP layers to graft" in refused(command, folder, folder)
    assert "gone does not exist" in refused(command, "gone", folder)
    assert "lies inside" in refused(command, base, folder, "--output", base / "graft")
    assert "--new-tokens=2 is too few" in refused(command, base, folder, "--new-tokens", "2")
    for unused in (["seed=1"], ["--text", folder / "config.json"]):
        error = refused(command, base, folder, *unused, "--hours", "0")
        assert f"--hours=0 trains nothing: leave out {unused[0]}, or give hours" in error
    # A trunk of the same shapes with another number of heads, and one of other shapes.
    for name, trunk in (("heads", folders.dense()), ("wide", folders.dense(d_model=64))):
        folders.write(tmp_path / name, models.build(trunk, SequentialConfig(depth=0)))
    out = ["--output", tmp_path / "out"]
    error = refused(command, base, tmp_path / "heads", *out)
    assert "do not fit the trunk of" in error and "n_heads: 2 -> 4" in error
    error = refused(command, base, tmp_path / "wide", *out)
    assert "mtp.depths.0.block.attention.qkv.weight has the shape" in error
    far = tuned(base, tmp_path / "far", by=5.0)
    error = refused(command, base, far, "--hours", "0", *out)
    assert "nothing is exported; give more --hours and another --output" in error
    config = read_model(base).config
    changed = ModelConfig(trunk=folders.dense(rope_theta=7.0), mtp=config.mtp)
    lines = graft.differences(config, changed)
    assert any(line.startswith("rope_theta: ") and line.endswith("-> 7.0") for line in lines)


@pytest.mark.slow
@pytest.mark.extras
def test_layers_that_no_longer_agree_are_trained(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in helpers.environment().items():
        monkeypatch.setenv(name, value)
    folder = tuned(base, tmp_path / "tuned", by=0.7, context=160)
    overrides = {
        "data.n_prompts": 128, "trainer.max_steps": 60, "trainer.val_check_interval": 30,
        "trainer.num_threads": 1, "optimizer.lr": 0.01, "paths.cache_dir": tmp_path / "cache",
        "logger": "csv",
    }  # fmt: skip
    words = [str(base), str(folder), "--hours", "0.02", "--output", str(tmp_path / "out")]
    words += [f"{key}={value}" for key, value in overrides.items()]
    command(words)
    output = capfd.readouterr().out
    assert "after training on" in output and "verified" in output
    exported = open_model(tmp_path / "out" / "model").seq_len
    assert exported == open_model(folder).seq_len > 128, "not the windows that it was trained on"
    weights = read_folder(tmp_path / "out" / "model").weights
    tuned_weights = open_model(folder).model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in tuned_weights.items())
    name = "mtp.depths.0.eh_proj.weight"
    assert not torch.equal(weights[name], open_model(base).model.state_dict()[name])
    # The plan is for these files: with changed files at the same paths it is refused.
    shutil.rmtree(tmp_path / "out" / "model")
    os.utime(folder / "config.json", (1, 1))
    with pytest.raises(SystemExit):
        command(words)
    assert "was begun with other files than" in capfd.readouterr().err
