"""EAGLE-3's layer as a GGUF file of its own.

Its tensors are those of the released layout (``eagle3.py``) by llama.cpp's names. ``d2t`` holds
token ids, not their distances from the rows; it is left out if every token has a row. The embedding
is the trunk's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.interop import eagle3
from mtp_lightning.interop.gguf_draft import Drafter
from mtp_lightning.interop.gguf_layout import LAYER, GGUFEntry, in_pairs
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.eagle import EagleConfig

_NAMES = {
    "fc": "fc",
    "norm": "output_norm",
    "lm_head": "output",
    "midlayer.hidden_norm": "blk.0.attn_norm_2",
    **{f"midlayer.{name}": f"blk.0.{theirs}" for name, theirs in LAYER.items()},
}


class Eagle3Drafter(Drafter):
    """See the module."""

    name, variant = "eagle3", "eagle"

    def drafts(self, config: ModelConfig) -> int:
        return 1

    def fields(self, config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        trunk, mtp = config.trunk, config.mtp
        assert isinstance(mtp, EagleConfig)
        fields = {"block_count": 1, "target_hidden_size": trunk.d_model}
        return fields | {"target_layers": list(mtp.layers_of(trunk.n_layers))}, {}

    def entries(self, model: MTPModel) -> Iterator[tuple[GGUFEntry, Tensor]]:
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


EAGLE3 = Eagle3Drafter()
