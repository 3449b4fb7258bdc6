"""Checkpoint files: written atomically, of plain content (`weights_only`), checked before reading.

* A save replaces the file as a whole (``atomic.py``). A crash, a full disk or a kill at any moment
  leaves the old file or the new one, never half of one.
* `torch.load` does not compare the zip checksums that `torch.save` writes: a flipped byte in a
  weight loads silently (seen with torch 2.13). So every read here checks them first, which costs
  one sequential read of the file (256 MB: 0.05 s from the page cache, where loading takes 0.7 s).
* A file holds only tensors and plain containers, so that loading it runs no code.

Lightning saves through these functions by a plugin (`callbacks/checkpoints.py`). This module does
not import Lightning, so evaluation and generation read checkpoints without it.
"""

from __future__ import annotations

import errno
import logging
import os
import pickle
import shutil
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mtp_lightning import parts
from mtp_lightning.errors import UserError
from mtp_lightning.run.atomic import replacing
from mtp_lightning.run.layout import BEST, LAST, PREVIOUS, SHARDS

log = logging.getLogger(__name__)

_ATOMS = (str, bytes, int, float, complex, bool, type(None), torch.Size, torch.dtype, torch.device)
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_MAPPINGS = (dict, OrderedDict, Counter)
_SEQUENCES = (list, tuple, set)
_ANOTHER = f"use another one, for example {PREVIOUS} or {BEST} in the same folder."
# Files whose checksums are compared in parallel.
_READERS = 8
_FULL = (errno.ENOSPC, errno.EDQUOT)


def save(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint so that `path` holds either the old file or the whole new one.

    Raises:
        UserError: an entry is not a tensor or a plain container; the message names it.
        OSError: the disk is full or not writable. The old file at `path` stays as it was.
    """
    path = Path(path)
    require_plain(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _disk_errors(path), replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(checkpoint, file)


def load(path: str | Path, *, mapped: bool = False, optimizer: bool = True) -> dict[str, Any]:
    """Check a checkpoint for damage and read it onto the CPU, with the shards of a sharded one.

    Args:
        path: the file.
        mapped: whether to skip the check and to leave the tensors in the file until they are used.
            This is for a file that :func:`newest_intact` has just checked. Of a sharded checkpoint
            it reads the index only.
        optimizer: whether to read the optimizer's state; otherwise it is empty.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file is damaged, or holds more than tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    reason = None if mapped else _broken_archive(path)
    if reason is not None:
        raise UserError(f"The checkpoint {path} is damaged ({reason}): {_ANOTHER}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if mapped or not isinstance(content, dict):
            return content
        if not optimizer and "optimizer_states" in content:
            content["optimizer_states"] = []
        reason = _broken_shards(content, path)
        if reason is not None:
            raise UserError(
                f"The checkpoint {path} cannot be used ({reason}): use another one, or copy the "
                f"folder {SHARDS}/ along with the file."
            )
        return filled(content, path)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"The checkpoint {path} holds more than tensors and plain containers, and is not "
            f"loaded because that could run foreign code ({_first_line(error)})."
        ) from error
    except (RuntimeError, EOFError, KeyError, RecursionError) as error:
        raise UserError(
            f"The checkpoint {path} is damaged or no checkpoint ({_first_line(error)}): {_ANOTHER}"
        ) from error


def filled(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a checkpoint with the content of all of its tensors.

    Args:
        content: the result of ``load(path, mapped=True)``.
        path: the checkpoint's file.

    Raises:
        FileNotFoundError: a shard is missing.
        UserError: a shard is damaged, or the content of a tensor is missing.
    """
    if is_sharded(content):
        return _shard_files(path).filled(content, path)
    if without_content(content):
        raise damaged(path)
    return content


def is_sharded(content: Any) -> bool:
    """Whether this is the index of a sharded checkpoint."""
    return isinstance(content, dict) and SHARDS in content


def without_content(value: Any) -> bool:
    """Whether a nested value has a tensor with a shape but no content (torch's device ``meta``)."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(map(without_content, value))
    return isinstance(value, torch.Tensor) and value.is_meta


def damaged(file: Path) -> UserError:
    """The error for a file that lacks some of its tensors."""
    return UserError(
        f"The checkpoint {file} is damaged (it does not hold the tensors that it should): use "
        f"another one, for example {PREVIOUS} or {BEST} of the run."
    )


def _shard_files(path: Path) -> Any:
    """The module that reads shards, of the part ``distributed``."""
    return parts.need("distributed", f"the sharded checkpoint {path}").shard_files


def inspect(path: Path) -> tuple[str | None, int]:
    """Check a checkpoint, with its shards, by the checksums of all bytes. Return why it cannot be
    used, or None; and its optimizer step, or -1 if it is damaged or has none."""
    reason, content = _read_index(path)
    if reason is None:
        try:
            reason = _broken_shards(content, path)
        except (UserError, RecursionError) as error:
            reason = _first_line(error)
    return (None, _step(content)) if reason is None else (reason, -1)


def intact(path: Path) -> bool:
    """Whether the checkpoint can be loaded and every stored byte is as it was written."""
    return inspect(path)[0] is None


def stored_step(path: Path) -> int:
    """Read the optimizer step of a checkpoint; -1 if it is damaged or has none. Of a sharded
    checkpoint, this reads the index only."""
    return _step(_read_index(path)[1])


def newest_intact(folder: Path) -> Path | None:
    """Find the checkpoint to continue from: `last.ckpt`, or else the intact one with the highest
    step; of equal steps, the newest file; None if there is none.

    A warning names each damaged file that was tried, and the reason.
    """
    candidates = []
    for path in sorted(folder.glob("[!.]*.ckpt"), key=lambda path: (path.name != LAST, path)):
        reason, step = inspect(path)
        if reason is not None:
            _report(path, reason)
        elif path.name == LAST:
            return path
        else:
            candidates.append((step, path.stat().st_mtime_ns, path))
    return max(candidates)[2] if candidates else None


def keep(folder: Path, choice: str) -> None:
    """Remove those checkpoints of a finished run that are not wanted.

    Args:
        folder: the folder of the checkpoints.
        choice: ``all`` keeps everything. ``weights`` keeps `last.ckpt` and `best.ckpt` without the
            optimizer's state: a third of the bytes, but no run can continue from them. A damaged
            file is reported and left as it is. ``none`` keeps neither. The checkpoints of
            ``keep_steps`` stay as they are.
    """
    last, best = folder / LAST, folder / BEST
    removed = {"all": (), "weights": (PREVIOUS,), "none": (PREVIOUS, LAST, BEST)}
    for name in removed[choice]:
        (folder / name).unlink(missing_ok=True)
    if choice == "weights":
        is_one_file = last.is_file() and best.is_file() and last.samefile(best)
        for path in (last,) if is_one_file else (last, best):
            if path.is_file():
                _drop_optimizer(path)
        if is_one_file:
            link_or_copy(last, best)
    if (folder / SHARDS).is_dir():
        _shard_files(folder).sweep(folder)


def _drop_optimizer(path: Path) -> None:
    reason, _ = inspect(path)
    if reason is None:
        save(load(path, mapped=True) | {"optimizer_states": []}, path)
    else:
        _report(path, reason)


def require_plain(value: Any, where: str = "checkpoint") -> None:
    """Refuse to save an entry that `weights_only=True` could not load; the message names its place
    and type."""
    kind = type(value)
    if kind in _ATOMS or kind in _TENSORS:
        return
    if kind in _MAPPINGS:
        for key, entry in value.items():
            require_plain(key, f"{where}, key {key!r}")
            require_plain(entry, f"{where}[{key!r}]")
    elif kind in _SEQUENCES:
        for i, entry in enumerate(value):
            require_plain(entry, f"{where}[{i}]")
    else:
        raise UserError(
            f"A checkpoint may hold only tensors and plain containers, but {where} is a "
            f"{kind.__module__}.{kind.__qualname__}: turn it into a plain dict, list, number "
            "or string first."
        )


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, atomically, by a hard link; by a copy where the file
    system has no links."""
    with _disk_errors(target), replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError as error:
            if error.errno in _FULL:
                raise
            shutil.copyfile(source, temporary)


def _read_index(path: Path) -> tuple[str | None, Any]:
    """(why the file cannot be used or None, its content with tensors that are not read yet)."""
    if not path.is_file():
        return "there is no such file", None
    reason = _broken_archive(path)
    if reason is not None:
        return reason, None
    try:
        # mmap reads the structure and not the weights, so this is cheap for a file of any size.
        return None, torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken structure can make the reader raise anything
        return f"it cannot be loaded: {_first_line(error)}", None


def _step(content: Any) -> int:
    step = content.get("global_step", -1) if isinstance(content, dict) else -1
    return step if isinstance(step, int) else -1


def _broken_shards(content: Any, path: Path) -> str | None:
    """Why the shards of an index cannot be used; None if they can, or if there are none."""
    if not is_sharded(content):
        return None
    files = []
    for file in _shard_files(path).files_of(content, path):
        if not file.is_file():
            return f"its part {file} is not there"
        files.append(file)
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        for file, reason in zip(files, pool.map(_broken_archive, files), strict=True):
            if reason is not None:
                return f"its part {file}: {reason}"
    return None


def _broken_archive(path: Path) -> str | None:
    if path.stat().st_size == 0:
        return "the file is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                # Unpacked, they could be a thousand times as large as the file.
                return "its parts are compressed, as no checkpoint's are"
            broken = archive.testzip()
    except Exception as error:  # zipfile raises many kinds on a damaged directory
        # A disk that is away for a moment does not damage files; EINVAL is of a damaged one.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        return f"not a whole checkpoint file: {_first_line(error)}"
    return None if broken is None else f"the checksum of its part {broken!r} does not match"


def _report(path: Path, reason: str) -> None:
    log.warning("The checkpoint %s is damaged and skipped: %s.", path, reason)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Replace errors of the disk by readable ones. torch's writer hides them in a RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(cause)
        disk_errors = [link for link in chain if isinstance(link, OSError)]
        for full in disk_errors:
            if full.errno in _FULL:
                free = shutil.disk_usage(path.parent).free
                state = "the previous checkpoint there is intact"
                if not path.exists():
                    state = "no checkpoint was there before"
                text = f"No space left to write the checkpoint {path} ({free:,} bytes free)"
                raise OSError(full.errno, f"{text}; {state}: free some space.") from error
        if disk_errors and isinstance(error, RuntimeError):
            text = f"Cannot write the checkpoint {path}: {disk_errors[0].strerror}."
            raise OSError(disk_errors[0].errno, text) from error
        raise
