"""Any dataset that ``datasets.load_dataset`` opens, including local parquet and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from data_modules.sources.base import FileSource
from data_modules.sources.text import expand
from mtp_lightning.errors import UserError, require_package

BUILDERS = frozenset({"arrow", "csv", "json", "pandas", "parquet", "text", "xml"})
"""Values of ``path`` that the library takes for a builder, even where a folder has that name."""


class HuggingFaceSource(FileSource):
    """One text column of a Hugging Face dataset; each row is a document.

    Args:
        path: name on the hub, a local dataset folder, or a builder such as ``parquet`` or ``json``
            together with ``data_files``.
        name: the dataset's configuration, if it has several.
        split: split to read; train and validation are cut from it by document.
        field: the column with the text.
        data_files: files for a builder: a path or glob, a list, or a dict from split to these.
        revision: branch, tag or commit on the hub. For a streamed dataset only a commit pins the
            text, since the rows are not read for its fingerprint.
        streaming: read rows as they arrive instead of downloading first.
        cache_dir: where the library keeps its files; None for its own default.

    Raises:
        UserError: from ``documents`` and ``fingerprint``, without ``datasets``, or if the dataset
            cannot be opened or has no such text column.
        OSError: if it is not found or the network is missing.
    """

    name = "huggingface"

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        split: str = "train",
        field: str = "text",
        data_files: str | Sequence[str] | Mapping[str, Any] | None = None,
        revision: str | None = None,
        streaming: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        self.path = path
        self.split = split
        self.field = field
        self.data_files = data_files
        self.streaming = streaming
        self.config_name = name
        self.revision = revision
        self.cache_dir = cache_dir

    @cached_property
    def _dataset(self) -> Any:
        require_package("datasets", what="data=huggingface", extra="hf")
        import datasets

        try:
            dataset = datasets.load_dataset(
                self.path,
                name=self.config_name,
                split=self.split,
                data_files=self.data_files,
                revision=self.revision,
                streaming=self.streaming,
                cache_dir=self.cache_dir,
            )
        except Exception as error:  # the library raises its own types, builders' and the hub's
            problem = f"cannot open the dataset {self.path!r}, split {self.split!r}: "
            reason = " ".join(str(error).split()) or type(error).__name__
            kind = OSError if isinstance(error, OSError) else UserError
            raise kind(problem + reason) from error
        columns = dataset.column_names
        if columns is not None and self.field not in columns:
            raise UserError(
                f"the dataset {self.path!r} has no column {self.field!r} (it has "
                f"{sorted(columns)}): set data.source.field to the name of the text"
            )
        return dataset

    def documents(self) -> Iterator[str]:
        dataset = self._dataset
        if not self.streaming:
            # Decode only the column that is read.
            dataset = dataset.select_columns([self.field])
        for number, row in enumerate(dataset):
            text = row.get(self.field)
            if not isinstance(text, str):
                raise UserError(
                    f"row {number} of the dataset {self.path!r} has no string under "
                    f"{self.field!r} but {type(text).__name__}: set data.source.field"
                )
            yield text

    @property
    def rules(self) -> tuple[object, ...]:
        names = self.path, self.config_name, self.split, self.field, self.revision
        rules = ("huggingface", *names, self.data_files)
        if self.files:
            return rules
        # The library's digest of the downloaded data and of the builder's options.
        return (*rules, "streaming" if self.streaming else self._dataset._fingerprint)

    def total_bytes(self) -> None:
        """Unknown: files may be compressed or have other columns."""
        return None

    @cached_property
    def files(self) -> list[tuple[str, Path]]:
        """The local files that the text comes from; none for a dataset of the hub. ``data_files``
        are relative to the dataset's folder, here or on the hub, if the path is one, else to the
        current folder."""
        path = Path(self.path)
        is_here = self.path not in BUILDERS and path.exists()
        if self.data_files is None:
            return expand(self.path, "data.source.path", text_only=False) if is_here else []
        patterns = list(_flat(self.data_files))
        on_hub = "/" in self.path and not is_here
        if on_hub or any("://" in item for item in patterns):
            return []
        paths = [str(path / item) if is_here and path.is_dir() else item for item in patterns]
        key = "data.source.data_files"
        return [file for item in paths for file in expand(item, key, text_only=False)]


def _flat(data_files: object) -> Iterator[str]:
    """The paths of ``data_files``, those of inner lists last."""
    todo: list[Any] = [data_files]
    while todo:
        item = todo.pop(0)
        if isinstance(item, str):
            yield item
        else:
            todo += item.values() if isinstance(item, Mapping) else item
