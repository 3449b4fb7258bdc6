"""Ends the work in a sweep's folder in good order at Ctrl-C and similar signals."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtp_lightning.run.lock import Lock


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or SIGTERM or SIGHUP, which end a sweep in the same way.

    Args:
        signum: the signal; an app's exit code is 128 more.
    """

    def __init__(self, signum: int) -> None:
        super().__init__("Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name)
        self.signum = signum


@contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """Yields a function that raises if Ctrl-C or a similar signal has come.

    An exception in the middle of a job's start would leave an unknown process, so the first signal
    waits for that function. The second one raises at once.
    """
    received: list[int] = []

    def receive(signum: int, frame: Any) -> None:
        received.append(signum)
        if len(received) > 1:
            raise Interrupted(signum)

    def check() -> None:
        if received:
            raise Interrupted(received[0])

    old = {}
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:  # ignored under nohup
            old[signum] = signal.signal(signum, receive)
    try:
        yield check
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


@contextmanager
def exit_if_interrupted(remedy: str) -> Iterator[None]:
    """Print what to do after an interruption, and exit with 128 + the signal's number."""
    try:
        yield
    except Interrupted as interrupt:
        print(f"interrupted. {remedy}", flush=True)
        raise SystemExit(128 + interrupt.signum) from interrupt


@contextmanager
def alone(folder: Path, busy: str, remedy: str) -> Iterator[None]:
    """Work in a sweep's folder, made if needed, that no other process may do at the same time.

    Raises:
        BlockingIOError: another process is at work; ``busy`` is the message.
        SystemExit: the work was interrupted, with ``remedy`` printed; 128 + the signal's number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / ".lock")
    if not lock.acquire():
        raise BlockingIOError(busy)
    try:
        with exit_if_interrupted(remedy):
            yield
    finally:
        lock.release()
