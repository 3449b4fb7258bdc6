"""One door for every model, also where the part that reads some of them is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data_modules
import mtp_lightning
from mtp_lightning.errors import UserError
from mtp_lightning.opening import FORMATS, Format, build_model, open_model, read_model
from mtp_lightning.run import loading
from tests.decoding.models import small_model
from tests.models import build
from tests.run.test_loading import checkpoint_of

PROGRAM = """
import sys

# An installation from a checkout would find there what the copy lacks.
sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__name__", "") != "_EditableFinder"]
from mtp_lightning.errors import UserError
from mtp_lightning.opening import open_model

print(open_model(sys.argv[1]).step)
for path in sys.argv[2:]:
    try:
        open_model(path)
    except UserError as error:
        print(error)
"""


def test_without_the_part_for_other_formats(tmp_path: Path) -> None:
    """A run still opens; a folder and a GGUF file are refused in one sentence."""
    for package in (mtp_lightning, data_modules):
        folder = Path(package.__file__).parent
        shutil.copytree(folder, tmp_path / "tree" / folder.name)
    shutil.rmtree(tmp_path / "tree" / "mtp_lightning" / "interop")
    torch.save(checkpoint_of(small_model(0, 2)), tmp_path / "run.ckpt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    asked = [str(tmp_path / name) for name in ("run.ckpt", "folder", "model.gguf")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *asked],
        cwd=tmp_path / "tree",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    step, folder, file = done.stdout.splitlines()
    assert step == "3"
    lacks = "and this installation lacks the part that reads it (mtp_lightning.interop): "
    assert f"folder is a folder in Hugging Face's layout, {lacks}" in folder
    assert f"model.gguf is a GGUF file, {lacks}" in file


def test_a_reader_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.save(checkpoint_of(small_model(0, 2)), tmp_path / "run.ckpt")
    wanted = loading.read(tmp_path / "run.ckpt")
    own = Format("a .mine file", lambda path: path.suffix == ".mine", f"{__name__}:read_mine")
    monkeypatch.setitem(globals(), "read_mine", lambda path, *, allow: wanted)
    monkeypatch.setattr("mtp_lightning.opening.FORMATS", [own, *FORMATS])
    assert read_model("x.mine") is wanted
    assert open_model("x.mine").step == 3
    broken = Format("a .mine file", own.fits, f"{__name__}_not_there:read_mine")
    monkeypatch.setattr("mtp_lightning.opening.FORMATS", [broken, *FORMATS])
    with pytest.raises(UserError, match="x.mine is a .mine file, and this installation lacks"):
        open_model("x.mine")


@pytest.mark.parametrize("tied", [True, False])
def test_a_built_model_is_the_stored_one(tied: bool) -> None:
    """Filled without being drawn first; what is tied stays tied, float64 stays float64."""
    small = small_model(0, 2)
    model = build(replace(small.config.trunk, tie_embeddings=tied), small.config.mtp).double()
    found = build_model(model.config, model.state_dict(), source="x")
    assert not found.training and found.head.weight.dtype == torch.float64
    assert (found.head.weight is found.trunk.embedding.weight) == tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name
