"""Reads a GGUF file as a model in Hugging Face's layout.

Weights in blocks of few bits are dequantized to float32: training and decoding here use these
rounded values, without the kernels that compute on blocks.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.interop import config_reading, gguf_fields, gguf_tokenizer
from mtp_lightning.interop.gguf_counts import require_counts
from mtp_lightning.interop.gguf_layout import Entry, Layout, entries
from mtp_lightning.interop.gguf_reader import one_reader
from mtp_lightning.interop.gguf_scales import KQUANTS, steps_and_offsets
from mtp_lightning.interop.parts import Part
from mtp_lightning.model import ModelConfig
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.mla import LatentAttentionConfig
from mtp_lightning.nn.weight_scales import WeightScales
from mtp_lightning.opening import pretrained_state
from mtp_lightning.stored import brief

log = logging.getLogger(__name__)

# A tensor of GGUF that holds no weight and replaces what follows from the config.
_FREQUENCIES = "rope_freqs.weight"
# Types of tensors whose numbers float32 holds exactly.
_EXACT = ("F32", "F16", "BF16")
# The files, and when they were written, of which this process has said that they are dequantized.
_SAID: set[tuple[Path, int]] = set()
# Bytes of a file that are dequantized at once.
_SLAB = 1 << 20


def is_gguf(path: str | Path) -> bool:
    """Whether a path is a GGUF file."""
    path = Path(path)
    return path.suffix == ".gguf" and path.is_file()


@dataclass(frozen=True)
class Blocks(Part):
    """A tensor in Hugging Face's layout, dequantized when it is read.

    Attributes:
        file: the file.
        held: where it is: gguf's tensor, its entry in the layout, and the tensor's place in the
            entry, None where it is all of it. Two of them hold its two halves.
        size: its shape.
    """

    file: Path
    held: tuple[tuple[Any, Entry, int | None], ...]
    size: tuple[int, ...]
    dtype = torch.float32

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.size)

    def copy_to(self, target: Tensor) -> None:
        (tensor, entry, i), *others = self.held
        if others or entry.unpack is not Entry.unpack or not target.is_contiguous():
            super().copy_to(target)
        else:  # without a second copy in memory
            numbers(self.file, tensor, i, out=target)

    def scales(self) -> WeightScales | None:
        (tensor, entry, i), *others = self.held
        kind = tensor.tensor_type
        if others or len(self.size) != 2 or kind.name not in KQUANTS:
            return None
        portions = _portions(self.file, tensor, i)
        found = [steps_and_offsets(stored, kind) for _, stored in portions]
        steps, offsets = (np.concatenate(each) for each in zip(*found, strict=True))
        quant = KQUANTS[kind.name]
        return WeightScales(
            steps=entry.unpack(torch.from_numpy(steps)),
            offsets=entry.unpack(torch.from_numpy(offsets)),
            group=quant.group,
            bits=quant.bits,
        )

    def read(self) -> Tensor:
        portions = []
        for tensor, entry, i in self.held:
            portions.append(entry.unpack(numbers(self.file, tensor, i)))
        found = portions[0] if len(portions) == 1 else torch.cat(portions, dim=1)
        return found.reshape(self.size).contiguous()


def numbers(file: Path, tensor: Any, i: int | None = None, out: Tensor | None = None) -> Tensor:
    """The values of a tensor of a file, or of one of the matrices that it stacks.

    Args:
        file: the file.
        tensor: gguf's.
        i: which matrix; None for all.
        out: contiguous, filled and returned; None for a new float32 tensor.
    """
    from gguf.quants import dequantize

    width = int(tensor.shape[0])
    shape = [int(n) for n in reversed(tensor.shape)][0 if i is None else 1 :]
    out = torch.empty(shape) if out is None else out
    rows = out.view(-1, width)
    for at, stored in _portions(file, tensor, i):
        found = dequantize(stored, tensor.tensor_type)
        rows[at : at + len(stored)] = torch.from_numpy(np.ascontiguousarray(found))
    return out


def _portions(file: Path, tensor: Any, i: int | None) -> Iterator[tuple[int, Any]]:
    """The stored bytes of some rows at a time, with the number of the first row; arguments as
    :func:`numbers`."""
    held = tensor.data if i is None else tensor.data[i]
    begin = tensor.data_offset + (0 if i is None else i * held.nbytes)
    rows = held.reshape(-1, held.shape[-1])
    n_bytes = rows.strides[0]
    step = max(1, _SLAB // n_bytes)
    for at in range(0, len(rows), step):
        part = rows[at : at + step]
        # Not through the reader's memory map, whose pages stay in memory.
        read = np.fromfile(file, part.dtype, part.size, offset=begin + at * n_bytes)
        yield at, read.reshape(part.shape)


def read(path: Path) -> tuple[dict[str, Any], ModelConfig, dict[str, Part]]:
    """The fields of a config.json, the model, and its tensors by Hugging Face's names, unread.

    Raises:
        UserError: for a damaged file, an architecture that is not read, or tensors that do not
            belong to it.
    """
    with opened(path) as reader:
        _refuse_stretched(path, reader)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        fields, layout = _described(path, reader, tensors)
        held = Counter(tensor.tensor_type.name for tensor in reader.tensors)
        state = path, path.stat().st_mtime_ns
        if held.keys() - _EXACT and state not in _SAID:
            _SAID.add(state)
            kinds = ", ".join(f"{count} of {name}" for name, count in sorted(held.items()))
            log.warning(
                "%s is dequantized to float32 (tensors: %s): from here on the model has these "
                "rounded values.",
                path,
                kinds,
            )
        return fields, layout.config, _parts(path, layout, tensors)


def _described(path: Path, reader: Any, tensors: dict[str, Any]) -> tuple[dict[str, Any], Layout]:
    """The fields of a config.json, and the layout of the file."""
    get = _contents(reader)
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path} is damaged or no language model: it has no token_embd.weight.")
    fields, dense = gguf_fields.to_json(get, tensors, source=str(path))
    fields["vocab_size"] = int(tensors["token_embd.weight"].shape[-1])
    for key, value in fields.items():  # layers and experts become objects
        counts = key.startswith(("num_", "n_"))
        if counts and isinstance(value, int) and value > len(tensors) * 64:
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
    mtp = SequentialConfig(depth=depth) if depth else NoMTPConfig()
    config = ModelConfig(trunk=trunk, mtp=mtp)
    return fields, Layout(arch=get("general.architecture"), config=config)


def _contents(reader: Any) -> Callable[[str], Any]:
    """From a key of the file to its content; None if it is not there."""

    def get(key: str) -> Any:
        field = reader.fields.get(key)
        return None if field is None else field.contents()

    return get


def _parts(path: Path, layout: Layout, tensors: dict[str, Any]) -> dict[str, Part]:
    """The tensors in Hugging Face's layout.

    Raises:
        UserError: a tensor is missing, unknown, or of another shape.
    """
    problems, known = [], set()
    held: dict[str, list[tuple[Any, Entry, int | None]]] = {}
    for entry in entries(layout):
        known.add(entry.name)
        tensor = tensors.get(entry.name)
        shape = None if tensor is None else tuple(int(n) for n in reversed(tensor.shape))
        if tensor is None:
            if not entry.copy:
                problems.append(f"{entry.name} is missing")
        elif shape != entry.shape:
            problems.append(
                f"{entry.name} has the shape {list(shape or ())} where {list(entry.shape)} is "
                "needed"
            )
        elif not entry.parts and numbers(path, tensor).any():
            problems.append(f"{entry.name} is not zero")
        for i, name in enumerate(entry.parts if tensor is not None else ()):
            held.setdefault(name, []).append((tensor, entry, i if len(entry.parts) > 1 else None))
    problems += [f"{name} is unknown" for name in tensors if name not in known]
    if problems:
        shown = "; ".join(problems[:8]) + ("; ..." if len(problems) > 8 else "")
        raise UserError(f"The tensors in {path} do not match its description: {shown}.")
    shapes = layout.shapes()
    return {name: Blocks(path, tuple(found), shapes[name]) for name, found in held.items()}


def tokenizer_state(path: Path) -> dict[str, Any]:
    """The tokenizer in a GGUF file, with its special tokens and chat template.

    Raises:
        UserError: if it holds no tokenizer that can be read.
    """
    with opened(path) as reader, tempfile.TemporaryDirectory() as folder:
        if not gguf_tokenizer.unpack(_contents(reader), Path(folder)):
            _tokenizer_of_transformers(path, folder)
        return pretrained_state(folder) | {"path": str(path)}


def _tokenizer_of_transformers(path: Path, folder: str) -> None:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"{path} needs the packages gguf and transformers: pip install -e '.[hf]'"
        ) from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True
        )
        tokenizer.save_pretrained(folder)
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        raise UserError(f"transformers reads no tokenizer from {path}: {error}") from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """gguf's reader of a file.

    Raises:
        UserError: the file is damaged, or the package is missing.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(f"{path} needs the package gguf: pip install -e '.[hf]'") from error
    require_counts(path)
    with contextlib.ExitStack() as stack:
        try:
            reader = stack.enter_context(one_reader(path))
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise UserError(f"{path} is damaged or not a GGUF file: {error}.") from error
        yield reader


def _refuse_stretched(path: Path, reader: Any) -> None:
    """Refuse stretched rotary positions, which are not read from GGUF."""
    if any(tensor.name == _FREQUENCIES for tensor in reader.tensors):
        raise UserError(
            f"{path} holds stretched rotary frequencies ({_FREQUENCIES}), which this project does "
            "not read from GGUF: import the model's own folder of safetensors."
        )
    for name, field in reader.fields.items():
        if name.endswith(".rope.scaling.type") and field.contents() != "none":
            raise UserError(
                f"{path} has {name}={field.contents()}, which this project does not read from "
                "GGUF: import the model's own folder of safetensors."
            )
