"""Reads a GGUF file as a model in Hugging Face's layout.

Weights in blocks of few bits are dequantized to float32. Training uses these rounded values;
decoding on a CPU packs them into blocks again, without loss (``cpu/packed.py``).
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mtp_lightning.errors import UserError, require_package
from mtp_lightning.interop import config_reading, gguf_fields, gguf_tokenizer
from mtp_lightning.interop.gguf_blocks import Blocks, numbers
from mtp_lightning.interop.gguf_layout import FREQUENCIES, LLAMA3, GGUFEntry, Layout, entries
from mtp_lightning.interop.gguf_reader import FileTensor, Header
from mtp_lightning.interop.tensor_files import StoredTensor
from mtp_lightning.interop.transformers_model import briefly
from mtp_lightning.interop.weight_map import DEEPSEEK, weight_map
from mtp_lightning.model import ModelConfig
from mtp_lightning.nn.mla import LatentAttentionConfig
from mtp_lightning.opening import pretrained_state
from mtp_lightning.stored import brief
from mtp_lightning.weights import require_fitting

log = logging.getLogger(__name__)

# Types of tensors whose numbers float32 holds exactly.
_EXACT = ("F32", "F16", "BF16")
# Files, with their times of modification, whose dequantization this process does not log (again).
_REPORTED: set[tuple[Path, int]] = set()


def keep_quiet(path: Path) -> None:
    """Do not log the dequantization of a file: this process has written it to check it."""
    _REPORTED.add(_state(path))


def _state(path: Path) -> tuple[Path, int]:
    return path, path.stat().st_mtime_ns


def read(path: Path, header: Header) -> tuple[dict[str, Any], ModelConfig, dict[str, StoredTensor]]:
    """The fields of a config.json, the model, and its tensors by Hugging Face's names, unread.

    Raises:
        UserError: for a damaged file, an architecture that is not read, or tensors that do not
            belong to it.
    """
    if (parts := header.fields.get("split.count", 0)) not in (0, 1):
        raise UserError(f"{path} is one of {parts} parts: join them (llama-gguf-split --merge).")
    _refuse_stretched(path, header)
    fields, layout = _describe(path, header)
    counts = Counter(tensor.kind.name for tensor in header.tensors.values())
    if counts.keys() - _EXACT and _state(path) not in _REPORTED:
        keep_quiet(path)
        kinds = ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()))
        log.warning(
            "%s holds rounded weights (tensors: %s): the model has exactly these, and not those "
            "of the model that the file was made from.",
            path,
            kinds,
        )
    return fields, layout.config, _parts(path, layout, header.tensors)


def _describe(path: Path, header: Header) -> tuple[dict[str, Any], Layout]:
    """The fields of a config.json, and the layout of the file."""
    get, tensors = header.fields.get, header.tensors
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path} is damaged or no language model: it has no token_embd.weight.")
    fields, dense = gguf_fields.to_json(get, tensors, source=str(path))
    arch = header.fields["general.architecture"]
    if arch == "llama" and FREQUENCIES in tensors:
        divisors = numbers(path, tensors[FREQUENCIES]).flatten().tolist()
        factor = gguf_fields.decimal(max(divisors, default=0.0))
        fields["rope_scaling"] = {"rope_type": "llama3", "factor": factor, **LLAMA3}
        fields["original_max_position_embeddings"] = LLAMA3["original_positions"]
    fields["vocab_size"] = tensors["token_embd.weight"].shape[0]
    # Layers and experts become objects, and the dimensions of a head a list.
    longest = max(max(tensor.shape) for tensor in tensors.values())
    for key, value in fields.items():
        counts = key.startswith(("num_", "n_", "first_"))
        most = 64 * len(tensors) if counts else longest if key == "head_dim" else None
        if most is not None and isinstance(value, int) and value > most:
            raise UserError(f"{path} is damaged or forged: it says {key}={brief(value)}.")
    config_reading.require_known(fields, source=str(path))
    depth = fields["num_nextn_predict_layers"]
    layers = fields["num_hidden_layers"]
    if not any(name.startswith(f"blk.{layers}.") for name in tensors):
        depth = 0  # converters leave the modules out and the number in
    trunk = config_reading.from_json(fields, depth=0 if dense else depth, source=str(path))
    if isinstance(trunk.attention, LatentAttentionConfig):  # one epsilon for all norms
        plain = replace(trunk.attention, norm_eps=None)
        trunk = replace(trunk, attention=plain)
    config = ModelConfig(trunk=trunk, mtp=DEEPSEEK.of_depth(depth))
    return fields, Layout(arch=arch, config=config)


def _parts(path: Path, layout: Layout, tensors: dict[str, FileTensor]) -> dict[str, StoredTensor]:
    """The tensors in Hugging Face's layout.

    Raises:
        UserError: a tensor is missing, unknown, of another shape, or not of the numbers that the
            layout needs.
    """
    needed = list(entries(layout))
    mismatch = f"The tensors in {path} do not match its description"
    require_fitting(
        {entry.name: entry.shape for entry in needed},
        tensors,
        optional={entry.name for entry in needed if entry.copy},
        message=mismatch,
    )
    rounded = any(tensor.kind.name not in _EXACT for tensor in tensors.values())
    stored: dict[str, list[tuple[FileTensor, GGUFEntry, int | None]]] = {}
    for entry in needed:
        tensor = tensors.get(entry.name)
        if tensor is None or (entry.copy and rounded):  # to another type than its original
            continue
        fixed = None if entry.parts else entry.assemble({})
        if fixed is not None and not torch.allclose(numbers(path, tensor), fixed, 1e-5, 0):
            wanted = "zero" if entry.fixed is None else "Llama 3's: import the model's own folder"
            raise UserError(f"{mismatch}: {entry.name} is not {wanted}.")
        for i, name in enumerate(entry.parts):
            stored.setdefault(name, []).append((tensor, entry, i if len(entry.parts) > 1 else None))
    mapped = weight_map(layout.config)
    shapes = {name: shape for place in mapped for name, shape in place.parts}
    return {name: Blocks(path, tuple(pieces), shapes[name]) for name, pieces in stored.items()}


def tokenizer_state(path: Path, header: Header) -> dict[str, Any]:
    """The tokenizer in a GGUF file, with its special tokens and chat template.

    Raises:
        UserError: if it holds no tokenizer that can be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        if not gguf_tokenizer.unpack(header.fields.get, Path(folder)):
            _tokenizer_of_transformers(path, header.fields.get, folder)
        try:
            return pretrained_state(folder) | {"path": str(path)}
        except (UserError, OSError) as error:  # which names the folder
            raise UserError(str(error).replace(folder, str(path))) from error


def _tokenizer_of_transformers(path: Path, get: Callable[[str], Any], folder: str) -> None:
    """Write the tokenizer into a folder as transformers reads it."""
    require_package("transformers", what=str(path), extra="hf")
    import transformers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    rule = get("tokenizer.ggml.pre")
    if get("tokenizer.ggml.model") == "gpt2" and rule not in list(GGUF_PRE_TOKENIZER_SPLITS):
        # transformers would split text by GPT-2's rule.
        raise UserError(
            f"{path} has tokenizer.ggml.pre={str(rule)[:40]}, which names no rule for splitting "
            "text that is known here: import the model's own folder, whose tokenizer.json has it."
        )
    try:
        # By default, transformers asks whether to run code that files next to this one name.
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the files may have any values
        raise UserError(
            f"transformers reads no tokenizer from {path}: {briefly(error)}."
        ) from error


def _refuse_stretched(path: Path, header: Header) -> None:
    """Refuse rotary positions that are stretched by a key, which are not read from GGUF."""
    fields = header.fields.items()
    types = {name: value for name, value in fields if name.endswith(".rope.scaling.type")}
    found = [f"{name}={value}" for name, value in types.items() if value != "none"]
    ends: tuple[str, ...] = (".rope.scaling.attn_factor",)
    if not types:  # older files have only factors
        ends += (".rope.scaling.factor", ".rope.scale_linear")
    found += [f"{name}={x}" for name, x in fields if name.endswith(ends) and x not in (0, 1)]
    if found:
        raise UserError(
            f"{path} has {found[0]}, and positions stretched so are not read from GGUF: import the "
            "model's own folder of safetensors."
        )
