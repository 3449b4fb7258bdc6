"""Compressed text and parquet files have the documents of the plain files, or are refused."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from data_modules.sources import TextSource
from tests.data_modules.stores import assert_refused

TEXTS = ["one", "zwei \u00fc\nlines", "drei \u4e16" * 50_000]
ROWS = "".join(json.dumps({"body": text, "n": i}) + "\n" for i, text in enumerate(TEXTS)).encode()


def zstd(data: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="extra 'hf' is not installed")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("suffix", [".gz", pytest.param(".zst", marks=pytest.mark.extras)])
def test_compressed_text_is_the_plain_text(tmp_path, suffix):
    pack = gzip.compress if suffix == ".gz" else zstd
    file = tmp_path / f"rows.jsonl{suffix}"
    # Two members one after the other are one file, as cat makes it.
    cut = ROWS.index(b"\n") + 3
    file.write_bytes(pack(ROWS[:cut]) + pack(ROWS[cut:]))
    source = TextSource(file, field="body")
    assert list(source.documents()) == TEXTS == list(source.documents())
    assert source.total_bytes() is None
    plain = tmp_path / f"b.txt{suffix}"
    plain.write_bytes(pack(TEXTS[1].encode()))
    assert list(TextSource(plain).documents()) == [TEXTS[1]]
    assert_refused(r"line 1, has no string under 'text'.*data.field", file)
    for damage in (file.read_bytes()[:-20], b"plain", pack(ROWS)[:12] + b"\xff" * 40):
        file.write_bytes(damage)
        assert_refused(rf"rows\.jsonl\{suffix} .*damaged.*compress it again", file, field="body")
    file.write_bytes(pack(b'{"body": "caf\xe9"}\n'))
    assert_refused("not UTF-8: byte 0xe9 at byte offset 13", file, field="body")


@pytest.mark.extras
def test_parquet_rows_are_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="extra 'hf' is not installed")
    from pyarrow import parquet

    file = tmp_path / "rows.parquet"
    parquet.write_table(
        pyarrow.table({"body": TEXTS, "n": [1, 2, 3]}), file, row_group_size=2, compression="zstd"
    )
    (tmp_path / "zz.txt").write_text("text")
    assert list(TextSource(tmp_path, field="body").documents()) == [*TEXTS, "text"]
    assert_refused(r"has no column 'text' \(it has \['body', 'n'\]\)", file)
    assert_refused("row 1, has no string under 'n' but int", file, field="n")
    whole = file.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:-9], whole[:8] + b"\xff" * 40 + whole[48:], whole[:middle] + whole[-8:]):
        file.write_bytes(damaged)
        assert_refused("rows.parquet is not a parquet file, or is damaged", file, field="body")


def test_compressed_parquet_is_not_read_as_text(tmp_path):
    file = tmp_path / "x.parquet.gz"
    file.write_bytes(gzip.compress(b"PAR1\x15\0"))
    assert_refused(r"x\.parquet\.gz is parquet .*: unpack it", file)


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl.zst"])
def test_a_missing_pyarrow_names_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd")
    assert_refused(r"needs the package pyarrow: .*\.\[hf\]", tmp_path / name)
