"""Text of installed packages, found through their metadata and never imported."""

from __future__ import annotations

import io
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from data_modules.sources.base import decode_utf8
from mtp_lightning.errors import UserError, missing_package


@dataclass(frozen=True)
class Package:
    """An installed distribution, with the name that was asked for; ``files`` has (path inside the
    package, path on disk), sorted by the former."""

    name: str
    version: str
    files: tuple[tuple[str, Path], ...]


def installed(
    name: str, keep: Callable[[PurePosixPath], bool], *, needed_by: str, extra: str | None = None
) -> Package:
    """The files of an installed package, from the record that its installer made.

    Args:
        name: the distribution, such as ``torch``.
        keep: whether a path of it is wanted.
        needed_by: what needs the package, such as ``data=packages``, for messages.
        extra: the extra of this project that installs the package, if there is one.

    Raises:
        UserError: if it is not installed, or its installer recorded no file that is wanted.
    """
    try:
        distribution = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):
        raise missing_package(name, what=needed_by, extra=extra) from None
    files = {
        file.as_posix(): Path(str(file.locate()))
        for file in distribution.files or ()
        if ".." not in file.parts and keep(file)
    }
    present = tuple((path, on_disk) for path, on_disk in sorted(files.items()) if on_disk.is_file())
    if not present:
        raise UserError(
            f"{needed_by}: the installed package {name!r} lists no usable file (an editable "
            "install lists none): install it again with pip install --force-reinstall "
            f"{name}, or leave it out"
        )
    return Package(name=name, version=distribution.version, files=present)


def python_text(data: bytes, where: str) -> str:
    """A Python file's text without a byte order mark, in the encoding that it declares (PEP 263).

    Raises:
        UserError: for a UTF-8 file that is not UTF-8.
        SyntaxError: for an unknown encoding.
        UnicodeDecodeError: for a file that is not in the encoding that it declares.
    """
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    if encoding in ("utf-8", "utf-8-sig"):
        return decode_utf8(data, where).removeprefix("\ufeff")
    return data.decode(encoding)
