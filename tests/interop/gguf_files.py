"""Writes small GGUF files as llama.cpp's converter does, and reads files with transformers."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_modules.tokenizers import ByteTokenizer
from mtp_lightning.decoding.sequence import Generation
from mtp_lightning.interop import gguf_writing, llama_cpp
from mtp_lightning.interop.verify import CheckFailed
from mtp_lightning.model import MTPModel

INSTALLED = all(importlib.util.find_spec(name) for name in ("transformers", "gguf"))
gguf: Any = importlib.import_module("gguf") if INSTALLED else None
transformers: Any = importlib.import_module("transformers") if INSTALLED else None
MARKS = [
    pytest.mark.extras,
    pytest.mark.skipif(not INSTALLED, reason="GGUF files need pip install -e '.[hf]'"),
    # transformers imports optional packages that warn.
    pytest.mark.filterwarnings("ignore"),
]
needs_llama_cpp = pytest.mark.skipif(
    not llama_cpp.is_there(), reason="llama.cpp needs pip install -e '.[engines]'"
)

WIDTH, LAYERS, HEADS, KV = 64, 2, 4, 2
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
WORDS = [*(chr(c) for c in range(33, 127)), "\u0120", "\u010a", "ab"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def k_quant(generator: np.random.Generator, name: str, rows: int, columns: int) -> Any:
    """Random blocks of Q4_K, Q5_K or Q6_K, [rows, bytes], of numbers of the size of 0.1."""
    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    blocks = generator.integers(0, 256, (rows * columns // numbers, size), dtype=np.uint8)
    scales = generator.uniform(1, 2, (len(blocks), 2)) * [3e-4, 2e-3]
    scale_bytes = scales.astype(np.float16).view(np.uint8)
    if name == "Q6_K":
        blocks[:, -2:] = scale_bytes[:, :2]
    else:
        blocks[:, :4] = scale_bytes
    return blocks.reshape(rows, -1)


def write_gguf(
    path: Path, *, kind: str = "llama", extra: Any = None, k_quants: bool = False
) -> Path:
    """A random model of 4-bit blocks, or one of K-quants as in a file Q4_K_M, as llama.cpp's
    converter lays it out."""
    generator = np.random.default_rng(0)
    width, d_ff = (256, 512) if k_quants else (WIDTH, 96)
    tokens = [*SPECIALS, *WORDS]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name("tiny")
    fields: dict[str, Any] = {
        "block_count": LAYERS, "context_length": 128, "embedding_length": width,
        "feed_forward_length": d_ff, "head_count": HEADS, "head_count_kv": KV,
        "layer_norm_rms_eps": 1e-5, "rope_freq_base": 50_000.0,
        "tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "token_list": tokens,
        "token_types": [3] * len(SPECIALS) + [1] * len(WORDS), "token_merges": ["a b"],
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "chat_template": TEMPLATE,
    }  # fmt: skip
    if kind == "llama":
        fields |= {"rope_dimension_count": width // HEADS, "vocab_size": len(tokens)}
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)

    def matrix(name: str, rows: int, columns: int) -> None:
        if k_quants:
            high = name.endswith(("_v.weight", "embd.weight"))
            dtype = "Q6_K" if high else "Q5_K" if "down" in name else "Q4_K"
            blocks = k_quant(generator, dtype, rows, columns)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[dtype])
            return
        numbers = generator.normal(0, 0.1, (rows, columns)).astype(np.float32)
        blocks = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)

    def vector(name: str, size: int) -> None:
        writer.add_tensor(name, generator.uniform(0.5, 1.5, size).astype(np.float32))

    matrix("token_embd.weight", len(tokens), width)
    vector("output_norm.weight", width)
    kv_width = KV * width // HEADS
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        vector(f"{block}attn_norm.weight", width)
        vector(f"{block}ffn_norm.weight", width)
        for name, rows in (("q", width), ("k", kv_width), ("v", kv_width), ("output", width)):
            matrix(f"{block}attn_{name}.weight", rows, width)
            if kind == "qwen2" and name != "output":
                vector(f"{block}attn_{name}.bias", rows)
        matrix(f"{block}ffn_gate.weight", d_ff, width)
        matrix(f"{block}ffn_up.weight", d_ff, width)
        matrix(f"{block}ffn_down.weight", width, d_ff)
    if extra is not None:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write(
    file: Path, model: MTPModel, tokenizer: Any = None, *, kind: Any = gguf_writing, **changes: Any
) -> gguf_writing.Written:
    """A model as a file, by the module ``kind``; without a tokenizer, it gets that of bytes."""
    options = {"dtype": "float32", "max_positions": 64, **changes}
    written: gguf_writing.Written = kind.write_file(
        file, model, tokenizer or ByteTokenizer(), **options
    )
    return written


def assert_damage_is_found(
    file: Path, name: str, model: MTPModel, *, kind: Any, dtype: str = "float32"
) -> None:
    """A check by ``kind`` finds another number in the tensor ``name`` of a file."""
    (tensor,) = (tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == name)
    offset = int(tensor.data_offset)
    with file.open("r+b") as content:
        content.seek(offset)
        content.write(np.float32(7.0).tobytes())
    with pytest.raises(CheckFailed, match=f"{name} in .* is not the model's tensor"):
        list(kind.check_file(file, model, ByteTokenizer(), dtype))


def assert_equal_acceptance(
    ours: Sequence[Generation], theirs: Sequence[llama_cpp.Continuation]
) -> None:
    """llama.cpp accepts the same share of drafts as this project, within one in a hundred."""
    our_share = sum(sum(text.drafts_accepted) for text in ours) / sum(text.drafts for text in ours)
    their_share = sum(text.accepted for text in theirs) / sum(text.drafted for text in theirs)
    assert 0.15 < our_share < 0.97, "a share that could differ"
    assert abs(our_share - their_share) <= 0.01


def hf_model(file: Path, **settings: Any) -> Any:
    """The model that transformers reads from a file, with changed settings; its from_pretrained
    needs one more package."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    for name, value in settings.items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    checkpoint = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(checkpoint["tensors"], strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model
