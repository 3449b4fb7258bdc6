"""Formats of token files from other programs: where the ids are in a file, and of what type.

====================  ============================================================================
Megatron-LM, NeMo,    ``.bin``: only the ids. ``.idx``: ``MMIDIDX`` and two zeros, version (uint64,
GPT-NeoX              1), code of the type (uint8), numbers of sequences and of document entries
                      (uint64), the sequences' lengths (int32) and byte offsets (int64), and the
                      sequence that each document begins with (int64), their count at the end
llm.c,                ``.bin``: 256 int32 with magic, version and number of ids, then the ids:
modded-nanogpt        uint16 after magic 20240520, uint32 after 20240801 (Llama 3)
nanoGPT               ``.bin``: only the ids, uint16
Dolma, OLMo           ``.npy`` without numpy's header: only the ids
litdata               ``.bin`` that an ``index.json`` names: see ``litdata_chunks.py``
numpy                 ``.npy`` of one dimension
====================  ============================================================================

The format is detected from the file. Only numbers are read from a header, and all of them are
checked against the file's size before use.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_modules.shards import Shard, stamp_of
from data_modules.token_files.litdata_chunks import INDEX, item_offsets, read_chunk
from mtp_lightning.errors import UserError

MEGATRON, NUMPY = b"MMIDIDX\x00\x00", b"\x93NUMPY"
_MEGATRON_HEADER = struct.Struct("<QBQQ")
_MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_LLM_C_HEADER = 256 * 4
_LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""By magic number: version and type."""
_FOREIGN = {
    NUMPY: "a .npy file: name it so",
    b"PK\x03\x04": "a zip or .npz archive: unpack it",
    b"\x1f\x8b\x08": "compressed by gzip: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
    b"PAR1": "parquet: read its text with data=huggingface",
    b"\x89HDF": "HDF5: write its ids as .npy",
    (20240522).to_bytes(4, "little"): "llm.c's file of multiple-choice questions: give a text file",
    MEGATRON: "Megatron's index: name it .idx, next to the .bin of the same name",
}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class TokenSource:
    """The contents of a token file."""

    format: str  # ``megatron``, ``litdata``, ``llm.c``, ``raw`` or ``npy``
    shard: Shard
    # Index of every document's first token, int64; None if only end-of-text tokens separate
    # documents.
    starts: np.ndarray | None
    files: tuple[Path, ...]  # all files that determine the contents


def read_header(path: Path, dtype: str | None = None) -> TokenSource:
    """Finds the ids of a ``.bin`` or ``.npy`` file. A file without header has ids of the type
    ``dtype`` (None for uint16); other files state theirs.

    Raises:
        UserError: if the file is empty, truncated, unknown, or of another type than ``dtype``.
        OSError: if it cannot be read.
    """
    if dtype not in (None, "uint16", "uint32", "int32", "int64"):
        raise UserError(f"data.dtype must be uint16, uint32, int32, int64 or null, not {dtype!r}")
    if path.suffix not in (".bin", ".npy"):
        raise UserError(
            f"{path} is not a file of token ids: give .bin (Megatron, nanoGPT, llm.c, litdata) or "
            f".npy files; for a folder with others too, use a glob: data.path='{path.parent}/*.bin'"
        )
    stamp = stamp_of(path)
    if stamp[0] == 0:
        raise UserError(f"{path} is empty: leave the file out of data.path")
    with path.open("rb") as file:
        head = file.read(_LLM_C_HEADER)
    if path.suffix == ".npy":
        source = _numpy(path) if head.startswith(NUMPY) else _raw(path, head, dtype)
    elif path.with_suffix(".idx").is_file():
        source = _megatron(path)
    elif (chunk := read_chunk(path)) is not None:
        source = TokenSource("litdata", *chunk, (path,))
    elif int.from_bytes(head[:4], "little") in _LLM_C:
        source = _llm_c(path, head)
    else:
        source = _raw(path, head, dtype)
    stated = np.dtype(source.shard.dtype).name  # in any byte order
    if dtype not in (None, stated):
        raise UserError(
            f"{path} ({source.format}) states that its ids are {stated}, not data.dtype={dtype}: "
            "leave data.dtype out"
        )
    return replace(source, shard=replace(source.shard, stamp=stamp))


def _raw(path: Path, head: bytes, dtype: str | None) -> TokenSource:
    for magic, description in _FOREIGN.items():
        if head.startswith(magic):
            raise UserError(f"{path} holds no token ids but is {description}")
    if item_offsets(path) is not None:
        raise UserError(f"{path} is a chunk of litdata without its {INDEX}: copy that file, too")
    if dtype is None and _upper_half_is_zero(head, "<u2"):
        wide = "int64" if _upper_half_is_zero(head, "<u4") else "uint32"
        raise UserError(
            f"{path} has no header and looks like ids of {wide[-2:]} bits: set data.dtype={wide}, "
            "or data.dtype=uint16 if every second id is really 0"
        )
    id_dtype = np.dtype(dtype or "uint16").newbyteorder("<")
    shard = Shard(path, id_dtype.str, 0, _count(path, id_dtype))
    return TokenSource("raw", shard, None, (path,))


def _upper_half_is_zero(head: bytes, half: str) -> bool:
    """Whether every second number of the type ``half`` is 0, as in small ids of twice its width."""
    halves = np.frombuffer(head[: len(head) // 8 * 8], half)
    return len(halves) >= 32 and not halves[1::2].any() and bool(halves[::2].any())


def _count(path: Path, dtype: np.dtype) -> int:
    """The number of ids in a file that holds nothing else."""
    n_bytes = path.stat().st_size
    n_tokens, rest = divmod(n_bytes, dtype.itemsize)
    if rest:
        raise UserError(
            f"{path} is truncated, or its ids are not {dtype.name}: {n_bytes:,} bytes are not a "
            f"multiple of {dtype.itemsize}; copy the file again, or set data.dtype"
        )
    return n_tokens


def _llm_c(path: Path, head: bytes) -> TokenSource:
    if len(head) < _LLM_C_HEADER:
        raise UserError(f"{path} is truncated in its llm.c header: copy the file again")
    magic, version, n_tokens = struct.unpack_from("<3i", head)
    supported, dtype = _LLM_C[magic]
    if version != supported:
        raise UserError(
            f"{path} has version {version} of llm.c's format, and only version {supported} is "
            "supported: write it again with llm.c's own scripts"
        )
    size = path.stat().st_size
    expected = _LLM_C_HEADER + n_tokens * np.dtype(dtype).itemsize
    if n_tokens < 1 or size != expected:
        raise UserError(
            f"{path} is truncated or damaged: its header says {n_tokens:,} ids, so {expected:,} "
            f"bytes, but it has {size:,}; copy the file again"
        )
    return TokenSource("llm.c", Shard(path, dtype, _LLM_C_HEADER, n_tokens), None, (path,))


def _numpy(path: Path) -> TokenSource:
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects
    except OSError:
        raise
    except Exception as error:  # a header of any kind of nonsense
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path} is not a .npy file of ids, or is truncated ({reason}): write it again with "
            "numpy.save"
        ) from None
    if not array.size:
        raise UserError(f"{path} is empty: leave the file out of data.path")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(
            f"{path} holds {array.dtype} of shape {array.shape}, not a one-dimensional array of "
            "integers: save ids.reshape(-1) of an integer type"
        )
    shard = Shard(path, array.dtype.str, array.offset, len(array))  # type: ignore[attr-defined]
    return TokenSource("npy", shard, None, (path,))


def _megatron(path: Path) -> TokenSource:
    index = path.with_suffix(".idx")

    def damaged(why: str) -> UserError:
        return UserError(
            f"{index} is not an index of {path.name}, or is damaged ({why}): copy both files "
            "again, or move the index away to read the .bin alone"
        )

    size = index.stat().st_size
    with index.open("rb") as file:
        magic, header = file.read(len(MEGATRON)), file.read(_MEGATRON_HEADER.size)
    if magic != MEGATRON or len(header) < _MEGATRON_HEADER.size:
        raise damaged("it does not begin like a Megatron index")
    version, code, n_sequences, n_entries = _MEGATRON_HEADER.unpack(header)
    if version != 1 or code not in _MEGATRON_TYPES:
        raise damaged(f"version {version} with ids of type {code} is not supported")
    offset = len(MEGATRON) + _MEGATRON_HEADER.size
    expected = offset + 12 * n_sequences + 8 * n_entries
    if size == expected + n_sequences and n_sequences:
        raise UserError(f"{index} is of images and text, which no model here reads: give text")
    if size != expected or n_sequences < 1 or n_entries < 2:
        raise damaged(f"its header implies {expected:,} bytes, but it has {size:,}")
    dtype = np.dtype(_MEGATRON_TYPES[code])
    n_tokens = _count(path, dtype)
    lengths = np.memmap(index, "<i4", "r", offset, (n_sequences,))
    pointers = np.memmap(index, "<i8", "r", offset + 4 * n_sequences, (n_sequences,))
    entries = np.memmap(index, "<i8", "r", offset + 12 * n_sequences, (n_entries,))
    end = 0  # byte end of the sequences so far: they must be contiguous to be read as one text
    for i in range(0, n_sequences, _BLOCK):
        sizes = lengths[i : i + _BLOCK].astype(np.int64) * dtype.itemsize
        ends = end + np.cumsum(sizes)
        if sizes.min() < 0 or not np.array_equal(pointers[i : i + _BLOCK], ends - sizes):
            raise damaged("its sequences are not contiguous")
        end = int(ends[-1])
    if end != n_tokens * dtype.itemsize:
        raise damaged(
            f"its sequences are {end:,} bytes, and {path.name} has {path.stat().st_size:,}"
        )
    if entries[0] != 0 or entries[-1] != n_sequences or (np.diff(entries) < 0).any():
        raise damaged("its documents are not in order")
    # An empty document begins where the next one does.
    begins = np.unique(entries[:-1])
    starts = np.unique(pointers[begins[begins < n_sequences]] // dtype.itemsize)
    starts = starts[starts < n_tokens]
    return TokenSource("megatron", Shard(path, dtype.str, 0, n_tokens), starts, (path, index))
