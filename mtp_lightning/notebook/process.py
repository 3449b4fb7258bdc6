"""A program of the platform in a process of its own, its output shown as it comes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence

# What is said of a run while it goes on: each line takes the place of the one before.
_PROGRESS = "step "
# Lines that are kept for an error that is none of the user's.
_KEPT = 30


def start(command: Sequence[str], *, quiet: bool = False) -> None:
    """Run ``python COMMAND`` to its end.

    An interrupt is handed on to the program, which then ends in good order; the rest of what it
    says is shown.

    Args:
        command: what Python is given.
        quiet: show nothing.

    Raises:
        RuntimeError: the program failed; with the sentence that it ended with.
        KeyboardInterrupt: it was interrupted.
    """
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # an interrupt comes from here, and once
    ) as process:
        kept: deque[str] = deque(maxlen=_KEPT)
        interrupted = False
        while True:
            try:
                _show(process, kept, quiet=quiet)
                break
            except KeyboardInterrupt:
                interrupted = True
                process.send_signal(signal.SIGINT)
    if interrupted:
        raise KeyboardInterrupt(kept[-1] if kept else "interrupted")
    if process.returncode:
        raise RuntimeError(_reason(kept))


def _show(process: subprocess.Popen[str], kept: deque[str], *, quiet: bool) -> None:
    assert process.stdout is not None
    on_progress = False
    for line in process.stdout:
        line = line.rstrip("\n")
        kept.append(line)
        if quiet:
            continue
        progress = line.startswith(_PROGRESS)
        if on_progress and not progress:
            print()
        # Longer than any line before it, so that nothing of one is left.
        print(f"\r{line:<100}" if progress else line, end="" if progress else "\n", flush=True)
        on_progress = progress
    if on_progress:
        print()


def _reason(kept: Sequence[str]) -> str:
    """The sentence for the user; of a defect, the end of what was said."""
    for line in reversed(kept):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    return "\n".join(kept)
