"""Verifies that a GGUF file is the model it was made from: read back here, and in llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.interop import gguf_file, llama_cpp
from mtp_lightning.interop.gguf_layout import entries
from mtp_lightning.interop.gguf_reader import read_header
from mtp_lightning.interop.gguf_writing import Written, kind_of, layout_tensors
from mtp_lightning.interop.verify import TEXT, CheckFailed
from mtp_lightning.model import MTPModel
from mtp_lightning.opening import open_model

_ROUNDED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_file(
    file: Path, model: MTPModel, tokenizer: Any, written: Written, dtype: str
) -> Iterator[str]:
    """Check a file; arguments as of ``gguf_writing.write_file``, whose result ``written`` is.

    Yields:
        The results, one line each.

    Raises:
        CheckFailed: a tensor or the tokenizer is not the model's, or llama.cpp computes something
            else.
    """
    gguf_file.keep_quiet(file)
    yield check_tensors(file, model, written, dtype)
    back = open_model(file)
    text = TEXT if tokenizer.reads_text else tokenizer.decode(range(tokenizer.vocab_size))
    found, wanted = back.tokenizer.encode(text).tolist(), tokenizer.encode(text).tolist()
    if found != wanted or back.tokenizer.eot_id != tokenizer.eot_id:
        raise CheckFailed(f"the tokenizer in {file} gives {found[:8]}..., not {wanted[:8]}...")
    yield f"its tokenizer gives the same {len(wanted)} ids for a text"
    if llama_cpp.is_there():
        yield from llama_cpp.check(file, back.model, tokenizer, dtype=dtype, context=back.seq_len)
    else:
        yield "llama.cpp itself did not read it: pip install -e '.[engines]' lets it"


def check_tensors(file: Path, model: MTPModel, written: Written, dtype: str) -> str:
    """Check that the tensors, read back, are the model's: rounded once, or of Q8_0 within a step.

    Raises:
        CheckFailed: one is not.
    """
    own = layout_tensors(written.layout, model)
    fields, _, parts = gguf_file.read(file, read_header(file))
    found = {name: part.read() for name, part in parts.items()}
    held = [entry for entry in entries(written.layout) if entry.parts and not entry.copy]
    names = {name for entry in held for name in entry.parts}
    for name in names ^ found.keys():
        raise CheckFailed(f"{name} is {'missing' if name in names else 'unknown'} in {file}.")
    for entry in held:
        wanted, got = entry.made_of(own), entry.made_of(found)
        if not _equal(wanted, got, kind_of(entry, dtype)):
            raise CheckFailed(f"{entry.name} in {file} is not the model's tensor.")
    return f"{len(held)} tensors, read back, are the model's ({fields['model_type']})"


def _equal(wanted: Tensor, found: Tensor, kind: str) -> bool:
    if kind != "Q8_0":
        return torch.equal(found, wanted.to(_ROUNDED[kind]).float())
    blocks = F.pad(wanted, (0, -wanted.shape[-1] % 32)).unflatten(-1, (-1, 32))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    apart = (found - wanted).abs().unflatten(-1, (-1, 32))
    return bool((apart <= step).all())
