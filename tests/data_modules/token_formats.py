"""Files of token ids, written as each program writes them: byte by byte, by its own layout."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

Documents = Sequence[Sequence[int]]


def nanogpt(path: Path, documents: Documents, code: str = "H") -> Path:
    """nanoGPT's data/openwebtext/prepare.py: uint16 ids, each document ended by its eot."""
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


def megatron(path: Path, documents: Documents, *, code: int = 8, sentences: int = 1) -> Path:
    """Megatron-LM's core/datasets/indexed_dataset.py, with every document written in so many
    sentences; code 8 is uint16, 4 int32, 5 int64."""
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
        file.write(struct.pack("<QBQQ", 1, code, len(sequences), len(begins)))
        file.write(struct.pack(f"<{len(lengths)}i", *lengths))
        file.write(struct.pack(f"<{len(pointers)}q", *pointers))
        file.write(struct.pack(f"<{len(begins)}q", *begins))
    return path


def litdata(folder: Path, documents: Documents, *, chunks: int = 1, code: int = 20) -> Path:
    """litdata's streaming/writer.py with a TokensLoader: a new folder with that many chunks; code
    20 is uint16, 18 int64. Returns index.json."""
    kind = {20: "H", 18: "q"}[code]
    folder.mkdir()
    size = -(-len(documents) // chunks)
    entries = []
    for number, first in enumerate(range(0, len(documents), size)):
        part = documents[first : first + size]
        width = struct.calcsize(kind)
        offsets = [4 * (len(part) + 2)]
        for document in part:
            offsets.append(offsets[-1] + width * len(document))
        data = struct.pack(f"<{len(part) + 2}I", len(part), *offsets)
        data += b"".join(struct.pack(f"<{len(d)}{kind}", *d) for d in part)
        name = f"chunk-0-{number}.bin"
        (folder / name).write_bytes(data)
        n_tokens = sum(map(len, part))
        entries.append({"chunk_bytes": len(data), "chunk_size": len(part), "dim": n_tokens})
        entries[-1]["filename"] = name
    config = {"chunk_bytes": None, "chunk_size": None, "compression": None, "encryption": None}
    config |= {"data_format": [f"no_header_tensor:{code}"], "item_loader": "TokensLoader"}
    index = folder / "index.json"
    index.write_text(json.dumps({"chunks": entries, "config": config}))
    return index
