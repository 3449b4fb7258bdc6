"""Writes small GGUF files as llama.cpp's converter lays them out."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

gguf: Any = importlib.import_module("gguf") if importlib.util.find_spec("gguf") else None

WIDTH, LAYERS, HEADS, KV = 64, 2, 4, 2
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
WORDS = [*(chr(c) for c in range(33, 127)), "\u0120", "\u010a", "ab"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_gguf(path: Path, *, kind: str = "llama", extra: Any = None) -> Path:
    """A random model of 4-bit blocks, as llama.cpp's converter lays it out."""
    generator = np.random.default_rng(0)
    tokens = [*SPECIALS, *WORDS]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50_000.0)
    if kind == "llama":
        writer.add_rope_dimension_count(WIDTH // HEADS)
        writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * len(WORDS))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)

    def matrix(name: str, rows: int, columns: int) -> None:
        numbers = generator.normal(0, 0.1, (rows, columns)).astype(np.float32)
        blocks = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)

    def vector(name: str, size: int) -> None:
        writer.add_tensor(name, generator.uniform(0.5, 1.5, size).astype(np.float32))

    matrix("token_embd.weight", len(tokens), WIDTH)
    vector("output_norm.weight", WIDTH)
    narrow = KV * WIDTH // HEADS
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        vector(f"{block}attn_norm.weight", WIDTH)
        vector(f"{block}ffn_norm.weight", WIDTH)
        for name, rows in (("q", WIDTH), ("k", narrow), ("v", narrow), ("output", WIDTH)):
            matrix(f"{block}attn_{name}.weight", rows, WIDTH)
        if kind == "qwen2":
            for name, rows in (("q", WIDTH), ("k", narrow), ("v", narrow)):
                vector(f"{block}attn_{name}.bias", rows)
        matrix(f"{block}ffn_gate.weight", 96, WIDTH)
        matrix(f"{block}ffn_up.weight", 96, WIDTH)
        matrix(f"{block}ffn_down.weight", WIDTH, 96)
    if extra is not None:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
