"""Ends all processes of a run, with a message, when one of them ends early.

Once the processes are connected, the connections to a process that ends break. Before that, each
process writes signs of life for the others. A process that has started others watches them, and
they are killed when it ends.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from lightning.pytorch.strategies.launchers import subprocess_script

from mtp_lightning.errors import UserError
from mtp_lightning.run.folder import leave

log = logging.getLogger(__name__)

# gloo's messages when the other end of a connection is gone.
_GONE = ("Connection closed by peer", "Connection reset by peer")
_BEAT = 2.0
# Seconds without a sign of life after which a process counts as gone. After the same time, a
# message names a process that has not started yet.
SILENCE = 20.0
# Seconds to wait for a process that has not started yet.
PATIENCE = 600.0
# Seconds for connected processes to notice a lost one themselves. They get more after SIGTERM,
# since all of them then save.
_GRACE, _SAVING = 15.0, 60.0
_ASKED = 128 + signal.SIGTERM


@contextmanager
def errors_of_lost_peers(folder: Path | None = None) -> Iterator[None]:
    """Turn the error of a connection to a process that has ended into a :class:`UserError`."""
    try:
        yield
    except RuntimeError as error:
        gone = isinstance(error, dist.DistNetworkError | dist.DistStoreError)
        if not gone and not any(words in str(error) for words in _GONE):
            raise
        raise gone_peer(str(error).strip().partition("\n")[0], folder) from error


def gone_peer(evidence: str, folder: Path | None = None) -> UserError:
    """The error for a process that has ended early, with the evidence for it."""
    remedy = "Start all of them again."
    if folder is not None:
        again = shlex.quote(f"run_dir={folder}")
        remedy = f"With {again} the same command continues from the last checkpoint."
    return UserError(
        f"another process of this run has ended ({evidence}), so this one ends too: the last lines "
        f"of its output say why. {remedy}"
    )


def _end(evidence: str, folder: Path) -> None:
    """End this process from a thread. Its main thread would wait in a library forever."""
    print(f"error: {gone_peer(evidence, folder)}", file=sys.stderr, flush=True)
    leave(folder)
    os._exit(1)


class Pulse(threading.Thread):
    """A thread that writes this process's signs of life to the store that all processes share, and
    watches the others', until the processes are connected. ``size`` returns the number of
    processes, 0 until it is known."""

    def __init__(self, store: dist.Store, rank: int, size: Callable[[], int]) -> None:
        super().__init__(daemon=True, name="pulse")
        self._store, self._rank, self._size = store, rank, size
        self._began = time.monotonic()
        # The newest sign of each process, and the time when it was first seen.
        self._signs: dict[int, tuple[str, float]] = {}
        self.met = threading.Event()
        # The run's folder, once the main thread waits for the others inside a library.
        self.waits_in: Path | None = None

    def run(self) -> None:
        beats, reported = 0, False
        try:
            while not (self.met.is_set() or dist.is_initialized()):
                beats += 1
                self._store.set(f"pulse {self._rank}", str(beats))
                self._look()
                missing = [r for r in range(self._size()) if r not in self._signs]
                if missing and not reported and time.monotonic() - self._began > SILENCE:
                    reported = True
                    log.warning(
                        "waiting for process %s of %d, which has not come in %.0f s; this one ends "
                        "after %.0f minutes",
                        *(", ".join(map(str, missing)), self._size(), SILENCE, PATIENCE / 60),
                    )
                lost = self.lost()
                if lost is not None and self.waits_in is not None and not dist.is_initialized():
                    _end(lost, self.waits_in)
                self.met.wait(_BEAT)
            # The processes may train another run afterwards, without further signs.
            self.met.set()
            self._store.set(f"pulse {self._rank}", "met")
        except RuntimeError:  # the store ended with the first process, which the main thread sees
            return

    def _look(self) -> None:
        for rank in range(self._size()):
            key = f"pulse {rank}"
            if rank != self._rank and self._store.check([key]):
                sign = self._store.get(key).decode()
                if self._signs.get(rank, ("", 0.0))[0] != sign:
                    self._signs[rank] = (sign, time.monotonic())
        self._signs[self._rank] = ("", time.monotonic())

    def lost(self) -> str | None:
        """Say which process has ended and how that is known; None if none has, or all are
        connected."""
        if self.met.is_set():
            return None
        now = time.monotonic()
        for rank in range(self._size()):
            sign, seen = self._signs.get(rank, ("", None))
            if seen is None and now - self._began > PATIENCE:
                return f"process {rank} has not come in {PATIENCE / 60:.0f} minutes"
            if seen is not None and sign != "met" and rank != self._rank and now - seen > SILENCE:
                return f"process {rank} has shown no sign of life for {SILENCE:.0f} s"
        return None


@contextmanager
def looking_after_children(folder: Path) -> Iterator[None]:
    """Watch the processes that Lightning starts during a block. This replaces Lightning's own
    observer, which kills all of them without a message."""

    def observe(children: Sequence[subprocess.Popen[bytes]]) -> None:
        threading.Thread(target=_end_with_any, args=(list(children), folder), daemon=True).start()

    lightnings_own = subprocess_script._launch_process_observer
    subprocess_script._launch_process_observer = observe  # type: ignore[assignment]
    try:
        yield
    finally:
        subprocess_script._launch_process_observer = lightnings_own


def _end_with_any(children: list[subprocess.Popen[bytes]], folder: Path) -> None:
    while True:
        codes = [child.poll() for child in children]
        met = dist.is_initialized()
        for rank, code in enumerate(codes, start=1):
            if code or (code == 0 and not met):
                if met:
                    time.sleep(_SAVING if code == _ASKED else _GRACE)
                for child in children:
                    child.kill()
                ending = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
                _end(f"process {rank} {ending}", folder)
        if None not in codes:
            return
        time.sleep(0.5)
