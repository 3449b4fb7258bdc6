"""Writes a model as a GGUF file, with the modules that llama.cpp drafts with, and verifies it: the
file is read back here, and by llama.cpp."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.errors import require_package
from mtp_lightning.interop import gguf_fields, gguf_file, gguf_tokenizer, llama_cpp
from mtp_lightning.interop.gguf_layout import GGUFEntry, Layout, entries, layout_of
from mtp_lightning.interop.gguf_reader import read_header
from mtp_lightning.interop.names import plain, to_folder
from mtp_lightning.interop.verify import CheckFailed, check_names, sample_of
from mtp_lightning.interop.writing import DTYPES
from mtp_lightning.model import MTPModel
from mtp_lightning.opening import open_model

# gguf's names of the types, by those of export.py.
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}
_ROUNDED = {TYPES[name]: dtype for name, dtype in DTYPES.items()}
_BLOCK = 32


@dataclass(frozen=True, kw_only=True)
class Written:
    """The contents of a written file.

    Attributes:
        arch: llama.cpp's architecture.
        modules: number of MTP modules after the trunk; 0 for EAGLE-3's layer alone.
        parameters: number of values in the tensors.
        notes: sentences about what is left out, how llama.cpp drafts, and what differs there.
    """

    arch: str
    modules: int
    parameters: int
    notes: list[str]


def write_file(
    file: Path,
    model: MTPModel,
    tokenizer: Any,
    *,
    dtype: str,
    max_positions: int,
    draft_vocab: int | None = None,
    name: str = "model",
) -> Written:
    """Write a model and its tokenizer.

    Args:
        file: the path of the new file.
        model: any variant; heads that llama.cpp does not read are left out.
        tokenizer: as for a folder (``writing.py``).
        dtype: a name of :data:`TYPES`.
        max_positions, draft_vocab: as for a folder.
        name: the model's name in the file.

    Raises:
        UserError: a trunk or a tokenizer that llama.cpp does not compute, or a missing package.
        OSError: for a full disk, among others.
    """
    layout = layout_of(model.config)
    tensors = _layout_tensors(layout, model)
    words, differences = gguf_tokenizer.to_fields(tokenizer, model.config.trunk.vocab_size)
    fields = gguf_fields.to_fields(layout, max_positions=max_positions)
    stored = (entry for entry in entries(layout) if not entry.copy)
    count = write_entries(
        file,
        layout.arch,
        fields,
        {"general.name": name, **gguf_fields.own_fields(layout, draft_vocab), **words},
        ((entry, entry.assemble(tensors)) for entry in stored),
        dtype=dtype,
    )
    notes = [*layout.sentences(), *differences]
    modules = layout.config.mtp.depth
    return Written(arch=layout.arch, modules=modules, parameters=count, notes=notes)


def write_entries(
    file: Path,
    arch: str,
    fields: Mapping[str, Any],
    others: Mapping[str, Any],
    values: Iterable[tuple[GGUFEntry, Tensor]],
    *,
    dtype: str,
) -> int:
    """Write a file, and return the number of values in its tensors.

    Args:
        file: the path of the new file.
        arch: llama.cpp's architecture.
        fields: values of ``ARCH.KEY`` by ``KEY``.
        others: values of other keys.
        values: the entries with their tensors; whole numbers are written as they are.
        dtype: a name of :data:`TYPES`.

    Raises:
        UserError: the package gguf is missing.
        OSError: for a full disk, among others.
    """
    require_package("gguf", what=str(file), extra="hf")
    import gguf

    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)  # it logs every step
    writer = gguf.GGUFWriter(None, arch, use_temp_file=True)
    _add(writer, {**{f"{arch}.{key}": value for key, value in fields.items()}, **others})
    count = 0
    for entry, value in values:
        count += value.numel()
        if not value.is_floating_point():
            writer.add_tensor(entry.name, value.numpy())
            continue
        kind = gguf.GGMLQuantizationType[_kind_of(entry, dtype)]
        numbers = value.float().contiguous().numpy()
        writer.add_tensor(entry.name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return count


def _layout_tensors(layout: Layout, model: MTPModel) -> dict[str, Tensor]:
    """The written part of a model in Hugging Face's layout, float32."""
    _, weights = plain(model)
    return to_folder(layout.config, weights, torch.float32)


def _kind_of(entry: GGUFEntry, dtype: str) -> str:
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


def check_file(file: Path, model: MTPModel, tokenizer: Any, dtype: str) -> Iterator[str]:
    """Check a file; arguments as of :func:`write_file`.

    Yields:
        The results, one line each.

    Raises:
        CheckFailed: a tensor or the tokenizer is not the model's, or llama.cpp computes something
            else.
    """
    gguf_file.keep_quiet(file)
    yield check_tensors(file, model, dtype)
    reread = open_model(file)
    text, wanted_ids = sample_of(tokenizer)
    ids = reread.tokenizer.encode(text).tolist()
    if ids != wanted_ids or reread.tokenizer.eot_id != tokenizer.eot_id:
        raise CheckFailed(f"the tokenizer in {file} gives {ids[:8]}..., not {wanted_ids[:8]}...")
    yield f"its tokenizer gives the same {len(wanted_ids)} ids for a text"
    if llama_cpp.is_there():
        yield from llama_cpp.check(
            file, reread.model, reread.tokenizer, dtype=dtype, context=reread.seq_len
        )
    else:
        yield "llama.cpp itself did not read it: pip install -e '.[engines]' lets it"


def check_tensors(file: Path, model: MTPModel, dtype: str) -> str:
    """Check that the tensors, read back, are the model's: rounded once, or of Q8_0 within a step.

    Raises:
        CheckFailed: one is not.
    """
    layout = layout_of(model.config)
    tensors = _layout_tensors(layout, model)
    fields, _, parts = gguf_file.read(file, read_header(file))
    stored = {name: part.read() for name, part in parts.items()}
    stored_entries = [entry for entry in entries(layout) if entry.parts and not entry.copy]
    check_names(stored, {name for entry in stored_entries for name in entry.parts}, file)
    for entry in stored_entries:
        wanted, read_back = entry.assemble(tensors), entry.assemble(stored)
        if not equal(entry, wanted, read_back, dtype):
            raise CheckFailed(f"{entry.name} in {file} is not the model's tensor.")
    return f"{len(stored_entries)} tensors, read back, are the model's ({fields['model_type']})"


def equal(entry: GGUFEntry, wanted: Tensor, stored: Tensor, dtype: str) -> bool:
    """Whether a tensor of a file of ``dtype``, read back, is the one wanted."""
    if not wanted.is_floating_point():
        return torch.equal(stored, wanted)
    if (kind := _kind_of(entry, dtype)) != "Q8_0":
        return torch.equal(stored, wanted.to(_ROUNDED[kind]).float())
    step = wanted.unflatten(-1, (-1, _BLOCK)).abs().amax(-1, keepdim=True) / 127
    differences = (stored - wanted).abs().unflatten(-1, (-1, _BLOCK))
    # The step is stored in fp16: off by half of its smallest number, times 127 levels.
    return bool((differences <= step + 127 * 2.0**-25).all())
