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
from mtp_lightning.interop.config_json import trunk_type
from mtp_lightning.interop.conversion import to_folder
from mtp_lightning.interop.gguf_layout import GGUFEntry, Layout, entries, layout_of
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
    """The contents of a written file."""

    arch: str  # llama.cpp's architecture
    modules: int  # number of MTP modules after the trunk; 0 for EAGLE-3's layer alone
    parameters: int  # number of values in the tensors
    notes: list[str]  # what is left out, how llama.cpp drafts, and what differs there


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
    """Write a model and its tokenizer; other arguments as of ``writing.write_folder``.

    Args:
        model: any variant; heads that llama.cpp does not read are left out.
        dtype: a name of :data:`TYPES`.
        name: the model's name in the file.

    Raises:
        UserError: a trunk or a tokenizer that llama.cpp does not compute, or a missing package.
        OSError: for a full disk, among others.
    """
    layout = layout_of(model.config)
    words, differences = gguf_tokenizer.to_fields(tokenizer, model.config.trunk.vocab_size)
    fields = gguf_fields.to_fields(layout, max_positions=max_positions)
    others = {"general.name": name, **gguf_fields.own_fields(layout, draft_vocab), **words}
    count = write_entries(file, layout.arch, fields, others, _values(layout, model), dtype=dtype)
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
    for key, value in {**{f"{arch}.{key}": x for key, x in fields.items()}, **others}.items():
        value_type = gguf.GGUFValueType.get_type(value)
        if value_type == gguf.GGUFValueType.INT32:  # llama.cpp reads unsigned counts
            value_type = gguf.GGUFValueType.UINT32
        writer.add_key_value(key, value, value_type)
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


def _values(layout: Layout, model: MTPModel) -> Iterator[tuple[GGUFEntry, Tensor]]:
    """The entries of a model's file, with their tensors."""
    tensors = to_folder(model, layout.config, torch.float32)
    for entry in entries(layout):
        if not entry.copy:
            yield entry, entry.assemble(tensors)


def _kind_of(entry: GGUFEntry, dtype: str) -> str:
    """The type of a tensor, as llama.cpp's converter chooses it: vectors and routers stay in
    float32, and rows that are not of whole blocks in float16."""
    if len(entry.shape) == 1 or entry.name.endswith("ffn_gate_inp.weight"):
        return "F32"
    if dtype == "q8_0" and entry.shape[-1] % _BLOCK:
        return "F16"
    return TYPES[dtype]


def check_file(file: Path, model: MTPModel, tokenizer: Any, dtype: str) -> Iterator[str]:
    """Check a file; arguments as of :func:`write_file`.

    Yields:
        The results, one line each.

    Raises:
        CheckFailed: a tensor or the tokenizer is not the model's, or llama.cpp computes something
            else.
    """
    gguf_file.keep_quiet(file)
    layout = layout_of(model.config)
    count = check_entries(file, _values(layout, model), dtype)
    yield f"{count} tensors, read back, are the model's ({trunk_type(layout.config.trunk)})"
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
        yield llama_cpp.ABSENT


def check_entries(file: Path, values: Iterable[tuple[GGUFEntry, Tensor]], dtype: str) -> int:
    """Check by the package gguf that a file has these tensors alone, rounded once, or of Q8_0
    within a step; return their number. Arguments as of :func:`write_entries`.

    Raises:
        CheckFailed: a tensor is missing, unknown or another one.
    """
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = []
    for entry, wanted in values:
        names.append(entry.name)
        if (tensor := stored.get(entry.name)) is None:
            continue  # check_names refuses it
        numbers = tensor.data
        if wanted.is_floating_point():
            numbers = gguf.quants.dequantize(numbers, tensor.tensor_type)
        if not _equal(entry, wanted, torch.from_numpy(numbers.copy()), dtype):
            raise CheckFailed(f"{entry.name} in {file} is not the model's tensor.")
    check_names(stored, names, file)
    return len(names)


def _equal(entry: GGUFEntry, wanted: Tensor, stored: Tensor, dtype: str) -> bool:
    """Whether a tensor of a file of ``dtype``, read back, is the one wanted."""
    if not wanted.is_floating_point():
        return torch.equal(stored, wanted)
    if (kind := _kind_of(entry, dtype)) != "Q8_0":
        return torch.equal(stored, wanted.to(_ROUNDED[kind]).float())
    step = wanted.unflatten(-1, (-1, _BLOCK)).abs().amax(-1, keepdim=True) / 127
    differences = (stored - wanted).abs().unflatten(-1, (-1, _BLOCK))
    # The step is stored in fp16: off by half of its smallest number, times 127 levels.
    return bool((differences <= step + 127 * 2.0**-25).all())
