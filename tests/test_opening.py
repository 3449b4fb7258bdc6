"""One door for every model, also where the part that reads some of them is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtp_lightning import parts
from mtp_lightning.errors import UserError
from mtp_lightning.opening import build_model, open_model, read_model
from mtp_lightning.parts import PARTS, Part
from mtp_lightning.run import loading
from tests.decoding.models import small_model
from tests.models import build, checkpoint_of


def test_a_reader_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.save(checkpoint_of(small_model(0, 2)), tmp_path / "run.ckpt")
    wanted = loading.read(tmp_path / "run.ckpt")
    monkeypatch.setitem(globals(), "read", lambda path, *, allow: wanted)
    formats = {"a .mine file": lambda path: path.suffix == ".mine"}
    own = Part(module=__name__, brings="my files", formats=formats)
    monkeypatch.setitem(PARTS, "mine", own)
    assert read_model("x.mine") is wanted
    assert open_model("x.mine").step == 3


@pytest.mark.parametrize("name", ["folder", "model.gguf"])
def test_without_the_part_that_reads_a_path(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(parts, "is_there", lambda part: False)
    kind = "a folder in Hugging Face's layout" if name == "folder" else "a GGUF file"
    with pytest.raises(UserError, match=f"{name}, {kind}, needs mtp_lightning/interop"):
        open_model(tmp_path / name)


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
