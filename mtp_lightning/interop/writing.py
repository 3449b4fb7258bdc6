"""Writes a model as a folder in Hugging Face's layout.

Equal models give equal bytes: names, order, shards and JSON depend only on the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.interop import config_json, stack_file, tensor_files
from mtp_lightning.interop.config_reading import DRAFT_VOCAB
from mtp_lightning.interop.conversion import has_extra_file, in_layers, to_folder
from mtp_lightning.interop.tensor_files import CONFIG, GENERATION, INDEX, write_json
from mtp_lightning.model import MTPModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The contents of a folder."""

    modules: int  # number of MTP modules among the layers, which transformers and servers read
    # The file or folder next to them that holds the stack instead (``stack_file.py``,
    # ``speculators.py``); empty if there is none.
    heads: str
    parameters: int  # number of values in the folder's tensors, including copies
    shards: int  # number of weight files


def write_folder(
    folder: Path,
    model: MTPModel,
    tokenizer: Any,
    *,
    dtype: str,
    max_positions: int,
    shard_bytes: int,
    draft_vocab: int | None = None,
) -> Contents:
    """Writes config.json, the weights with their index, generation_config.json and the tokenizer
    into a folder, which is created if needed.

    Args:
        dtype: a name of :data:`DTYPES`.
        max_positions: the context length that the folder states.
        shard_bytes: most bytes of a weight file, which holds at least one tensor.
        draft_vocab: number of first token ids that the modules were trained to draft; None for all.

    Raises:
        UserError: for a trunk that no layout computes.
        OSError: for a full disk, among others.
    """
    config = model.config
    laid_out, extra = in_layers(config), has_extra_file(config)
    depth = laid_out.mtp.depth
    fields = config_json.to_json(
        config, depth=depth, max_positions=max_positions, dtype=dtype, eot_id=tokenizer.eot_id
    )
    fields |= tokenizer.special_ids()
    if draft_vocab is not None and model.depth:
        fields[DRAFT_VOCAB] = draft_vocab
    tensors = to_folder(model, laid_out, DTYPES[dtype])

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, fields)
    n_shards = _write_shards(folder, tensors, shard_bytes)
    if extra:
        stack_file.write(folder, model, DTYPES[dtype], max_positions=max_positions)
        tensors |= stack_file.tensors(model, DTYPES[dtype])
    write_tokenizer(folder, tokenizer, max_positions=max_positions)
    write_json(folder / GENERATION, tokenizer.generation_config())
    return Contents(
        modules=depth,
        heads=stack_file.where(config) if extra else "",
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        shards=n_shards,
    )


def write_tokenizer(folder: Path, tokenizer: Any, *, max_positions: int) -> None:
    """Writes tokenizer.json for the tokenizers library, and tokenizer_config.json; a tokenizer that
    came with such files (chat template, special tokens) keeps them."""
    (folder / "tokenizer.json").write_text(tokenizer.library_json(), encoding="utf-8")
    beside: dict[str, str] = tokenizer.files_beside() if hasattr(tokenizer, "beside") else {}
    for name, text in beside.items():
        (folder / name).write_text(text, encoding="utf-8")
    if "tokenizer_config.json" in beside:
        return
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.eot_token,
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", fields)


def _write_shards(folder: Path, tensors: dict[str, Tensor], shard_bytes: int) -> int:
    shards = list(_fill(tensors, shard_bytes))
    table: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensor_files.write(folder / file, shard, {"format": "pt"})
        table |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": table})
    return len(shards)


def _fill(tensors: dict[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
