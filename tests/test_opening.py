"""``open_model`` and ``StoredModel.build``: readers of parts, missing parts, and exact weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtp_lightning import parts
from mtp_lightning.errors import UserError
from mtp_lightning.opening import open_model, read_model
from mtp_lightning.parts import PARTS, Part
from mtp_lightning.run import loading
from tests.decoding.models import small_model
from tests.models import as_stored, build, checkpoint_of


def test_a_part_can_add_a_reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.save(checkpoint_of(small_model(0, 2)), tmp_path / "run.ckpt")
    stored = loading.read(tmp_path / "run.ckpt")
    monkeypatch.setitem(globals(), "read", lambda path, *, allow: stored)
    formats = {"a .mine file": lambda path: path.suffix == ".mine"}
    part = Part(module=__name__, brings="my files", formats=formats)
    monkeypatch.setitem(PARTS, "mine", part)
    assert read_model("x.mine") is stored
    assert open_model("x.mine").step == 3


@pytest.mark.parametrize("name", ["folder", "model.gguf"])
def test_a_missing_part_that_reads_a_path_is_named(name, monkeypatch, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(parts, "is_there", lambda part: False)
    kind = "a folder in Hugging Face's layout" if name == "folder" else "a GGUF file"
    with pytest.raises(UserError, match=f"{name}, {kind}, needs mtp_lightning/interop"):
        open_model(tmp_path / name)


@pytest.mark.parametrize("tied", [True, False])
def test_a_built_model_equals_the_stored_one(tied: bool) -> None:
    """Also its ties and its dtype."""
    small = small_model(0, 2)
    model = build(replace(small.config.trunk, tie_embeddings=tied), small.config.mtp).double()
    built = as_stored(model).build()
    assert not built.training and built.head.weight.dtype == torch.float64
    assert (built.head.weight is built.trunk.embedding.weight) == tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, built.state_dict()[name]), name
