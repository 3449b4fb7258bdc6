"""EAGLE-3's layer as a GGUF file: read back, and drafting in llama.cpp."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from data_modules.tokenizers import ByteTokenizer
from mtp_lightning.decoding import generate
from mtp_lightning.errors import UserError
from mtp_lightning.interop import llama_cpp
from mtp_lightning.interop.gguf_eagle3 import EAGLE3
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.eagle import EagleConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from tests import models
from tests.interop import folders
from tests.interop.gguf_files import (
    MARKS,
    assert_damage_is_found,
    assert_equal_acceptance,
    gguf,
    needs_llama_cpp,
    write,
)
from tests.interop.language import LETTERS, learn

pytestmark = MARKS
TRUNK = folders.dense(n_layers=4, tie_embeddings=False)


@functools.cache
def trained_model(draft_vocab: int | None) -> MTPModel:
    mtp = EagleConfig(depth=2, layers=(1, 2, 3), draft_vocab=draft_vocab)
    model = MTPModel(ModelConfig(trunk=TRUNK, mtp=mtp))
    if draft_vocab is not None:  # rows for the letters, and for the last tokens
        counts = torch.zeros(TRUNK.vocab_size, dtype=torch.long)
        counts[:LETTERS] = counts[LETTERS + 20 :] = 1
        assert model.mtp.own_head is not None
        model.mtp.own_head.choose(counts)
    return learn(model, "depths.0.fuse.weight", steps=120)


@needs_llama_cpp
@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("draft_vocab", [None, 96])
def test_llama_cpp_accepts_the_same_share_of_drafts(
    draft_vocab: int | None, drafts: int, tmp_path: Path
) -> None:
    """On 16 prompts, within one draft in a hundred; the texts are the same."""
    model, trunk, layer = trained_model(draft_vocab), tmp_path / "t.gguf", tmp_path / "d.gguf"
    write(trunk, model)
    write(layer, model, kind=EAGLE3)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(LETTERS, (16, 6), generator=generator).tolist()
    texts = generate(model, prompts, max_new_tokens=40, eot_id=None, draft_depth=drafts)
    file = llama_cpp.DraftFile(layer, "eagle3", "float32", drafts)
    answers = llama_cpp.continue_prompts(trunk, prompts, [40] * 16, drafts=drafts, drafter=file)
    assert [text.ids for text in answers] == [text.token_ids for text in texts]
    assert_equal_acceptance(texts, answers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "q8_0"])
def test_a_file_read_back_is_the_layer(dtype: str, tmp_path: Path) -> None:
    file, model = tmp_path / "d.gguf", trained_model(96)
    written = write(file, model, kind=EAGLE3, dtype=dtype)
    lines = list(EAGLE3.check_file(file, model, ByteTokenizer(), dtype))
    assert lines[0] == "14 tensors, read back, are the drafter's" and len(lines) > 1
    assert "draft-eagle3" in written.notes[0]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert model.mtp.own_head is not None
    assert tensors["d2t"].data.tolist() == model.mtp.own_head.tokens.tolist()
    assert_damage_is_found(file, "output_norm.weight", model, kind=EAGLE3, dtype=dtype)


@pytest.mark.parametrize(
    ("mtp", "message"),
    [
        (SequentialConfig(depth=1), "layout=eagle3 is for a model of mtp=eagle, not mtp=sequent"),
        (EagleConfig(depth=1, layers=(1, 3, 2)), r"nothing like mtp.layers=\[1, 3, 2\]"),
        (EagleConfig(depth=1, confidence=True), "nothing like objective.confidence=true"),
    ],
)
def test_other_heads_are_refused(mtp: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        write(tmp_path / "d.gguf", models.build(TRUNK, mtp), kind=EAGLE3)
