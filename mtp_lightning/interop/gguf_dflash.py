"""DFlash's drafter as a GGUF file of its own, with ``correction=markov`` DSpark's.

llama.cpp's mask is a token, so the file has one more than the trunk, whose row of the embedding is
the learned mask. The file therefore has its own embedding and head, and ``d2t`` maps the head's
rows to the trunk's tokens. llama.cpp adds ``W2 W1[token]`` to the logits; here ``W2 = U A``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.interop.gguf_draft import Drafter
from mtp_lightning.interop.gguf_layout import GGUFEntry
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.dflash import DFlashConfig

_LAYER = {
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.out": "attn_output",
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "feed_forward_norm": "ffn_norm",
    "feed_forward.down": "ffn_down",
}
_HALVES = {
    "attention.key_value": ("attn_k", "attn_v"),
    "feed_forward.gate_up": ("ffn_gate", "ffn_up"),
}


class DFlashDrafter(Drafter):
    """See the module."""

    name, variant, extra_tokens = "dflash", "dflash", 1

    def obstacle(self, config: ModelConfig) -> str:
        assert isinstance(config.mtp, DFlashConfig)
        if config.mtp.correction == "selector":
            return "mtp.correction=selector without convolutions"
        return super().obstacle(config)

    def drafts(self, config: ModelConfig) -> int:
        return config.mtp.depth  # a shorter block drafts something else

    def fields(self, config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        trunk, mtp = config.trunk, config.mtp
        assert isinstance(mtp, DFlashConfig)
        fields = {
            "block_count": mtp.blocks,
            "vocab_size": trunk.vocab_size + 1,
            "block_size": mtp.depth + 1,
            "target_layers": list(mtp.layers_of(trunk.n_layers)),
            "sample_from_anchor": False,
        }
        return fields, {"tokenizer.ggml.mask_token_id": trunk.vocab_size}

    def entries(self, model: MTPModel) -> Iterator[tuple[GGUFEntry, Tensor]]:
        for name, tensor in _tensors(model):
            entry = GGUFEntry(name=name, shape=tuple(tensor.shape), parts=(name,))
            yield entry, tensor


def _tensors(model: MTPModel) -> Iterator[tuple[str, Tensor]]:
    mtp, size = model.config.mtp, model.config.trunk.vocab_size
    assert isinstance(mtp, DFlashConfig)
    weights = {n: t.detach().cpu().float() for n, t in model.state_dict().items()}
    head = model.head.weight.detach().cpu().float()
    yield "token_embd.weight", torch.cat((weights["trunk.embedding.weight"], weights["mtp.mask"]))
    yield "output.weight", head
    yield "d2t", torch.arange(size)
    yield "fc.weight", weights["mtp.fuse.weight"]
    yield "enc.output_norm.weight", weights["mtp.text_norm.weight"]
    yield "output_norm.weight", weights["mtp.norm.weight"]
    if mtp.correction == "markov":
        table, down = (weights[f"mtp.corrections.0.{x}.weight"] for x in ("embedding", "down"))
        yield "markov_w1.weight", F.pad(table, (0, 0, 0, 1))
        yield "markov_w2.weight", head @ down
    for i in range(mtp.blocks):
        own, theirs = f"mtp.layers.{i}", f"blk.{i}"
        for name, their_name in _LAYER.items():
            yield f"{theirs}.{their_name}.weight", weights[f"{own}.{name}.weight"]
        for name, their_names in _HALVES.items():
            halves = weights[f"{own}.{name}.weight"].chunk(2)
            for their_name, half in zip(their_names, halves, strict=True):
                yield f"{theirs}.{their_name}.weight", half


DFLASH = DFlashDrafter()
