"""Reads a GGUF file as a model in Hugging Face's layout, with transformers' own reader.

GGUF holds weights in blocks of few bits, which are dequantized to float32: training and decoding
here use these rounded values, without the kernels that compute on blocks.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.interop.gguf_counts import require_counts
from mtp_lightning.interop.gguf_reader import one_reader
from mtp_lightning.interop.parts import Held, Part
from mtp_lightning.opening import pretrained_state
from mtp_lightning.stored import brief

log = logging.getLogger(__name__)

# A tensor of GGUF that holds no weight and follows from the config, or replaces those values.
_FREQUENCIES = "rope_freqs.weight"


def is_gguf(path: str | Path) -> bool:
    """Whether a path is a GGUF file."""
    path = Path(path)
    return path.suffix == ".gguf" and path.is_file()


@dataclass(frozen=True)
class Blocks(Part):
    """A tensor of a GGUF file, dequantized when it is read.

    Attributes:
        file: the file.
        blocks: gguf's tensor, with its shape reversed.
        process: transformers' function that undoes the row permutation of llama.cpp's converter.
    """

    file: Path
    blocks: Any
    process: Callable[..., Any]
    dtype = torch.float32

    @property
    def shape(self) -> torch.Size:
        return torch.Size(int(size) for size in reversed(self.blocks.shape))

    def read(self) -> Tensor:
        from gguf.quants import dequantize

        # Not through the reader's memory map, whose pages stay in memory.
        held = self.blocks.data
        stored = np.fromfile(self.file, held.dtype, held.size, offset=self.blocks.data_offset)
        numbers = dequantize(stored.reshape(held.shape), self.blocks.tensor_type)
        found = self.process(weights=numbers, name=self.blocks.name)
        return torch.from_numpy(np.ascontiguousarray(found.weights))


def read(path: Path) -> tuple[dict[str, Any], dict[str, Part]]:
    """The fields of a config.json, and the tensors by Hugging Face's names, unread.

    Raises:
        UserError: for a damaged file, an architecture that transformers does not read from GGUF,
            tensors that it skips, or missing packages.
    """
    with _opened(path) as (transformers, reader):
        return _read(path, transformers, reader)


def _read(path: Path, transformers: Any, reader: Any) -> tuple[dict[str, Any], dict[str, Part]]:
    _refuse_what_is_passed_over(path, reader)
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    fields = _parsed(path, load_gguf_checkpoint)["config"]
    for key, value in fields.items():  # layers and experts become objects even on the meta device
        if isinstance(value, int) and key.startswith("num_") and value > len(reader.tensors) * 64:
            raise UserError(f"{path} is damaged or forged: it says {key}={brief(value)}.")
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**fields)
        shape = transformers.AutoModelForCausalLM.from_config(config)
    held = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    kinds = ", ".join(f"{count} of {name}" for name, count in sorted(held.items()))
    log.warning(
        "%s is dequantized to float32 (tensors: %s): from here on the model has these rounded "
        "values.",
        path,
        kinds,
    )
    parts = _parts(path, fields, reader, shape)
    if parts is None:
        options = {"return_tensors": True, "model_to_load": shape}
        found = _parsed(path, load_gguf_checkpoint, **options)["tensors"]
        parts = {name: Held(tensor) for name, tensor in found.items()}
    return fields, parts


def _parts(path: Path, fields: dict[str, Any], reader: Any, shape: Any) -> dict[str, Part] | None:
    """The tensors one by one; None for an architecture whose tensors transformers merges."""
    from transformers import modeling_gguf_pytorch_utils as theirs

    kind = theirs.TENSOR_PROCESSORS.get(
        reader.fields["general.architecture"].contents(), theirs.TensorProcessor
    )
    if kind not in (theirs.TensorProcessor, theirs.LlamaTensorProcessor):
        return None
    processor = kind(config=fields)
    names = _parsed(path, lambda _: theirs.get_gguf_hf_weights_map(shape, processor))
    return {
        names[tensor.name]: Blocks(path, tensor, processor.process)
        for tensor in reader.tensors
        if tensor.name in names
    }


def tokenizer_state(path: Path) -> dict[str, Any]:
    """The tokenizer in a GGUF file, with its special tokens and chat template.

    Raises:
        UserError: if it holds no tokenizer that transformers reads.
    """
    with _opened(path) as (transformers, _), tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(path.parent), gguf_file=path.name, local_files_only=True
            )
            tokenizer.save_pretrained(folder)
        except (ValueError, KeyError, NotImplementedError, OSError) as error:
            raise UserError(f"transformers reads no tokenizer from {path}: {error}") from error
        return pretrained_state(folder) | {"path": str(path)}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """transformers, and gguf's reader of a file."""
    try:
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise UserError(
            f"{path} needs the packages gguf and transformers: pip install -e '.[hf]'"
        ) from error
    require_counts(path)
    with contextlib.ExitStack() as stack:
        try:
            reader = stack.enter_context(one_reader(path))
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise UserError(f"{path} is damaged or not a GGUF file: {error}.") from error
        yield transformers, reader


def _parsed(path: Path, load: Any, **options: Any) -> dict[str, Any]:
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            return dict(load(str(path), **options))
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise UserError(f"transformers cannot read {path}: {error}") from error


def _refuse_what_is_passed_over(path: Path, reader: Any) -> None:
    """Refuses what changes the arithmetic but is dropped by transformers."""
    if any(tensor.name == _FREQUENCIES for tensor in reader.tensors):
        raise UserError(
            f"{path} holds stretched rotary frequencies ({_FREQUENCIES}), which transformers does "
            "not read from GGUF: import the model's own folder of safetensors."
        )
    for name, field in reader.fields.items():
        if name.endswith(".rope.scaling.type") and field.contents() != "none":
            raise UserError(
                f"{path} has {name}={field.contents()}, which transformers does not read from "
                "GGUF: import the model's own folder of safetensors."
            )
