"""Stores whose files have changed since they were built are refused by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from data_modules import digests
from data_modules.token_store import TokenStore
from data_modules.tokenizers import ByteTokenizer
from tests.data_modules.stores import store_of

DOCUMENTS = [f"document {i} of a corpus\n" * (i % 5 + 1) for i in range(200)]
FILES = [
    "train.bin", "train.starts.npy", "val.bin", "val.starts.npy", "val.pieces.npy", "meta.json",
    "tokenizer_state.json",
]  # fmt: skip


def flip(file: Path, at: int = -3) -> None:
    """Flips one bit of a file."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def open_store(folder: Path) -> TokenStore:
    """Builds the store, or opens it from the cache."""
    return store_of(DOCUMENTS, folder)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_or_missing_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = open_store(tmp_path).folder
    assert {path.name for path in folder.iterdir()} == {*FILES, "digests.json"}
    open_store(tmp_path)
    flip(folder / name)
    message = rf"{folder} is damaged \({name} has other contents .* delete that folder"
    with pytest.raises(ValueError, match=message):
        open_store(tmp_path)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"damaged \({name} is missing\)"):
        open_store(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"3", b'{"train.bin": 3}'])
def test_damaged_or_missing_digests_are_refused(tmp_path: Path, content: bytes) -> None:
    folder = open_store(tmp_path).folder
    (folder / "digests.json").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged .* delete that folder"):
        open_store(tmp_path)
    (folder / "digests.json").unlink()
    with pytest.raises(ValueError, match=r"is damaged \(digests.json is missing\): delete that"):
        open_store(tmp_path)


def test_digests_of_a_new_store_are_right_without_reading_its_files(tmp_path, files_read):
    folder = open_store(tmp_path).folder
    assert not [name for name in files_read if name.endswith(".bin")]
    stored = json.loads((folder / "digests.json").read_text())
    for name in FILES:
        content = (folder / name).read_bytes()
        assert stored[name] == hashlib.blake2b(content, digest_size=16).hexdigest()


def test_a_large_file_is_read_once(tmp_path, files_read, files_look_old, monkeypatch):
    monkeypatch.setattr(digests, "LARGE", 1000)
    open_store(tmp_path)
    files_read.clear()
    open_store(tmp_path)
    assert "train.bin" in files_read
    files_read.clear()
    open_store(tmp_path)
    assert "train.bin" not in files_read


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00v\x00{'des", b"x"])
def test_arrays_that_cannot_be_read_are_refused(tmp_path: Path, content: bytes) -> None:
    folder = open_store(tmp_path).folder
    for name in ("train.starts.npy", "val.pieces.npy"):
        (folder / name).write_bytes(content)
    store = TokenStore(folder)
    for read in (store["train"].starts, store["val"].pieces):
        with pytest.raises(ValueError, match=r"is damaged \((train.starts|val.pieces).npy: "):
            read()
    with (folder / "train.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="damaged .train.bin has .* delete that folder"):
        TokenStore(folder)
    for meta in (b"{", b"\xff\xfe\x00", b"[]", b'{"splits": 3}', b'{"splits": {"train": {}}}'):
        (folder / "meta.json").write_bytes(meta)
        with pytest.raises(ValueError, match="is damaged .* delete that folder"):
            TokenStore(folder)


@pytest.mark.parametrize("wrong", [300, -1, 70_000])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, wrong: int) -> None:
    class Beyond(ByteTokenizer):
        def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
            return [np.append(ids.astype(np.int64), wrong) for ids in super().encode_batch(texts)]

    with pytest.raises(ValueError, match=f"returns ids from .* to .*reports {257} ids"):
        store_of(DOCUMENTS, tmp_path, tokenizer=Beyond())
    assert list((tmp_path / "stores").iterdir()) == []
