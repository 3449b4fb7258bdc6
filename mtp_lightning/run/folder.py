"""A run's folder: one process uses it at a time, and a run that makes no step leaves none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from mtp_lightning.run.layout import CHECKPOINTS, CONFIG_FILE
from mtp_lightning.run.lock import Lock

_LOCK_FILE = ".run.lock"
# The entries that a run's folder may have before the first step.
_BEGUN = {
    *(_LOCK_FILE, ".hydra", "train.log", CONFIG_FILE, CHECKPOINTS),
    *("tokenizer.json", "tokenizer_state.json"),
}
# How the names of others begin: TensorBoard's files, and logs of processes that Lightning starts.
_ALSO_BEGUN = ("events.out.tfevents.", "train_ddp_process_")
# Of these, the entries that no start makes before it holds the lock: if one is there, the folder
# was used before.
_OTHERS = _BEGUN - {_LOCK_FILE, ".hydra", "train.log"}
# The data workers inherit the lock, and end some seconds after a run that is killed.
_SECONDS = 15.0


@contextmanager
def claimed(folder: Path, *, option: str = "run_dir", seconds: float = _SECONDS) -> Iterator[None]:
    """Hold a folder that one process writes at a time during a block; create it if needed.

    If the block ends with an error before a run has made a step, the folder is removed, unless it
    held files before.

    Args:
        option: the setting that names the folder, for the message.
        seconds: the longest time to wait for another process.

    Raises:
        BlockingIOError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    had_files = _has_files(folder)
    lock = Lock(folder / _LOCK_FILE)
    # Another start that failed may have removed the folder.
    make = partial(folder.mkdir, parents=True, exist_ok=True)
    if not lock.wait(seconds=seconds, before=make):
        raise BlockingIOError(
            f"Another process works in {folder}: wait for its end, or take another {option}."
        )
    for temporary in (folder / CHECKPOINTS).glob(".*.tmp"):  # left by a kill during a save
        temporary.unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        if not had_files:
            leave(folder)
        raise
    finally:
        lock.release()


def _has_files(folder: Path) -> bool:
    """Whether a folder holds files that are not of this start of a run."""
    job_log = folder / "train.log"  # Hydra has opened this start's, which is still empty
    return (
        any((folder / name).exists() for name in _OTHERS)
        or any(folder.glob("events.out.tfevents.*"))
        or (job_log.is_file() and job_log.stat().st_size > 0)
    )


def leave(folder: Path) -> None:
    """Remove the folder of a run that has made no step."""
    with suppress(OSError):
        names = {entry.name for entry in folder.iterdir()}
        others = {name for name in names if name.startswith(_ALSO_BEGUN)}
        empty = CHECKPOINTS not in names or not any((folder / CHECKPOINTS).iterdir())
        if empty and names - others <= _BEGUN:
            shutil.rmtree(folder)
