"""Ends the work in a sweep's folder in good order at Ctrl-C and similar signals."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtp_lightning.command_line.shell import Stopped
from mtp_lightning.run.lock import Lock


class Interrupted(Stopped):
    """Ctrl-C, or SIGTERM or SIGHUP, which end a sweep in the same way."""

    def __init__(self, signum: int) -> None:
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        super().__init__(name, signum)


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
def continued_by(remedy: str) -> Iterator[None]:
    """Add the remedy to the message of an interruption."""
    try:
        yield
    except Interrupted as interrupt:
        raise Stopped(f"interrupted. {remedy}", interrupt.signum) from interrupt


@contextmanager
def alone(folder: Path, busy: str, remedy: str) -> Iterator[None]:
    """Work in a sweep's folder, made if needed, that no other process may do at the same time.

    Raises:
        BlockingIOError: another process is at work; ``busy`` is the message.
        Stopped: the work was interrupted; the message ends in ``remedy``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / ".lock")
    if not lock.acquire():
        raise BlockingIOError(busy)
    try:
        with continued_by(remedy):
            yield
    finally:
        lock.release()
