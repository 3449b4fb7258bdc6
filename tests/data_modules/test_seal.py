"""Stores whose files have changed since they were built: refused by name, never trained on."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from data_modules import digests
from data_modules.cache import build_once
from data_modules.token_store import TokenStore
from data_modules.tokenizers import ByteTokenizer
from tests.data_modules.stores import store_of

DOCUMENTS = [f"document {i} of a corpus\n" * (i % 5 + 1) for i in range(200)]
FILES = [
    "train.bin", "train.starts.npy", "val.bin", "val.starts.npy", "val.pieces.npy", "meta.json",
]  # fmt: skip
FILES.append("tokenizer_state.json")


def flip(file: Path, at: int = -3) -> None:
    """Flips one bit of a file."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def reopened(folder: Path) -> TokenStore:
    """The store as another process finds it in the cache."""
    return store_of(DOCUMENTS, folder)


@pytest.mark.parametrize("name", FILES)
def test_a_bit_of_any_file_that_changed_is_told(tmp_path: Path, name: str) -> None:
    folder = reopened(tmp_path).folder
    assert {path.name for path in folder.iterdir()} == {*FILES, "digests.json"}
    reopened(tmp_path)
    flip(folder / name)
    told = rf"{folder} is damaged \({name} has other contents .* delete that folder"
    with pytest.raises(ValueError, match=told):
        reopened(tmp_path)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"damaged \({name} is missing\)"):
        reopened(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"3", b'{"train.bin": 3}'])
def test_damaged_digests_are_told(tmp_path: Path, content: bytes) -> None:
    folder = reopened(tmp_path).folder
    (folder / "digests.json").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged .* delete that folder"):
        reopened(tmp_path)


def test_digests_are_those_of_the_files_which_are_not_read_for_it(tmp_path, reads):
    folder = reopened(tmp_path).folder
    assert not [name for name in reads if name.endswith(".bin")]
    known = json.loads((folder / "digests.json").read_text())
    for name in FILES:
        content = (folder / name).read_bytes()
        assert known[name] == hashlib.blake2b(content, digest_size=16).hexdigest()


def test_what_is_large_is_read_once(tmp_path, reads, later, monkeypatch):
    monkeypatch.setattr(digests, "LARGE", 1000)
    folder = reopened(tmp_path).folder
    reads.clear()
    reopened(tmp_path)
    assert "train.bin" in reads
    reads.clear()
    reopened(tmp_path)
    assert "train.bin" not in reads
    # A copy with its times, as of another disk: the same size, another inode.
    copied = (folder / "train.bin").read_bytes()
    (folder / "copy").write_bytes(copied)
    (folder / "copy").replace(folder / "train.bin")
    reopened(tmp_path)
    assert "train.bin" in reads


def test_a_store_from_before_is_taken_as_it_is_in_one_line(tmp_path, caplog):
    folder = reopened(tmp_path).folder
    (folder / "digests.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert reopened(tmp_path)["train"].n_documents > 0
        reopened(tmp_path)
    assert caplog.text.count("has no digests yet") == 1
    flip(folder / "train.bin")
    with pytest.raises(ValueError, match="train.bin has other contents"):
        reopened(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00v\x00{'des", b"x"])
def test_damage_from_before_there_were_digests_is_told(tmp_path: Path, content: bytes) -> None:
    folder = reopened(tmp_path).folder
    (folder / "digests.json").unlink()
    for name in ("train.starts.npy", "val.pieces.npy"):
        (folder / name).write_bytes(content)
    store = reopened(tmp_path)
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
def test_ids_that_a_tokenizer_does_not_have_are_told(tmp_path: Path, wrong: int) -> None:
    class Beyond(ByteTokenizer):
        def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
            return [np.append(ids.astype(np.int64), wrong) for ids in super().encode_batch(texts)]

    with pytest.raises(ValueError, match=f"returns ids from .* to .*reports {257} ids"):
        store_of(DOCUMENTS, tmp_path, tokenizer=Beyond())
    assert list((tmp_path / "stores").iterdir()) == []


def test_whatever_is_built_once_is_looked_at(tmp_path: Path) -> None:
    """Trained tokenizers, views of token files and states of a trunk, too."""
    target = tmp_path / "kind" / "key"
    build_once(target, lambda folder: (folder / "a").write_bytes(b"1" * 100))
    (target / "a").write_bytes(b"2" * 100)
    with pytest.raises(ValueError, match="a has other contents"):
        build_once(target, lambda folder: None)
