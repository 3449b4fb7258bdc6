"""A run's folder: one process has it at a time, and a run that never began leaves none."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mtp_lightning.run.layout import CHECKPOINTS, CONFIG_FILE
from mtp_lightning.run.lock import Lock

_LOCK_FILE = ".run.lock"
# What stands in the folder of a run that has made no step yet, beside TensorBoard's files.
_BEGUN = {
    *(_LOCK_FILE, ".hydra", "train.log", CONFIG_FILE, CHECKPOINTS),
    *("tokenizer.json", "tokenizer_state.json"),
}
# Processes that fetch batches have the lock, too, and outlive a run that is killed by seconds.
_SECONDS = 15.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Have a run's folder for a block, which is made if it is not there.

    If the block ends by an error before the run has made a step, the folder is taken away.

    Args:
        folder: of the run.

    Raises:
        BlockingIOError: another process trains in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / _LOCK_FILE)
    try:
        had = lock.wait(seconds=_SECONDS)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        had = True  # a file system that has none: nobody can be told
    if not had:
        raise BlockingIOError(
            f"Another process trains in {folder}: wait for its end, or take another run_dir."
        )
    for left in (folder / CHECKPOINTS).glob(".*.tmp"):  # by a kill in the midst of a save
        left.unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        leave(folder)
        raise
    finally:
        lock.release()


def leave(folder: Path) -> None:
    """Take the folder of a run away that has made no step."""
    with suppress(OSError):
        if _has_not_begun(folder):
            shutil.rmtree(folder)


def _has_not_begun(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    empty = CHECKPOINTS not in names or not any((folder / CHECKPOINTS).iterdir())
    return empty and names - events <= _BEGUN
