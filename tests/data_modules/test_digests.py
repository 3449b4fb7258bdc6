"""Remembered digests: large files are read once, and again when they may have changed."""

from __future__ import annotations

import hashlib
import os

import pytest

from data_modules import TokenDataModule
from data_modules.cache import cache_key
from data_modules.digests import LARGE, content_digest
from data_modules.sources.base import digest_files
from data_modules.tokenizers import ByteTokenizer


def test_a_large_file_is_read_once(tmp_path, files_read, files_look_old):
    large, small, memory = tmp_path / "large", tmp_path / "small", tmp_path / "memory"
    large.write_bytes(b"x" * LARGE)
    small.write_bytes(b"x" * (LARGE - 1))
    files = [("a", large), ("b", small)]
    expected = digest_files(files)
    files_read.clear()
    assert digest_files(files, digest_cache=memory) == expected and files_read == ["large", "small"]
    files_read.clear()
    assert digest_files(files, digest_cache=memory) == expected and files_read == ["small"]
    assert len(list(memory.iterdir())) == 1


def test_a_changed_or_replaced_file_has_another_digest(tmp_path, files_look_old):
    file, memory = tmp_path / "file", tmp_path / "memory"
    file.write_bytes(b"x" * LARGE)
    first = content_digest(file, memory)
    stamp = file.stat()
    file.write_bytes(b"y" * LARGE)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size and time, as cp -p leaves
    second = content_digest(file, memory)
    assert second != first and second == content_digest(file) and first[0] == second[0] == LARGE
    other = tmp_path / "other"
    other.write_bytes(b"z" * LARGE)
    other.replace(file)
    assert content_digest(file, memory) == content_digest(file) != second


def test_the_digest_of_a_file_of_this_moment_is_not_remembered(tmp_path):
    """Its next change might fall into the same tick of the file system's clock."""
    (tmp_path / "file").write_bytes(b"x" * LARGE)
    content_digest(tmp_path / "file", tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def test_the_digest_of_a_file_that_changes_meanwhile_is_not_remembered(
    tmp_path, monkeypatch, files_look_old
):
    file, memory, read = tmp_path / "file", tmp_path / "memory", hashlib.file_digest
    file.write_bytes(b"x" * LARGE)

    def read_slowly(*args):
        file.write_bytes(b"y" * LARGE)
        return read(*args)

    monkeypatch.setattr(hashlib, "file_digest", read_slowly)
    content_digest(file, memory)
    assert not memory.exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"stamp": 1}', '{"stamp": [1], "digest": 3}'])
def test_a_damaged_record_is_ignored(tmp_path, files_look_old, damage):
    file, memory = tmp_path / "file", tmp_path / "memory"
    file.write_bytes(b"x" * LARGE)
    expected = content_digest(file, memory)
    (record,) = memory.iterdir()
    record.write_text(damage)
    assert content_digest(file, memory) == expected
    record.unlink()
    record.mkdir()
    assert content_digest(file, memory) == expected and list(memory.iterdir()) == [record]
    (tmp_path / "blocked").write_text("")  # not a folder
    assert content_digest(file, tmp_path / "blocked") == expected


def test_a_data_module_remembers_digests_in_its_cache(tmp_path, files_read, files_look_old):
    (tmp_path / "a.txt").write_text("some line of text\n" * 80_000)

    def module() -> TokenDataModule:
        path = str(tmp_path / "a.txt")
        return TokenDataModule.from_text(path, ByteTokenizer(), cache_dir=tmp_path / "cache")

    first = module().fingerprint
    assert files_read.count("a.txt") == 1 and module().fingerprint == first
    assert files_read.count("a.txt") == 1


def test_files_of_names_that_are_not_utf8_have_cache_keys(tmp_path):
    folder = tmp_path / "na\udcffme"
    folder.mkdir()
    (folder / "o\udcff").touch()
    keys = {cache_key(path, "") for path in (tmp_path, folder, folder / "o\udcff")}
    assert len(keys) == 3
