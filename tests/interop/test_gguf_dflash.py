"""DFlash's drafter as a GGUF file: read back, and drafting in llama.cpp, whose code is another."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_modules.tokenizers import ByteTokenizer
from mtp_lightning.decoding import generate
from mtp_lightning.errors import UserError
from mtp_lightning.interop import llama_cpp
from mtp_lightning.interop.gguf_dflash import DFLASH
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.dflash import DFlashConfig
from mtp_lightning.mtp.eagle import EagleConfig
from mtp_lightning.nn.attention import GroupedQueryConfig
from tests import models
from tests.interop import folders
from tests.interop.gguf_files import (
    MARKS,
    assert_damage_is_found,
    assert_equal_acceptance,
    needs_llama_cpp,
    write,
)
from tests.interop.language import LETTERS, learn

pytestmark = MARKS
TRUNK = folders.dense(n_layers=4, tie_embeddings=False)
LAYERS = (1, 2, 3)


@functools.cache
def trained_model(correction: str) -> MTPModel:
    mtp = DFlashConfig(depth=3, blocks=2, layers=LAYERS, correction=correction, correction_rank=(
        None if correction == "none" else 16
    ))  # fmt: skip
    return learn(MTPModel(ModelConfig(trunk=TRUNK, mtp=mtp)), "fuse.weight", steps=120)


@needs_llama_cpp
@pytest.mark.parametrize("correction", ["none", "markov"])
def test_llama_cpp_accepts_the_same_share_of_drafts(correction: str, tmp_path: Path) -> None:
    """On 16 prompts, within one draft in a hundred; the texts are the same."""
    model, trunk, file = trained_model(correction), tmp_path / "t.gguf", tmp_path / "d.gguf"
    write(trunk, model)
    write(file, model, kind=DFLASH)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(LETTERS, (16, 6), generator=generator).tolist()
    texts = generate(model, prompts, max_new_tokens=40, eot_id=None)
    drafter = llama_cpp.DraftFile(file, "dflash", "float32", 3)
    answers = llama_cpp.continue_prompts(trunk, prompts, [40] * 16, drafts=3, drafter=drafter)
    assert [text.ids for text in answers] == [text.token_ids for text in texts]
    assert_equal_acceptance(texts, answers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "q8_0"])
def test_a_file_read_back_is_the_drafter(dtype: str, tmp_path: Path) -> None:
    file, model = tmp_path / "d.gguf", trained_model("markov")
    written = write(file, model, kind=DFLASH, dtype=dtype)
    lines = list(DFLASH.check_file(file, model, ByteTokenizer(), dtype))
    assert lines[0] == "30 tensors, read back, are the drafter's" and len(lines) > 1
    assert "draft-dflash" in written.notes[0]
    assert_damage_is_found(file, "enc.output_norm.weight", model, kind=DFLASH, dtype=dtype)


@pytest.mark.parametrize(
    ("mtp", "message"),
    [
        (EagleConfig(depth=1), "layout=dflash is for a model of mtp=dflash, not mtp=eagle"),
        (DFlashConfig(depth=1, layers=(1, 3, 2)), r"nothing like mtp.layers=\[1, 3, 2\]"),
        (DFlashConfig(depth=1, layers=(1, 2, 4)), r"nothing like mtp.layers=\[1, 2, 4\]"),
        (DFlashConfig(depth=1, correction="selector"), "nothing like mtp.correction=selector"),
        (DFlashConfig(depth=1, layers=LAYERS, confidence=True), "objective.confidence=true"),
    ],
)
def test_other_heads_are_refused(mtp: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        write(tmp_path / "d.gguf", models.build(TRUNK, mtp), kind=DFLASH)


def test_partly_rotated_heads_are_refused(tmp_path: Path) -> None:
    """llama.cpp would rotate other pairs of each head."""
    trunk = replace(TRUNK, attention=GroupedQueryConfig(d_rope=4))
    with pytest.raises(UserError, match="nothing like model.attention.d_rope=4"):
        write(
            tmp_path / "d.gguf", models.build(trunk, DFlashConfig(depth=1, layers=LAYERS)),
            kind=DFLASH,
        )  # fmt: skip
