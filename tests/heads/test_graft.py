"""MTP layers of a base model on a tuned copy of its trunk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_modules.windows import WindowBatch
from mtp_lightning.apps import doctor
from mtp_lightning.heads import graft
from mtp_lightning.model import ModelConfig
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
    """The base's trunk, moved by a share of its matrices' spread, without its MTP layers."""
    run = open_model(base)
    trunk = folders.alone(run.model)
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


def stub(name: str, result: Path, command: Any) -> None:
    """An export whose check is left out, in this process."""
    asked = dict(word.split("=") for word in command[1:])
    assert name == "export"
    more = {"verify": False, "max_positions": int(asked["max_positions"])}
    folders.export_run(asked["checkpoint"], asked["output"], **more)


def test_layers_that_still_agree_are_written(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
) -> None:
    monkeypatch.setattr("mtp_lightning.heads.__main__.run_phase", stub)
    folder = tuned(base, tmp_path / "tuned", by=0.01)
    words = [str(base), str(folder), "--output", str(tmp_path / "out")]
    command(words)
    said = capsys.readouterr().out
    assert "20 tensors" in said and "of the names and shapes needed" in said
    assert "with the tuned trunk" in said and "with the base's trunk" in said
    assert "after training on" not in said
    found = read_folder(tmp_path / "out" / "model")
    own, theirs = open_model(base).model.state_dict(), open_model(folder).model.state_dict()
    for name, weight in found.weights.items():
        wanted = own if name.startswith("mtp.") else theirs
        assert torch.equal(weight, wanted[name]), name
    assert "exists: choose another --output" in refused(command, *words)
    # Other layers take the place of those of the start before.
    shutil.rmtree(tmp_path / "out" / "model")
    stale = tmp_path / "out" / "grafted" / "mtp_heads.safetensors"
    stale.write_bytes(b"of another stack")
    command(words)
    assert (
        not stale.exists() and read_folder(tmp_path / "out" / "model").weights.keys() == own.keys()
    )


def test_agreement_is_each_depths_with_the_trunk(base: Path) -> None:
    """Against the choices computed token by token."""
    model = open_model(base).model
    text = torch.randint(256, (20,), generator=torch.Generator().manual_seed(0))
    found = graft.agreement_of_depths(model, [text])
    assert [len(rights) for rights in found.rights.values()] == [16, 15]
    with torch.no_grad():
        hidden = model(WindowBatch(text.unsqueeze(0), 2))
        choices = {k: model.head(h)[0].argmax(-1).tolist() for k, h in hidden.items()}
    for k in (1, 2):
        wanted = [choices[k][i] == choices[0][i + k] for i in range(len(choices[0]) - k)]
        assert found.rights[k].tolist() == wanted


def test_a_fall_must_be_more_than_chance() -> None:
    def of(*right: bool) -> graft.Agreement[int]:
        return graft.Agreement({1: torch.tensor(right * 10)}, 0.1)

    assert of(True, False, False, False).fell_from(of(True, True, False, True))
    assert not of(True, True, False).fell_from(of(True, False, True))
    one = graft.Agreement({1: torch.tensor([True] * 39 + [False])}, 0.1)
    assert not one.fell_from(graft.Agreement({1: torch.tensor([True] * 40)}, 0.1))


def test_models_that_do_not_fit(base: Path, tmp_path: Path, refused: Refused) -> None:
    folder = tuned(base, tmp_path / "tuned", by=0.0)
    assert "has no MTP layers to graft" in refused(command, folder, folder)
    assert "gone does not exist" in refused(command, "gone", folder)
    assert "--new-tokens=2 is too few" in refused(command, base, folder, "--new-tokens", "2")
    for unused in (["seed=1"], ["--text", folder / "config.json"]):
        said = refused(command, base, folder, *unused, "--hours", "0")
        assert f"--hours=0 trains nothing: leave out {unused[0]}, or give hours" in said
    # The same shapes with other heads, and other shapes.
    for name, trunk in (("heads", folders.dense()), ("wide", folders.dense(d_model=64))):
        folders.write(tmp_path / name, models.build(trunk, SequentialConfig(depth=0)))
    out = ["--output", tmp_path / "out"]
    said = refused(command, base, tmp_path / "heads", *out)
    assert "do not fit the trunk of" in said and "n_heads: 2 -> 4" in said
    said = refused(command, base, tmp_path / "wide", *out)
    assert "mtp.depths.0.block.attention.qkv.weight has the shape" in said
    far = tuned(base, tmp_path / "far", by=5.0)
    said = refused(command, base, far, "--hours", "0", *out)
    assert "nothing is exported; give more --hours and another --output" in said
    other = read_model(base).config
    changed = folders.dense(rope_theta=7.0)
    lines = graft.differences(other, ModelConfig(trunk=changed, mtp=other.mtp))
    assert any(line.startswith("rope_theta: ") and line.endswith("-> 7.0") for line in lines)


@pytest.mark.slow
@pytest.mark.extras
def test_layers_that_fell_are_trained_on(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in helpers.environment().items():
        monkeypatch.setenv(name, value)
    folder = tuned(base, tmp_path / "tuned", by=0.7, context=160)
    small = {
        "data.n_prompts": 128, "trainer.max_steps": 60, "trainer.val_check_interval": 30,
        "trainer.num_threads": 1, "optimizer.lr": 0.01, "paths.cache_dir": tmp_path / "cache",
        "logger": "csv",
    }  # fmt: skip
    words = [str(base), str(folder), "--hours", "0.02", "--output", str(tmp_path / "out")]
    command([*words, *(f"{key}={value}" for key, value in small.items())])
    said = capfd.readouterr().out
    assert "after training on" in said and "verified" in said
    stated = open_model(tmp_path / "out" / "model").seq_len
    assert stated == open_model(folder).seq_len > 128, "not the windows that it was trained on"
    found = read_folder(tmp_path / "out" / "model").weights
    theirs = open_model(folder).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in theirs.items())
    own = open_model(base).model.state_dict()
    name = "mtp.depths.0.eh_proj.weight"
    assert not torch.equal(found[name], own[name])
    # The plan is of these files: other layers at the same path are another question.
    shutil.rmtree(tmp_path / "out" / "model")
    os.utime(folder / "config.json", (1, 1))
    with pytest.raises(SystemExit):
        command([*words, *(f"{key}={value}" for key, value in small.items())])
    assert "was begun with other files than" in capfd.readouterr().err
