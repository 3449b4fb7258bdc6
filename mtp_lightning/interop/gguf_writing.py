"""Writes a model as a GGUF file, with the modules that llama.cpp drafts with."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.interop import engines, gguf_fields, gguf_tokenizer
from mtp_lightning.interop.gguf_layout import Entry, Layout, entries, layout_of
from mtp_lightning.interop.names import plain, to_folder
from mtp_lightning.model import MTPModel

# gguf's names of the types, by those of export.py.
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}
_BLOCK = 32


@dataclass(frozen=True, kw_only=True)
class Written:
    """The contents of a written file.

    Attributes:
        layout: the layout of its tensors.
        parameters: number of values in the tensors.
        said: sentences about what is left out, how llama.cpp drafts, and what differs there.
    """

    layout: Layout
    parameters: int
    said: list[str]


def write_file(
    file: Path,
    model: MTPModel,
    tokenizer: Any,
    *,
    dtype: str,
    max_positions: int,
    name: str = "model",
) -> Written:
    """Write a model and its tokenizer.

    Args:
        file: the path of the new file.
        model: any variant; heads that llama.cpp does not read are left out.
        tokenizer: as for a folder (``writing.py``).
        dtype: a name of :data:`TYPES`.
        max_positions: the context length that the file states.
        name: the model's name in the file.

    Raises:
        UserError: a trunk or a tokenizer that llama.cpp does not compute, or a missing package.
        OSError: for a full disk, among others.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"{file} needs the package gguf: pip install -e '.[hf]'") from error
    layout = layout_of(model.config)
    tensors = layout_tensors(layout, model)
    words, split = gguf_tokenizer.to_fields(tokenizer, model.config.trunk.vocab_size)
    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)  # it tells every step
    writer = gguf.GGUFWriter(None, layout.arch, use_temp_file=True)
    writer.add_name(name)
    fields = gguf_fields.to_fields(layout, max_positions=max_positions)
    _add(writer, {f"{layout.arch}.{key}": value for key, value in fields.items()})
    _add(writer, {**gguf_fields.own_fields(layout), **words})
    count = 0
    for entry in entries(layout):
        if entry.copy:
            continue
        kind = gguf.GGMLQuantizationType[kind_of(entry, dtype)]
        numbers = entry.made_of(tensors).float().contiguous().numpy()
        count += numbers.size
        writer.add_tensor(entry.name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said = [*engines.of_file(layout), *([split] if split else [])]
    return Written(layout=layout, parameters=count, said=said)


def layout_tensors(layout: Layout, model: MTPModel) -> dict[str, Tensor]:
    """The written part of a model in Hugging Face's layout, float32."""
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    _, weights = plain(model.config, weights)
    return to_folder(layout.config, weights, torch.float32)


def kind_of(entry: Entry, dtype: str) -> str:
    """The type of a tensor, as llama.cpp's converter chooses it: vectors and routers stay in
    float32, and rows that are not of whole blocks in float16."""
    if len(entry.shape) == 1 or entry.name.endswith("ffn_gate_inp.weight"):
        return "F32"
    if dtype == "q8_0" and entry.shape[-1] % _BLOCK:
        return "F16"
    return TYPES[dtype]


def _add(writer: Any, fields: dict[str, Any]) -> None:
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
