"""Files of token ids, written as each program writes them: byte by byte, by its own layout."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

Documents = Sequence[Sequence[int]]


def nanogpt(path: Path, documents: Documents, code: str = "H") -> Path:
    """nanoGPT's data/openwebtext/prepare.py: uint16 ids, each document closed by its eot."""
    ids = [i for document in documents for i in document]
    path.write_bytes(struct.pack(f"<{len(ids)}{code}", *ids))
    return path


def llm_c(path: Path, documents: Documents, *, llama: bool = False) -> Path:
    """llm.c's dev/data/data_common.py: 256 int32 before the ids."""
    ids = [i for document in documents for i in document]
    header = [20240801, 7, len(ids)] if llama else [20240520, 1, len(ids)]
    header += [0] * (256 - len(header))
    code = "I" if llama else "H"
    path.write_bytes(struct.pack("<256i", *header) + struct.pack(f"<{len(ids)}{code}", *ids))
    return path


def numpy_file(path: Path, documents: Documents) -> Path:
    """Version 1.0 of numpy's format: magic, version, length of the header, a dict, the items."""
    ids = [i for document in documents for i in document]
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({len(ids)},), }}"
    header = header.ljust((64 - (10 + len(header) + 1) % 64) % 64 + len(header)) + "\n"
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode("latin1")
    path.write_bytes(start + struct.pack(f"<{len(ids)}H", *ids))
    return path


def megatron(
    path: Path, documents: Documents, *, code: int = 8, sentences: int = 1, modes: bool = False
) -> Path:
    """Megatron-LM's core/datasets/indexed_dataset.py.

    Args:
        path: the .bin.
        documents: ids of each.
        code: of the type: 8 uint16, 4 int32, 5 int64.
        sentences: sequences that every document is written in.
        modes: a byte a sequence at the end, of images and text.
    """
    kind = {8: "H", 4: "i", 5: "q"}[code]
    sequences: list[Sequence[int]] = []
    begins = [0]
    for document in documents:
        size = -(-len(document) // sentences) or 1
        sequences += [document[i : i + size] for i in range(0, len(document), size)]
        begins.append(len(sequences))
    with path.open("wb") as file:
        for sequence in sequences:
            file.write(struct.pack(f"<{len(sequence)}{kind}", *sequence))
    lengths = [len(sequence) for sequence in sequences]
    pointers = [sum(lengths[:i]) * struct.calcsize(kind) for i in range(len(lengths))]
    with path.with_suffix(".idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack("<Q", 1))
        file.write(struct.pack("<B", code))
        file.write(struct.pack("<Q", len(sequences)))
        file.write(struct.pack("<Q", len(begins)))
        file.write(struct.pack(f"<{len(lengths)}i", *lengths))
        file.write(struct.pack(f"<{len(pointers)}q", *pointers))
        file.write(struct.pack(f"<{len(begins)}q", *begins))
        if modes:
            file.write(bytes(len(sequences)))
    return path
