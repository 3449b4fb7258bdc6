"""Reading a folder in Hugging Face's layout: config.json and safetensors, as data.

Nothing in the folder is executed: no pickled file is opened, no code that it names is imported.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.interop import config_reading, fp8, gguf_file, stack_file, tensor_files
from mtp_lightning.interop.conversion import from_folder
from mtp_lightning.interop.gguf_reader import Header, read_header
from mtp_lightning.interop.tensor_files import CONFIG, GENERATION, INDEX, SINGLE, StoredTensor
from mtp_lightning.interop.weight_map import module_layout, weight_map
from mtp_lightning.model import ModelConfig
from mtp_lightning.opening import pretrained_state
from mtp_lightning.parts import is_gguf
from mtp_lightning.weights import Stored, StoredModel, require_held

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(
    path: Path, *, allow: Collection[str] = (), header: Header | None = None
) -> StoredModel:
    """A model from elsewhere without its tokenizer.

    Args:
        path: the folder, or a GGUF file, which is dequantized.
        header: of a GGUF file, if it was read.
        allow: packages whose variants its file of heads may ask for.

    Raises:
        FileNotFoundError: config.json or a file of weights is missing.
        UserError: a model or tensor that does not fit, pickled or damaged weights.
    """
    if is_gguf(path):
        fields, config, tensors = gguf_file.read(path, header or read_header(path))
    else:
        fields, tensors = contents(path)
        depth = _mtp_layers(fields, tensors)
        trunk = config_reading.from_json(fields, depth=depth, source=str(path / CONFIG))
        config = ModelConfig(trunk=trunk, mtp=module_layout(fields["model_type"]).of_depth(depth))
    require_held(config, tensors, source=str(path))
    weights = dict[str, Stored | Tensor](from_folder(weight_map(config), tensors, source=str(path)))
    if stack_file.is_there(path):
        embedding = tensors["model.embed_tokens.weight"]
        mtp, extra = stack_file.read(path, config.trunk, embedding, allow=allow)
        config = ModelConfig(trunk=config.trunk, mtp=mtp)
        weights |= extra
        require_held(config, weights, source=str(path))
    return StoredModel(
        path=path,
        config=config,
        weights=weights,
        tokenizer_state=None,
        brings_trunk=True,
        run_config=config_reading.run_config(fields, path),
    )


def read(path: Path, *, allow: Collection[str] = ()) -> StoredModel:
    """The reader of folders and GGUF files, see :func:`~mtp_lightning.opening.open_model`;
    arguments and errors as :func:`describe`."""
    header = read_header(path) if is_gguf(path) else None
    stored = describe(path, allow=allow, header=header)
    if header is not None:
        return replace(stored, tokenizer_state=gguf_file.tokenizer_state(path, header))
    if not (path / "tokenizer.json").is_file():
        return stored
    state, fields = pretrained_state(path), tensor_files.read_json(path / CONFIG)
    if "eos_token_id" in fields:  # older folders name their ends here alone
        ends = json.dumps({"eos_token_id": fields["eos_token_id"]})
        state.setdefault("beside", {}).setdefault(GENERATION, ends)
    return replace(stored, tokenizer_state=state)


def contents(folder: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The fields of a folder's config.json and its tensors, unread. Matrices in fp8 are dequantized
    when they are read.

    Raises:
        FileNotFoundError: a file is missing.
        UserError: a kind of model that is not known here, pickled or damaged weights, or a tensor
            in another quantization.
    """
    source, fields = str(folder / CONFIG), tensor_files.read_json(folder / CONFIG)
    config_reading.require_known(fields, source=source)
    block = fp8.block_size(fields, source=source)
    tensors: dict[str, StoredTensor] = {}
    for file, promised in files_of(folder).items():
        in_file, _ = tensor_files.open_file(file)
        if promised is not None and promised != in_file.keys():
            name = min(promised ^ in_file.keys())
            where = "the index" if name in promised else "the file"
            raise UserError(f"{file} does not agree with the index: {name} is only in {where}.")
        tensors |= in_file
    if block is not None:
        fp8.dequantize(tensors, block, source=str(folder))
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise UserError(
                f"{name} in {folder} is stored as {str(tensor.dtype).removeprefix('torch.')}: only "
                "float32, bfloat16, float16 and float64 can be imported."
            )
    return fields, tensors


def files_of(folder: Path) -> dict[Path, set[str] | None]:
    """The files of weights, and the tensors that the index promises of each.

    Raises:
        FileNotFoundError: there are none, or one is missing.
        UserError: only pickled ones, or an index that points out of the folder.
    """
    if (folder / SINGLE).is_file():  # as transformers: an index next to it is of an earlier model
        return {folder / SINGLE: None}
    if (folder / INDEX).is_file():
        table = tensor_files.read_json(folder / INDEX).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            raise UserError(f"{folder / INDEX} has no weight_map of names to files.")
        files: dict[Path, set[str] | None] = {}
        for name in sorted(set(table.values())):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(
                    f"{folder / INDEX} points to {name}: only safetensors files of the folder "
                    "itself are read."
                )
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing, though the index names it.")
            files[folder / name] = {tensor for tensor, file in table.items() if file == name}
        return files
    pickled = [f.name for end in ("bin", "pt", "pth", "ckpt") for f in folder.glob(f"*.{end}")]
    if pickled:
        raise UserError(
            f"{folder} holds its weights in pickled files only ({', '.join(sorted(pickled)[:3])}), "
            "which can run code when they are opened: convert them to safetensors first."
        )
    raise FileNotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}.")


def _mtp_layers(fields: dict[str, Any], tensors: Collection[str]) -> int:
    """MTP layers among the tensors: all that transformers reads, or none."""
    declared = config_reading.read_depth(fields)
    first = fields.get("num_hidden_layers")
    if not declared or not isinstance(first, int):
        return 0
    prefix = module_layout(fields["model_type"]).prefix(first, 0)
    return declared if any(name.startswith(prefix) for name in tensors) else 0
