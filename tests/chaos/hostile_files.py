"""Hostile files: pickles, bombs, paths that lead outside, enormous sizes."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.chaos.cases import hold
from tests.chaos.given import LLAMA, Make, Place, changed, safetensors, written
from tests.chaos.processes import run


def _pickle_in_archive(place: Place) -> Path:
    """The run's checkpoint with another pickle."""
    source = place.finished.checkpoint
    file = place.given / "hostile.ckpt"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = pickle.dumps(place.payload(), protocol=2)
            new.writestr(name, content)
    return file


def _bomb_in_archive(place: Place) -> Path:
    """Four billion zeros in a few megabytes."""
    file = place.given / "hostile.ckpt"
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("archive/data.pkl", "w", force_zip64=True) as member,
    ):
        zeros = bytes(1 << 24)
        for _ in range(250):
            member.write(zeros)
    return file


def _names_outside(place: Place) -> Path:
    file = place.given / "hostile.ckpt"
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("../../canary", str(place.canary), "archive/../../../canary"):
            archive.writestr(name, b"written outside")
    return file


def _model(**trunk: Any) -> Make:
    return changed(lambda c: c["model_config"]["trunk"].update(trunk))


def _stored(path: str, target: str, *given: str) -> Make:
    """A run whose stored config calls a function; CANARY is its path."""

    def make(place: Place) -> Path:
        def change(content: dict[str, Any]) -> None:
            at = content
            *parents, last = path.split(".")
            for key in parents:
                at = at[key]
            called = [text.replace("CANARY", str(place.canary)) for text in given]
            at[last] = {"_target_": target, "_args_": called}

        return place.run(change)

    return make


def _deep(n: int) -> Any:
    value: Any = 0
    for _ in range(n):
        value = [value]
    return value


def _in_parts(**index: Any) -> Make:
    """An index of a checkpoint in parts, and one part that is a pickle."""

    def change(content: dict[str, Any]) -> None:
        state = content["state_dict"]
        content["state_dict"] = {name: tensor.to("meta") for name, tensor in state.items()}
        content["parts"] = {"folder": "00000001-abc", "parts": 1, **index}

    def make(place: Place) -> Path:
        part = place.given / "parts" / "00000001-abc" / "weights-0-of-1.pt"
        part.parent.mkdir(parents=True)
        torch.save({"state_dict": place.payload()}, part)
        return place.checkpoint(change)

    return make


CHECKPOINTS: dict[str, Make] = {
    "a pickle for a part": _in_parts(),
    "parts in a folder outside": _in_parts(folder="../../.."),
    "10^12 parts": _in_parts(parts=10**12),
    "10^12 weights of no content": changed(
        lambda c: c["state_dict"].update(more=torch.empty(10**6, 10**6, device="meta"))
    ),
    "a pickle": lambda place: place.write("hostile.ckpt", pickle.dumps(place.payload())),
    "a pickle in a checkpoint": _pickle_in_archive,
    "an object in the optimizer's state": lambda place: place.checkpoint(
        lambda c: c.update(optimizer_states=[place.payload()])
    ),
    "a bomb of zeros": _bomb_in_archive,
    "names that lead outside": _names_outside,
    "a vocabulary of 10^12": _model(vocab_size=10**12),
    "10^9 layers": _model(n_layers=10**9),
    "a width of 10^9": _model(d_model=10**9),
    "lists in lists": changed(lambda c: c["model_config"].update(mtp=_deep(150))),
    "10^9 depths": changed(lambda c: c["model_config"]["mtp"].update(depth=10**9)),
}
_CALL = ("os.system", "touch CANARY")
RUNS: dict[str, Make] = {
    "a source that is a command": _stored("config.data.source", *_CALL),
    "a tokenizer that is a command": _stored("config.tokenizer", *_CALL),
    "an optimizer that is a command": _stored("config.optimizer", *_CALL),
    "a schedule that is a command": _stored("config.lambda_schedule", *_CALL),
    "a callback that is a command": _stored("config.callbacks.nan_guard", *_CALL),
    "code for a source": _stored("config.data.source", "builtins.eval", "open('CANARY', 'w')"),
    "a tokenizer of pickles": lambda place: place.run(
        lambda c: c.update(tokenizer={"name": "byte", "state": place.payload()})
    ),
}


def _index(target: str) -> Make:
    """A folder whose index says that its tensors are in another file."""

    def make(place: Place) -> Path:
        path = target.replace("{secret}", str(place.secret))
        names = ("embed_tokens", "norm", "layers.0.input_layernorm")
        index = {"metadata": {}, "weight_map": {f"model.{name}.weight": path for name in names}}
        return place.model(LLAMA, model__safetensors__index__json=json.dumps(index).encode())

    return make


def _folder(config: dict[str, Any] | None = None, **files: bytes) -> Make:
    return lambda place: place.model({**LLAMA, **(config or {})}, **files)


_DEEP = b"[" * 100_000 + b"]" * 100_000


def _header(header: dict[str, Any] | bytes, length: int | None = None) -> Make:
    """A folder whose file of tensors has this header."""
    return _folder(model__safetensors=safetensors(header, bytes(4), length))


def _tensor(shape: list[int], offsets: list[int]) -> Make:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    return _header({"model.embed_tokens.weight": entry})


def _sized(**config: Any) -> Make:
    return _folder(config, model__safetensors=safetensors({}), evil__py=b"open('canary', 'w')")


FOLDERS: dict[str, Make] = {
    "an index that leads outside": _index("../../secret.txt"),
    "an index of an absolute path": _index("{secret}"),
    "a header of 2^63 bytes": _header({}, 2**63),
    "a header longer than its file": _header({}, 10**8),
    "a header of deep lists": _header(b'{"a":' + _DEEP + b"}"),
    "a tensor of 10^12 rows": _tensor([10**12, 8], [0, 4]),
    "offsets after the end": _tensor([257, 8], [0, 10**9]),
    "negative offsets": _tensor([1, 1], [-8, -4]),
    "10^9 layers in its config": _sized(num_hidden_layers=10**9),
    "a width of 10^12 in its config": _sized(hidden_size=10**12),
    "code of its own": _sized(model_type="mine", auto_map={"AutoConfig": "evil.Config"}),
    "weights in a pickle": lambda p: p.model(LLAMA, pytorch_model__bin=pickle.dumps(p.payload())),
    "a tokenizer whose pattern never ends": lambda place: _slow_tokenizer(place),
    "a tokenizer of deep lists": lambda p: _with_tokenizer(p, b'{"version":' + _DEEP + b"}"),
}


def _with_tokenizer(place: Place, content: bytes) -> Path:
    """The export of the run with another tokenizer."""
    folder = place.given / "model"
    ended = run(
        ["export.py", f"checkpoint={place.finished.run}", f"output={folder}", "verify=false"],
        place.given / "export.log",
    )
    hold(ended.code == 0, f"without a fault the export fails: {ended.out[-800:]}")
    (folder / "tokenizer.json").write_bytes(content)
    return folder


def _slow_tokenizer(place: Place) -> Path:
    """One that splits texts by a pattern that backtracks forever."""
    folder = _with_tokenizer(place, b"")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Split(pattern=Regex("(a+)+$"), behavior="isolated")
    (folder / "tokenizer.json").write_text(made.to_str())
    return folder


def _compressed(place: Place) -> Path:
    """Four billion zeros in a compressed text of a few megabytes."""
    file = place.given / "bomb.txt.gz"
    with gzip.open(file, "wb", compresslevel=1) as out:
        for _ in range(250):
            out.write(bytes(1 << 24))
    return file


def _pipe(place: Place) -> Path:
    """A pipe without a writer, which a reader would wait for forever."""
    file = place.given / "pipe.txt"
    os.mkfifo(file)
    return file


TEXTS: dict[str, Make] = {
    "a bomb of zeros": _compressed,
    "deep JSON": written("a.jsonl", b'{"text": ' + _DEEP + b"}\n"),
    "a number of a million digits": written("a.jsonl", b'{"text": ' + b"9" * 1_000_000 + b"}\n"),
    "escape codes": written("a.txt", b"\x1b]0;owned\x07 and more words of it\n" * 300),
    "no gzip": written("a.txt.gz", b"\x1f\x8b" + bytes(40)),
    "no parquet": written("a.parquet", b"PAR1" + bytes(40) + b"PAR1"),
    "a pipe": _pipe,
}  # fmt: skip


def _array(header: bytes, data: bytes = b"") -> bytes:
    pad = b" " * (-(10 + len(header) + 1) % 64)
    head = header + pad + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


def _objects(place: Place) -> Path:
    array = np.empty(1, dtype=object)
    array[0] = place.payload()
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return place.write("a.npy", buffer.getvalue())


_HEADER = b"{'descr': '<i8', 'fortran_order': False, 'shape': (4000,)}"
_INDEX = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2**60, 2**60)
TOKENS: dict[str, Make] = {
    "objects": _objects,
    "10^15 numbers": written(
        "a.npy", _array(b"{'descr': '<u2', 'fortran_order': False, 'shape': (1000000000000000,)}")
    ),
    "a header that is code": written("a.npy", _array(b"__import__('os').system('touch canary')")),
    "negative numbers": written("a.npy", _array(_HEADER, b"\xff" * 32000)),
    "an odd number of bytes": written("a.bin", bytes(4001)),
    "a magic number and no more": written("a.bin", struct.pack("<iii", 20240520, 1, 2**30)),
    "an index of Megatron's that lies": written("a.idx", _INDEX),
}  # fmt: skip
