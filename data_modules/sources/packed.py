"""Text in packed files: compressed with gzip or zstd, or a column of parquet."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mtp_lightning.errors import UserError, require_package

COMPRESSED = (".gz", ".zst")
"""Suffixes of files that are decompressed as they are read."""


@contextmanager
def open_plain(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed if its suffix says so.

    Raises:
        UserError: for damaged or truncated data, also from reads inside the block, and for ``.zst``
            without pyarrow.
    """
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        if suffix not in COMPRESSED:
            yield file
            return
        magic, name = (b"\x1f\x8b", "gzip") if suffix == ".gz" else (b"\x28\xb5\x2f\xfd", "zstd")
        damaged = UserError(f"{path} is not a {name} file, or is damaged: compress it again")
        if not file.peek(4).startswith(magic):
            raise damaged
        try:
            # A buffer of its own: GzipFile would read the file in many small blocks.
            unpacked: Any = gzip.GzipFile(fileobj=file)
            if suffix == ".zst":
                pyarrow = _pyarrow(path)
                unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
            with io.BufferedReader(unpacked, 1 << 20) as plain:
                yield plain
        except (EOFError, zlib.error, OSError) as error:
            if getattr(error, "errno", None) is None:  # else the disk is damaged
                raise damaged from error
            raise


def _pyarrow(path: Path) -> Any:
    require_package("pyarrow", what=str(path), extra="hf")
    import pyarrow
    import pyarrow.parquet

    return pyarrow


def parquet_column(path: Path, field: str) -> Iterator[str]:
    """The rows of a column, read one batch at a time.

    Raises:
        UserError: if it is not a parquet file, is damaged, or has no such column of strings; or
            without pyarrow.
    """
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise UserError(
                    f"{path} has no column {field!r} (it has {sorted(columns)}): set data.field to "
                    "the name of the text"
                )
            batches = file.iter_batches(columns=[field], batch_size=1024)
            texts = (text for batch in batches for text in batch.column(0).to_pylist())
            for row, text in enumerate(texts, start=1):
                if not isinstance(text, str):
                    raise UserError(
                        f"{path}, row {row}, has no string under {field!r} but "
                        f"{type(text).__name__}: set data.field to the name of the text"
                    )
                yield text
    except (pyarrow.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk is damaged
            raise
        raise UserError(f"{path} is not a parquet file, or is damaged: write it again") from None
