"""EAGLE-3's layer as a GGUF file of its own, with which llama.cpp drafts for the trunk's file
(``draft-eagle3``).

The architecture is ``eagle3``. Its tensors are those of the released layout (``eagle3.py``) by
llama.cpp's names. ``d2t`` holds token ids, not their distances from the rows; it is left out if
every token has a row. The embedding is the trunk's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mtp_lightning.errors import UserError
from mtp_lightning.interop import eagle3, gguf_tokenizer, gguf_writing, llama_cpp
from mtp_lightning.interop.gguf_fields import trunk_fields
from mtp_lightning.interop.gguf_layout import LAYER, GGUFEntry, in_pairs
from mtp_lightning.interop.gguf_reader import read_header
from mtp_lightning.interop.gguf_writing import Written
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.eagle import EagleConfig

LAYOUT = "eagle3"
_NAMES = {
    "fc": "fc",
    "norm": "output_norm",
    "lm_head": "output",
    "midlayer.hidden_norm": "blk.0.attn_norm_2",
    **{f"midlayer.{name}": f"blk.0.{theirs}" for name, theirs in LAYER.items()},
}


def require_fits(config: ModelConfig) -> None:
    """Refuse a model whose heads llama.cpp does not compute as EAGLE-3's layer.

    Raises:
        UserError: naming the setting.
    """
    mtp, trunk = config.mtp, config.trunk
    if not isinstance(mtp, EagleConfig) or not mtp.depth:
        raise UserError(f"layout={LAYOUT} is for a model of mtp=eagle, not mtp={mtp.variant}.")
    setting = eagle3.obstacle(config)
    if not setting and trunk.rope_scaling is not None:
        setting = "model.rope_scaling"
    if setting:
        raise UserError(f"llama.cpp's {LAYOUT} has nothing like {setting}: export a folder.")


def write_file(
    file: Path,
    model: MTPModel,
    tokenizer: Any,
    *,
    dtype: str,
    max_positions: int,
    name: str = "model",
) -> Written:
    """Write the layer of a model with the trunk's tokenizer; arguments and errors as of
    ``gguf_writing.write_file``."""
    require_fits(model.config)
    trunk, mtp = model.config.trunk, model.config.mtp
    assert isinstance(mtp, EagleConfig)
    fields = trunk_fields(trunk, n_layers=1, max_positions=max_positions)
    fields["target_hidden_size"] = trunk.d_model
    fields["target_layers"] = list(mtp.layers_of(trunk.n_layers))
    words, differences = gguf_tokenizer.to_fields(tokenizer, trunk.vocab_size)
    others = {"general.name": name, **words}
    count = gguf_writing.write_entries(file, LAYOUT, fields, others, _entries(model), dtype=dtype)
    note = (
        "llama.cpp drafts with this file next to the trunk's (`llama-server --model TRUNK.gguf "
        "--model-draft DRAFT.gguf --spec-type draft-eagle3`); `mtp-lightning export "
        "output=TRUNK.gguf` writes that."
    )
    return Written(arch=LAYOUT, modules=0, parameters=count, notes=[note, *differences])


def _entries(model: MTPModel) -> Iterator[tuple[GGUFEntry, torch.Tensor]]:
    """The entries of the file, with their values."""
    trunk, mtp = model.config.trunk, model.config.mtp
    assert isinstance(mtp, EagleConfig)
    rotary_heads = {"blk.0.attn_q": trunk.n_heads, "blk.0.attn_k": trunk.n_kv_heads}
    tensors = eagle3.layer_tensors(model, torch.float32)
    for name, tensor in tensors.items():
        if name in ("d2t", "t2d"):
            continue
        theirs = _NAMES[name.removesuffix(".weight")]
        entry = GGUFEntry(name=f"{theirs}.weight", shape=tuple(tensor.shape), parts=(name,))
        if theirs in rotary_heads:
            entry = in_pairs(entry, rotary_heads[theirs])
        yield entry, entry.assemble(tensors)
    if mtp.draft_vocab is not None:
        ids = tensors["d2t"] + torch.arange(mtp.draft_vocab)
        yield GGUFEntry(name="d2t", shape=tuple(ids.shape), parts=("d2t",)), ids


def check_file(file: Path, model: MTPModel, tokenizer: Any, dtype: str) -> Iterator[str]:
    """Check a file; arguments, results and errors as of ``gguf_writing.check_file``."""
    count = gguf_writing.check_entries(file, _entries(model), dtype)
    yield f"{count} tensors, read back, are the layer's"
    if not llama_cpp.is_there():
        yield llama_cpp.ABSENT
        return
    with tempfile.TemporaryDirectory() as folder:
        trunk = Path(folder) / "trunk.gguf"
        context = int(read_header(file).fields[f"{LAYOUT}.context_length"])
        gguf_writing.write_file(trunk, model, tokenizer, dtype="float32", max_positions=context)
        yield from llama_cpp.check(
            trunk, model, tokenizer, dtype="float32", context=context, layer=file, layer_dtype=dtype
        )
